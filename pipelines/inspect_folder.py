r"""What is in a folder: videos, a cache, or what a command left behind.

  video-jepa inspect VIDEOS --count --manifest videos.jsonl
  video-jepa inspect cache/train --verify
  video-jepa inspect runs/encoder runs/encoder/encoder

Of videos it reads headers and a frame each; --count decodes all of them and finds what is really there: frames, gaps,
damage. Of a cache it says what the embeddings are and which videos have changed since; --verify reads all of it. Of a
run or a model, or of all that `all` has left, it says what that says of itself.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from data.account import examples
from data.cache import EmbeddingCache
from data.content import is_content_of
from data.counting import count_frames
from data.errors import printable
from data.manifest import MANIFEST_SUFFIX, index_videos, sort_out
from data.picture import IMAGE_FPS
from data.video import probe_video
from jepa.config import Bounded, Positive
from pipelines.run.command import counted, require, run_command
from pipelines.run.files import MARK, flat, read_json, to_json


@dataclass(frozen=True)
class Options(Bounded):
    """Say what is in folders."""

    paths: Positional[tuple[Path, ...]]
    """Videos, folders and manifests of videos; caches; runs; models."""
    count: bool = False
    """Decode all of each video and count what comes out."""
    manifest: Path | None = None
    """List of the videos to write, or to bring up to date; all commands take it in place of the videos."""
    verify: bool = False
    """Check each clip of a cache against its checksum: a bit that has flipped is otherwise read without an error."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images whose names are no times."""


def main(options: Options) -> None:
    """Say of each cache, run and model what it is, then what videos there are."""
    require(len(options.paths) > 0, "no PATHS are given: name a folder of videos, a cache, a run or a model")
    videos = []
    for path in [part for given in options.paths for part in parts_of(given)]:
        if (path / "cache.json").is_file():
            inspect_cache(EmbeddingCache(path), options.verify)
        elif (path / MARK).is_file():
            models = ", ".join(sorted(file.parent.name for file in path.glob("*/model.safetensors"))) or "none"
            print_facts(f"{path}: a run, with models: {models}", read_json(path / MARK))
        elif (path / "model.safetensors").is_file():
            print_facts(f"{path}: a model", read_json(path / "config.json"))
        else:
            videos.append(path)
    if videos:
        inspect_videos(videos, options)


def parts_of(path: Path) -> list[Path]:
    """The caches and runs in a folder of `all` or `demo`, or the folder itself."""
    inner = [file.parent for name in ("cache/*/cache.json", f"*/{MARK}") for file in sorted(path.glob(name))]
    return inner if (path / "cache" / "train" / "cache.json").is_file() else [path]


def inspect_videos(paths: list[Path], options: Options) -> None:
    """Look at what is new, say what there is, and of what is wrong the first few, and leave a manifest."""
    manifest = options.manifest
    is_named = manifest is None or manifest.suffix == MANIFEST_SUFFIX
    require(is_named, f"--manifest is {manifest}: its name must end in {MANIFEST_SUFFIX}")
    look = count_frames if options.count else probe_video
    records, files = index_videos(paths, manifest, look=look, image_fps=options.image_fps)
    videos, account = sort_out(records, files)
    hours, frames = sum(video.duration_s for video in videos) / 3600, sum(video.frames or 0 for video in videos)
    found = account.faults
    if frames:  # all has been decoded
        found["damaged"] = [f"{video.path}: {video.damage}" for video in videos if video.damage]
        found["with gaps"] = [
            f"{video.path}: {counted(len(video.gaps_s), 'gap')}, the first of {length:.2f} s at {begin:.2f} s"
            for video in videos
            for begin, length in video.gaps_s[:1]
        ]
    faults = "; ".join(f"{title} {len(lines):,}" for title, lines in found.items())
    print(*account.listing, sep="\n")
    print(f"{counted(len(videos), 'video')}, {hours:.2f} h{f', {frames:,} frames' if frames else ''}; {faults}")
    for title, lines in found.items():
        say(title, lines)
    if manifest is not None:
        print(f"wrote {manifest}: all commands take it in place of the videos")
    require(any(record.video for record in records), f"not one of {counted(len(records), 'file')} can be used")


def inspect_cache(cache: EmbeddingCache, verify: bool) -> None:
    """Say what the embeddings are and which videos are not what they were.

    With `verify`, raises `UserError` where a clip is not what was written.
    """
    gaps = sum(len(cache.unbroken_runs(clip)) - 1 for clip in cache.clips)
    clips, sources = counted(len(cache.clips), "clip"), {clip.key.source for clip in cache.clips}
    print_facts(
        f"{cache.folder}: a cache, {clips} of {counted(len(sources), 'video')}, {counted(cache.frames, 'embedding')}, "
        f"{cache.frames / cache.provenance.fps / 3600:.2f} h, {counted(gaps, 'gap')} in time",
        to_json(cache.provenance),
    )
    for what, stale in stale_videos(cache).items():
        say(what, stale)
    if verify:
        bar = tqdm(cache.clips, unit="clip", desc="verifying", leave=False)
        damaged = [one for one in bar if not (cache.is_intact(one) and np.isfinite(cache.take(one.rows)).all())]
        say("damaged", [clip.key.source for clip in damaged])
        files = [f"{shard} {shard.with_suffix('.json')}" for shard in sorted({clip.shard for clip in damaged})]
        said = f"{len(damaged)} of {clips} in {cache.folder} are not what was written"
        require(not damaged, f"{said}: delete {' '.join(files)} and embed the videos again")
        print(f"  verified: {clips} as written")


def stale_videos(cache: EmbeddingCache) -> dict[str, list[str]]:
    """Videos that do not lie any more where they were embedded, and such as have another content now."""
    stale: dict[str, list[str]] = {"video is gone or was moved": [], "video has changed": []}
    for source, content in sorted({clip.key[:2] for clip in cache.clips}):
        try:
            if not is_content_of(Path(source), content):
                stale["video has changed"].append(source)
        except OSError:
            stale["video is gone or was moved"].append(source)
    return stale


def print_facts(title: str, record: dict[str, object]) -> None:
    """A record, a line each."""
    for line in [title, *(f"  {name}: {value}" for name, value in flat(record).items())]:
        print(printable(line))


def say(title: str, found: list[str]) -> None:
    """Print some examples."""
    for line in examples(title, found):
        print(line)


if __name__ == "__main__":
    run_command(main, Options)
