"""Several futures instead of one: drawn from a predictor with a latent, or from a Gaussian around one guess."""

import torch
from einops import rearrange, reduce
from torch import Tensor

from jepa.baselines import Baseline
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.scoring import central_interval, live_features
from jepa.shrinkage import LONGEST, of_horizons, shrink

EXPECTED_OF = 16
"""Rollouts whose mean is the expected future."""
CALIBRATED_ON = 32
"""Samples by which their spread is judged: of few, the mean is uncertain itself."""
SPREADS = [0.5 + 0.05 * step for step in range(31)]
"""Factors by which samples may be stretched."""
SHARES = (0.5, 0.9)
"""Of central intervals: samples are spread, and judged, by whether these hold what they promise."""


@torch.no_grad()
def draw(
    predictor: Predictor,
    past: Tensor,
    horizon: int | None,
    n: int,
    generator: torch.Generator,
    times_s: Tensor | None = None,
) -> Tensor:
    """`n` rollouts of each past, each with a latent of its own: (B, T, D) -> (n, B, horizon, D).

    On the clock, or at (horizon,) `times_s`.

    Raises:
        ValueError: the predictor has no latent, so all its futures would be one; or as for `rollout`.
    """
    if not predictor.config.latent_dimension:
        raise ValueError("this predictor knows one future only: train one with --predictor.latent-dimension 16")
    steps = horizon if times_s is None else len(times_s)
    latents = draw_latents((n * len(past), steps or 0, predictor.config.latent_dimension), generator).to(past)
    return rollout(predictor, past.repeat(n, 1, 1), horizon, times_s, latents).unflatten(0, (n, len(past)))


def draw_latents(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Standard normal (B, horizon, Z), on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


@torch.no_grad()
def sample(predictor: Predictor, past: Tensor, horizon: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` futures of each past, as sure of themselves as validation advised: (B, T, D) -> (n, B, horizon, D).

    Their mean is drawn towards copying and the mean of all embeddings, as that of any rollout; how far they lie apart
    is stretched by the predictor's `sample_spread`; both for each horizon.

    Raises:
        ValueError: see `draw`.
    """
    drawn = draw(predictor, past, horizon, max(n, EXPECTED_OF), generator)
    centre = drawn.mean(dim=0)
    spread = of_horizons(predictor.sample_spread, horizon)[:, None]
    return shrink(centre, past[:, -1], predictor.shrinkage) + spread * (drawn[:n] - centre)


@torch.no_grad()
def expected_future(
    predictor: Predictor | Baseline, past: Tensor, horizon: int | None, times_s: Tensor | None = None
) -> Tensor:
    """The point forecast, (B, T, D) -> (B, horizon, D): the mean of `EXPECTED_OF` rollouts where there are several.

    On the clock, or at (horizon,) `times_s`. The same numbers at each call: the latents are drawn from a fixed seed.
    """
    if not isinstance(predictor, Predictor) or not predictor.config.latent_dimension:
        return rollout(predictor, past, horizon, times_s)
    generator = torch.Generator(past.device).manual_seed(0)
    return draw(predictor, past, horizon, EXPECTED_OF, generator, times_s).mean(dim=0)


@torch.no_grad()
def calibrate_samples(predictor: Predictor, past: Tensor, future: Tensor) -> None:
    """How far samples have to lie apart for their central intervals to hold what they should, into the predictor.

    For each horizon the spread for which the coverage of the central 50 % and 90 % is least off, taken together.

    Args:
        predictor: with a latent, its shrinkage fitted; changed in place.
        past: (N, T, D), standardised, of clips that it was not trained on.
        future: (N, horizon, D), what came.
    """
    predictor.sample_spread.fill_(1.0)
    drawn = sample(predictor, past, future.shape[1], CALIBRATED_ON, torch.Generator(past.device).manual_seed(0))
    centre = drawn.mean(dim=0)
    error = future - centre
    live = live_features(future)
    off = torch.zeros(len(SPREADS), future.shape[1], device=past.device)
    for share in SHARES:
        low, high = central_interval(drawn - centre, share)
        for number, spread in enumerate(SPREADS):
            inside = (error >= spread * low) & (error <= spread * high)
            off[number] += (reduce(inside[..., live].float(), "n horizon d -> horizon", "mean") - share).abs()
    best = torch.tensor(SPREADS)[off.argmin(dim=0).cpu()]  # (horizon,)
    predictor.sample_spread[: len(best)] = best[:LONGEST]
    predictor.sample_spread[len(best) :] = best[-1]


class GaussianFutures:
    """The plain guess that sampled futures have to beat: Gaussian noise around one future, as wide as its errors were.

    Args:
        imagined: (N, horizon, D), point forecasts on validation clips.
        future: (N, horizon, D), what came.
    """

    def __init__(self, imagined: Tensor, future: Tensor) -> None:
        errors = rearrange((future - imagined).double(), "n h d -> h n d")
        covariance = errors.mT @ errors / errors.shape[1]  # about 0: a bias is spread too
        values, vectors = torch.linalg.eigh(covariance)
        self.roots = (vectors * values.clamp_min(0).sqrt()[:, None]).to(imagined)  # (horizon, D, D)

    def sample(self, imagined: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Point forecasts (B, horizon, D) -> (n, B, horizon, D)."""
        shape = (n, *imagined.shape)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(imagined)
        return imagined + torch.einsum("h d k, n b h k -> n b h d", self.roots, noise)
