r"""Infilling: embeddings that are missing in the middle of a clip, predicted from those on both sides.

  python examples/infilling.py --train-cache cache/train --validation-cache cache/val --test-cache cache/test

A bidirectional transformer on embeddings of which some are masked (Devlin et al. 2019, arXiv:1810.04805), in windows
with one gap in the middle. The guess that it has to beat is a straight line across the gap, and that is where it
starts from: to the line it adds sigma * f, where sigma is the line's usual error in gaps of that length and the head of
f is zero at first. What it adds is trusted, for each length, as far as validation clips advise. Its rival is ridge
regression on the nearest embeddings on both sides, chosen and trusted by the same clips.

Leaves `infiller/`, and what it is worth on test clips on the screen and in `infilling.json`. Ctrl-C saves; the same
command with --resume goes on.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from jepa.diagnostics import floor_std
from pipelines.run.command import run_command
from pipelines.run.files import summary, write_json
from pipelines.run.models import require_no_video_in_both
from pipelines.run.options import OptimizerOptions, RunOptions
from pipelines.run.run import Run, step_generator

NEAREST = 4
"""Visible embeddings on each side of a gap that each place in it is shown."""
MEASURED, HELD_OUT = 8192, 512
"""Most windows of training clips that statistics and ridge regression are taken from, and of validation clips."""
PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""On the squared weights of ridge regression, per sample."""
CHOSEN_BY = "validation_relative_to_line"


@dataclass(frozen=True)
class InfillerConfig(Bounded):
    """The infiller."""

    longest_gap: PositiveInt = 9
    """Longest run of embeddings that it learns to fill in."""
    context: PositiveInt = 8
    """Embeddings that it sees on each side of the longest gap."""
    width: PositiveInt = 128
    """Width of the hidden layers."""
    depth: PositiveInt = 2
    """Layers."""
    heads: PositiveInt = 8
    """Attention heads; they must divide the width."""

    @property
    def window(self) -> int:
        """Embeddings in the longest gap and its context together."""
        return self.longest_gap + 2 * self.context


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train an infiller on cached embeddings, and judge it against a straight line."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos, to choose the best model by."""
    test_cache: Path = Path("cache/test")
    """Embeddings of videos that are used for neither, to judge it on."""
    output_dir: Path = Path("runs/infiller")
    """Where the infiller, the results and the logs are left."""
    steps: PositiveInt = 1500
    """Optimiser steps."""
    batch_size: PositiveInt = 64
    """Windows in a batch, on each process."""
    infiller: InfillerConfig = field(default_factory=InfillerConfig)
    optimizer: OptimizerOptions = field(default_factory=lambda: OptimizerOptions(weight_decay=1e-2))


def main(options: Options) -> None:
    """Measure the line's errors, train, keep the best on validation clips, judge it on test clips."""
    run = Run(options, "infilling", ("infiller", "infilling.json"))
    caches = [EmbeddingCache(path) for path in (options.train_cache, options.validation_cache, options.test_cache)]
    for number, other in enumerate(caches[1:], start=1):
        other.require_same_space(caches[0].provenance.encoder_fingerprint, caches[0].provenance.fps, "the first cache")
        for one in caches[:number]:
            require_no_video_in_both(one, other)
    train, validation, test = (Windows(cache, options.infiller.window) for cache in caches)
    infiller = Infiller(options.infiller, caches[0].shape[-1])
    measured, held_out = train.take(train.evenly(MEASURED)), validation.take(validation.evenly(HELD_OUT))
    infiller.measure(measured)
    run.begin({"clips": summary([clip.key for cache in caches for clip in cache.clips])}, f"{len(train):,} windows")
    fill = run.prepare(infiller, options.optimizer, clip_norm=1.0)
    best = run.keep_best(infiller, CHOSEN_BY)

    for _, batch in run.steps(lambda place: draw_batches(train, options, rank=run.rank, place=place)):
        hidden, sigma = infiller.hidden(batch.length), infiller.sigma[batch.length - 1, None] * infiller.std
        error = ((fill(batch.windows, batch.length) - batch.windows) / sigma).square().mean(dim=2)  # (B, window)
        run.update(((error * hidden).sum(dim=1) / batch.length).mean(), {}, batch.videos)
        if run.due:
            run.log(infiller.fit_trust(held_out.to(run.device)), show=("loss", CHOSEN_BY))

    artefacts: dict[str, tuple[str, Any, nn.Module]] = {}
    if run.is_main:
        best.restore()
        results = evaluate(infiller.cpu().eval(), measured, held_out, test.take(test.evenly(MEASURED)))
        write_json(options.output_dir / "infilling.json", results)
        print(table(results))
        config = {**asdict(options.infiller), "dimension": caches[0].shape[-1]}
        artefacts = {"infiller": ("infiller", config, infiller)}
    run.finish({}, artefacts)


class Batch(NamedTuple):
    """What a step learns from."""

    windows: Tensor
    """float32 (B, window, D), as cached."""
    length: Tensor
    """int (B,): of the gap in each."""
    videos: tuple[Path, ...]
    """Videos that the windows are from."""
    place: dict[str, int]
    """Where the next batch begins."""


def draw_batches(windows: Windows, options: Options, *, rank: int, place: dict[str, int]) -> Iterator[Batch]:
    """Endless windows with gaps of all lengths; each batch is a function of seed, step and rank."""
    for step in count(place.get("step", 0)):
        generator = step_generator(options.seed, step, rank, torch.device("cpu"))
        chosen = windows.sample(options.batch_size, generator)
        length = torch.randint(1, options.infiller.longest_gap + 1, (options.batch_size,), generator=generator)
        yield Batch(windows.take(chosen), length, windows.videos(chosen), {"step": step + 1})


class Infiller(nn.Module):
    """Windows with a gap in the middle -> the same with the gap filled in.

    Each place is told where it stands, by a learned token for each length of the gap; the line across; and the nearest
    visible embeddings on both sides relative to that line, each with a learned weight. These also lead straight to the
    head: most of the answer is linear in them. What stands in the gap has no influence, not even if it is NaN.
    """

    mean: Tensor
    std: Tensor
    sigma: Tensor
    trust: Tensor

    def __init__(self, config: InfillerConfig, dimension: int) -> None:
        super().__init__()
        self.config, views = config, 2 * NEAREST + 1
        self.emphasis = nn.Parameter(torch.zeros(config.longest_gap, config.window, views))
        self.tokens = nn.Parameter(0.02 * torch.randn(config.longest_gap, config.window, config.width))
        self.embed = nn.Linear(views * dimension, config.width)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, nn.LayerNorm(config.width), enable_nested_tensor=False)
        self.head = nn.Linear(config.width + views * dimension, dimension)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.register_buffer("mean", torch.zeros(dimension))
        self.register_buffer("std", torch.ones(dimension))
        self.register_buffer("sigma", torch.ones(config.longest_gap, dimension))
        self.register_buffer("trust", torch.ones(config.longest_gap))

    def forward(self, windows: Tensor, length: Tensor) -> Tensor:
        """Raw embeddings (B, window, D) and the length of each gap, int (B,) -> (B, window, D)."""
        line, before, after = draw_line((windows - self.mean) / self.std, length)
        away, sigma = torch.arange(NEAREST, device=line.device), self.sigma[length - 1, None]  # (B, 1, D)
        seen = torch.cat([before[..., None] - away, after[..., None] + away], dim=-1).clamp(0, line.shape[1] - 1)
        nearest = torch.take_along_dim(line, rearrange(seen, "b t k -> b (t k) 1"), dim=1)
        nearest = rearrange(nearest, "b (t k) d -> b t k d", t=line.shape[1]) - line[:, :, None]
        views = torch.cat([line[:, :, None], nearest / self.sigma.mean(dim=0)], dim=2)  # (B, window, views, D)
        views = rearrange((1 + self.emphasis[length - 1][..., None]) * views, "b t k d -> b t (k d)")
        states = self.layers(self.embed(views) + self.tokens[length - 1])
        added = self.trust[length - 1, None, None] * sigma * self.head(torch.cat([states, views], dim=-1))
        return (line + added * self.hidden(length)[..., None]) * self.std + self.mean

    def hidden(self, length: Tensor) -> Tensor:
        """Whether each place lies in the gap, int (B,) -> bool (B, window)."""
        start, end = gap_ends(length, self.config.window)
        at = torch.arange(self.config.window, device=length.device)
        return (at >= start) & (at < end)

    def measure(self, windows: Tensor) -> None:
        """Mean and standard deviation of training windows (N, window, D), and the usual errors of the line."""
        self.mean.copy_(windows.double().mean(dim=(0, 1)))
        self.std.copy_(floor_std(windows.double().std(dim=(0, 1))))
        standardised = (windows - self.mean) / self.std
        for length in torch.arange(1, self.config.longest_gap + 1):
            error = draw_line(standardised, length.expand(len(windows)))[0] - standardised
            self.sigma[length - 1] = floor_std(error[:, self.hidden(length[None])[0]].square().mean(dim=(0, 1)).sqrt())

    @torch.no_grad()
    def fit_trust(self, windows: Tensor) -> dict[str, float]:
        """How far to trust what is added, from 0 to 1, for each length; and the error that is left, of the line's."""
        self.eval()
        self.trust.fill_(1.0)
        relative = []
        for length in range(1, self.config.longest_gap + 1):
            added, missing = (part.flatten() for part in self.beside_line(windows, length))
            trust = least_squares_share(added, missing)
            self.trust[length - 1] = trust
            relative.append(float((trust * added - missing).square().mean() / missing.square().mean().clamp_min(1e-12)))
        self.train()
        return {CHOSEN_BY: float(np.mean(relative))} | {f"{CHOSEN_BY}_gap_{i}": x for i, x in enumerate(relative, 1)}

    def beside_line(self, windows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """What is added to the line in the gap, and what was missing there; standardised (N, length, D) twice."""
        lengths = torch.full((len(windows),), length, device=windows.device)
        gap, true = self.hidden(lengths[:1])[0], (windows - self.mean) / self.std
        parts = zip(windows.split(512), lengths.split(512), strict=True)
        filled = (torch.cat([self(*part) for part in parts]) - self.mean) / self.std
        line, _, _ = draw_line(true, lengths)
        return (filled - line)[:, gap], (true - line)[:, gap]


def gap_ends(length: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """First place of the gap in the middle of a window, and the first after it; int (B,) -> int (B, 1) twice."""
    start = (window - length[:, None]) // 2
    return start, start + length[:, None]


def draw_line(windows: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A straight line across the gap, (B, window, D); and the nearest visible places up to and from each place."""
    start, end = gap_ends(length, windows.shape[1])
    at = torch.arange(windows.shape[1], device=windows.device)
    hidden = (at >= start) & (at < end)
    before, after = torch.where(hidden, start - 1, at), torch.where(hidden, end, at)  # (B, window)
    first, last = (torch.take_along_dim(windows, place[..., None], dim=1) for place in (before, after))
    share = (at - before) / (after - before).clamp_min(1)
    return torch.lerp(first, last, share[..., None].to(windows.dtype)), before, after


def least_squares_share(added: Tensor, missing: Tensor) -> Tensor:
    """The share, from 0 to 1, of what is added that comes nearest to what is missing; a scalar."""
    return ((added * missing).sum() / added.square().sum().clamp_min(1e-12)).clamp(0, 1)


@torch.no_grad()
def evaluate(infiller: Infiller, train: Tensor, held_out: Tensor, test: Tensor) -> dict[str, list[float]]:
    """Error in the middle of the gap relative to the line's, for each guess and length of the gap.

    Args:
        infiller: on the CPU.
        train: raw training windows, (M, window, D), for ridge regression.
        held_out: likewise of validation clips, to choose it by.
        test: likewise of test clips; all lengths are judged on the same ones.
    """
    found: dict[str, list[float]] = {"model": [], "ridge": [], "copy_last": []}
    for length in range(1, infiller.config.longest_gap + 1):
        added, missing = infiller.beside_line(test, length)
        first = int(infiller.hidden(torch.tensor([length]))[0].nonzero()[0])
        copied = (test[:, first - 1, None] - test[:, first : first + length]) / infiller.std + missing
        ridged = ridge_beside_line(infiller, train, held_out, length=length)(test)
        for name, guess in {"model": added, "ridge": ridged, "copy_last": copied}.items():
            error, of_line = ((part[:, length // 2]).square().mean() for part in (guess - missing, missing))
            found[name].append(float(error / of_line))
    return found


def ridge_beside_line(
    infiller: Infiller, train: Tensor, held_out: Tensor, *, length: int
) -> Callable[[Tensor], Tensor]:
    """Ridge regression from the nearest embeddings on both sides of a gap: windows -> what it adds to the line."""
    gap = infiller.hidden(torch.tensor([length]))[0]
    first, places = int(gap.nonzero()[0]), torch.arange(len(gap))
    seen = ~gap & (places >= first - NEAREST) & (places < first + length + NEAREST)

    def inputs(windows: Tensor) -> np.ndarray:
        return ((windows - infiller.mean) / infiller.std)[:, seen].flatten(1).double().numpy()

    missing, held_missing = (infiller.beside_line(windows, length)[1].flatten(1) for windows in (train, held_out))
    fitted = [Ridge(penalty * len(train)).fit(inputs(train), missing.double().numpy()) for penalty in PENALTIES]
    guesses = [torch.from_numpy(ridge.predict(inputs(held_out))).float() for ridge in fitted]
    best = int(torch.stack([(guess - held_missing).square().mean() for guess in guesses]).argmin())
    share = least_squares_share(guesses[best], held_missing)
    return lambda windows: (
        share * rearrange(torch.from_numpy(fitted[best].predict(inputs(windows))).float(), "n (t d) -> n t d", t=length)
    )


def table(results: dict[str, list[float]]) -> str:
    """The results on one screen."""
    lines = ["error in the middle of a gap, relative to a straight line's"]
    lines.append(f"{'gap':12}" + "".join(f"{gap:>8}" for gap in range(1, len(results["model"]) + 1)))
    lines += [f"{name:12}" + "".join(f"{error:8.3f}" for error in errors) for name, errors in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main, Options)
