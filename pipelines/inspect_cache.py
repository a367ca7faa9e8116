r"""What is inside an embedding cache, and is it still what was written?

  python pipelines/inspect_cache.py --cache cache/train --verify

Prints where the embeddings come from and what there is of them. --verify reads all of it and checks each clip against
its checksum: a bit that has flipped on the disk is otherwise read without an error.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.embedding_cache import CachedClip, ClipKey, EmbeddingCache
from data.manifest import file_state
from pipelines.stage import UserError, counted, run_stage

SHOWN = 10


@dataclass(frozen=True)
class Options:
    """Show what is inside an embedding cache."""

    cache: Path = Path("cache/train")
    """The cache."""
    verify: bool = False
    """Check each clip against its checksum."""


def main(options: Options) -> None:
    """The story: open, describe, compare with the videos as they are now, verify."""
    cache = EmbeddingCache(options.cache)
    print(describe(cache))
    states = {clip: compare(clip) for clip in cache.clips}
    for state, count in Counter(states.values()).items():
        clips = [clip for clip in cache.clips if states[clip] == state]
        print(f"{counted(count, 'clip')} whose video {state}" + ("" if state == "is unchanged" else ":"))
        if state != "is unchanged":
            print_some([clip.key.source for clip in clips])
    if options.verify:
        verify(cache)


def describe(cache: EmbeddingCache) -> str:
    """Provenance and amounts, a line each."""
    provenance = cache.provenance
    height, width = provenance.image_size
    seconds = cache.frames / provenance.fps
    gaps = len(cache.unbroken_runs()) - len(cache.clips)
    shards = {clip.shard for clip in cache.clips}
    size = sum(shard.stat().st_size for shard in shards)
    versions = ", ".join(f"{name} {version}" for name, version in provenance.versions.items())
    return "\n".join(
        [
            f"{cache.folder}: {counted(len(cache.clips), 'clip')} of "
            f"{counted(len({clip.key.source for clip in cache.clips}), 'video')}, "
            f"{cache.frames:,} embeddings, {seconds / 3600:.2f} h, {counted(gaps, 'gap')} in time",
            f"embeddings of dimension {provenance.embedding_dimension}, {provenance.dtype}, at {provenance.fps:g} fps, "
            f"by encoder {provenance.encoder_fingerprint}",
            f"of frames of {height}x{width} pixels: {provenance.transform}",
            f"{counted(len(shards), 'shard')}, {size / 1e6:.1f} MB; made with {versions}",
        ]
    )


def compare(clip: CachedClip) -> str:
    """What has become of a clip's video since it was embedded."""
    try:
        now = ClipKey(*file_state(Path(clip.key.source)), clip.key.phase_s)
    except OSError:
        return "is gone"
    return "is unchanged" if now == clip.key else "has changed since (run cache_embeddings again)"


def verify(cache: EmbeddingCache) -> None:
    """Raises `UserError` if a clip is not what was written."""
    bar = tqdm(cache.clips, unit="clip", desc="verifying", leave=False)
    damaged = [clip for clip in bar if not (cache.is_intact(clip) and np.isfinite(cache.clip_embeddings(clip)).all())]
    if damaged:
        print("clips that are not what was written:")
        print_some([clip.key.source for clip in damaged])
        files = [
            str(file)
            for shard in sorted({clip.shard for clip in damaged})
            for file in (shard, shard.with_suffix(".json"))
        ]
        raise UserError(
            f"{len(damaged)} of {len(cache.clips)} clips in {cache.folder} are damaged: delete {' '.join(files)} "
            "and run cache_embeddings again"
        )
    print(f"verified: all {len(cache.clips):,} clips are what was written")


def print_some(sources: list[str]) -> None:
    """The first few of a list."""
    for source in sources[:SHOWN]:
        print(f"  {source}")
    if len(sources) > SHOWN:
        print(f"  and {len(sources) - SHOWN} more")


if __name__ == "__main__":
    run_stage(main, Options)
