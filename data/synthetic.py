"""Videos with known physics, simulated, rendered and encoded here: the demo's data and the tests' ground truth.

Two balls bounce in a square box without losing energy, off the walls and off each other. Behind them lies a
texture drawn anew for each clip (`textured`), which may also flicker like leaves in the wind (`full`): light and
shade that change in every frame and say nothing about what happens next. The frames are encoded to real H.264
mp4 files; beside each lies a CSV with the true state of every frame.

To test surprise, a clip may hold one impossible event; it comes with its lawful twin, the same clip without the event.
"""

import csv
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, cast

import av
import joblib
import numpy as np
from av.video.stream import VideoStream
from tqdm import tqdm

Result = TypeVar("Result")
Background = Literal["plain", "textured", "full"]
Walls = Literal["mirror", "random"]
Event = Literal["none", "reverse", "freeze", "pass_through"]
"""What cannot happen. `reverse`: a ball turns round in mid-air. `freeze`: both balls hold still for the rest of the
clip. `pass_through`: the balls go through each other where they should bounce, once."""

STATE_COLUMNS = ("ball_1_x", "ball_1_y", "ball_2_x", "ball_2_y")
VELOCITY_COLUMNS = ("ball_1_vx", "ball_1_vy", "ball_2_vx", "ball_2_vy")
BALL_COLOURS = np.array([[0.95, 0.35, 0.20], [0.25, 0.55, 0.95]])
"""RGB in [0, 1], shape (balls, 3)."""
WIDEST_BOUNCE = np.pi / 3
"""A ball leaves a wall of `walls="random"` within this angle of the wall's normal, in radians."""
MID_AIR = 2
"""A ball is in mid-air if nothing bounces within this many frames."""


@dataclass(frozen=True)
class BallWorld:
    """The box, the balls and the camera. Lengths are in pixels, speeds in pixels per frame."""

    size: int = 64
    """Width and height of the box and of the video, in pixels."""
    radius: float = 6.0
    """Radius of each ball, in pixels."""
    slowest: float = 1.5
    """Least initial speed, in pixels per frame."""
    fastest: float = 3.0
    """Greatest initial speed, in pixels per frame."""
    frames: int = 40
    """Frames in a clip."""
    fps: int = 10
    """Frame rate of the video."""
    background: Background = "full"
    """`plain`: grey. `textured`: a texture for each clip. `full`: a texture that flickers in every frame."""
    walls: Walls = "mirror"
    """`mirror`: balls leave walls as light leaves a mirror. `random`: at a random angle, their speed kept."""


def simulate_balls(
    world: BallWorld, generator: np.random.Generator, event: Event = "none", at: int = 0, substeps: int = 8
) -> np.ndarray:
    """Simulate two equal balls in a box, elastic everywhere.

    Args:
        world: the box and the balls.
        generator: draws how the balls begin, and how they leave random walls.
        event: what happens that cannot happen; all else stays lawful, before and after.
        at: the first frame that shows the event; `pass_through` waits from there on for the next collision.
        substeps: steps of the simulation in a frame.

    Returns:
        float64 (frames, 2, 4): x, y in pixels and vx, vy in pixels per frame, of each ball in each frame.
    """
    low, high = world.radius, world.size - world.radius
    position = generator.uniform(low, high, size=(2, 2))
    while np.linalg.norm(position[0] - position[1]) < 2.5 * world.radius:
        position = generator.uniform(low, high, size=(2, 2))
    angle = generator.uniform(0, 2 * np.pi, size=2)
    speed = generator.uniform(world.slowest, world.fastest, size=(2, 1))
    velocity = speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    states = np.empty((world.frames, 2, 4))
    may_pass, passing = event == "pass_through", False
    for frame in range(world.frames):
        states[frame] = np.concatenate([position, velocity], axis=1)
        if event == "reverse" and frame + 1 == at:
            velocity = velocity * [[-1], [1]]
        if event == "freeze" and frame + 1 == at:
            velocity = np.zeros_like(velocity)
        for _ in range(substeps):
            position = position + velocity / substeps
            below, above = position < low, position > high
            position = np.where(below, 2 * low - position, np.where(above, 2 * high - position, position))
            if world.walls == "random" and (below | above).any():
                velocity = leave_walls(velocity, below, above, generator)
            else:
                velocity = np.where(below | above, -velocity, velocity)
            offset = position[0] - position[1]
            distance = np.linalg.norm(offset)
            approach = (velocity[0] - velocity[1]) @ offset
            touching = bool(distance < 2 * world.radius)
            passing = passing and touching
            if touching and approach < 0 and may_pass and frame + 1 >= at:
                may_pass, passing = False, True
            elif touching and approach < 0 and not passing:
                # Equal masses exchange the velocity components along the line between the centres.
                exchange = approach / distance**2 * offset
                velocity = velocity + np.stack([-exchange, exchange])
    return states


def leave_walls(
    velocity: np.ndarray, below: np.ndarray, above: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Velocities (2, 2) after random walls: a ball that is `below` or `above` in x or y leaves at a random angle.

    The angle is uniform within `WIDEST_BOUNCE` of the wall's inward normal; in a corner, of the diagonal between both
    normals, as far as that leads into the box.
    """
    inward = below.astype(float) - above  # (balls, 2), the sum of the normals
    widest = np.where((inward != 0).all(axis=1), np.pi / 4, WIDEST_BOUNCE)
    angle = np.arctan2(inward[:, 1], inward[:, 0]) + generator.uniform(-widest, widest)
    speed = np.linalg.norm(velocity, axis=1)
    leaving = speed[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.where((below | above).any(axis=1, keepdims=True), leaving, velocity)


def smooth_noise(generator: np.random.Generator, cells: int, size: int, amplitude: float) -> np.ndarray:
    """Low-frequency noise: a `cells` x `cells` grid of uniform colours, bilinearly enlarged.

    Returns:
        float64 (3, size, size) in [-amplitude, amplitude].
    """
    grid = generator.uniform(-amplitude, amplitude, size=(3, cells, cells))
    at = np.linspace(0, cells - 1, size)
    left = np.minimum(at.astype(int), cells - 2)
    weight = at - left
    rows = grid[:, left] * (1 - weight)[:, None] + grid[:, left + 1] * weight[:, None]
    return rows[:, :, left] * (1 - weight) + rows[:, :, left + 1] * weight


def render_balls(states: np.ndarray, world: BallWorld, generator: np.random.Generator) -> np.ndarray:
    """Draw antialiased balls over the background.

    Args:
        states: (frames, 2, 4) as from `simulate_balls`.
        world: the world that `states` came from.
        generator: draws the background.

    Returns:
        uint8 (frames, size, size, 3), RGB.
    """
    size = world.size
    still = np.full((3, size, size), 0.4)
    if world.background != "plain":
        still = still + smooth_noise(generator, 5, size, 0.25) + smooth_noise(generator, 16, size, 0.15)
    vertical, horizontal = np.mgrid[0:size, 0:size] + 0.5
    frames = np.empty((len(states), size, size, 3), dtype=np.uint8)
    for index, balls in enumerate(states):
        image = still
        if world.background == "full":
            brightness = generator.uniform(0.9, 1.1)
            image = still * brightness + smooth_noise(generator, 4, size, 0.1)
            image = image + generator.normal(0, 0.02, size=image.shape)
        for ball, colour in zip(balls, BALL_COLOURS, strict=True):
            distance = np.hypot(horizontal - ball[0], vertical - ball[1])
            cover = np.clip(world.radius + 0.5 - distance, 0, 1)
            image = image * (1 - cover) + colour[:, None, None] * cover
        frames[index] = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    return frames


def write_video(path: Path, frames: np.ndarray, fps: float, codec: str = "libx264") -> None:
    """Encode RGB frames, uint8 (frames, height, width, 3), to a video file of constant rate."""
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream(codec, rate=rate))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            # With B-frames x264's macroblock tree reads memory that it never wrote: the same clip came out differently.
            stream.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        # Many small clips are encoded side by side: threads inside one encoder would only fight over the cores.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_ball_clip(folder: Path, index: int, world: BallWorld, seed: int) -> Path:
    """Simulate, render and encode one clip; write its state beside it.

    Leaves `clip_<index>.mp4` and `clip_<index>.csv` (`frame,time_s`, positions in pixels, velocities in pixels
    per frame). The CSV is written last, so a clip that has one is whole.
    """
    path = folder / f"clip_{index:05d}.mp4"
    if not path.with_suffix(".csv").exists():
        generator = np.random.default_rng([seed, index])
        states = simulate_balls(world, generator)
        write_video(path, render_balls(states, world, generator), world.fps)
        write_states(path.with_suffix(".csv"), states, world)
    return path


def write_states(path: Path, states: np.ndarray, world: BallWorld, event_at: int | None = None) -> None:
    """Write what `simulate_balls` returned as a CSV, whole or not at all.

    Args:
        path: of the CSV.
        states: (frames, 2, 4).
        world: the world that `states` came from.
        event_at: adds a column `event`, 1 in the frame that shows an impossible event first and 0 in all others.
    """
    unfinished = path.with_suffix(".csv.tmp")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file)
        mark = [] if event_at is None else ["event"]
        writer.writerow(["frame", "time_s", *STATE_COLUMNS, *VELOCITY_COLUMNS, *mark])
        for frame, balls in enumerate(states):
            values = [*balls[:, :2].ravel(), *balls[:, 2:].ravel()]
            marked = [int(frame == event_at)] if mark else []
            writer.writerow([frame, f"{frame / world.fps:.6f}", *(f"{value:.4f}" for value in values), *marked])
    unfinished.replace(path)


def simulate_pair(world: BallWorld, generator: np.random.Generator, event: Event) -> tuple[np.ndarray, np.ndarray, int]:
    """A lawful clip, its impossible twin, and the first frame in which they differ.

    The event falls into the middle half of the clip. `reverse` and `freeze` happen in mid-air, `pass_through` at the
    first collision of the balls in that half.

    Returns:
        Two float64 (frames, 2, 4) as from `simulate_balls`, and the frame.
    """
    first, last = world.frames // 4, world.frames * 3 // 4
    while True:
        seed, at = generator.integers(2**32), int(generator.integers(first, last))
        if event == "pass_through":
            at = first
        lawful = simulate_balls(world, np.random.default_rng(seed))
        impossible = simulate_balls(world, np.random.default_rng(seed), event, at)
        differ = np.flatnonzero((lawful != impossible)[..., :2].any(axis=(1, 2)))  # positions: velocities are not seen
        if len(differ) and differ[0] < last and (event == "pass_through" or _in_mid_air(lawful, impossible, at)):
            return lawful, impossible, int(differ[0])


def _in_mid_air(lawful: np.ndarray, impossible: np.ndarray, at: int) -> bool:
    """Whether no ball of either twin bounces within `MID_AIR` frames of the frame that shows the event first."""
    around = lawful[at - 1 - MID_AIR : at + MID_AIR + 1, :, 2:]
    after = impossible[at : at + MID_AIR + 1, :, 2:]
    return np.ptp(around, axis=0).max() == np.ptp(after, axis=0).max() == 0


def write_ball_pair(folder: Path, index: int, world: BallWorld, seed: int, event: Event) -> None:
    """Write an impossible clip and its lawful twin: the same beginning, the same background in every frame.

    Leaves `clip_<index>.mp4` and `.csv` in `folder/lawful` and `folder/impossible`, as `write_ball_clip` does; the
    column `event` of the impossible clip's CSV is 1 in the frame that shows the event first, and 0 elsewhere. The video
    encoder looks ahead: before the event the twins are the same but for its noise.
    """
    paths = [folder / kind / f"clip_{index:05d}.mp4" for kind in ("lawful", "impossible")]
    if all(path.with_suffix(".csv").exists() for path in paths):
        return
    generator = np.random.default_rng([seed, index])
    *twins, at = simulate_pair(world, generator, event)
    background = generator.integers(2**32)
    for path, states, event_at in zip(paths, twins, (-1, at), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, render_balls(states, world, np.random.default_rng(background)), world.fps)
        write_states(path.with_suffix(".csv"), states, world, event_at)


def write_ball_videos(folder: Path, clips: int, world: BallWorld, seed: int) -> list[Path]:
    """Write `clips` clips into `folder` on all cores, continuing where an interrupted run stopped.

    The clips of one seed are the same on every machine and for every number of cores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return _on_all_cores(partial(write_ball_clip, folder, world=world, seed=seed), clips, folder.name)


def write_ball_pairs(folder: Path, pairs: int, world: BallWorld, seed: int, event: Event) -> None:
    """Write `pairs` pairs of clips into `folder`, as `write_ball_videos` writes clips."""
    _on_all_cores(partial(write_ball_pair, folder, world=world, seed=seed, event=event), pairs, folder.name)


def _on_all_cores(write: Callable[[int], Result], number: int, name: str) -> list[Result]:
    with ProcessPoolExecutor(joblib.cpu_count()) as pool:
        written = pool.map(write, range(number), chunksize=8)
        return list(tqdm(written, total=number, unit="clip", desc=f"rendering {name}", leave=False))
