r"""Stage 5: when does a video do what the world model did not expect?

  python pipelines/score_surprise.py --videos VIDEO... --encoder runs/encoder/encoder \
      --predictor runs/predictor/predictor --output-dir runs/surprise

Leaves `surprise.csv` (`video,time_s,energy,percentile`, one row for each frame on the predictor's clock that has
enough past), and for each video a picture of its energy over time with its most surprising frames. Energy is the
prediction error in units of what is usual on validation clips (mean 1); the percentile says how much of ordinary
video is less surprising. Videos are read as a stream: their length does not matter.
"""

import csv
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tqdm import tqdm

from data.decoder import Damage, VideoError
from data.manifest import check_videos
from data.video import IMAGE_FPS, TimedFrame, VideoInfo, read_on_clock
from jepa.encoder import FrameEncoder
from jepa.energy import energy, percentile
from jepa.predictor import Predictor
from pipelines.artefacts import load_encoder, load_predictor
from pipelines.stage import RunFolder, UserError, leave_account, require, run_stage

FRAMES_PER_CHUNK = 256
SHOWN_FRAMES = 5


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
    image_fps: float = IMAGE_FPS
    """Rate of folders of images, which have no times of their own."""
    strict: bool = False
    """A video that cannot be used or is damaged is an error; otherwise it is left out and listed."""
    seed: int = 0
    """Seeds whatever a model might draw; the models here draw nothing."""
    overwrite: bool = False
    """Replace the results in the output folder."""


@dataclass(frozen=True)
class Surprise:
    """What was found in one video."""

    times_s: np.ndarray
    energies: np.ndarray
    percentiles: np.ndarray
    frames: list[tuple[float, float, np.ndarray]]
    """Energy, time and picture (3, H, W) of the most surprising moments."""


def main(options: Options) -> None:
    """The story: load, stream each video through encoder and predictor, write, draw."""
    torch.manual_seed(options.seed)
    output = RunFolder(options.output_dir, ("surprise.csv", "pictures"))
    encoder, predictor = load_pair(options.encoder, options.predictor)
    output.require_unfinished(options.overwrite)
    require(options.image_fps > 0, f"--image-fps is {options.image_fps:g}: it must be positive")
    manifest = options.output_dir / "videos.jsonl"
    videos = check_videos(options.videos, predictor.fps, manifest, options.image_fps, options.strict)
    account = videos.account()
    scored: dict[VideoInfo, Surprise] = {}
    for video in tqdm(videos.videos, unit="video", desc="scoring"):
        damage = Damage()
        try:
            found = score(encoder, predictor, video, None if options.strict else damage)
        except VideoError as error:
            if options.strict:
                raise
            account.refuse(video.path, str(error))
        else:
            scored[video] = found
            account.add(video.path, float(found.times_s[-1]), damage)
    if not scored:
        raise UserError(next(iter(account.refused.values())))

    # What an interrupted run left can go: there is nothing in it to go on from.
    output.prepare(options, overwrite=True)
    unfinished = options.output_dir / ".tmp.surprise.csv"
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video", "time_s", "energy", "percentile"])
        for video, found in scored.items():
            for time_s, value, share in zip(found.times_s, found.energies, found.percentiles, strict=True):
                writer.writerow([video.path, f"{time_s:.3f}", f"{value:.4f}", f"{share:.1f}"])
    unfinished.replace(options.output_dir / "surprise.csv")
    (options.output_dir / "pictures").mkdir(exist_ok=True)
    names = picture_names([video.path for video in scored])
    for (video, found), name in zip(scored.items(), names, strict=True):
        draw(video.path, found, options.output_dir / "pictures" / name)
    output.finish(
        {
            "videos": len(scored),
            "refused_videos": len(account.refused),
            "damaged_videos": len(account.damaged),
            "mean_energy": float(np.mean(np.concatenate([found.energies for found in scored.values()]))),
        }
    )
    leave_account(account, options.output_dir)
    for video, found in list(scored.items())[:10]:
        value, time_s, _ = found.frames[0]
        print(f"  {video.path}: most surprising at {time_s:.2f} s (energy {value:.1f}; ordinary is 1)")
    print(f"wrote {options.output_dir}/surprise.csv and a picture of each video in {options.output_dir}/pictures")


def load_pair(encoder_folder: Path, predictor_folder: Path) -> tuple[FrameEncoder, Predictor]:
    """An encoder and a predictor that belong together. Raises `UserError`."""
    encoder, predictor = load_encoder(encoder_folder), load_predictor(predictor_folder)
    if encoder.fingerprint() != predictor.encoder_fingerprint:
        raise UserError(
            f"{encoder_folder} is encoder {encoder.fingerprint()}, but {predictor_folder} was trained on embeddings "
            f"of encoder {predictor.encoder_fingerprint}: give the encoder that made its cache"
        )
    return encoder, predictor


@torch.no_grad()
def score(encoder: FrameEncoder, predictor: Predictor, video: VideoInfo, damage: Damage | None = None) -> Surprise:
    """Energy of each frame on the clock that has enough past, in one pass over the video.

    Raises:
        VideoError: without `damage`, the video is damaged; nowhere is there an unbroken stretch longer than the
            context.
    """
    context, dimension = predictor.config.context, len(predictor.mean)
    keep = max(context, predictor.memory)
    past, past_tick = torch.empty(0, dimension), -1
    times_s, energies = [], []
    top: list[tuple[float, int, float, np.ndarray]] = []
    serial = count()
    size, fps = encoder.config.image_size, predictor.fps
    stream = progress(read_on_clock(video.path, size, fps, damage=damage, image_fps=video.average_fps), video, fps)
    while chunk := list(islice(stream, FRAMES_PER_CHUNK)):
        frames = torch.from_numpy(np.stack([timed.frame for timed in chunk]))
        embeddings = predictor.standardise(encoder(frames))
        ticks = np.array([timed.tick for timed in chunk])
        # Cut where time jumps: what was before a gap is no past of what comes after it.
        runs = np.split(np.arange(len(chunk)), np.flatnonzero(np.diff(ticks, prepend=ticks[0] - 1) != 1))
        for run in (run for run in runs if len(run)):
            if ticks[run[0]] != past_tick + 1:
                past = past[:0]
            sequence = torch.cat([past, embeddings[run]])
            if len(sequence) > context:
                new = energy(predictor, sequence[None])[0][-len(run) :]  # the rest was scored with the last chunk
                for value, at in zip(new.tolist(), run[-len(new) :], strict=True):
                    times_s.append(chunk[at].time_s)
                    energies.append(value)
                    heapq.heappush(top, (value, next(serial), chunk[at].time_s, chunk[at].frame))
                    if len(top) > SHOWN_FRAMES:
                        heapq.heappop(top)
            past, past_tick = sequence[-keep:], int(ticks[run[-1]])
    if not energies:
        raise VideoError(
            f"{video.path}: no unbroken stretch of more than {context} frames at {predictor.fps:g} fps "
            f"({(context + 1) / predictor.fps:.1f} s), which the predictor's context takes"
        )
    values = np.array(energies)
    shares = percentile(predictor, torch.tensor(energies)).numpy()
    frames_by_energy = [(value, time_s, frame) for value, _, time_s, frame in sorted(top, reverse=True)]
    return Surprise(np.array(times_s), values, shares, frames_by_energy)


def progress(stream: Iterator[TimedFrame], video: VideoInfo, fps: float) -> Iterator[TimedFrame]:
    """Show how far a long video has been read."""
    total = int(video.duration_s * fps) or None
    return iter(tqdm(stream, total=total, unit="frame", desc=video.path.name, leave=False))


def picture_names(paths: list[Path]) -> list[str]:
    """A file name for each video; videos of one name in several folders keep apart."""
    names = [f"{path.stem}.png" for path in paths]
    return [
        name if names.count(name) == 1 else f"{path.stem}_{index}.png"
        for index, (name, path) in enumerate(zip(names, paths, strict=True))
    ]


def draw(video: Path, found: Surprise, path: Path) -> None:
    """Energy over time, and the most surprising frames in the order of time."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    grid = figure.add_gridspec(2, SHOWN_FRAMES, height_ratios=[2, 1])
    axes = figure.add_subplot(grid[0, :])
    draw_energy(found, axes)
    axes.set_title(str(video), fontsize=9)
    show_most_surprising(found, [figure.add_subplot(grid[1, column]) for column in range(SHOWN_FRAMES)])
    figure.savefig(path, dpi=120)


def draw_energy(found: Surprise, axes: Axes) -> None:
    """Energy over time, its greatest values marked."""
    axes.plot(found.times_s, found.energies, linewidth=1)
    axes.axhline(1, color="0.6", linewidth=1, linestyle="--", label="mean of ordinary video")
    axes.set_xlabel("time in seconds")
    axes.set_ylabel("energy")
    axes.set_ylim(0, 1.25 * max(1.0, *found.energies))  # room for the legend
    axes.legend(frameon=False, loc="upper right")
    for value, time_s, _ in found.frames:
        axes.plot(time_s, value, "o", color="C3", markersize=4)


def show_most_surprising(found: Surprise, row: Sequence[Axes]) -> None:
    """The most surprising frames in the order of time, one in each of the axes."""
    for axes in row:
        axes.axis("off")
    for axes, (value, time_s, frame) in zip(row, sorted(found.frames, key=lambda entry: entry[1]), strict=False):
        axes.imshow(frame.transpose(1, 2, 0))
        axes.set_title(f"{time_s:.2f} s, energy {value:.1f}", fontsize=8)


if __name__ == "__main__":
    run_stage(main, Options)
