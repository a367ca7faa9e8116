"""The objectives against independent implementations of the published formulas, in NumPy and float64.

That many ranks compute the same is in test_ranks.py.
"""

import math

import numpy as np
import pytest
import torch

from jepa.objectives import EPSILON, MARGIN, SIGReg, VICReg

OBJECTIVES = [
    VICReg(),
    VICReg(variance_weight=1.0, invariance_weight=2.0, covariance_weight=3.0),
    SIGReg(),
    SIGReg(share=0.3, slices=7),
]
KINDS = [VICReg, SIGReg]
SHAPES = [(2, 1), (2, 9), (12, 5), (5, 12), (8, 8)]
"""Samples and features."""


def reference_vicreg(first, second, config):
    """The authors' published code, written out feature by feature."""
    samples, features = first.shape
    invariance = sum((a - b) ** 2 for a, b in zip(first.ravel(), second.ravel(), strict=True)) / (samples * features)
    variance = covariance = 0.0
    for view in (first, second):
        centred = view - view.mean(axis=0)
        for j in range(features):
            std = math.sqrt((centred[:, j] ** 2).sum() / (samples - 1) + EPSILON)
            variance += max(0.0, MARGIN - std) / features / 2
            for k in range(features):
                if j != k:
                    covariance += ((centred[:, j] * centred[:, k]).sum() / (samples - 1)) ** 2 / features
    return {
        "variance": (config.variance_weight, variance),
        "invariance": (config.invariance_weight, invariance),
        "covariance": (config.covariance_weight, covariance),
    }


def reference_sigreg(first, second, config):
    """LeJEPA: the integral over t of |characteristic function - Gaussian's|^2 exp(-t^2 / 2), by hand, from -3 to 3."""
    samples, features = first.shape
    directions = torch.randn(features, config.slices, generator=generator()).double().numpy()
    statistics = []
    for view in (first, second):
        for direction in directions.T:
            projected = view @ direction / np.sqrt((direction**2).sum())
            knots = np.linspace(-3, 3, 33)
            characteristic = np.exp(1j * np.outer(knots, projected)).mean(axis=1)
            difference = np.abs(characteristic - np.exp(-(knots**2) / 2)) ** 2 * np.exp(-(knots**2) / 2)
            statistics.append(samples * np.trapezoid(difference, knots))
    mean = (first + second) / 2
    invariance = (((first - mean) ** 2).mean() + ((second - mean) ** 2).mean()) / 2
    return {
        "sigreg": (config.share, np.mean(statistics)),
        "invariance": (1 - config.share, invariance),
    }


REFERENCES = {"vicreg": reference_vicreg, "sigreg": reference_sigreg}


def reference_loss(first, second, config):
    return sum(weight * term for weight, term in REFERENCES[config.kind](first, second, config).values())


def generator():
    return torch.Generator().manual_seed(5)


def make_views(samples, features, seed=0):
    numbers = np.random.default_rng([seed, samples, features])
    first = numbers.normal(size=(samples, features)) * numbers.uniform(0.3, 2, size=features) + 0.5
    return first, first + 0.3 * numbers.normal(size=(samples, features))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_reference(objective, shape):
    first, second = make_views(*shape)
    ours = objective(torch.from_numpy(first), torch.from_numpy(second), generator=generator())
    theirs = REFERENCES[objective.kind](first, second, objective)
    assert ours.unweighted.keys() == ours.weighted.keys() == theirs.keys()
    for name, (weight, term) in theirs.items():
        assert ours.unweighted[name].item() == pytest.approx(term, rel=1e-10, abs=1e-12)
        assert ours.weighted[name].item() == pytest.approx(weight * term, rel=1e-10, abs=1e-12)
    assert ours.loss.item() == pytest.approx(reference_loss(first, second, objective), rel=1e-10)
    assert ours.loss.dtype == torch.float64


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_equal_those_of_the_reference(objective, shape):
    views = make_views(*shape, seed=1)
    leaves = [torch.from_numpy(view).clone().requires_grad_() for view in views]
    objective(*leaves, generator=generator()).loss.backward()
    for v, i, j in [(0, 0, 0), (0, 3, 1), (1, 2, 3), (1, 1, 0)]:
        losses = []
        for step in (1e-6, -1e-6):
            moved = [view.copy() for view in views]
            moved[v][i, j] += step
            losses.append(reference_loss(*moved, objective))
        assert leaves[v].grad[i, j].item() == pytest.approx((losses[0] - losses[1]) / 2e-6, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("shape", [(64, 8), (8, 64)])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_views_are_measured_in_float32(objective, shape):
    first, second = (torch.from_numpy(view).bfloat16() for view in make_views(*shape))
    terms = objective(first, second, generator=generator())
    exact = objective(first.double(), second.double(), generator=generator()).loss.item()
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(exact, rel=2e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = objective(first.float(), second.float(), generator=generator())
    assert under_autocast.loss.dtype == torch.float32
    assert under_autocast.loss.item() == pytest.approx(exact, rel=2e-6)


def test_covariance_of_decorrelated_features_far_from_zero_does_not_cancel():
    # Nearly orthogonal features around a mean of a thousand: the squared off-diagonals are a millionth of all squares.
    numbers = np.random.default_rng(0)
    orthogonal = np.linalg.qr(np.c_[np.ones(64), numbers.normal(size=(64, 32))])[0][:, 1:] * 8
    first = (orthogonal + 1e-3 * numbers.normal(size=(64, 32)) + 1000).astype(np.float32)
    ours = VICReg()(torch.from_numpy(first), torch.from_numpy(first), generator=generator())
    theirs = reference_vicreg(first.astype(float), first.astype(float), VICReg())
    assert ours.unweighted["covariance"].item() == pytest.approx(theirs["covariance"][1], rel=1e-2)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (3, 2, 5, 64)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_of_every_frame_is_a_sample(kind, shape):
    views = torch.randn(2, *shape, dtype=torch.float64, generator=generator())
    tokens, samples = views.clone().requires_grad_(), views.flatten(1, -2).requires_grad_()
    ours = kind()(*tokens, generator=generator())
    theirs = kind()(*samples, generator=generator())
    assert ours.loss == theirs.loss
    ours.loss.backward()
    theirs.loss.backward()
    assert torch.equal(tokens.grad.flatten(1, -2), samples.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_shapes_are_refused(kind):
    for first, second in [((4, 3), (4, 2)), ((4, 3), (5, 3)), ((4,), (4,)), ((4, 3, 1), (4, 3))]:
        with pytest.raises(ValueError, match="must be"):
            kind()(torch.randn(first), torch.randn(second), generator=generator())
    for samples in (0, 1):
        with pytest.raises(ValueError, match=f"batch of {samples} "):
            kind()(torch.randn(samples, 3), torch.randn(samples, 3), generator=generator())
