r"""Stage 2: embed videos on a clock and keep the embeddings on disk.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/cache_embeddings.py \
      --videos DIR --encoder runs/encoder/encoder --fps 4 --output-dir cache/train

Leaves HDF5 shards with their manifests. Run the same command again after a kill, or after adding videos: only what is
missing is embedded.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from tqdm import tqdm

from data.embedding_cache import (
    CacheWriter,
    ClipKey,
    EmbeddedClip,
    EmbeddingCache,
    Provenance,
    clip_key,
    remaining_clips,
)
from data.manifest import check_videos
from data.video import FrameSize, TimedFrame, VideoError, read_on_clock
from jepa.encoder import FrameEncoder
from pipelines.artefacts import load_encoder
from pipelines.stage import LAUNCH, require, run_stage, versions
from pipelines.training import start_accelerator

FRAMES_PER_CHUNK = 256


@dataclass(frozen=True)
class Options:
    """Embed videos and keep the embeddings on disk."""

    videos: tuple[Path, ...]
    """Folders (searched recursively) and video files."""
    encoder: Path = Path("runs/encoder/encoder")
    """The trained encoder."""
    output_dir: Path = Path("cache/train")
    """The cache; an existing one of the same encoder and clock is added to."""
    fps: float = 4.0
    """Ticks per second of the clock that embeddings lie on, by time."""
    phases: int = 1
    """Sample each video on this many clocks, shifted against each other: more training windows from the same video."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored embeddings."""
    clips_per_shard: int = 64
    """Clips in one file; a kill loses at most this many."""
    seed: int = 0
    """Seeds whatever a backbone might draw; ours draw nothing."""


def main(options: Options) -> None:
    """The story: check, see what is missing, decode ahead, embed, commit."""
    require(options.fps > 0, f"--fps is {options.fps:g}: it must be positive")
    require(options.phases > 0, f"--phases is {options.phases}: it must be positive")
    require(options.clips_per_shard > 0, f"--clips-per-shard is {options.clips_per_shard}: it must be positive")
    accelerator = start_accelerator()
    set_seed(options.seed)
    encoder = load_encoder(options.encoder).to(accelerator.device).eval()
    # Each phase is a clock of the same rate, so a video need not be faster for several of them.
    videos = check_videos(options.videos, options.fps, progress=accelerator.is_main_process)
    provenance = Provenance(
        encoder_fingerprint=encoder.fingerprint(),
        embedding_dimension=encoder.config.embedding_dimension,
        fps=options.fps,
        image_size=encoder.config.image_size,
        dtype=options.dtype,
        versions=versions(),
    )
    wanted = [
        clip_key(video.path, phase / options.phases / options.fps)
        for video in videos.videos
        for phase in range(options.phases)
    ]

    # The main process makes the folder; all others read it before anything is written to it.
    with accelerator.main_process_first():
        writer = CacheWriter(options.output_dir, provenance, options.clips_per_shard, accelerator.is_main_process)
    remaining = remaining_clips(options.output_dir, wanted)
    accelerator.wait_for_everyone()
    mine = remaining[accelerator.process_index :: accelerator.num_processes]
    if accelerator.is_main_process:
        print(videos.account())
        print(f"{len(wanted) - len(remaining)} of {len(wanted)} clips are in the cache already")

    failures: list[str] = []
    frames, started = 0, time.monotonic()
    bar = tqdm(total=len(mine), unit="clip", desc="embedding", disable=not accelerator.is_main_process)
    with writer:
        for key, chunks in decode_ahead(mine, encoder.config.image_size, options.fps):
            try:
                clip = embed(encoder, key, chunks, accelerator.device)
            except VideoError as error:
                failures.append(str(error))
            else:
                frames += len(clip.ticks)
                writer.add(clip)
            bar.update()
            bar.set_postfix({"frames/s": f"{frames / (time.monotonic() - started):.0f}"})
    bar.close()
    accelerator.wait_for_everyone()

    for reason in failures:
        print(f"  left out: {reason}")
    if accelerator.is_main_process:
        cache = EmbeddingCache(options.output_dir)
        vanished = sorted({clip.key.source for clip in cache.clips if not Path(clip.key.source).exists()})
        for source in vanished:
            print(f"  gone since it was embedded, its embeddings are kept: {source}")
        print(
            f"wrote {options.output_dir}: {len(cache.clips)} clips, {cache.frames:,} embeddings of dimension "
            f"{provenance.embedding_dimension} at {options.fps:g} fps. "
            "Next, with a cache of other videos in cache/val:\n"
            f"  {LAUNCH} pipelines/train_predictor.py --train-cache {options.output_dir} --validation-cache cache/val "
            "--output-dir runs/predictor"
        )
    accelerator.end_training()


def decode_ahead(
    keys: list[ClipKey], size: FrameSize, fps: float
) -> Iterator[tuple[ClipKey, Iterator[list[TimedFrame]]]]:
    """Clips in order, the first chunk of frames of the next ones decoded while the present one is embedded."""

    def begin(key: ClipKey) -> tuple[Iterator[TimedFrame], list[TimedFrame] | VideoError]:
        frames = read_on_clock(Path(key.source), size, fps, key.phase_s)
        try:
            return frames, list(islice(frames, FRAMES_PER_CHUNK))
        except VideoError as error:
            return frames, error

    with ThreadPoolExecutor(2) as pool:
        waiting = [(key, pool.submit(begin, key)) for key in keys[:4]]
        for position, key in enumerate(keys):
            _, future = waiting.pop(0)
            if position + 4 < len(keys):
                waiting.append((keys[position + 4], pool.submit(begin, keys[position + 4])))
            frames, first = future.result()

            def chunks(
                frames: Iterator[TimedFrame] = frames, first: list[TimedFrame] | VideoError = first
            ) -> Iterator[list[TimedFrame]]:
                if isinstance(first, VideoError):
                    raise first
                chunk = first
                while chunk:
                    upcoming = pool.submit(lambda: list(islice(frames, FRAMES_PER_CHUNK)))
                    yield chunk
                    chunk = upcoming.result()

            yield key, chunks()


@torch.no_grad()
def embed(
    encoder: FrameEncoder, key: ClipKey, chunks: Iterator[list[TimedFrame]], device: torch.device
) -> EmbeddedClip:
    """Embed one clip chunk by chunk, so that a video may be longer than memory.

    Raises:
        VideoError: decoding breaks off, or there is no frame on the clock.
    """
    embeddings, times_s, ticks = [], [], []
    for chunk in chunks:
        frames = torch.from_numpy(np.stack([timed.frame for timed in chunk])).to(device)
        embeddings.append(encoder(frames).float().cpu().numpy())
        times_s += [timed.time_s for timed in chunk]
        ticks += [timed.tick for timed in chunk]
    if not embeddings:
        raise VideoError(f"{key.source}: there is no frame on the clock")
    return EmbeddedClip(key, np.concatenate(embeddings), np.array(times_s), np.array(ticks))


if __name__ == "__main__":
    run_stage(main, Options)
