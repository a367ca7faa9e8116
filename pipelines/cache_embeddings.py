r"""Embed videos on a clock and keep the embeddings on disk.

  video-jepa embed --videos DIR --encoder runs/encoder/encoder --fps 4 --output-dir cache/train

A published encoder needs no training: `--encoder timm:vit_small_patch14_dinov2.lvd142m --tokens grid --pca 64`, with
`--encoder-weights FILE.safetensors` where there is no network, or a clip encoder, `--encoder hf:facebook/vjepa2-...`.
It is left in OUTPUT/encoder, whole; give that folder as --encoder for other videos.

The window of a clip encoder ends at the tick; its frames are consecutive ticks. Before a video's beginning, and after a
gap in the recording, the first frame there is repeated.

Run the same command again after a kill, or after adding videos: only what is missing is embedded.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from data.account import Account, examples
from data.cache import CachedClip, ClipKey, Column, EmbeddingCache, Provenance
from data.cache_writer import CacheWriter, remaining_clips
from data.clock import clock_offsets_s
from data.errors import DataError
from data.lerobot import episodes_in, missing_files
from data.manifest import check_videos
from data.picture import IMAGE_FPS
from data.sidecar import columns_beside, read_sidecar, table_beside
from data.video import TRANSFORM, VideoInfo
from jepa.config import Positive, PositiveInt
from jepa.encoder import Encoder
from pipelines.run.command import counted, require, run_command
from pipelines.run.devices import main_first, start_accelerator
from pipelines.run.embed import Task, embed_videos
from pipelines.run.encoders import find_encoder, keep_encoder, sample_windows
from pipelines.run.files import read_json, require_artefact_alone, to_json, versions, write_json
from pipelines.run.published import PublishedOptions

OWN_NAMES = ("cache.json", "places.json", "shards", "videos.jsonl", "account.json", "encoder")
"""Names of what a cache's folder holds."""
MOST_ROUNDING = 0.01  # rounding of stored embeddings, as a share of a feature's variance, that nothing is said of
NUMBER = Column("float64")  # what a CSV says of a tick


@dataclass(frozen=True, kw_only=True)
class Options(PublishedOptions):
    """Embed videos and keep the embeddings on disk."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, and manifests."""
    encoder: str = "runs/encoder/encoder"
    """Encoder: a folder of ours, timm:MODEL, or hf:MODEL of transformers."""
    output_dir: Path = Path("cache/train")
    """The cache; an existing one of the same encoder and clock is added to."""
    fps: Positive = 4.0
    """Ticks per second of the clock that embeddings lie on, by time."""
    clocks: PositiveInt = 1
    """Clocks, shifted against each other, that each video is sampled on: more training windows from the same video."""
    columns: tuple[str, ...] = ()
    """Columns of the CSV beside each video to keep, too, such as `speed steering`, or patterns such as `action_*`."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored embeddings."""
    precision: Literal["launched", "fp32", "bf16", "fp16"] = "launched"
    """Precision of the encoder; a cache holds one only. launched: as accelerate says."""
    batch_size: PositiveInt = 64
    """Frames (windows, for a clip encoder) that are embedded together, on each process."""
    clips_per_shard: PositiveInt = 64
    """Clips in a file; a kill loses at most this many."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images whose names are no times."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""


def main(options: Options) -> None:
    """Check, see what is missing, embed it, account."""
    accelerator = start_accelerator(options.precision)
    is_main = accelerator.is_main_process
    videos, account = main_first(accelerator, lambda: usable_videos(options, is_main))
    options = main_first(accelerator, partial(named, options, videos))
    missing = missing_files(video.path for video in videos)
    if is_main and (slow := [video for video in videos if 0 < video.average_fps < 0.95 * options.fps * options.clocks]):
        said = f"such as {slow[0].path} of {slow[0].average_fps:.4g}: on {options.clocks} clocks its frames come twice"
        print(f"warning: {counted(len(slow), 'video')} of fewer frames a second than all clocks together, {said}")
    encoder = main_first(accelerator, lambda: chosen_encoder(options, accelerator, videos))
    provenance = Provenance(
        encoder=options.encoder, encoder_fingerprint=encoder.fingerprint, fps=options.fps, image_fps=options.image_fps,
        image_size=encoder.image_size, window=encoder.window, transform=TRANSFORM,
        precision=accelerator.mixed_precision.replace("no", "fp32"),
        columns={"embeddings": Column(options.dtype, encoder.shape), **dict.fromkeys(options.columns, NUMBER)},
        versions=versions(),
    )  # fmt: skip
    make_writer = partial(
        CacheWriter, options.output_dir, provenance, clips_per_shard=options.clips_per_shard, is_main=is_main,
        places={str(video.path): video.content for video in videos},
    )  # fmt: skip
    writer, read = main_first(accelerator, make_writer), Account()
    tasks = missing_clips(options, accelerator, videos)
    mine = tasks[accelerator.process_index :: accelerator.num_processes]
    durations_s = {video.path: video.duration_s for video in videos}
    expected = round(options.fps * sum(durations_s[task.source] * len(task.keys) for task in mine))
    bar = tqdm(total=expected or None, unit="frame", desc="embedding", disable=not is_main)
    with writer, bar:
        for task in embed_videos(
            accelerator, encoder, mine, fps=options.fps, image_fps=options.image_fps, batch_size=options.batch_size,
            strict=options.strict, bar=bar,
        ):  # fmt: skip
            keep(writer, task, options, account=read, duration_s=durations_s[task.source])
    account.merge(gather_object([read]))
    for path in missing:
        account.refused[str(path)] = f"{path}: its data set promises it, and it is not there"
    if is_main:
        warn_of_rounding(writer.rounding)
        leave_account(account, options.output_dir)
        summarise(options)
    accelerator.end_training()


def usable_videos(options: Options, is_main: bool) -> tuple[list[VideoInfo], Account]:
    """The videos to embed, once the cache has a place and its columns have names."""
    folder = options.output_dir
    require(folder.is_dir() or not (folder.exists() or folder.is_symlink()), f"--output-dir {folder} is no folder")
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name not in OWN_NAMES) if is_main else []
    require(not others, f"--output-dir {folder} holds {', '.join(others[:3])}, and is no cache: take another one")
    require_artefact_alone(folder / "encoder")  # which is no run of that name
    require_names(options.columns)
    return check_videos(
        options.videos, fps=options.fps, manifest=folder / "videos.jsonl", image_fps=options.image_fps,
        strict=options.strict, is_main=is_main,
    )  # fmt: skip


def named(options: Options, videos: list[VideoInfo]) -> Options:
    """The same with the names of the columns that patterns stand for; a slip is said before all work."""
    if not options.columns:
        return options
    columns = columns_beside((video.path for video in videos), options.columns)
    require_names(columns)
    return replace(options, columns=columns)


def require_names(columns: Iterable[str]) -> None:
    """Raises `UserError` where a cache cannot hold columns of these names."""
    for name in columns:
        require(NUMBER.is_valid(name), f"--columns {name}: a cache has no place for a column of this name")


def chosen_encoder(options: Options, accelerator: Accelerator, videos: list[VideoInfo]) -> Encoder:
    """The encoder on its device; a published one is left in the cache's folder, with its principal components."""
    encoder = find_encoder(options.encoder, options).to(accelerator.device)
    # What it does not take is said before all work.
    encoder.embed(torch.zeros(1, encoder.window, 3, *encoder.image_size, device=accelerator.device))
    if Path(options.encoder).is_dir():
        return encoder
    windows = sample_windows(encoder, videos, fps=options.fps, batch_size=options.batch_size)
    folder = options.output_dir / "encoder"
    return keep_encoder(encoder, options.pca, folder, windows=windows, accelerator=accelerator)


def missing_clips(options: Options, accelerator: Accelerator, videos: list[VideoInfo]) -> list[Task]:
    """What the cache does not hold yet, a task for each video, alike on all ranks. Collective."""
    offsets_s = clock_offsets_s(options.fps, options.clocks)
    wanted = [ClipKey(str(video.path), video.content, offset_s) for video in videos for offset_s in offsets_s]
    remaining = remaining_clips(options.output_dir, wanted)
    accelerator.wait_for_everyone()  # nobody writes before all have seen what is there
    if accelerator.is_main_process:
        print(f"{len(wanted) - len(remaining)} of {len(wanted)} clips are in the cache already")
    return [Task(Path(source), list(keys)) for source, keys in groupby(remaining, key=lambda key: key.source)]


def keep(writer: CacheWriter, task: Task, options: Options, *, account: Account, duration_s: float) -> None:
    """Write down what has become of a video."""
    clips = [] if task.refused else task.clips()
    try:
        begins_s = [episode.begin_s - 2e-3 for episode in episodes_in(task.source)[1:]]
        if begins_s:  # no window crosses from one episode to the next
            clips = [replace(clip, ticks=clip.ticks + np.searchsorted(begins_s, clip.times_s)) for clip in clips]
        for clip in clips if options.columns else ():
            values = read_sidecar(
                task.source, clip.times_s, columns=options.columns, tolerance_s=0.5 / options.fps,
                image_fps=options.image_fps,
            )  # fmt: skip
            clip.columns.update(zip(options.columns, values.T, strict=True))
    except (DataError, OSError) as error:
        if options.strict:
            raise
        task.refused = str(error)
    if task.refused or not clips:
        nothing = f"{task.source}: {str(task.damage) or 'there is no frame on the clock'}"
        account.refused[str(task.source)] = f"{task.refused or nothing} ({duration_s:.1f} s left out)"
        return
    account.add(task.source, max(float(clip.times_s[-1]) for clip in clips), task.damage)
    for clip in clips:
        writer.add(clip)


def warn_of_rounding(rounding: np.ndarray) -> None:
    """Say so where storage rounds away what varies: of features that hardly vary around a large mean."""
    if many := int((rounding > MOST_ROUNDING).sum()):
        worst = f"by {rounding.max():.0%} of its variance at worst"
        said = f"in {many} of {len(rounding)} features float16 rounds away what varies, {worst}"
        print(f"warning: {said}: take --dtype float32, and another --output-dir", file=sys.stderr)


def leave_account(account: Account, folder: Path) -> None:
    """Say what was read and what was not, and write it down: what earlier runs read still counts."""
    print(account)
    path, now = folder / "account.json", to_json(account)
    earlier = read_json(path) if path.exists() else {}
    write_json(path, now | {name: earlier.get(name, {}) | now[name] for name in ("read_s", "damaged")})


def has_newer_table(clip: CachedClip) -> bool:
    """Whether the CSV beside a video was written after the clip was cached."""
    table, manifest = table_beside(Path(clip.key.source)), clip.shard.with_suffix(".json")
    return table.is_file() and table.stat().st_mtime_ns > manifest.stat().st_mtime_ns


def summarise(options: Options) -> None:
    """What the cache holds now, and what to run next."""
    cache, folder = EmbeddingCache(options.output_dir), options.output_dir
    kept = options.encoder if Path(options.encoder).is_dir() else folder / "encoder"
    with_tables = cache.clips if options.columns else []
    newer = sorted({clip.key.source for clip in with_tables if has_newer_table(clip)})
    said = examples("its table has changed, and what is cached has not: take another --output-dir", newer)
    tables = Counter(table_beside(Path(source)) for source in {clip.key.source for clip in with_tables})
    shared = [str(table) for table, count in tables.items() if count > 1 and table.is_file()]
    for line in said + examples("one table of several videos, and not of one of them", shared):
        print(line)
    for name in options.columns:
        unknown = sum(int(np.isnan(cache.take(clip.rows, name)).sum()) for clip in cache.clips)
        if unknown:
            print(f"{name}: the tables say nothing of it at {unknown:,} of {cache.frames:,} ticks")
    print(
        f"wrote {folder}: {len(cache.clips)} clips, {cache.frames:,} embeddings of shape {cache.shape} at "
        f"{options.fps:g} fps. Next, with VALIDATION, the cache of other videos by --encoder {kept}:\n"
        f"  video-jepa train --train-cache {folder} --validation-cache VALIDATION --output-dir runs/predictor"
    )


if __name__ == "__main__":
    run_command(main, Options)
