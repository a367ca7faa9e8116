"""Simple scores beside the model's energy: each is what it says, and of a grid at the most surprising places."""

import numpy as np
import pytest
import torch

from jepa.metrics import roc_auc
from jepa.rivals import Rivals

CONTEXT, AHEAD = 3, (1, 2)
ALL = ("copying", "mahalanobis", "nearest", "difference")


def walks(count, shape=(4,), seed=0):
    """Random walks whose features have scales of their own, (count, 6, *shape)."""
    steps = torch.randn(count, 6, *shape, generator=torch.Generator().manual_seed(seed))
    return (steps * torch.linspace(0.5, 2, shape[-1])).cumsum(dim=1)


def make(names=ALL, shape=(4,), ignored=None):
    return Rivals(names, walks(500, shape), context=CONTEXT, ahead=AHEAD, ignored=ignored)


def test_ordinary_copying_and_places_have_an_energy_of_one():
    found = make()(walks(2000, seed=1))
    assert float(found["copying"].mean()) == pytest.approx(1, abs=0.1)
    assert float(found["mahalanobis"].mean()) == pytest.approx(1.1, abs=0.2)  # a tick later it has walked farther


def test_the_nearest_is_found_exactly_and_a_known_moment_is_at_none():
    rivals, windows = make(("nearest",)), walks(30, seed=2)
    came = windows[:, [CONTEXT, CONTEXT + 1]]
    expected = torch.cdist(came, rivals.known).square().amin(dim=2).mean(dim=1) / 4
    torch.testing.assert_close(rivals(windows)["nearest"], expected, atol=1e-4, rtol=1e-4)
    assert float(rivals(walks(500))["nearest"].min()) < float(expected.min())


def test_what_jumps_is_seen_by_what_looks_at_time_and_what_is_strange_by_the_others():
    ordinary, jump, strange = walks(3, seed=3).unsqueeze(1)
    jump[:, CONTEXT:] = ordinary[:, CONTEXT - 1 : CONTEXT] + 6
    strange[:] = strange + 40  # all the time
    found = {name: torch.cat([make()(one)[name] for one in (ordinary, jump, strange)]) for name in ALL}
    for name in ("copying", "difference"):
        assert found[name][1] > 3 * found[name][0]
        torch.testing.assert_close(found[name][2], make()(strange - 40)[name][0], rtol=1e-3, atol=1e-3)
    for name in ("mahalanobis", "nearest"):
        assert found[name][2] > 10 * found[name][0]


def test_of_a_grid_one_place_is_enough_and_ignored_ones_are_none():
    windows = walks(1, (6, 6, 4), seed=4)
    loud = windows.clone()
    loud[:, CONTEXT:, 1, 4] += 30
    ignored = torch.zeros(6, 6, dtype=torch.bool)
    ignored[1, 4] = True
    names = ("copying", "mahalanobis", "nearest")
    for name in names:
        found, unseen = (make(names, (6, 6, 4), which)(loud)[name] for which in (None, ignored))
        assert float(found) > 3 * float(unseen)


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    truth = np.array([False, True, False, True, True])
    assert roc_auc(np.array([0.0, 1, 2, 3, 2]), truth) == pytest.approx((1 + 2 + 1.5) / 6)
    assert np.isnan(roc_auc(np.arange(5.0), np.zeros(5, bool)))
