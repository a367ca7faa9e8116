"""Encoders in folders of ours, and those that others have trained, of timm or of transformers, found by name."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data.clock import read_frames_at
from data.decoder import Damage
from data.errors import VideoError
from data.video import VideoInfo
from jepa.backbones import build_backbone
from jepa.components import principal_components
from jepa.encoder import Encoder, EncoderConfig, FrameEncoder
from jepa.errors import ConfigurationError
from jepa.fingerprint import fingerprint
from jepa.video_encoder import load_clip_encoder
from pipelines.run.artefacts import load_module, save_artefact
from pipelines.run.command import require
from pipelines.run.files import to_json
from pipelines.run.published import PublishedOptions

FITTED_FRAMES = 1024
"""Frames (windows, for a clip encoder) that principal components are fitted on, evenly over the videos."""
TAKEN: dict[str, set[str]] = {
    "timm": {"tokens", "grid", "levels", "image_size", "encoder_weights", "pca"},
    "hf": {"tokens", "window", "pca"},
    "a folder": set(),
}
"""Options that an encoder of each kind takes."""


def load_encoder(folder: Path) -> Encoder:
    """The encoder that `pretrain_encoder` or `cache_embeddings` left, in evaluation mode. Raises `UserError`."""
    return load_module(folder, "encoder", Encoder.build)


def find_encoder(name: str, options: PublishedOptions) -> Encoder:
    """The encoder `timm:MODEL`, `hf:MODEL`, or in a folder of ours; in evaluation mode, published ones without a head.

    Raises `ConfigurationError` where it cannot be had, and `UserError` where something is asked for that it does not
    take, or the folder holds no encoder.
    """
    source, _, model = name.partition(":")
    kind = source if source in TAKEN and model else "a folder"
    for option in PublishedOptions.__dataclass_fields__:
        fits = option in TAKEN[kind] or getattr(options, option) == getattr(PublishedOptions(), option)
        require(fits, f"--{option.replace('_', '-')} is not for --encoder {name}, which is {kind}: drop it")
    if kind == "a folder":
        return load_encoder(Path(name))
    if kind == "hf":
        require(options.tokens != "flat", f"--tokens flat is not for --encoder {name}: take vector or grid")
        return load_clip_encoder(model, tokens="grid" if options.tokens == "grid" else "vector", window=options.window)
    require(options.tokens == "grid" or not any(options.grid), "--grid needs --tokens grid")
    try:
        return _timm_encoder(model, options)
    except ConfigurationError as error:
        field = {"backbone": "encoder", "weights": "encoder_weights" if options.encoder_weights else "encoder"}
        file = " (--encoder-weights FILE)" if error.field == "weights" and not options.encoder_weights else ""
        raise ConfigurationError(field.get(error.field, error.field), error.message + file) from error


def _timm_encoder(model: str, options: PublishedOptions) -> FrameEncoder:
    import timm  # here, because it takes seconds

    published: Any = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    size = published.input_size[1:] if published and not any(options.image_size) else options.image_size
    backbone = build_backbone(model, size, load=True, weights_file=options.encoder_weights)
    grid, levels = options.grid, options.levels or (-1,)
    if options.tokens == "grid" and not any(grid):
        strides = [level["reduction"] for level in backbone.feature_info]
        stride = strides[levels[0]] if -len(strides) <= levels[0] < len(strides) else 1  # else it is refused below
        grid = (-(-size[0] // stride), -(-size[1] // stride))
    pooling: Any = "flatten" if options.tokens == "flat" else "average" if options.levels else "native"
    config = EncoderConfig(
        backbone=model, weights="frozen", image_size=size, grid=grid, levels=levels, pooling=pooling,
        embedding_dimension=0,
    )  # fmt: skip
    return FrameEncoder(config, backbone).eval()


def keep_encoder(
    encoder: Encoder, components: int, folder: Path, *, windows: Iterator[Tensor], accelerator: Accelerator
) -> Encoder:
    """Leave a published encoder without a head in a folder, or take the same one that is there.

    So many principal components of `windows`, uint8 (n, window, 3, H, W) each, become its head; none if 0. Raises
    `UserError` where the folder holds another one, `ConfigurationError` where there are fewer components.
    """
    if (folder / "config.json").exists():
        kept = load_encoder(folder).to(accelerator.device)
        is_same = to_json(kept.config) == to_json(replace(encoder.config, embedding_dimension=components))
        is_same &= fingerprint(kept.backbone.state_dict(), {}) == fingerprint(encoder.backbone.state_dict(), {})
        mend = f"take another --output-dir, or --encoder {folder}"
        require(is_same, f"{folder} holds another encoder than the one asked for: {mend}")
        return kept
    if components:
        bar = tqdm(windows, desc=f"principal components of {FITTED_FRAMES:,} frames", unit="batch", leave=False)
        with accelerator.autocast():
            features = (encoder.embed(frames.to(accelerator.device)) for frames in bar)
            encoder.replace_head(principal_components(features, components).to(accelerator.device))
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_artefact(folder, "encoder", encoder.config, encoder)
    return encoder


def sample_windows(encoder: Encoder, videos: Sequence[VideoInfo], *, fps: float, batch_size: int) -> Iterator[Tensor]:
    """Windows uint8 (n, window, 3, H, W) that end at times evenly over the videos; what does not decode is left out."""
    chosen = videos[:: -(-len(videos) // FITTED_FRAMES)]
    each = -(-FITTED_FRAMES // len(chosen))
    for video in chosen:
        ends_s = (np.arange(each) + 0.5) / each * video.duration_s
        for part in np.array_split(ends_s, -(-each // batch_size)):
            times_s = (part[:, None] - np.arange(encoder.window)[::-1] / fps).clip(min=0)  # (n, window)
            with suppress(VideoError, OSError):
                frames, _ = read_frames_at(
                    video.path, encoder.image_size, times_s=times_s.ravel(), damage=Damage(),
                    image_fps=video.average_fps,
                )  # fmt: skip
                yield rearrange(torch.from_numpy(frames), "(n t) c h w -> n t c h w", t=encoder.window)
