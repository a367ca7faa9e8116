r"""Is what was planted seen, and where it was planted? Events in ordinary videos, to choose settings by.

  python -m benchmarks.planted --run runs/benchmarks/ped2

Into each validation clip of a finished run of `benchmarks/ped2.py` something is pasted for three seconds: a patch from
`elsewhere`, of another video, at the pace of a walker, or a `large` one, twice as wide and high; a walker who is
`fast`, two and a half times the pace, or `faster`, five times, or large and fast; one who goes `backwards`, as he was
filmed from end to beginning. The clip that nothing was pasted into is encoded alike. For each size of neighbourhoods
and share of places: the area under the ROC curve between moments with and without, and how often, where the energy is
above the 95th percentile of ordinary moments, the highest cell lies on what was pasted. No label of a test is looked
at.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import jepa.calibration
from benchmarks.common import markdown, read_json, run, shared, write_results
from data.cache import EmbeddingCache
from data.clock import read_on_clock
from data.synthetic import write_video
from data.video import probe_video
from data.windows import Windows
from jepa.calibration import mean_of_neighbours, most_surprising
from jepa.config import Bounded
from pipelines.run.command import run_command
from pipelines.run.files import write_json
from pipelines.run.models import load_predictor
from pipelines.run.scoring import Scorer, Scores, score_videos

HEIGHT, WIDTH = 36, 20
"""Of what is pasted, in pixels; a walker of Ped2."""
PACE, SECONDS = 12.0, 3.0
"""Pixels a second, and how long it is there."""


class Kind(NamedTuple):
    """Something that is pasted."""

    what: str
    """`foreign`, a `walker`, or one `backwards`."""
    pace: float = 1.0
    """In paces of a walker, then in sizes of one."""
    size: int = 1


KINDS = {
    "elsewhere": Kind("foreign"),
    "large": Kind("foreign", size=2),
    "fast": Kind("walker", pace=2.5),
    "faster": Kind("walker", pace=5.0),
    "large_fast": Kind("walker", pace=2.5, size=2),
    "backwards": Kind("backwards"),
}


@dataclass(frozen=True)
class Options(Bounded):
    """Events that were planted in ordinary videos."""

    run: Path = Path("runs/benchmarks/ped2")
    """Finished run of `benchmarks/ped2.py`."""
    neighbourhoods: tuple[float, ...] = (0.07, 0.2, 0.33)
    """Sizes to compare, as shares of the picture's shorter side."""
    most_surprising: tuple[float, ...] = (0.001, 0.03, 0.1, 0.2)
    """Shares of the places that a moment is told by, to compare."""
    horizons: tuple[int, ...] = (1, 2, 3, 4)
    """Ticks whose energies are averaged."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """What is planted."""
    output_dir: Path = Path("runs/benchmarks/planted")
    """Where videos, caches and results are left."""


def main(options: Options) -> None:
    """The story: plant, embed, score with each setting, compare."""
    cache = EmbeddingCache(options.run / "cache" / "val")
    clips = [Path(source) for source in dict.fromkeys(clip.key.source for clip in cache.clips)]
    for kind in ("nothing", *options.kinds):
        for number, clip in enumerate(clips):
            plant(clip, KINDS.get(kind), options.output_dir / "videos" / kind, seed=number)
        run("cache_embeddings", {
            "videos": options.output_dir / "videos" / kind, "encoder": options.run / "cache" / "train" / "encoder",
            "fps": cache.provenance.fps, "clocks": 4, "batch-size": 16,
            "output-dir": options.output_dir / "cache" / kind,
        })  # fmt: skip
    predictor, calibration = load_predictor(options.run / "predictor_0")
    scorer, scores = Scorer(predictor, calibration, options.horizons), dict[str, list[Scores]]()
    vars(jepa.calibration)["NEIGHBOURHOOD"] = 0.0  # places by themselves
    for kind in ("nothing", *options.kinds):
        watched = EmbeddingCache(options.output_dir / "cache" / kind)
        scores[kind] = list(score_videos(scorer, Windows(watched, scorer.length)))
    found: dict[str, dict[str, list[float]]] = {}
    for size, share in itertools.product(options.neighbourhoods, options.most_surprising):
        vars(jepa.calibration).update(NEIGHBOURHOOD=size, MOST_SURPRISING=share)
        seen = {kind: [scored_anew(one) for one in of_kind] for kind, of_kind in scores.items()}
        found[f"{size:g}, {share:g}"] = {kind: judge(seen["nothing"], seen[kind]) for kind in options.kinds}
    write_results(options.output_dir, found)
    rows = [[size, *(cell for values in kinds.values() for cell in values)] for size, kinds in found.items()]
    heads = [f"{kind}: {what}" for kind in options.kinds for what in ("AUROC", "on it")]
    print(markdown([["neighbourhood, places", *heads], *rows]))


def scored_anew(scores: Scores) -> Scores:
    """The same by the neighbourhoods and the share of places that are set now, of the mean over horizons."""
    maps = mean_of_neighbours(torch.from_numpy(scores.maps)[:, None])  # (N, 1, *tokens)
    return replace(scores, maps=maps[:, 0].numpy(), energies=most_surprising(maps)[:, 0].double().numpy())


def plant(clip: Path, kind: Kind | None, folder: Path, *, seed: int) -> None:
    """Write the clip with something pasted in, and beside it where."""
    path, generator = folder / clip.name, np.random.default_rng(seed)
    if path.with_suffix(".json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    info = probe_video(clip)
    timed = list(read_on_clock(clip, (info.height, info.width), fps=info.average_fps))
    frames = np.stack([one.frame for one in timed]).transpose(0, 2, 3, 1).copy()
    fps = info.average_fps
    first = int(generator.integers(fps, len(frames) - (SECONDS + 1) * fps))
    what, pace, size = kind or Kind("walker")
    patch = (
        (foreign_patch(generator) if what == "foreign" else find_walker(frames))
        .repeat(size, axis=1)
        .repeat(size, axis=2)
    )
    height, width = patch.shape[1:3]
    top = int(generator.integers(info.height // 2, info.height - HEIGHT - 20)) - (height - HEIGHT)
    places = [(float("nan"), float("nan"))] * len(frames)
    for step in range(int(SECONDS * fps) if kind else 0):
        left = int(info.width * 0.2 + PACE * pace * step / fps)
        pasted = patch[-1 - step % len(patch)] if what == "backwards" else patch[step % len(patch)]
        frames[first + step, top : top + height, left : left + width] = pasted
        places[first + step] = (top + height / 2) / info.height, (left + width / 2) / info.width
    write_video(path, frames, fps)
    write_json(path.with_suffix(".json"), {
        "times_s": [one.time_s for one in timed], "places": places, "size": [height / info.height, width / info.width],
    })  # fmt: skip


def find_walker(frames: np.ndarray) -> np.ndarray:
    """The liveliest place of a clip over a second, uint8 (T, HEIGHT, WIDTH, 3)."""
    change = np.abs(np.diff(frames[:11].astype(np.float32), axis=0)).mean(axis=(0, 3))
    sums = np.pad(change, ((1, 0), (1, 0))).cumsum(axis=0).cumsum(axis=1)
    boxes = sums[HEIGHT:, WIDTH:] - sums[:-HEIGHT, WIDTH:] - sums[HEIGHT:, :-WIDTH] + sums[:-HEIGHT, :-WIDTH]
    top, left = np.unravel_index(boxes.argmax(), boxes.shape)
    return frames[:11, top : top + HEIGHT, left : left + WIDTH].copy()


def foreign_patch(generator: np.random.Generator) -> np.ndarray:
    """Something of another video, uint8 (1, HEIGHT, WIDTH, 3), as grey as the others are."""
    frame = next(iter(read_on_clock(shared("driving") / "b_01.mp4", (160, 320), fps=1))).frame
    left = int(generator.integers(0, 300 - WIDTH))
    grey = frame[:, 60 : 60 + HEIGHT, left : left + WIDTH].mean(axis=0, keepdims=True)
    return np.repeat(grey, 3, axis=0).transpose(1, 2, 0)[None].astype(np.uint8)


def judge(ordinary: list[Scores], planted: list[Scores]) -> list[float]:
    """Area under the curve of moments with something against the same of the clip without; how often it is on it."""
    truths, energies, right, loud = [], [], 0, 0
    level = np.quantile(np.concatenate([scores.energies for scores in ordinary]), 0.95)
    for without, scores in zip(ordinary, planted, strict=True):
        where = read_json(scores.video.with_suffix(".json"))
        places = np.array(where["places"], dtype=float)
        at = np.abs(np.subtract.outer(scores.times_s, where["times_s"])).argmin(axis=1)
        is_there = np.isfinite(places[at, 0])
        truths += [np.ones(is_there.sum()), np.zeros(len(without.energies))]
        energies += [scores.energies[is_there], without.energies]
        grid = scores.maps.shape[1:]
        for moment in np.flatnonzero(is_there & (scores.energies > level)):
            highest = np.unravel_index(scores.maps[moment].argmax(), grid)
            off = np.abs(np.add(highest, 0.5) - places[at[moment]] * grid)
            right, loud = right + bool((off <= np.multiply(where["size"], grid) / 2 + 1).all()), loud + 1
    return [float(roc_auc_score(np.concatenate(truths), np.concatenate(energies))), right / max(loud, 1)]


if __name__ == "__main__":
    run_command(main, Options)
