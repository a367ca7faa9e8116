"""How far a rollout is trusted, against a search over all weights."""

import itertools

import pytest
import torch

from jepa.baselines import CopyLast, LinearExtrapolation, Shrunk
from jepa.rollout import rollout
from jepa.shrinkage import LONGEST, fit_shrinkage, no_shrinkage, shrink
from jepa.skill import imagine


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def mean_squared_errors(imagined: torch.Tensor, future: torch.Tensor) -> torch.Tensor:
    return (imagined - future).square().mean(dim=(0, 2))


def test_a_rollout_that_goes_twice_too_far_is_halved():
    last, future = torch.randn(50, 4), torch.randn(50, 3, 4)
    weights = fit_shrinkage(last[:, None] + 2 * (future - last[:, None]), last, future)
    assert torch.allclose(weights[:3, 0, :2], torch.tensor([0.5, 0.0]), atol=1e-5)
    assert torch.allclose(shrink(last[:, None] + 2 * (future - last[:, None]), last, weights), future, atol=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_weights_are_better(seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(4, 40, 2, 3, generator=generator)
    last = draw[0, :, 0]
    # Futures that return to the mean, follow the rollout, stay, or go against it.
    mix = torch.rand(3, generator=generator) * torch.tensor([2.0, 1.0, 2.0]) - torch.tensor([0.7, 0.3, 0.5])
    imagined = draw[1]
    future = mix[0] * imagined + mix[1] * last[:, None] + mix[2] * draw[2]
    weights = fit_shrinkage(imagined, last, future)
    assert weights.min() >= 0
    assert weights[..., :2].sum(dim=2).max() <= 1 + 1e-6
    found = mean_squared_errors(shrink(imagined, last, weights), future)
    for rollout_weight, mean_weight in itertools.product(torch.linspace(0, 1, 21), repeat=2):
        if rollout_weight + mean_weight <= 1:
            other = torch.tensor([rollout_weight, mean_weight, torch.inf]).repeat(LONGEST, 1, 1)
            assert (found <= mean_squared_errors(shrink(imagined, last, other), future) + 1e-6).all()


def test_another_mean_is_another_origin():
    last, future, shift = torch.randn(40, 4), torch.randn(40, 3, 4), torch.randn(4)
    imagined = 0.4 * future + 0.5 * torch.randn(40, 3, 4)
    weights = fit_shrinkage(imagined, last, future)
    moved = (imagined + shift, last + shift, future + shift)
    mean = shift.expand(40, 4)
    assert torch.allclose(fit_shrinkage(*moved, mean), weights, atol=1e-4)
    assert not torch.allclose(fit_shrinkage(*moved), weights, atol=1e-2)
    expected = shrink(imagined, last, weights) + shift
    assert torch.allclose(shrink(*moved[:2], weights, mean), expected, atol=1e-5)


def test_what_copies_anyway_and_what_is_always_right():
    last, future = torch.randn(20, 4), torch.randn(20, 2, 4)
    copied = last[:, None].expand(-1, 2, -1)
    found = mean_squared_errors(shrink(copied, last, fit_shrinkage(copied, last, future)), future)
    assert (found <= mean_squared_errors(copied, future)).all()
    assert torch.allclose(fit_shrinkage(future, last, future)[0, 0, :2], torch.tensor([1.0, 0.0]), atol=1e-5)


def test_later_horizons_share_the_last_weights():
    last, future = torch.randn(30, 4), torch.randn(30, 3, 4)
    weights = fit_shrinkage(future + torch.randn(30, 3, 4), last, future)
    assert (weights[3:] == weights[2]).all()
    imagined = torch.randn(30, LONGEST + 5, 4)
    on_rollout, on_mean, _ = weights[-1, 0]
    expected = on_rollout * imagined[:, -1] + (1 - on_rollout - on_mean) * last
    assert torch.allclose(shrink(imagined, last, weights)[:, -1], expected, atol=1e-6)


def test_long_and_short_rollouts_are_trusted_apart():
    """Short ones are right, long ones go in no direction that anything goes: found apart, and so treated."""
    last, step = torch.randn(60, 4), torch.randn(60, 2, 4)
    imagined = last[:, None] + torch.cat([0.1 * step[:30], 10 * step[30:]])
    future = torch.cat([imagined[:30], last[30:, None] + torch.randn(30, 2, 4)])
    together, apart = (fit_shrinkage(imagined, last, future, classes=classes) for classes in (1, 2))
    assert apart.shape == (LONGEST, 2, 3)
    assert torch.allclose(apart[:2, 0, :2], torch.tensor([1.0, 0.0]), atol=1e-5)
    assert apart[:, 1, 0].max() < 0.1
    assert (apart[:, 1, 2] == torch.inf).all()
    errors = [(shrink(imagined, last, weights) - future)[:30].square().max() for weights in (apart, together)]
    assert errors[0] < 1e-6 < errors[1]
    # A class is chosen by the length alone, whatever else is in the batch.
    assert torch.equal(shrink(imagined[:1], last[:1], apart), shrink(imagined, last, apart)[:1])


def test_only_what_has_weights_is_shrunk():
    past = torch.randn(5, 3, 4)
    raw = rollout(LinearExtrapolation(), past, 6)
    assert torch.equal(imagine(LinearExtrapolation(), past, 6), raw)
    assert torch.equal(imagine(Shrunk(LinearExtrapolation(), no_shrinkage()), past, 6), raw)
    copying = Shrunk(LinearExtrapolation(), torch.zeros(LONGEST, 1, 3))
    assert torch.equal(imagine(copying, past, 6), rollout(CopyLast(), past, 6))
