r"""Train a decoder from cached embeddings to small pictures, for looking only.

  video-jepa train-decoder --train-cache cache/train --validation-cache cache/val --output-dir runs/decoder

It shows what embeddings hold, and what they have forgotten; `video-jepa imagine` shows forecasts through it. Encoder
and predictor learn nothing from it. The videos must still be where they were. Leaves `decoder/`, `metrics.json`,
`curve.jsonl` and tracker logs. Ctrl-C saves; the same command with --resume goes on.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.cache import EmbeddingCache
from data.frames import fitting_size, read_frames
from jepa.config import PositiveInt, Side
from jepa.diagnostics import floor_std
from jepa.picture_decoder import PictureDecoder
from pipelines.run.caches import learned_from, require_finite
from pipelines.run.command import run_command
from pipelines.run.run import Run
from pipelines.run.training import OptimizerOptions, RunOptions

CHOSEN_BY = "validation_error"
"""Metric by which the best weights are chosen: squared error, in units of that of the mean picture."""
HELD_OUT_FRAMES, MOST_NUMBERS = 1000, 256_000_000
"""Frames of a validation, and numbers in the embeddings that are held in memory, at most."""


@dataclass(frozen=True)
class Options(RunOptions):
    """Train a decoder from cached embeddings to small pictures."""

    train_cache: Path = Path("cache/train")
    """Embeddings to train on, and their videos."""
    validation_cache: Path = Path("cache/val")
    """Embeddings of other videos, to choose the best weights by."""
    output_dir: Path = Path("runs/decoder")
    """Where the decoder, its metrics and its logs are left."""
    steps: PositiveInt = 1000
    """Optimiser steps."""
    batch_size: PositiveInt = 64
    """Pictures in a batch, on each process."""
    longest_side: Side = 64
    """Longer side of the pictures in pixels; the other follows the shape of the first video."""
    frames: PositiveInt = 20_000
    """Frames that are learned from at most, evenly over the cache; they are held in memory."""
    width: PositiveInt = 128
    """Channels of the decoder's coarsest layer."""
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)


def main(options: Options) -> None:
    """Read frames again, train the decoder on them, save the best on validation frames."""
    run = Run(options, "train_decoder", ("decoder",))
    train, validation = EmbeddingCache(options.train_cache), EmbeddingCache(options.validation_cache)
    provenance, encoder = train.provenance, train.provenance.encoder_fingerprint
    validation.require_same_space(encoder, provenance.fps, train.shape, "the decoder")
    inputs, sources = learned_from(train, validation)
    size = fitting_size(Path(train.clips[0].key.source), provenance, (options.longest_side, options.longest_side))
    known, held_out = read_pairs(train, options.frames, size), read_pairs(validation, HELD_OUT_FRAMES, size)
    seen = f"pictures of {size[0]} x {size[1]}; {len(known.pictures):,} frames of {len(train.clips):,} clips"
    run.begin(inputs, seen, sources=sources)
    decoder = PictureDecoder(train.shape, size, width=options.width, encoder_fingerprint=encoder)
    flat, pictures = known.embeddings.flatten(0, -2), known.pictures.split(256)
    decoder.mean.copy_(flat.mean(dim=0))
    decoder.std.copy_(floor_std(flat.std(dim=0, correction=0)))
    decoder.mean_picture.copy_(sum(part.float().sum(dim=0) for part in pictures) / (255 * len(known.pictures)))  # type: ignore[arg-type]
    network = run.prepare(decoder, options.optimizer, clip_norm=1.0)
    best = run.keep_best(decoder, CHOSEN_BY)

    for _, batch in run.draws(partial(draw_batch, known, options.batch_size)):
        run.update((network(batch.embeddings) - batch.pictures.float() / 255).square().mean(), {})
        if run.due:
            run.show("true above, decoded below", true_and_decoded(decoder, held_out))
            run.log({CHOSEN_BY: relative_error(decoder, held_out)}, show=(CHOSEN_BY,))

    best.restore()
    run.show("embeddings", held_out.pictures / 255, held_out.embeddings)
    run.finish(
        {"encoder_fingerprint": encoder}, {"decoder": ("picture_decoder", decoder.description(), decoder)},
        next=f"video-jepa imagine --cache CACHE_OF_TEST --decoder {options.output_dir} --output-dir runs/imagined",
    )  # fmt: skip


class Batch(NamedTuple):
    """Embeddings float32 (B, *tokens, D) and their frames uint8 (B, 3, H, W)."""

    embeddings: Tensor
    pictures: Tensor


def read_pairs(cache: EmbeddingCache, most: int, size: tuple[int, int]) -> Batch:
    """Embeddings and frames, evenly over a cache. Raises `VideoError` where a video is not as it was."""
    most = min(most, cache.frames, max(1, MOST_NUMBERS // int(np.prod(cache.shape))))
    rows = cache.rows[np.linspace(0, cache.frames - 1, most).astype(int)]
    embeddings = require_finite(cache, torch.from_numpy(cache.take(rows)))
    return Batch(embeddings, torch.from_numpy(read_frames(cache, rows, size)))


def draw_batch(known: Batch, size: int, generator: torch.Generator) -> Batch:
    """Pairs drawn uniformly."""
    chosen = torch.randint(len(known.embeddings), (size,), generator=generator)
    return Batch(known.embeddings[chosen], known.pictures[chosen])


@torch.no_grad()
def true_and_decoded(decoder: PictureDecoder, held_out: Batch) -> Tensor:
    """Eight frames, evenly over those held out, above what is decoded of them, in [0, 1] (8, 3, 2 H, W)."""
    some = torch.linspace(0, len(held_out.pictures) - 1, 8).long()
    decoded = decoder(held_out.embeddings[some].to(decoder.mean.device)).cpu()
    return torch.cat([held_out.pictures[some] / 255, decoded], dim=2)


@torch.no_grad()
def relative_error(decoder: PictureDecoder, held_out: Batch) -> float:
    """Squared error in units of that of the mean picture."""
    errors, device = torch.zeros(2, device=decoder.mean.device), decoder.mean.device
    for embeddings, pictures in zip(held_out.embeddings.split(256), held_out.pictures.split(256), strict=True):
        true = pictures.to(device).float() / 255
        for place, shown in enumerate((decoder(embeddings.to(device)), decoder.mean_picture)):
            errors[place] += (shown - true).square().sum()
    return float(errors[0] / errors[1].clamp_min(1e-12))


if __name__ == "__main__":
    run_command(main, Options)
