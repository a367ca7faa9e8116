r"""Stage 2: embed videos on a clock and keep the embeddings on disk.

  accelerate launch --quiet --config_file accelerate_config.yaml pipelines/cache_embeddings.py \
      --videos DIR --encoder runs/encoder/encoder --fps 4 --output-dir cache/train

Leaves HDF5 shards with their manifests. Run the same command again after a kill, or after adding videos: only what is
missing is embedded.

Videos are decoded in threads, embedded in batches that mix videos, and written in a thread of its own: the slowest of
the three sets the pace. All batches have one shape, so that an embedding does not depend on what it was computed with.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from accelerate.utils import gather_object, set_seed
from tqdm import tqdm

from data.embedding_cache import CacheWriter, ClipKey, EmbeddingCache, Provenance, remaining_clips
from data.manifest import Account, file_state, is_there
from data.video import IMAGE_FPS, TRANSFORM, clock_phases_s
from pipelines.artefacts import load_encoder
from pipelines.compute import start_accelerator
from pipelines.embed_videos import Task, embed_videos
from pipelines.guards import Heartbeat
from pipelines.stage import LAUNCH, leave_account, require, run_stage, versions
from pipelines.training import find_usable_videos, main_first

WRITES_AHEAD = 8
"""Videos that may wait to be written."""


@dataclass(frozen=True)
class Options:
    """Embed videos and keep the embeddings on disk."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    encoder: Path = Path("runs/encoder/encoder")
    """The trained encoder."""
    output_dir: Path = Path("cache/train")
    """The cache; an existing one of the same encoder and clock is added to."""
    fps: float = 4.0
    """Ticks per second of the clock that embeddings lie on, by time."""
    phases: int = 1
    """Sample each video on this many clocks, shifted against each other: more training windows from the same video."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    dtype: Literal["float16", "float32"] = "float16"
    """Precision of the stored embeddings."""
    batch_size: int = 64
    """Frames that are embedded together, on each process."""
    clips_per_shard: int = 64
    """Clips in one file; a kill loses at most this many."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    seed: int = 0
    """Seeds whatever a backbone might draw; ours draw nothing."""


def main(options: Options) -> None:
    """The story: check, see what is missing, decode, embed and write side by side, account."""
    for name in ("fps", "phases", "image_fps", "batch_size", "clips_per_shard"):
        value = getattr(options, name)
        require(value > 0, f"--{name.replace('_', '-')} is {value:g}: it must be positive")
    accelerator = start_accelerator()
    heartbeat = Heartbeat(accelerator)
    is_main = accelerator.is_main_process
    set_seed(options.seed)
    encoder = load_encoder(options.encoder).to(accelerator.device).eval()
    provenance = Provenance(
        encoder_fingerprint=encoder.fingerprint(),
        embedding_dimension=encoder.embedding_dimension,
        fps=options.fps,
        image_fps=options.image_fps,
        image_size=encoder.config.image_size,
        transform=TRANSFORM,
        dtype=options.dtype,
        versions=versions(),
    )
    # Each phase is a clock of the same rate, so a video need not be faster for several of them.
    videos = find_usable_videos(
        accelerator, options.videos, options.fps, options.output_dir, options.image_fps, options.strict
    )
    phases_s = clock_phases_s(options.fps, options.phases)
    wanted = [ClipKey(*file_state(video.path), phase_s) for video in videos.videos for phase_s in phases_s]
    writer = main_first(
        accelerator, lambda: CacheWriter(options.output_dir, provenance, options.clips_per_shard, is_main)
    )
    remaining = remaining_clips(options.output_dir, wanted)
    accelerator.wait_for_everyone()  # nobody writes before all have seen what is there
    if is_main:
        print(f"{len(wanted) - len(remaining)} of {len(wanted)} clips are in the cache already")
    tasks = [Task(Path(source), list(keys)) for source, keys in groupby(remaining, key=lambda key: key.source)]
    mine = tasks[accelerator.process_index :: accelerator.num_processes]

    account = Account()
    by_path = {str(video.path): video for video in videos.videos}
    wanted_of = [(by_path[str(task.source)], options.fps * len(task.keys)) for task in mine]
    expected = sum(video.duration_s * video.sampled_fps(ticks_per_second) for video, ticks_per_second in wanted_of)
    bar = tqdm(total=round(expected) or None, unit="frame", desc="embedding", disable=not is_main)
    with writer, ThreadPoolExecutor(1) as writing:
        writes = []
        for task in embed_videos(
            accelerator, encoder, mine, options.fps, options.image_fps, options.batch_size, options.strict, bar
        ):
            writes.append(writing.submit(keep, writer, task, account))
            if len(writes) > WRITES_AHEAD:
                writes.pop(0).result()
        for write in writes:
            write.result()
    bar.close()

    total = videos.account()
    total.merge(gather_object([account]))
    if is_main:
        leave_account(total, options.output_dir, add=True)
        summarise(options)
    heartbeat.stop()
    accelerator.end_training()


def keep(writer: CacheWriter, task: Task, account: Account) -> None:
    """Write down what has become of a video."""
    if task.refused:
        account.refuse(task.source, task.refused)
        return
    clips = task.clips()
    if not clips:
        found = str(task.damage) or "there is no frame on the clock"
        account.refuse(task.source, f"{task.source}: {found}")
        return
    account.add(task.source, max(float(clip.times_s[-1]) for clip in clips), task.damage)
    for clip in clips:
        writer.add(clip)


def summarise(options: Options) -> None:
    """What the cache holds now, and what to run next."""
    cache = EmbeddingCache(options.output_dir)
    vanished = sorted({clip.key.source for clip in cache.clips if not is_there(Path(clip.key.source))})
    for source in vanished:
        print(f"  gone since it was embedded, its embeddings are kept: {source}")
    print(
        f"wrote {options.output_dir}: {len(cache.clips)} clips, {cache.frames:,} embeddings of dimension "
        f"{cache.provenance.embedding_dimension} at {options.fps:g} fps. "
        "Next, with a cache of other videos in cache/val:\n"
        f"  {LAUNCH} pipelines/train_predictor.py --train-cache {options.output_dir} --validation-cache cache/val "
        "--output-dir runs/predictor"
    )


if __name__ == "__main__":
    run_stage(main, Options)
