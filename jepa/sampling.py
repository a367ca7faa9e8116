"""Several futures instead of one: drawn from a predictor with a latent, or from a Gaussian around one guess."""

import torch
from einops import rearrange
from torch import Tensor

from jepa.baselines import Baseline
from jepa.predictor import Predictor
from jepa.rollout import rollout


@torch.no_grad()
def sample(predictor: Predictor, past: Tensor, horizon: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw `n` futures of each past: (B, T, D) -> (n, B, horizon, D).

    Raises:
        ValueError: the predictor has no latent, so all its futures would be one; or as for `rollout`.
    """
    if not predictor.config.latent_dimension:
        raise ValueError("this predictor knows one future only: train one with --predictor.latent-dimension 16")
    drawn = rollout(predictor, past.repeat(n, 1, 1), horizon, generator=generator)
    return drawn.unflatten(0, (n, len(past)))


@torch.no_grad()
def expected_future(predictor: Predictor | Baseline, past: Tensor, horizon: int, n: int = 16) -> Tensor:
    """The point forecast, (B, T, D) -> (B, horizon, D): the mean of `n` futures where there are several.

    The same numbers at each call: the latent of the samples is drawn from a fixed seed.
    """
    if not isinstance(predictor, Predictor) or not predictor.config.latent_dimension:
        return rollout(predictor, past, horizon)
    return sample(predictor, past, horizon, n, torch.Generator(past.device).manual_seed(0)).mean(dim=0)


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
