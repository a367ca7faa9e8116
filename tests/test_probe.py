"""Probes against cases known beforehand, and against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import PredefinedSplit, cross_val_predict

from jepa.probe import FOLDS, MOST_FEATURES, PENALTIES, fit_probe, probe_features

GROUPS = torch.arange(10).repeat_interleave(40)


def linear_world(noise=0.0):
    """400 embeddings whose columns are linear in them, on scales that differ by a thousand, far from 0."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(400, 6, generator=generator) * 5 + 2
    targets = embeddings.double() @ torch.randn(6, 2, generator=generator).double() * torch.tensor([1.0, 1000.0]) + 1e7
    return embeddings, targets + noise * torch.randn(400, 2, generator=generator) * targets.std(dim=0)


def fit(embeddings, targets, groups=GROUPS, batch=64):
    parts = (value.split(batch) for value in (embeddings, targets, groups))
    return fit_probe(zip(*parts, strict=True), tuple(embeddings.shape[1:]))


def r2(read, true):
    return 1 - (read - true).square().sum(dim=0) / (true - true.mean(dim=0)).square().sum(dim=0)


def test_what_is_linear_is_read_and_shapes_are_kept():
    embeddings, targets = linear_world()
    probe = fit(embeddings[:320], targets[:320], GROUPS[:320])
    assert r2(probe(embeddings[320:]), targets[320:]).min() > 0.9999
    assert torch.allclose(probe(embeddings[:12].reshape(3, 4, 6)).flatten(0, 1), probe(embeddings[:12]), rtol=1e-12)
    assert probe(embeddings[:12]).dtype == torch.float64
    nonsense = fit(embeddings[torch.randperm(320)], targets[:320], GROUPS[:320])
    assert r2(nonsense(embeddings[320:]), targets[320:]).max() < 0.3


@pytest.mark.parametrize("batch", [64, 400])
def test_a_probe_is_the_ridge_of_scikit_learn_at_the_penalty_that_cross_validation_chooses(batch):
    embeddings, targets = linear_world(noise=1.0)
    targets[:, 1] = torch.randn(400, generator=torch.Generator().manual_seed(1))
    probe = fit(embeddings, targets, batch=batch)
    x = ((embeddings - embeddings.mean(0)) / embeddings.std(0, correction=0)).double().numpy()
    for column, penalty in enumerate(probe.penalties):
        y = targets[:, column].numpy()
        errors = {}
        for candidate in PENALTIES:
            samples = 400 * (1 - 1 / FOLDS)
            held_out = cross_val_predict(Ridge(candidate * samples), x, y, cv=PredefinedSplit(GROUPS.numpy() % FOLDS))
            errors[candidate] = np.square(held_out - y).mean()
        assert penalty == min(errors, key=errors.get)
        expected = Ridge(penalty * 400).fit(x, y).predict(x)
        np.testing.assert_allclose(probe(embeddings)[:, column].numpy(), expected, rtol=1e-5, atol=1e-5 * y.std())
    assert probe.penalties[1] > probe.penalties[0]  # what cannot be known is held back more


def test_penalties_are_chosen_by_group():
    """Embeddings that say which group they are from, and a target that is nothing but its group's: not to be known."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(10, 8, generator=generator)[GROUPS] + 0.1 * torch.randn(400, 8, generator=generator)
    target = torch.randn(10, 1, generator=generator)[GROUPS]
    mixed = GROUPS[torch.randperm(400, generator=generator)]
    assert fit(own, target, mixed).penalties[0] < 0.1 < fit(own, target, GROUPS).penalties[0]


def test_columns_and_features_that_do_not_vary_do_no_harm():
    embeddings, targets = linear_world()
    embeddings[:, 2], targets[:, 1] = 3.7, 0.1
    probe = fit(embeddings, targets)
    read = probe(embeddings)
    assert read.isfinite().all()
    assert torch.allclose(read[:, 1], torch.full((400,), 0.1, dtype=torch.float64))


def test_small_grids_are_read_place_by_place_and_large_ones_on_average():
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(400, 2, 3, 4, generator=generator)
    probe = fit(embeddings, embeddings[:, 1, 2, :1] - embeddings[:, 0, 0, :1])
    assert len(probe.weights) == 24
    assert probe.penalties == PENALTIES[:1]
    assert r2(probe(embeddings), embeddings[:, 1, 2, :1] - embeddings[:, 0, 0, :1]) > 0.999
    large = torch.randn(5, 7, MOST_FEATURES // 16, 17, generator=generator)
    assert torch.equal(probe_features(large, large.shape[2:]), large.mean(dim=2))


def test_one_group_is_too_few():
    with pytest.raises(ValueError, match="at least two groups"):
        fit(torch.randn(6, 3), torch.randn(6, 1), torch.zeros(6, dtype=torch.long))
    assert fit(torch.randn(6, 3), torch.randn(6, 1), torch.arange(6) // 3)(torch.randn(2, 3)).isfinite().all()
