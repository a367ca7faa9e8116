r"""When does a video do what the world model did not expect?

  video-jepa surprise --videos VIDEO... --encoder runs/encoder/encoder --predictor runs/predictor \
      --output-dir runs/surprise

Videos are embedded first, into OUTPUT/cache; `--cache cache/test` scores videos that have been. Leaves `surprise.csv`
(a row for each frame with enough past), `peaks.csv` (the most surprising moments of each video, with a `rank`),
`pictures/NAME.png` (both curves) and `peaks/NAME.png` (each peak among the frames around it). Energy is the error of
the believed forecast in units of what is usual (mean 1); the percentile says how much of ordinary video has less. The
change cosine says whether things went as expected, from 1 by 0 to -1: its mean over seconds notices what goes wrong
for longer, such as a film that runs backwards.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from scipy.ndimage import maximum_filter1d
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.errors import DataError
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
from pipelines.run.models import load_predictor, take_finite
from pipelines.run.pictures import Scores, draw_peaks, draw_surprise
from pipelines.run.stages import run_stage

BATCH = 256
COLUMNS = ("time_s", "energy", "percentile", "change_cosine")


@dataclass(frozen=True)
class Options(Bounded):
    """Score how surprising each moment of a video is to the world model."""

    videos: tuple[Path, ...] = ()
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    cache: Path | None = None
    """Embeddings of videos to score, instead of videos."""
    encoder: str = "runs/encoder/encoder"
    """The encoder of the predictor's embeddings."""
    predictor: Path = Path("runs/predictor")
    """Run folder of train_predictor: the predictor and its calibration."""
    output_dir: Path = Path("runs/surprise")
    """Where the results are left."""
    horizon: PositiveInt = 1
    """Ticks before a moment that it is forecast from. 1 notices best what is sudden."""
    peaks: PositiveInt = 5
    """Most surprising moments of each video that are shown."""
    image_fps: Positive = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """Embed what has no embeddings yet, score each video, say and show what is surprising."""
    require_one_process()
    require(bool(options.videos) != bool(options.cache), "give --videos, or --cache with their embeddings")
    folder = options.output_dir
    output = RunFolder(options, "score_surprise", ("surprise.csv", "peaks.csv", "pictures", "peaks"))
    predictor, calibration = load_predictor(options.predictor)
    require(
        options.horizon <= calibration.horizon,
        f"--horizon is {options.horizon}, and the calibration knows what is usual up to {calibration.horizon} ticks "
        "ahead: lower it, or run video-jepa calibrate with a larger one",
    )
    if options.videos:
        embed(options, predictor.fps)
    cache = EmbeddingCache(options.cache or folder / "cache")
    cache.require_same_space(
        predictor.encoder_fingerprint, predictor.fps, str(options.predictor), shape=predictor.shape
    )
    device = Accelerator().device
    windows = Windows(cache, predictor.config.context + options.horizon)
    output.begin({"provenance": cache.provenance, "clips": len(cache.clips)})
    for name in ("pictures", "peaks"):
        (folder / name).mkdir(exist_ok=True)
    frames, energy, videos, far = 0, 0.0, 0, 0
    with (folder / "surprise.csv").open("w", newline="") as every, (folder / "peaks.csv").open("w", newline="") as best:
        moments, highest = csv.writer(every), csv.writer(best)
        moments.writerow(["video", *COLUMNS])
        highest.writerow(["video", "rank", *COLUMNS])
        for scores in score_clips(predictor.to(device), calibration.to(device), windows):
            peaks = find_peaks(scores)[: options.peaks]
            moments.writerows([scores.video, *scores.as_text(place)] for place in range(len(scores.rows)))
            highest.writerows([scores.video, rank, *scores.as_text(peak)] for rank, peak in enumerate(peaks, start=1))
            show(scores, peaks, folder, cache)
            frames, energy = frames + len(scores.rows), energy + float(scores.energies.sum())
            videos, far = videos + 1, far + (scores.level > FAR_LEVEL)
    silent = len(cache.clips) - videos
    counts = {"videos": videos, "too_short_videos": silent, "far_from_calibration": far}
    output.finish({**counts, "mean_energy": energy / frames})
    if silent:
        print(f"{counted(silent, 'video')} without {windows.length} frames in a row: not scored")
    print(f"wrote {folder}/surprise.csv and peaks.csv, and pictures of each video in pictures and peaks")


def embed(options: Options, fps: float) -> None:
    """Embed the videos into OUTPUT/cache; what is there already stays."""
    chosen = {"videos": tuple(path.absolute() for path in options.videos), "fps": fps, "image-fps": options.image_fps}
    encoder = Path(options.encoder)
    chosen |= {"encoder": encoder.absolute() if encoder.is_dir() else options.encoder}
    chosen |= {"output-dir": (options.output_dir / "cache").absolute()} | ({"strict": True} if options.strict else {})
    run_stage("embed", chosen)


def score_clips(predictor: Predictor, calibration: Calibration, windows: Windows) -> Iterator[Scores]:
    """The scores of each clip, one after the other, in memory that does not depend on their number.

    The last embedding of each window is forecast from as many as the predictor looks back on.
    """
    cache, horizon = windows.cache, windows.length - predictor.config.context
    for clip, found in groupby(score_windows(predictor, calibration, windows), key=itemgetter(0)):
        rows, energies, cosines = np.stack([one for _, one in found]).T.copy()  # (N,) each
        rows, tensor = rows.astype(np.int64), torch.from_numpy(energies)
        yield Scores(
            video=Path(cache.clips[clip].key.source),
            rows=rows,
            ticks=cache.take(rows, "ticks"),
            times_s=cache.take(rows, "times_s"),
            energies=energies,
            percentiles=calibration.percentile(tensor, horizon).cpu().numpy(),
            cosines=cosines,
            level=calibration.level(tensor, horizon),
            reach=windows.length - 1,
        )


@torch.no_grad()
def score_windows(predictor: Predictor, calibration: Calibration, windows: Windows) -> Iterator[tuple[int, np.ndarray]]:
    """The clip of each window; and row in the cache, energy and change cosine of its last frame, float64 (3,)."""
    context, fps = predictor.config.context, predictor.fps
    ticks = torch.tensor([windows.length - context], dtype=torch.float64)
    for start in tqdm(range(0, len(windows), BATCH), desc="scoring", unit="batch", leave=False):
        indices = np.arange(start, min(start + BATCH, len(windows)))
        embeddings = take_finite(windows, indices).to(predictor.mean.device)
        past, came = Sequence.on_clock(embeddings[:, :context], fps), embeddings[:, -1:]
        believed = rollout(predictor, past, Future(ticks / fps), calibration=calibration)
        energy = calibration.energy(believed, came, ticks)[:, 0]
        standardised = (predictor.standardise(part) for part in (believed, came, past.embeddings[:, -1]))
        cosine = change_cosine(*standardised)[:, 0]
        found = [windows.rows(indices)[:, -1], energy.double().cpu().numpy(), cosine.double().cpu().numpy()]
        yield from zip(windows.clip_of(indices).tolist(), np.stack(found, axis=1), strict=True)


def show(scores: Scores, peaks: list[int], folder: Path, cache: EmbeddingCache) -> None:
    """Pictures of a video, and a line on the screen."""
    name, highest = picture_name(scores.video, folder / "pictures"), peaks[0]
    draw_surprise(scores, peaks, folder / "pictures" / name)
    try:
        draw_peaks(scores, peaks, cache, folder / "peaks" / name)
    except DataError as error:
        print(f"no pictures of its peaks: {error}")
    time_s, energy = scores.times_s[highest], scores.energies[highest]
    said = f"  {scores.video}: most surprising at {time_s:.2f} s (energy {energy:.1f})"
    if scores.level > FAR_LEVEL:
        said += "; its ordinary level is far above what the calibration calls ordinary: percentiles say little of it"
    tqdm.write(said)


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
    text = video.stem.encode(errors="backslashreplace").decode()
    text = "".join(letter if letter.isprintable() and letter not in '\\/:*?"<>|' else "_" for letter in text)
    stem = text.encode()[:200].decode(errors="ignore") or "video"
    names = (f"{stem}_{number}.png" if number > 1 else f"{stem}.png" for number in count(1))
    return next(name for name in names if not (folder / name).exists())


if __name__ == "__main__":
    run_command(main, Options)
