r"""From a folder of videos to a page about them, by the commands that one would run by hand.

  video-jepa all VIDEOS --output-dir runs/holiday --open

Looks at all videos, keeps some for validation and some for the test, no recording in two of these (or those in folders
called `train`, `val` and `test`), trains an encoder, or takes a published one (--encoder
timm:vit_small_patch14_dinov2.lvd142m), trains a predictor, judges it, looks for what is surprising in the test videos,
and leaves `report/report.html`. Each command that it runs is shown: go on from there by hand. Interrupted, the same
command goes on.
"""

import math
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tyro.conf import Positional

from data.decoder import Damage
from data.manifest import check_videos, read_manifest, record_videos
from data.picture import IMAGE_FPS
from data.splits import SPLITS, split_videos
from data.video import VideoInfo
from jepa.config import NotNegativeInt, Positive, PositiveInt
from jepa.networks import MLPConfig
from pipelines.run.command import counted, require, run_command
from pipelines.run.files import write_json
from pipelines.run.options import dashed
from pipelines.run.published import PublishedOptions
from pipelines.run.stages import run_stage

HORIZON, ROLLOUT, LEAST = 20, 8, 2
"""Ticks that are forecast, and trained on, at most: as many as the usual video allows; and at least."""
PAIRS, SURE = 128, 0.8
"""Pairs of neighbouring frames in a batch of `pretrain`; share of a folder's that are taken for sure to be there."""


@dataclass(frozen=True, kw_only=True)
class Options(PublishedOptions):
    """Make a page about a folder of videos."""

    videos: Positional[tuple[Path, ...]]
    """Folders (searched recursively), video files, folders of images, and manifests."""
    output_dir: Path = Path("runs")
    """Where caches, models and the page are left."""
    encoder: str | None = None
    """Published encoder, timm:MODEL or hf:MODEL, or a folder of ours. None: one is trained on these videos."""
    fps: Positive = 4.0
    """Ticks per second of the clock that embeddings lie on."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images whose names are no times."""
    columns: tuple[str, ...] = ()
    """Columns of the CSV beside each video to read off forecasts, by name or pattern."""
    actions: tuple[str, ...] = ()
    """Columns that are actions, by name or pattern such as `action_*`."""
    encoder_steps: PositiveInt = 1000
    """Optimiser steps of the encoder, where one is trained."""
    predictor_steps: PositiveInt = 800
    """Optimiser steps of the predictor."""
    decoder_steps: PositiveInt = 1000
    """Optimiser steps of the decoder, through which the page shows what the predictor imagines."""
    seed: NotNegativeInt = 0
    """Seed of all commands."""
    open: bool = False
    """Open the page in a browser at the end."""


def main(options: Options) -> None:
    """Divide the videos, then run the commands."""
    require(bool(options.videos), "no videos are given: name folders, or files")
    published, folder = published_options(options), options.output_dir.absolute()
    parts, page = divide(options, folder / "videos"), folder / "report" / "report.html"
    horizon, batch = usual_horizon(parts, options.fps), batch_of(parts, options.fps)
    todo = [*stages(options, folder, published, horizon=horizon, batch=batch)]
    for number, (command, given) in enumerate(todo, start=1):
        run_stage(command, given, f"{number} of {len(todo)}: ")
    print(f"\nLook at {page}")
    if options.open:
        webbrowser.open(page.as_uri())


def published_options(options: Options) -> dict[str, Any]:
    """What `embed` is told of a published encoder; nothing where one is trained. Raises `UserError`."""
    given = {dashed(name): getattr(options, name) for name in PublishedOptions.__dataclass_fields__
             if getattr(options, name) != getattr(PublishedOptions(), name)}  # fmt: skip
    if options.encoder is None:
        require(not given, f"--{next(iter(given), '')} is for a published encoder: give --encoder, or drop it")
        return {}
    if options.encoder_weights:
        given["encoder-weights"] = options.encoder_weights.absolute()
    is_ours = Path(options.encoder).is_dir()
    return {"encoder": Path(options.encoder).absolute() if is_ours else options.encoder} | given


def stages(
    options: Options, folder: Path, published: dict[str, Any], *, horizon: int, batch: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each command and its options; run again, it goes on or is done anew. All paths are absolute."""
    videos = {split: folder / "videos" / f"{split}.jsonl" for split in SPLITS}
    train, validation, test = (folder / "cache" / split for split in SPLITS)
    encoder, names = train / "encoder", ["predictor", "evaluation", "decoder", "imagined", "surprise"]
    clock, again = {"fps": options.fps, "image-fps": options.image_fps}, {"seed": options.seed, "resume": True}
    if options.encoder is None:
        names, encoder = ["encoder", *names], folder / "encoder" / "encoder"
        published = {"encoder": encoder}
        given = {"videos": videos["train"], "output-dir": folder / "encoder", "steps": options.encoder_steps}
        yield "pretrain", given | clock | again | ({"batch-size": batch} if batch < PAIRS else {})
    for cache, taken in ((train, published), (validation, {"encoder": encoder}), (test, {"encoder": encoder})):
        columns = {"columns": (*options.columns, *options.actions), "output-dir": cache}
        yield "embed", {"videos": videos[cache.name]} | taken | clock | columns
    known = {"train-cache": train, "validation-cache": validation}
    given = {"output-dir": folder / "predictor", "steps": options.predictor_steps, "validation-horizon": horizon}
    yield "train", known | given | {"rollout-steps": min(ROLLOUT, horizon), "actions": options.actions} | again
    judged = {"cache": test, "predictor": folder / "predictor", "overwrite": True}
    probe = {"probe-cache": train, "probe-columns": options.columns} if options.columns else {}
    yield "evaluate", judged | {"output-dir": folder / "evaluation", "horizon": horizon} | probe
    yield "train-decoder", known | {"output-dir": folder / "decoder", "steps": options.decoder_steps} | again
    shown = {"among": train, "decoder": folder / "decoder", "output-dir": folder / "imagined", "horizon": horizon}
    yield "imagine", judged | shown
    yield "surprise", judged | {"output-dir": folder / "surprise"}
    runs = tuple(folder / name for name in names)
    yield "report", {"runs": runs, "output-dir": folder / "report", "overwrite": True}


def divide(options: Options, folder: Path) -> dict[str, list[VideoInfo]]:
    """Videos by split, each in a manifest. Raises `UserError` where the folder is not ours, or of other videos."""
    is_ours = (folder / "videos.jsonl").exists() or not folder.exists()
    require(is_ours, f"--output-dir {folder.parent} has a folder {folder.name} of somebody else: take another one")
    videos, account = check_videos(
        [path.absolute() for path in options.videos], fps=options.fps, manifest=folder / "videos.jsonl",
        image_fps=options.image_fps,
    )  # fmt: skip
    least_s = (MLPConfig().context + LEAST) / options.fps
    for video in videos:
        if 0 < video.duration_s < least_s:
            few = f"{video.path}: its {video.duration_s:.1f} s are less than the {least_s:.1f} s that a forecast takes"
            account.refused[str(video.path)] = f"{few} at --fps {options.fps:g}: raise that, or bring longer videos"
        else:
            account.add(video.path, video.duration_s, Damage())
    print(account)
    videos = [video for video in videos if str(video.path) not in account.refused]
    require(bool(videos), next(iter(account.refused.values()), ""))
    parts = split_videos(videos)
    for split, part in parts.items():
        path, contents = folder / f"{split}.jsonl", {video.content for video in part}
        before = {record.video.content for record in read_manifest(path) if record.video} if path.exists() else contents
        others = f"gone: {len(before - contents)}, new: {len(contents - before)}"
        said = f"{folder.parent} was begun with other videos ({others}): take another --output-dir, or go on by hand"
        require(before == contents, said)
        record_videos(path, part)
        minutes = sum(video.duration_s for video in part) / 60
        print(f"{split}: {counted(len(part), 'video')}, {minutes:.1f} minutes, {part[0].path.name} ...")
    write_json(folder / "account.json", account)
    return parts


def usual_horizon(parts: dict[str, list[VideoInfo]], fps: float) -> int:
    """Ticks that can be forecast in most videos of each split."""
    usual_s = min(median(video.duration_s for video in part) for part in parts.values())
    return max(LEAST, min(HORIZON, int(usual_s * fps) - MLPConfig().context))


def batch_of(parts: dict[str, list[VideoInfo]], fps: float) -> int:
    """Pairs in a batch: fewer than usual, a power of two, where a folder is so small that it has not as many."""
    pairs = SURE * sum(video.duration_s * fps - 1 for video in parts["train"])
    return min(PAIRS, 2 ** int(math.log2(max(2.0, pairs))))


if __name__ == "__main__":
    run_command(main, Options)
