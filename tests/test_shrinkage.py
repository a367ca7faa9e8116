"""How far a rollout is trusted, against a search over all weights."""

import itertools

import pytest
import torch

from jepa.baselines import CopyLast, LinearExtrapolation, Shrunk
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from jepa.sampling import expected_future
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
    assert torch.allclose(weights[:3], torch.tensor([0.5, 0.0]), atol=1e-5)
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
    assert weights.sum(dim=1).max() <= 1 + 1e-6
    found = mean_squared_errors(shrink(imagined, last, weights), future)
    for rollout_weight, mean_weight in itertools.product(torch.linspace(0, 1, 21), repeat=2):
        if rollout_weight + mean_weight <= 1:
            other = torch.stack([rollout_weight, mean_weight]).repeat(LONGEST, 1)
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
    assert torch.allclose(fit_shrinkage(future, last, future)[0], torch.tensor([1.0, 0.0]), atol=1e-5)


def test_later_horizons_share_the_last_weights():
    last, future = torch.randn(30, 4), torch.randn(30, 3, 4)
    weights = fit_shrinkage(future + torch.randn(30, 3, 4), last, future)
    assert (weights[3:] == weights[2]).all()
    imagined = torch.randn(30, LONGEST + 5, 4)
    expected = weights[-1, 0] * imagined[:, -1] + (1 - weights[-1].sum()) * last
    assert torch.allclose(shrink(imagined, last, weights)[:, -1], expected, atol=1e-6)


def test_only_what_has_weights_is_shrunk():
    past = torch.randn(5, 3, 4)
    raw = rollout(LinearExtrapolation(), past, 6)
    assert torch.equal(imagine(LinearExtrapolation(), past, 6), raw)
    assert torch.equal(imagine(Shrunk(LinearExtrapolation(), no_shrinkage()), past, 6), raw)
    copying = Shrunk(LinearExtrapolation(), torch.zeros(LONGEST, 2))
    assert torch.equal(imagine(copying, past, 6), rollout(CopyLast(), past, 6))


@pytest.mark.parametrize("latent_dimension", [0, 2])
def test_a_future_at_given_times_is_trusted_as_that_on_the_clock(latent_dimension):
    config = PredictorConfig(context=3, width=8, depth=1, latent_dimension=latent_dimension)
    predictor = Predictor(config, 5, 4.0, "abc", longest_gap=3).eval()
    torch.nn.init.normal_(predictor.members[0].head.weight)
    predictor.shrinkage[:4] = torch.tensor([[0.9, 0.1], [0.7, 0.1], [0.5, 0.1], [0.3, 0.2]])
    past = torch.randn(6, 3, 5)
    on_clock = imagine(predictor, past, 4)
    assert torch.equal(imagine(predictor, past, times_s=torch.tensor([0.25, 0.5, 0.75, 1.0])), on_clock)
    times_s = torch.tensor([0.5, 1.0])
    bare = expected_future(predictor, past, None, times_s)
    expected = shrink(bare, past[:, -1], predictor.shrinkage[[1, 3]])
    assert torch.allclose(imagine(predictor, past, times_s=times_s), expected, atol=1e-6)
