r"""Stage 5: when does a video do what the world model did not expect?

  python pipelines/score_surprise.py --videos VIDEO... --encoder runs/encoder/encoder \
      --predictor runs/predictor/predictor --output-dir runs/surprise

Leaves `surprise.csv` (`video,time_s,energy,percentile,agreement`, one row for each frame on the predictor's clock that
has enough past), `moments.csv` (the same columns and a `rank`, the most surprising moments of each video), and for each
video two pictures: `pictures/NAME.png`, its energy and agreement over time, and `moments/NAME.png`, its most surprising
moments with the frames around them. Energy is the prediction error in units of what is usual on validation clips
(mean 1); the percentile says how much of ordinary video is less surprising. Agreement says whether things went the way
that was expected, however much of that there was: from 1 by 0, when one has nothing to do with the other, to -1. Its
mean over some seconds notices what goes wrong for longer, such as a film that runs backwards. Videos are read as a
stream: their length does not matter. What an interrupted run has made is thrown away.
"""

import csv
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.manifest import Account, check_videos
from data.video import IMAGE_FPS, TimedFrame, VideoInfo, read_on_clock
from jepa.encoder import FrameEncoder
from jepa.energy import agreement, energy, percentile, predictions
from jepa.predictor import Predictor
from pipelines.artefacts import load_encoder, load_predictor, require_calibrated
from pipelines.stage import RunFolder, UserError, leave_account, require, run_stage

FRAMES_PER_CHUNK = 256
SHOWN_FRAMES = 5
"""Of a moment: itself, and as many before it as after it."""
CURVE_POINTS = 4000
"""A curve in a picture has at most so many points."""
SPANS = 60
"""A picture shows the mean agreement of at most so many spans of a video, each as long as the others."""


@dataclass(frozen=True)
class Options:
    """Score how surprising each moment of a video is to the world model."""

    videos: tuple[Path, ...]
    """Folders (searched recursively), video files, folders of images, zips of them, and manifests."""
    encoder: Path = Path("runs/encoder/encoder")
    """The trained encoder."""
    predictor: Path = Path("runs/predictor/predictor")
    """The trained predictor; its clock is used."""
    output_dir: Path = Path("runs/surprise")
    """Where the results are left."""
    horizon: int = 1
    """How many steps before a moment it is predicted from. 1 notices best what is sudden."""
    moments: int = 5
    """How many of the most surprising moments of each video are shown."""
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    seed: int = 0
    """Seeds whatever a model might draw; the latents of energies are always the same."""
    overwrite: bool = False
    """Replace the results in the output folder."""


class Scored(NamedTuple):
    """A frame, and how surprising it is."""

    energy: float
    """Minus infinity where there is not enough past."""
    percentile: float
    agreement: float
    time_s: float
    frame: np.ndarray
    """Planar RGB, uint8, (3, H, W)."""


class Moment(NamedTuple):
    """A frame that is more surprising than all around it."""

    peak: Scored
    around: list[Scored]
    """`SHOWN_FRAMES` in the order of time, the peak among them; fewer where the video begins or ends."""


@dataclass(frozen=True)
class Surprise:
    """What was found in one video."""

    times_s: np.ndarray
    energies: np.ndarray
    percentiles: np.ndarray
    """(N,) each; of a video of more than `CURVE_POINTS` frames only the most surprising of neighbours."""
    spans: np.ndarray
    """(at most `SPANS`, 2): mean time in seconds and mean agreement of equal parts of the video."""
    frames: int
    """How many have an energy."""
    mean_energy: float
    """Of all of them."""
    end_s: float
    """When the last one is shown."""
    moments: list[Moment]
    """The most surprising one first."""


def main(options: Options) -> None:
    """The story: load, stream each video through encoder and predictor, and put what was found in its place."""
    torch.manual_seed(options.seed)
    output = RunFolder(options.output_dir, ("surprise.csv", "moments.csv", "pictures", "moments"))
    encoder, predictor = load_pair(options.encoder, options.predictor)
    require_calibrated(predictor, options.predictor)
    output.require_unfinished(options.overwrite)
    require(options.image_fps > 0, f"--image-fps is {options.image_fps:g}: it must be positive")
    require(options.moments > 0, f"--moments is {options.moments}: it must be positive")
    known = predictor.energy_horizon
    require(
        0 < options.horizon <= known,
        f"--horizon is {options.horizon}: {options.predictor} knows its usual errors for 1 to {known} steps",
    )
    manifest = options.output_dir / "videos.jsonl"
    videos = check_videos(options.videos, predictor.fps, manifest, options.image_fps, options.strict)
    account = videos.account()
    unfinished = options.output_dir / ".tmp.surprise"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        scored = score_videos(encoder, predictor, videos.videos, account, options, unfinished)
        if not scored:
            raise UserError(next(iter(account.refused.values())))
        output.prepare(options, overwrite=True)
        for part in unfinished.iterdir():
            part.rename(options.output_dir / part.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    frames = sum(summary.frames for summary in scored)
    output.finish(
        {
            "videos": len(scored),
            "refused_videos": len(account.refused),
            "damaged_videos": len(account.damaged),
            "mean_energy": sum(summary.frames * summary.mean_energy for summary in scored) / frames,
        }
    )
    leave_account(account, options.output_dir)
    for summary in scored[:10]:
        when = f"most surprising at {summary.time_s:.2f} s (energy {summary.energy:.1f}; ordinary is 1)"
        print(f"  {summary.path}: {when}")
    print(f"wrote {options.output_dir}/surprise.csv and moments.csv, and pictures of each video in its folders "
          "pictures (energy and agreement over time) and moments (frames)")  # fmt: skip


def load_pair(encoder_folder: Path, predictor_folder: Path) -> tuple[FrameEncoder, Predictor]:
    """An encoder and a predictor that belong together. Raises `UserError`."""
    encoder, predictor = load_encoder(encoder_folder), load_predictor(predictor_folder)
    if encoder.fingerprint() != predictor.encoder_fingerprint:
        raise UserError(
            f"{encoder_folder} is encoder {encoder.fingerprint()}, but {predictor_folder} was trained on embeddings "
            f"of encoder {predictor.encoder_fingerprint}: give the encoder that made its cache"
        )
    return encoder, predictor


class Summary(NamedTuple):
    """What is kept of a video when it is done."""

    path: Path
    frames: int
    mean_energy: float
    energy: float
    """Of the most surprising moment."""
    time_s: float
    """Of the most surprising moment."""


def score_videos(
    encoder: FrameEncoder,
    predictor: Predictor,
    videos: Sequence[VideoInfo],
    account: Account,
    options: Options,
    folder: Path,
) -> list[Summary]:
    """Score the videos one after the other; leave all tables and pictures in the folder.

    Raises:
        VideoError: with `options.strict`, a video cannot be used or is damaged.
    """
    for name in ("pictures", "moments"):
        (folder / name).mkdir(parents=True)
    scored = []
    with (
        (folder / "surprise.csv").open("w", newline="") as table,
        (folder / "moments.csv").open("w", newline="") as top,
    ):
        rows, top_rows = csv.writer(table), csv.writer(top)
        columns = ["time_s", "energy", "percentile", "agreement"]
        rows.writerow(["video", *columns])
        top_rows.writerow(["video", "rank", *columns])
        names = picture_names([video.path for video in videos])
        for video, name in zip(tqdm(videos, unit="video", desc="scoring"), names, strict=True):
            damage = Damage()

            def write(frame: Scored, path: Path = video.path) -> None:
                rows.writerow([path, *as_text(frame)])

            try:
                found = score(
                    encoder,
                    predictor,
                    video,
                    None if options.strict else damage,
                    options.horizon,
                    options.moments,
                    write,
                )
            except VideoError as error:
                if options.strict:
                    raise
                account.refuse(video.path, str(error))
                continue
            account.add(video.path, found.end_s, damage)
            for rank, moment in enumerate(found.moments, start=1):
                top_rows.writerow([video.path, rank, *as_text(moment.peak)])
            draw(video.path, found, folder / "pictures" / name)
            draw_moments(video.path, found.moments, folder / "moments" / name)
            peak = found.moments[0].peak
            scored.append(Summary(video.path, found.frames, found.mean_energy, peak.energy, peak.time_s))
    return scored


def as_text(frame: Scored) -> tuple[str, str, str, str]:
    """Time in seconds, energy, percentile and agreement as the tables have them."""
    return f"{frame.time_s:.3f}", f"{frame.energy:.4f}", f"{frame.percentile:.1f}", f"{frame.agreement:.3f}"


def score(
    encoder: FrameEncoder,
    predictor: Predictor,
    video: VideoInfo,
    damage: Damage | None = None,
    horizon: int = 1,
    moments: int = 5,
    write: Callable[[Scored], object] = lambda frame: None,
) -> Surprise:
    """Find the most surprising moments in one pass over the video, in memory that does not depend on its length.

    A moment is a frame of more energy than all within `context + horizon - 1` frames of it: so long after an event a
    frame may be predicted from a past that it is part of, and echo it.

    Args:
        encoder: of the predictor's embeddings.
        predictor: how surprising a frame is to it.
        video: what to read.
        damage: where to write down what is wrong inside.
        horizon: how many steps before it a frame is predicted from.
        moments: how many are kept.
        write: is given each frame that has an energy, in the order of time.

    Raises:
        VideoError: without `damage`, the video is damaged; nowhere is there an unbroken stretch as long as the
            context and the horizon.
    """
    context, beside = predictor.config.context, SHOWN_FRAMES // 2
    reach = context + horizon - 1
    curve, course = Curve(max), Curve(add_up)
    frames, total_energy, end_s = 0, 0.0, 0.0
    found: list[Moment] = []
    window: deque[Scored | None] = deque([None] * (2 * reach + 1), maxlen=2 * reach + 1)
    for frame in chain(score_frames(encoder, predictor, video, damage, horizon), [None] * reach):
        if frame is not None and frame.energy > -np.inf:
            write(frame)
            curve.add((frame.energy, frame.percentile, frame.time_s))
            course.add((frame.time_s, frame.agreement, 1.0))
            frames, total_energy, end_s = frames + 1, total_energy + frame.energy, frame.time_s
        window.append(frame)
        if (peak := window[reach]) is not None and is_peak(window, reach):
            around = list(window)[reach - beside : reach + beside + 1]
            found.append(Moment(peak, [one for one in around if one is not None]))
            found = sorted(found, key=lambda moment: -moment.peak.energy)[:moments]
    if not frames:
        raise VideoError(
            f"{video.path}: no unbroken stretch of {context + horizon} frames at {predictor.fps:g} fps "
            f"({(context + horizon) / predictor.fps:.1f} s), which the predictor's context and the horizon take"
        )
    energies, percentiles, times_s = np.array(curve.points).T
    parts = np.array_split(np.array(course.points), min(SPANS, len(course.points)))
    spans = np.stack([part[:, :2].sum(axis=0) / part[:, 2].sum() for part in parts])
    return Surprise(times_s, energies, percentiles, spans, frames, total_energy / frames, end_s, found)


@torch.no_grad()
def score_frames(
    encoder: FrameEncoder, predictor: Predictor, video: VideoInfo, damage: Damage | None, horizon: int
) -> Iterator[Scored]:
    """Every frame of a video on the predictor's clock, with its energy and agreement.

    Raises:
        VideoError: without `damage`, the video is damaged.
    """
    context, dimension = predictor.config.context, len(predictor.mean)
    needed = context + horizon
    past, past_tick = torch.empty(0, dimension), -1
    size, fps = encoder.config.image_size, predictor.fps
    stream = progress(read_on_clock(video.path, size, fps, damage=damage, image_fps=video.average_fps), video, fps)
    while chunk := list(islice(stream, FRAMES_PER_CHUNK)):
        frames = torch.from_numpy(np.stack([timed.frame for timed in chunk]))
        embeddings = predictor.standardise(encoder(frames))
        energies, agreements = torch.full((len(chunk),), -torch.inf), torch.zeros(len(chunk))
        ticks = np.array([timed.tick for timed in chunk])
        # Cut where time jumps: what was before a gap is no past of what comes after it.
        runs = np.split(np.arange(len(chunk)), np.flatnonzero(np.diff(ticks, prepend=ticks[0] - 1) != 1))
        for run in (run for run in runs if len(run)):
            if ticks[run[0]] != past_tick + 1:
                past = past[:0]
            sequence = torch.cat([past, embeddings[run]])
            if len(sequence) >= needed:
                windows = rearrange(sequence.unfold(0, needed, 1), "n d t -> n t d")
                known, came, judged = windows[:, :context], windows[:, context:], run[-len(windows) :]
                predicted = predictions(predictor, known, horizon)
                energies[judged] = energy(predictor, known, came, predicted)[:, -1]
                agreements[judged] = agreement(predictor, known, came, predicted)[:, -1]
            past, past_tick = sequence[1 - needed :], int(ticks[run[-1]])
        shares = percentile(predictor, energies, horizon).tolist()
        for timed, value, share, agreed in zip(chunk, energies.tolist(), shares, agreements.tolist(), strict=True):
            yield Scored(value, share, agreed, timed.time_s, timed.frame)


def is_peak(window: Sequence[Scored | None], at: int) -> bool:
    """Whether one frame has the most energy of a window; of equals the first."""
    energies = [-np.inf if frame is None else frame.energy for frame in window]
    return energies[at] > -np.inf and energies.index(max(energies)) == at


Point = tuple[float, float, float]


def add_up(one: Point, other: Point) -> Point:
    """Two points as one, number by number."""
    return one[0] + other[0], one[1] + other[1], one[2] + other[2]


class Curve:
    """Points in the order of time, at most `CURVE_POINTS`; where there are more, neighbours are merged."""

    def __init__(self, merge: Callable[[Point, Point], Point]) -> None:
        self.points: list[Point] = []
        self.merge, self.pool, self.added = merge, 1, 0

    def add(self, point: Point) -> None:
        if self.added % self.pool == 0:
            self.points.append(point)
        else:
            self.points[-1] = self.merge(self.points[-1], point)
        self.added += 1
        if self.added == CURVE_POINTS * self.pool:
            self.points = [self.merge(*pair) for pair in zip(self.points[::2], self.points[1::2], strict=True)]
            self.pool *= 2


def progress(stream: Iterator[TimedFrame], video: VideoInfo, fps: float) -> Iterator[TimedFrame]:
    """Show how far a long video has been read."""
    total = int(video.duration_s * fps) or None
    return iter(tqdm(stream, total=total, unit="frame", desc=video.path.name, leave=False))


def picture_names(paths: list[Path]) -> list[str]:
    """A file name for each video; where two have the same, all are numbered."""
    stems = [path.stem for path in paths]
    if len(set(stems)) < len(stems):
        stems = [f"{index}_{stem}" for index, stem in enumerate(stems)]
    return [f"{stem}.png" for stem in stems]


def draw(video: Path, found: Surprise, path: Path) -> None:
    """Energy and agreement over time, and the most surprising frames in the order of time."""
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    columns = len(found.moments)
    grid = figure.add_gridspec(3, columns, height_ratios=[2, 1, 1])
    axes = figure.add_subplot(grid[0, :])
    draw_energy(found, axes)
    axes.set_title(str(video), fontsize=9)
    draw_agreement(found, figure.add_subplot(grid[1, :], sharex=axes))
    show_most_surprising(found, [figure.add_subplot(grid[2, column]) for column in range(columns)])
    figure.savefig(path, dpi=120)


def draw_energy(found: Surprise, axes: Axes) -> None:
    """Energy over time, the most surprising moments marked."""
    axes.plot(found.times_s, found.energies, linewidth=1)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", label="mean on validation clips")
    axes.set_ylabel("energy")
    axes.set_ylim(0, 1.25 * max(1.0, *found.energies))  # room for the legend
    axes.legend(frameon=False, loc="upper right")
    for moment in found.moments:
        axes.plot(moment.peak.time_s, moment.peak.energy, "o", color="C3", markersize=4)


def draw_agreement(found: Surprise, axes: Axes) -> None:
    """Mean agreement of each span of the video: below 0, it goes against what was expected."""
    times_s, agreements = found.spans.T
    axes.axhline(0, color="0.6", linewidth=1, linestyle="--")
    axes.plot(times_s, agreements, ".-", linewidth=1)
    axes.set_ylim(-1, 1)
    axes.set_ylabel("agreement")
    axes.set_xlabel("time in seconds")


def show_most_surprising(found: Surprise, row: Sequence[Axes]) -> None:
    """The most surprising frames in the order of time, one in each of the axes."""
    for axes in row:
        axes.axis("off")
    peaks = sorted((moment.peak for moment in found.moments), key=lambda peak: peak.time_s)
    for axes, peak in zip(row, peaks, strict=False):
        axes.imshow(rearrange(peak.frame, "c h w -> h w c"))
        axes.set_title(f"{peak.time_s:.2f} s, energy {peak.energy:.1f}", fontsize=8)


def draw_moments(video: Path, moments: list[Moment], path: Path) -> None:
    """A contact sheet: a row for each moment, the most surprising one first, its frames in the order of time."""
    height, width = moments[0].peak.frame.shape[1:]
    between = max(1, width // 16)
    figure = Figure(figsize=(9, 0.4 + len(moments) * (0.8 + 1.65 * height / width)), layout="constrained")
    figure.suptitle(str(video), fontsize=9)
    for row, (axes, (peak, around)) in enumerate(
        zip(figure.subplots(len(moments), squeeze=False)[:, 0], moments, strict=True), start=1
    ):
        tiles = [np.pad(one.frame, ((0, 0), (0, 0), (0, between)), constant_values=255) for one in around]
        axes.imshow(rearrange(tiles, "n c h w -> h (n w) c"))
        lefts = np.arange(len(around)) * (width + between) - 0.5
        for one, left in zip(around, lefts, strict=True):
            if one is peak:
                axes.add_patch(
                    Rectangle((left, -0.5), width, height, fill=False, color="C3", linewidth=3, clip_on=False)
                )
        axes.set_xlim(-0.5, SHOWN_FRAMES * (width + between) - between - 0.5)
        axes.set_xticks(lefts + width / 2, [caption(one) for one in around], fontsize=8)
        axes.tick_params(length=0)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_title(f"{row}. at {peak.time_s:.2f} s", fontsize=9, loc="left")
    figure.savefig(path, dpi=120)


def caption(frame: Scored) -> str:
    """Time, energy and percentile of a frame in a contact sheet."""
    if frame.energy == -np.inf:
        return f"{frame.time_s:.2f} s\nnot enough past"
    return f"{frame.time_s:.2f} s\nenergy {frame.energy:.1f}, percentile {frame.percentile:.1f}"


if __name__ == "__main__":
    run_stage(main, Options)
