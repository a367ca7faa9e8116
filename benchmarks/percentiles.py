r"""Do percentiles mean what they say? Ordinary clips that nothing was fitted on should be ordinary.

  python -m benchmarks.percentiles --runs runs/benchmarks/balls/seed_0 runs/benchmarks/robot/published

The 16 training clips of UCSD Ped2 (Mahadevan et al. 2010, a walkway from above, nothing abnormal in them; needs them in
`$JEPA_SHARED/ped2`) are left out in turn: encoder and predictor learn from the others, every fourth of these chooses
and calibrates, and the one left out is scored. Of finished runs of other benchmarks the validation and test clips are
left out in turn, in as many parts: the model stays, and is calibrated on the others. Prints which share of the frames
lies above the 99th and above the 90th percentile, in the mean over clips, and writes `results.json`.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import Recipe, embed, markdown, read_scores, run_once, shared, train, train_on, write_results
from data.cache import EmbeddingCache
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from pipelines.run.command import run_command
from pipelines.run.judging import calibrate
from pipelines.run.models import load_predictor
from pipelines.run.scoring import Scorer, score_videos

LEVELS = (99, 90)


@dataclass(frozen=True)
class Options(Bounded):
    """Share of ordinary frames above percentiles, on clips that nothing was fitted on."""

    runs: tuple[Path, ...] = ()
    """Finished runs, each with `encoder/`, `predictor/`, `cache/val` and `cache/test`."""
    walkway: bool = True
    """Leave out the clips of the walkway in turn."""
    parts: PositiveInt = 16
    """Parts in which clips are left out; at 16 each of the walkway alone."""
    steps: tuple[PositiveInt, PositiveInt] = (500, 400)
    """Steps of the encoder and of the predictor."""
    horizon: PositiveInt = 1
    """Ticks before a moment that it is forecast from."""
    output_dir: Path = Path("runs/benchmarks/percentiles")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: train without each part of the walkway and score it, score the runs, print."""
    shares: dict[str, dict[str, list[float]]] = {}
    for folder in options.runs:
        shares[str(folder)] = score_in_turn(folder, options)
    if options.walkway:
        clips = sorted((shared("ped2") / "train").glob("*.mp4"))
        shares["walkway"] = {}
        for part, left_out in enumerate(np.array_split(np.array(clips), options.parts)):
            folder = options.output_dir / f"walkway_{part:02}"
            train_without(clips, left_out.tolist(), folder, options)
            shares["walkway"] |= score(folder, folder / "surprise", options)
    write_results(options.output_dir, shares)
    rows: list[list[object]] = [["clips", "number", *(f"above {level}, %" for level in LEVELS), "worst clip"]]
    for name, of_clips in shares.items():
        values = 100 * np.array(list(of_clips.values()))  # (clips, levels)
        rows.append(
            [name, len(values), *map(float, values.mean(axis=0)), f"{values[:, 0].max():.1f} above {LEVELS[0]}"]
        )
    print(markdown(rows))


def train_without(clips: Sequence[Path], left_out: Sequence[Path], folder: Path, options: Options) -> None:
    """Encoder, caches and predictor of all clips but those left out, which are the test."""
    others = [clip for clip in clips if clip not in left_out]
    videos = {"train": [clip for index, clip in enumerate(others) if index % 4], "val": others[::4], "test": left_out}
    train("pretrain_encoder", folder / "encoder", {"videos": videos["train"], "fps": 10, "steps": options.steps[0]},
          {"encoder.image-size": (64, 96)})  # fmt: skip
    embed(folder / "cache", videos, folder / "encoder", Recipe(fps=10))
    train_on(folder / "cache", folder / "predictor", {"steps": options.steps[1]})


def score_in_turn(folder: Path, options: Options) -> dict[str, list[float]]:
    """Shares of the moments of each held-out clip above each of `LEVELS`, by a calibration on the other parts."""
    predictor, calibration = load_predictor(folder / "predictor")
    parts = [EmbeddingCache(folder / "cache" / split) for split in ("val", "test")]
    videos = [clip.key.source for part in parts for clip in part.clips]
    both = {"both": [Path(video) for video in videos]}
    caches = options.output_dir / f"{folder.parent.name}_{folder.name}"
    embed(caches, both, folder / "encoder", Recipe(predictor.fps))
    cache = EmbeddingCache(caches / "both")
    shares: dict[str, list[float]] = {}
    for left_out in np.array_split(np.arange(len(cache.clips)), options.parts):
        others, mine = copy.copy(cache), copy.copy(cache)
        others.clips = [clip for number, clip in enumerate(cache.clips) if number not in left_out]
        mine.clips = [cache.clips[number] for number in left_out]
        anew, _ = calibrate(predictor, calibration.ridge, others, horizon=calibration.horizon)
        scorer = Scorer(predictor, anew, (options.horizon,))
        for scores in score_videos(scorer, Windows(mine, scorer.length)):
            shares[str(scores.video)] = [float((scores.percentiles > level).mean()) for level in LEVELS]
    return shares


def score(folder: Path, output: Path, options: Options) -> dict[str, list[float]]:
    """Shares of the frames of each test clip of a run above each of `LEVELS`."""
    given = {"cache": folder / "cache" / "test", "predictor": folder / "predictor", "horizons": options.horizon}
    run_once("score_surprise", output, given, {"peaks": 1})
    found = read_scores(output / "surprise.csv", "percentile")
    return {clip: [float((values > level).mean()) for level in LEVELS] for clip, values in found.items()}


if __name__ == "__main__":
    run_command(main, Options)
