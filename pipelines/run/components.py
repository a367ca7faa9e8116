"""Principal components of a published encoder's features, fitted in one pass over frames of the videos."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.video import VideoInfo, read_frames_at
from jepa.components import principal_components
from jepa.fingerprint import fingerprint
from pipelines.run.command import require
from pipelines.run.encoders import AnyEncoder, load_encoder
from pipelines.run.folder import save_artefact, to_json

FITTED_FRAMES = 1024
"""Frames (windows, for a clip encoder) that components are fitted on, evenly over the videos."""


def keep_encoder(
    encoder: AnyEncoder, components: int, folder: Path, *, videos: Sequence[VideoInfo], fps: float, batch_size: int,
    accelerator: Accelerator,
) -> AnyEncoder:  # fmt: skip
    """A published encoder as an artefact, with a head of principal components if any are wanted.

    Args:
        encoder: without a head.
        components: how many; 0: its features as they are.
        folder: of the artefact; if one of the same encoder is there already, that is taken.
        videos: what components are fitted on.
        fps: rate of the clock that the frames of a window lie on.
        batch_size: windows that are embedded together.
        accelerator: gives the device and the precision.

    Raises:
        UserError: the folder holds another encoder.
        ConfigurationError: there are fewer components than are wanted.
    """
    if (folder / "config.json").exists():
        kept = load_encoder(folder)
        wanted = replace(encoder.config, embedding_dimension=components)
        require(
            to_json(kept.config) == to_json(wanted)
            and fingerprint(kept.backbone, {}) == fingerprint(encoder.backbone, {}),
            f"{folder} holds another encoder than is asked for: take another --output-dir, or give it as --encoder",
        )
        return kept
    if components:
        encoder.to(accelerator.device)
        windows = sample_windows(encoder, videos, fps=fps, batch_size=batch_size)
        bar = tqdm(windows, desc=f"principal components of {FITTED_FRAMES:,} frames", unit="batch", leave=False)
        with accelerator.autocast():
            features = (encoder.embed(frames.to(accelerator.device)) for frames in bar)
            encoder.replace_head(principal_components(features, components))
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_artefact(folder, "encoder", encoder.config, encoder)
    return encoder


def sample_windows(
    encoder: AnyEncoder, videos: Sequence[VideoInfo], *, fps: float, batch_size: int
) -> Iterator[Tensor]:
    """Windows uint8 (n, window, 3, H, W) that end at times evenly over the videos; what does not decode is left out."""
    chosen = videos[:: -(-len(videos) // FITTED_FRAMES)]
    each = -(-FITTED_FRAMES // len(chosen))
    before_s = np.arange(encoder.window)[::-1] / fps
    for video in chosen:
        ends_s = (np.arange(each) + 0.5) / each * video.duration_s
        for part in np.array_split(ends_s, -(-each // batch_size)):
            times_s = (part[:, None] - before_s).clip(min=0)  # (n, window)
            with suppress(VideoError, OSError):
                frames, _ = read_frames_at(
                    video.path,
                    encoder.image_size,
                    times_s=times_s.ravel(),
                    damage=Damage(),
                    image_fps=video.average_fps,
                )
                yield rearrange(torch.from_numpy(frames), "(n t) c h w -> n t c h w", t=encoder.window)
