r"""When does a video do what the world model did not expect?

  video-jepa surprise --cache cache/test --predictor runs/predictor --output-dir runs/surprise
  video-jepa surprise --videos VIDEO... --encoder runs/encoder/encoder --predictor runs/predictor

The second embeds the videos first, into OUTPUT/cache. Leaves `surprise.csv` (a row for each frame with enough past),
`peaks.csv` (the most surprising moments of each video, with a `rank`), `pictures/NAME.png` (both curves) and
`peaks/NAME.png` (each peak among the frames around it). Energy is the error of the believed forecast in units of what
is usual (mean 1), of a grid of tokens that of its most surprising place, which `row` and `column` name and the pictures
show; the percentile says how much of ordinary video has less. The change cosine says whether things went as expected,
from 1 by 0 to -1: its mean over seconds notices what goes wrong for longer, such as a film that runs backwards.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy.ndimage import maximum_filter1d
from tqdm import tqdm

from data.cache import Provenance
from data.errors import DataError, printable
from data.video import IMAGE_FPS
from data.windows import Windows
from jepa.calibration import FAR_LEVEL, Calibration
from jepa.config import Bounded, Positive, PositiveInt
from jepa.metrics import change_cosine
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.command import counted, require, require_one_process, run_command
from pipelines.run.folder import RunFolder
from pipelines.run.models import in_batches, inputs_of, load_predictor, open_cache
from pipelines.run.pictures import Scores, draw_peaks, draw_surprise, plain
from pipelines.run.stages import run_stage

COLUMNS = ("time_s", "energy", "percentile", "change_cosine")
PLACE = ("row", "column")


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
    horizons: tuple[PositiveInt, ...] = (1,)
    """Ticks ahead of a past whose energies are averaged. 1 notices best what is sudden, 1 2 3 4 what goes astray."""
    peaks: PositiveInt = 5
    """Most surprising moments of each video that are shown."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Score each video, say and show what is surprising."""
    require_one_process()
    folder, device = options.output_dir, Accelerator().device
    output = RunFolder(options, "score_surprise", ("surprise.csv", "peaks.csv", "pictures", "peaks"))
    require(bool(options.videos) != bool(options.cache), "give --cache, or --videos to embed first")
    predictor, calibration = load_predictor(options.predictor, device)
    farthest = max(options.horizons, default=0)
    require(
        0 < farthest <= calibration.horizon,
        f"--horizons are {options.horizons}, and the calibration knows what is usual from 1 to {calibration.horizon} "
        "ticks ahead: give such, or run video-jepa calibrate with a larger horizon",
    )
    cache = open_cache(options.cache or embed(options, predictor.fps), predictor)
    windows = Windows(cache, predictor.config.context + farthest)
    output.begin(inputs_of(options.predictor, cache))
    for name in ("pictures", "peaks"):
        (folder / name).mkdir(exist_ok=True)
    frames, energy, videos, far = 0, 0.0, 0, 0
    with (folder / "surprise.csv").open("w", newline="") as every, (folder / "peaks.csv").open("w", newline="") as best:
        moments, highest = csv.writer(every), csv.writer(best)
        columns = COLUMNS + PLACE * (len(predictor.shape) > 1)
        moments.writerow(["video", *columns])
        highest.writerow(["video", "rank", *columns])
        for scores in score_clips(predictor, calibration, windows, options.horizons):
            peaks = find_peaks(scores)[: options.peaks]
            video = str(scores.video).encode(errors="backslashreplace").decode()  # names need not be UTF-8
            moments.writerows([video, *scores.as_text(place)] for place in range(len(scores.ticks)))
            highest.writerows([video, rank, *scores.as_text(peak)] for rank, peak in enumerate(peaks, start=1))
            show(scores, peaks, folder, cache.provenance)
            frames, energy = frames + len(scores.ticks), energy + float(scores.energies.sum())
            videos, far = videos + 1, far + (scores.level > FAR_LEVEL)
    silent = len(cache.clips) - videos
    counts = {"videos": videos, "too_short_videos": silent, "far_from_calibration": far}
    output.finish({**counts, "mean_energy": energy / frames})
    if silent:
        print(f"{counted(silent, 'video')} without {windows.length} frames in a row: not scored")
    print(f"wrote {folder}/surprise.csv and peaks.csv, and pictures of each video in pictures and peaks")


def embed(options: Options, fps: float) -> Path:
    """The cache of the videos in the output folder, in which what is there already is not embedded again."""
    cache = (options.output_dir / "cache").absolute()
    encoder = str(Path(options.encoder).absolute()) if Path(options.encoder).is_dir() else options.encoder
    videos = tuple(path.absolute() for path in options.videos)
    run_stage(
        "embed", {"videos": videos, "encoder": encoder, "fps": fps, "image-fps": options.image_fps, "output-dir": cache}
    )
    return cache


@torch.no_grad()
def score_clips(
    predictor: Predictor, calibration: Calibration, windows: Windows, horizons: tuple[int, ...]
) -> Iterator[Scores]:
    """The scores of each clip, one after the other, in memory that does not depend on their number.

    From each past so much future is forecast as its window has; its moment lies in the middle of the horizons.
    """
    context, cache, device = predictor.config.context, windows.cache, predictor.mean.device
    ordinary, middle = calibration.ordinary(horizons), round(sum(horizons) / len(horizons))
    ahead, future = torch.tensor(horizons).to(device), Future.ticks(windows.length - context, predictor.fps)
    numbers = np.arange(len(windows))
    by_clip = np.split(numbers, np.flatnonzero(np.diff(windows.clip_of(numbers))) + 1)
    for chosen in tqdm(by_clip, desc="scoring", unit="clip", leave=False):
        parts = []
        for _, embeddings in in_batches(windows, chosen, device):
            past, came = Sequence.on_clock(embeddings[:, :context], predictor.fps), embeddings[:, context:]
            believed = rollout(predictor, past, future, calibration=calibration)
            maps = calibration.energy_map(believed[:, ahead - 1], came[:, ahead - 1], ahead)
            standardised = (predictor.standardise(part) for part in (believed, came, past.embeddings[:, -1:]))
            expected, seen, last = standardised
            cosines = change_cosine(expected[:, middle - 1, None], seen[:, middle - 1, None], last[:, 0])
            energies = calibration.highest(maps, ahead).mean(dim=1)
            parts.append([part.cpu() for part in (energies, cosines[:, 0], maps.mean(dim=1))])
        energies, cosines, maps = (torch.cat(part) for part in zip(*parts, strict=True))
        rows = windows.rows(chosen)[:, context + middle - 1]
        yield Scores(
            video=Path(cache.clips[windows.clip_of(chosen[:1])[0]].key.source),
            ticks=cache.take(rows, "ticks"),
            times_s=cache.take(rows, "times_s"),
            energies=energies.double().numpy(),
            percentiles=ordinary.percentile(energies).numpy(),
            cosines=cosines.double().numpy(),
            maps=maps.numpy(),
            level=ordinary.level(energies.double()),
            reach=windows.length - 1,
        )


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


def find_peaks(scores: Scores) -> list[int]:
    """Frames of more energy than all within `reach` ticks, the most surprising first.

    So long after an event a frame may be forecast from a past that it is part of, and echo it.
    """
    first, energies = scores.ticks[0], np.full(int(scores.ticks[-1] - scores.ticks[0]) + 1, -np.inf)
    energies[scores.ticks - first] = scores.energies
    highest = maximum_filter1d(energies, 2 * scores.reach + 1, mode="constant", cval=-np.inf)[scores.ticks - first]
    places = np.flatnonzero(scores.energies >= highest)
    return places[np.argsort(-scores.energies[places], kind="stable")].tolist()


def picture_name(video: Path, folder: Path) -> str:
    """A new name for a video's picture, short enough for any file system."""
    stem = plain(video.stem)[:60]
    names = (f"{stem}_{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
    return next(name for name in names if not (folder / name).exists())


if __name__ == "__main__":
    run_command(main, Options)
