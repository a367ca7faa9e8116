r"""When does a video do what the world model did not expect?

  video-jepa surprise --cache cache/test --predictor runs/predictor --output-dir runs/surprise
  video-jepa surprise --videos VIDEO... --encoder runs/encoder/encoder --predictor runs/predictor

The second embeds the videos first, into OUTPUT/cache. Leaves `surprise.csv` (a row for each frame with enough past),
`peaks.csv` (the most surprising moments of each video, with a `rank`); `video-jepa report` shows them. Energy is the
error of the believed forecast in units of what is usual (mean 1), of a grid of tokens at its most surprising places,
the highest of which `row` and `column` name, while `maps.csv` has the energies of all places at each peak. The
percentile says how much of ordinary video has less. The change cosine says whether things went as expected, from 1 by 0
to -1: its mean over seconds notices what goes wrong for longer, such as a film that runs backwards.

  video-jepa surprise --cache cache/last_night --normal cache/other_nights --alarms-per-hour 1 --horizons 1 2 3 4

With ordinary videos that nothing was fitted on, `events.csv` says what is rarer than that in them: from when to when,
the peak and, of a grid, the cells; and how many false alarms are to be expected.
"""

import csv
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.errors import printable
from data.files import apart
from data.picture import IMAGE_FPS
from jepa.alarms import Alarm, choose_threshold, find_events, hours_of
from jepa.calibration import FAR_LEVEL
from jepa.config import Bounded, Bounds, NotNegative, Positive, PositiveInt
from jepa.metrics import roc_auc
from jepa.predictor import Predictor
from jepa.rivals import Rival, Rivals
from pipelines.run.caches import require_no_video_in_both
from pipelines.run.command import UserError, counted, require, run_command
from pipelines.run.files import read_json
from pipelines.run.folder import RunFolder, read_mark
from pipelines.run.models import find_columns, inputs_of, load_predictor, open_cache, windows_for
from pipelines.run.scoring import BOX, DIGITS, PLACE, SPAN, Scorer, Scores, fit_rivals, ignored_places, score_videos
from pipelines.run.stages import run_stage


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
    """Most surprising moments of each video that are listed."""
    normal: Path | None = None
    """Embeddings of ordinary videos that nothing was fitted on, to choose the threshold of alarms by."""
    alarms_per_hour: Positive = 1.0
    """False alarms that are borne in an hour of ordinary video."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Score each video, say what is surprising."""
    folder, device = options.output_dir, Accelerator().device
    output = RunFolder(options, "score_surprise", ("surprise.csv", "peaks.csv", "maps.csv", "events.csv"))
    require(bool(options.videos) != bool(options.cache), "give --cache, or --videos to embed first")
    predictor, calibration = load_predictor(options.predictor, device)
    farthest = max(options.horizons, default=0)
    known = f"the calibration knows what is usual from 1 to {calibration.horizon} ticks ahead"
    mend = "give such, or run video-jepa calibrate with a larger horizon"
    require(0 < farthest <= calibration.horizon, f"--horizons are {options.horizons}, and {known}: {mend}")
    ignored = ignored_places(options.ignore_region, predictor) if options.ignore_region else None
    scorer = Scorer(predictor, calibration, options.horizons, ignored, smoothing_s=options.smoothing)
    cache = open_cache(options.cache or embed(options, predictor), predictor)
    windows, truth = windows_for(cache, predictor, scorer.length), find_columns(cache, filter(None, [options.truth]))
    require(len(truth) < 2, f"--truth {options.truth} stands for {', '.join(truth)}: name one")
    alarm = choose_alarm(options, scorer, cache) if options.normal else None
    rivals = find_rivals(options, scorer)
    offsets_s = sorted({clip.key.offset_s for clip in cache.clips})
    output.begin(inputs_of(options.predictor, cache) | {"offsets_s": offsets_s})
    simple = rivals.names if rivals else ()
    columns = apart(truth, ("video", *DIGITS, *PLACE, *simple))
    with Tables(folder, alarm, (*simple, *columns), places=predictor.shape[:-1]) as tables:
        for scores in score_videos(scorer, windows, rivals, columns=columns):
            peaks = scores.peaks(options.peaks)
            tables.write(scores, peaks)
            say(scores, peaks[0])
    silent = len({clip.key.source for clip in cache.clips}) - len(tables.levels)
    far = sum(level > FAR_LEVEL for level in tables.levels)
    output.finish({
        "videos": len(tables.levels), "too_short_videos": silent, "far_from_calibration": far,
        "mean_energy": float(np.concatenate(tables.columns["energy"]).mean()),
        "events": tables.events if alarm else None, "threshold": alarm.threshold if alarm else None,
    } | (areas := tables.areas(*columns) if columns else {}))  # fmt: skip
    for name, area in sorted(areas.items(), key=lambda one: -one[1]):
        print(f"  area under the ROC curve of {options.truth}: {name.removeprefix('auroc_'):12} {area:.3f}")
    if silent:
        print(f"{counted(silent, 'video')} without {windows.length} frames in a row: not scored")
    if alarm:
        low, high = alarm.expected(tables.hours)
        events = f"{counted(tables.events, 'event')} of an energy above {alarm.threshold:.2f}"
        ordinary = f"the {60 * alarm.hours:.1f} of {options.normal}"
        print(f"{events} in {60 * tables.hours:.1f} minutes; were they as ordinary as {ordinary}, there would be "
              f"{low} to {high}")  # fmt: skip
    print(f"wrote {folder}/{', '.join(tables.writers)}. To see it:")
    print(f"  video-jepa report --runs {options.predictor} {folder} --output-dir runs/report")


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


class Tables(ExitStack):
    """The tables of a scoring, written video by video, and what is summed over all."""

    def __init__(self, folder: Path, alarm: Alarm | None, beside: Sequence[str], *, places: Sequence[int]) -> None:
        super().__init__()
        moment = (*DIGITS, *PLACE * bool(places))
        heads = {"surprise.csv": (*moment, *beside), "peaks.csv": ("rank", *moment)}
        if places:
            heads["maps.csv"] = ("rank", *(f"cell_{row}_{column}" for row, column in np.ndindex(*places)))
        if alarm:
            heads["events.csv"] = (*SPAN, *BOX * bool(places))
        self.writers = {name: csv.writer(self.enter_context((folder / name).open("w", newline=""))) for name in heads}
        for name, writer in self.writers.items():
            writer.writerow(("video", *heads[name]))
        self.alarm, self.levels, self.events, self.hours = alarm, list[float](), 0, 0.0
        self.columns: dict[str, list[np.ndarray]] = {name: [] for name in ("energy", *beside)}

    def write(self, scores: Scores, peaks: list[int]) -> None:
        """Add a video."""
        video = str(scores.video).encode(errors="backslashreplace").decode()  # names need not be UTF-8
        texts = [scores.as_text(place) for place in range(len(scores.times_s))]
        beside = [[f"{value:.4g}" for value in values] for values in scores.beside.values()]
        events = find_events(scores.timeline, self.alarm.threshold) if self.alarm else []
        rows: dict[str, Iterable[Sequence[Any]]] = {
            "surprise.csv": ([*text, *values] for text, *values in zip(texts, *beside, strict=True)),
            "peaks.csv": ([rank, *texts[peak]] for rank, peak in enumerate(peaks, start=1)),
            "maps.csv": ([rank, *(f"{cell:.4g}" for cell in scores.maps[peak].flat)]
                         for rank, peak in enumerate(peaks, start=1)),
            "events.csv": map(scores.event_as_text, events),
        }  # fmt: skip
        for name, writer in self.writers.items():
            writer.writerows([video, *row] for row in rows[name])
        for name, values in ({"energy": scores.energies} | scores.beside).items():
            self.columns[name].append(values)
        self.levels.append(scores.level)
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
        found, wanted = read_json(folder / "config.json").get("fingerprint"), predictor.encoder_fingerprint
        said = f"--encoder {encoder} is encoder {found}, and the predictor's is {wanted}: take that one"
        require(found == wanted, said)
        encoder = str(folder.absolute())
    videos = tuple(path.absolute() for path in options.videos)
    given = {"videos": videos, "encoder": encoder, "fps": fps, "image-fps": options.image_fps, "output-dir": cache}
    run_stage("embed", given | ({"columns": predictor.actions} if predictor.actions else {}))
    return cache


def say(scores: Scores, highest: int) -> None:
    """A line on the screen about a video."""
    time_s, energy = scores.times_s[highest], scores.energies[highest]
    said = f"  {scores.video}: most surprising at {time_s:.2f} s (energy {energy:.1f})"
    if scores.level > FAR_LEVEL:
        said += "; its ordinary level is far above what the calibration calls ordinary: percentiles say little of it"
    tqdm.write(printable(said))


if __name__ == "__main__":
    run_command(main, Options)
