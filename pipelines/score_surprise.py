r"""When does a video do what the world model did not expect?

  video-jepa surprise --cache cache/test --predictor runs/predictor --output-dir runs/surprise
  video-jepa surprise --videos VIDEO... --encoder runs/encoder/encoder --predictor runs/predictor

The second embeds the videos first, into OUTPUT/cache. Leaves `surprise.csv` (a row for each frame with enough past),
`peaks.csv` (the most surprising moments of each video, with a `rank`), `pictures/NAME.png` (both curves) and
`peaks/NAME.png` (each peak among the frames around it). Energy is the error of the believed forecast in units of what
is usual (mean 1), of a grid of tokens at its most surprising places, the highest of which `row` and `column` name and
the pictures show; the percentile says how much of ordinary video has less. The change cosine says whether things went
as expected, from 1 by 0 to -1: its mean over seconds notices what goes wrong for longer, such as a film that runs
backwards.

  video-jepa surprise --cache cache/last_night --normal cache/other_nights --alarms-per-hour 1 --horizons 1 2 3 4

With ordinary videos that nothing was fitted on, `events.csv` says what is rarer than that in them: from when to when,
the peak and, of a grid, the cells; and how many false alarms are to be expected.
"""

import csv
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from data.cache import EmbeddingCache, Provenance
from data.errors import DataError, printable
from data.video import IMAGE_FPS
from jepa.alarms import Alarm, choose_threshold, find_events, hours_of
from jepa.calibration import FAR_LEVEL
from jepa.config import Bounded, Bounds, NotNegative, Positive, PositiveInt
from jepa.metrics import roc_auc
from jepa.predictor import Predictor
from jepa.rivals import Rival, Rivals
from pipelines.run.artefacts import artefact_fingerprint
from pipelines.run.command import UserError, counted, require, require_one_process, run_command
from pipelines.run.folder import RunFolder, read_mark
from pipelines.run.models import (
    find_columns,
    inputs_of,
    load_predictor,
    open_cache,
    require_no_video_in_both,
    windows_for,
)
from pipelines.run.pictures import draw_peaks, draw_surprise, plain
from pipelines.run.scoring import BOX, PLACE, SPAN, Scorer, Scores, fit_rivals, ignored_places, score_videos
from pipelines.run.stages import run_stage

COLUMNS = ("time_s", "energy", "percentile", "change_cosine")


@dataclass(frozen=True)
class Options(Bounded):
    """Score how surprising each moment of a video is to the world model."""

    cache: Path | None = None
    """Embeddings of the videos to score."""
    videos: tuple[Path, ...] = ()
    """Videos to embed and score, instead of a cache."""
    encoder: str = "runs/encoder/encoder"
    """Encoder of the predictor's embeddings; for videos."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images among the videos whose names are no times."""
    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor: the predictor and its calibration."""
    output_dir: Path = Path("runs/surprise")
    """Where the results are left."""
    ignore_region: Path | None = None
    """Picture of the frame, white where nothing counts, such as a clock or a tree; for grids of tokens."""
    horizons: tuple[PositiveInt, ...] = (1,)
    """Ticks ahead of a past whose energies are averaged. 1 notices best what is sudden, 1 2 3 4 what goes astray."""
    smoothing: NotNegative = 0.0
    """Seconds up to a moment that its energy is the mean of; for what is there for longer than it takes to happen."""
    score: tuple[Rival, ...] = ("copying", "mahalanobis", "difference")
    """Simple scores beside the energy, fitted on the videos that the predictor was trained on."""
    truth: str = ""
    """Column of the cache that is above 0 where something happened: says which score tells it best."""
    peaks: Annotated[int, Bounds("from 1 to 100", lambda value: 1 <= value <= 100)] = 5
    """Most surprising moments of each video that are shown."""
    normal: Path | None = None
    """Embeddings of ordinary videos that nothing was fitted on, to choose the threshold of alarms by."""
    alarms_per_hour: Positive = 1.0
    """False alarms that are borne in an hour of ordinary video."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Score each video, say and show what is surprising."""
    require_one_process()
    folder, device = options.output_dir, Accelerator().device
    output = RunFolder(options, "score_surprise", ("surprise.csv", "peaks.csv", "events.csv", "pictures", "peaks"))
    require(bool(options.videos) != bool(options.cache), "give --cache, or --videos to embed first")
    predictor, calibration = load_predictor(options.predictor, device)
    farthest = max(options.horizons, default=0)
    require(
        0 < farthest <= calibration.horizon,
        f"--horizons are {options.horizons}, and the calibration knows what is usual from 1 to {calibration.horizon} "
        "ticks ahead: give such, or run video-jepa calibrate with a larger horizon",
    )
    ignored = ignored_places(options.ignore_region, predictor) if options.ignore_region else None
    scorer = Scorer(predictor, calibration, options.horizons, ignored, smoothing_s=options.smoothing)
    cache = open_cache(options.cache or embed(options, predictor), predictor)
    windows, truth = windows_for(cache, predictor, scorer.length), find_columns(cache, filter(None, [options.truth]))
    alarm = choose_alarm(options, scorer, cache) if options.normal else None
    rivals = find_rivals(options, scorer)
    offsets_s = sorted({clip.key.offset_s for clip in cache.clips})
    output.begin(inputs_of(options.predictor, cache) | {"offsets_s": offsets_s})
    for name in ("pictures", "peaks"):
        (folder / name).mkdir(exist_ok=True)
    beside = (*(rivals.names if rivals else ()), *truth)
    with Tables(folder, alarm, beside, on_grid=len(predictor.shape) > 1) as tables:
        for scores in score_videos(scorer, windows, rivals, columns=truth):
            peaks = scores.peaks(options.peaks)
            tables.write(scores, peaks)
            show(scores, peaks, folder, cache.provenance)
    silent = len({clip.key.source for clip in cache.clips}) - len(tables.levels)
    far = sum(level > FAR_LEVEL for level in tables.levels)
    output.finish({
        "videos": len(tables.levels), "too_short_videos": silent, "far_from_calibration": far,
        "mean_energy": tables.energy / tables.moments, "events": tables.events if alarm else None,
        "threshold": alarm.threshold if alarm else None,
    } | (areas := tables.areas(*truth) if truth else {}))  # fmt: skip
    for name, area in sorted(areas.items(), key=lambda one: -one[1]):
        print(f"  area under the ROC curve of {options.truth}: {name.removeprefix('auroc_'):12} {area:.3f}")
    if silent:
        print(f"{counted(silent, 'video')} without {windows.length} frames in a row: not scored")
    if alarm:
        low, high = alarm.expected(tables.hours)
        print(
            f"{counted(tables.events, 'event')} of an energy above {alarm.threshold:.2f} in {60 * tables.hours:.1f} "
            f"minutes; were they as ordinary as the {60 * alarm.hours:.1f} of {options.normal}, there would be {low} "
            f"to {high}"
        )
    print(f"wrote {folder}/{', '.join(tables.names)}, and pictures of each video in pictures and peaks")


def choose_alarm(options: Options, scorer: Scorer, watched: EmbeddingCache) -> Alarm:
    """The alarm that ordinary videos set off as rarely as is asked. Raises `UserError` where they are too few."""
    normal = open_cache(options.normal or Path(), scorer.predictor)
    require_no_video_in_both(normal, watched)
    windows = windows_for(normal, scorer.predictor, scorer.length)
    timelines = [scores.timeline for scores in score_videos(scorer, windows)]
    try:
        return choose_threshold(timelines, options.alarms_per_hour)
    except ValueError as error:
        raise UserError(f"--normal {options.normal}: {error}") from error


def find_rivals(options: Options, scorer: Scorer) -> Rivals | None:
    """Simple scores by the cache that the predictor was trained on, where it is still there."""
    folder = Path(read_mark(options.predictor).get("options", {}).get("train_cache", ""))
    if options.score and not (folder / "cache.json").exists():
        print(f"{folder}, which the predictor has learned from, is not there: no simple scores beside the energy")
    elif options.score:
        return fit_rivals(options.score, scorer, open_cache(folder, scorer.predictor))
    return None


class Tables(AbstractContextManager["Tables"]):
    """The tables of a scoring, written video by video, and sums over all."""

    def __init__(self, folder: Path, alarm: Alarm | None, beside: Sequence[str], *, on_grid: bool) -> None:
        moment = (*COLUMNS, *PLACE * on_grid)
        heads = {"surprise.csv": ("video", *moment, *beside), "peaks.csv": ("video", "rank", *moment)}
        heads |= {"events.csv": ("video", *SPAN, *BOX * on_grid)} if alarm else {}
        self.alarm, self.names = alarm, list(heads)
        self.levels, self.moments, self.energy, self.events, self.hours = list[float](), 0, 0.0, 0, 0.0
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in ("energy", *beside)}
        self.files = [(folder / name).open("w", newline="") for name in heads]
        self.writers = [csv.writer(file) for file in self.files]
        for writer, head in zip(self.writers, heads.values(), strict=True):
            writer.writerow(head)

    def __exit__(self, *error: object) -> None:
        for file in self.files:
            file.close()

    def write(self, scores: Scores, peaks: list[int]) -> None:
        """Add a video."""
        surprise, highest, *alarms = self.writers
        video = str(scores.video).encode(errors="backslashreplace").decode()  # names need not be UTF-8
        beside = [[f"{value:.4g}" for value in scores.beside[name]] for name in scores.beside]
        surprise.writerows([video, *scores.as_text(place), *(one[place] for one in beside)]
                           for place in range(len(scores.times_s)))  # fmt: skip
        highest.writerows([video, rank, *scores.as_text(peak)] for rank, peak in enumerate(peaks, start=1))
        events = find_events(scores.timeline, self.alarm.threshold) if self.alarm else []
        for writer in alarms:
            writer.writerows([video, *scores.event_as_text(event)] for event in events)
        for name, values in ({"energy": scores.energies} | scores.beside).items():
            self.columns[name].append(values)
        self.levels.append(scores.level)
        self.moments, self.energy = self.moments + len(scores.times_s), self.energy + float(scores.energies.sum())
        self.events, self.hours = self.events + len(events), self.hours + hours_of([scores.timeline])

    def areas(self, truth: str) -> dict[str, float]:
        """Areas under the ROC curve over the moments of all videos of which the truth is known."""
        columns = {name: np.concatenate(parts) for name, parts in self.columns.items()}
        happened = columns.pop(truth)
        known = np.isfinite(happened)
        return {f"auroc_{name}": roc_auc(scores[known], happened[known] > 0) for name, scores in columns.items()}


def embed(options: Options, predictor: Predictor) -> Path:
    """The cache of the videos in the output folder, in which what is there already is not embedded again."""
    cache, encoder, fps = (options.output_dir / "cache").absolute(), options.encoder, predictor.fps
    if (folder := Path(encoder)).is_dir():  # a published one is known when it has been fetched
        found, wanted = artefact_fingerprint(folder), predictor.encoder_fingerprint
        require(
            found == wanted, f"--encoder {encoder} is encoder {found}, and the predictor's is {wanted}: take that one"
        )
        encoder = str(folder.absolute())
    videos = tuple(path.absolute() for path in options.videos)
    given = {"videos": videos, "encoder": encoder, "fps": fps, "image-fps": options.image_fps, "output-dir": cache}
    run_stage("embed", given | ({"columns": predictor.actions} if predictor.actions else {}))
    return cache


def show(scores: Scores, peaks: list[int], folder: Path, provenance: Provenance) -> None:
    """Pictures of a video, and a line on the screen."""
    name, highest = picture_name(scores.video, folder / "pictures"), peaks[0]
    draw_surprise(scores, peaks, folder / "pictures" / name)
    try:
        draw_peaks(scores, peaks, provenance, folder / "peaks" / name)
    except (DataError, OSError) as error:  # its scores are there, all the same
        print(printable(f"no pictures of its peaks: {error}"))
    time_s, energy = scores.times_s[highest], scores.energies[highest]
    said = f"  {scores.video}: most surprising at {time_s:.2f} s (energy {energy:.1f})"
    if scores.level > FAR_LEVEL:
        said += "; its ordinary level is far above what the calibration calls ordinary: percentiles say little of it"
    tqdm.write(printable(said))


def picture_name(video: Path, folder: Path) -> str:
    """A new name for a video's picture, short enough for any file system."""
    stem = plain(video.stem)[:60]
    names = (f"{stem}_{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
    return next(name for name in names if not os.path.lexists(folder / name))


if __name__ == "__main__":
    run_command(main, Options)
