"""Videos with known physics, simulated, rendered and encoded here: the demo's data and the tests' ground truth.

Two balls bounce in a square box without losing energy, off the walls and off each other. Behind them lies a
texture drawn anew for each clip (`textured`), which may also flicker like leaves in the wind (`full`): light and
shade that change in every frame and say nothing about what happens next. The frames are encoded to real H.264
mp4 files; beside each lies a CSV with the true state of every frame.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import av
import joblib
import numpy as np
from tqdm.contrib.concurrent import process_map

Result = TypeVar("Result")
Motion = tuple[np.ndarray, np.ndarray]
"""Positions (2, 2) in pixels and velocities (2, 2) in pixels per frame, of both balls."""

STATE_COLUMNS = ("ball_1_x", "ball_1_y", "ball_2_x", "ball_2_y")
VELOCITY_COLUMNS = ("ball_1_vx", "ball_1_vy", "ball_2_vx", "ball_2_vy")
BALL_COLOURS = np.array([[0.95, 0.35, 0.20], [0.25, 0.55, 0.95]])
"""RGB in [0, 1], shape (balls, 3)."""
SUBSTEPS = 8
"""Steps of the simulation in a frame."""


@dataclass(frozen=True)
class BallWorld:
    """The box, the balls and the camera. Lengths are in pixels, speeds in pixels per frame."""

    size: int = 64
    """Width and height of the box and of the video."""
    radius: float = 6.0
    slowest: float = 1.5
    fastest: float = 3.0
    """Least and greatest initial speed."""
    frames: int = 40
    fps: int = 10
    background: Literal["plain", "textured", "full"] = "full"
    """`plain`: grey. `textured`: a texture for each clip. `full`: a texture that flickers in every frame."""

    def leave_walls(
        self, velocity: np.ndarray, below: np.ndarray, above: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Velocities (2, 2) after the walls that balls are `below` or `above` of in x or y; `generator` is for chance.

        Here balls leave walls as light leaves a mirror.
        """
        return np.where(below | above, -velocity, velocity)


def simulate_balls(world: BallWorld, generator: np.random.Generator) -> np.ndarray:
    """Simulate two equal balls in a box, elastic everywhere, from a random beginning.

    Returns float64 (frames, 2, 4): x, y in pixels and vx, vy in pixels per frame, of each ball in each frame.
    """
    motion = begin_motion(world, generator)
    states = np.empty((world.frames, 2, 4))
    for frame in range(world.frames):
        states[frame] = np.concatenate(motion, axis=1)
        motion = move_balls(motion, world, generator)
    return states


def begin_motion(world: BallWorld, generator: np.random.Generator) -> Motion:
    """Balls at random places, apart from each other, with random velocities."""
    low, high = world.radius, world.size - world.radius
    position = generator.uniform(low, high, size=(2, 2))
    while np.linalg.norm(position[0] - position[1]) < 2.5 * world.radius:
        position = generator.uniform(low, high, size=(2, 2))
    angle = generator.uniform(0, 2 * np.pi, size=2)
    speed = generator.uniform(world.slowest, world.fastest, size=(2, 1))
    return position, speed * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def move_balls(motion: Motion, world: BallWorld, generator: np.random.Generator, *, do_collide: bool = True) -> Motion:
    """The balls one frame later; without collisions they go through each other."""
    position, velocity = motion
    low, high = world.radius, world.size - world.radius
    for _ in range(SUBSTEPS):
        position = position + velocity / SUBSTEPS
        below, above = position < low, position > high
        position = np.where(below, 2 * low - position, np.where(above, 2 * high - position, position))
        velocity = world.leave_walls(velocity, below, above, generator)
        offset = position[0] - position[1]
        distance = np.linalg.norm(offset)
        approach = (velocity[0] - velocity[1]) @ offset
        if do_collide and distance < 2 * world.radius and approach < 0:
            # Equal masses exchange the velocity components along the line between the centres.
            exchange = approach / distance**2 * offset
            velocity = velocity + np.stack([-exchange, exchange])
    return position, velocity


def smooth_noise(generator: np.random.Generator, *, cells: int, size: int, amplitude: float) -> np.ndarray:
    """A `cells` x `cells` grid of uniform colours, bilinearly enlarged: float64 (3, size, size), up to +-amplitude."""
    grid = generator.uniform(-amplitude, amplitude, size=(3, cells, cells))
    places = np.linspace(0, cells - 1, size)
    enlarge = np.stack([np.interp(places, range(cells), one) for one in np.eye(cells)])  # (cells, size)
    return enlarge.T @ grid @ enlarge


def render_balls(states: np.ndarray, world: BallWorld, generator: np.random.Generator) -> np.ndarray:
    """Antialiased balls over a random background, RGB uint8 (frames, size, size, 3)."""
    size = world.size
    still = np.full((3, size, size), 0.4)
    if world.background != "plain":
        for cells, amplitude in ((5, 0.25), (16, 0.15)):
            still = still + smooth_noise(generator, cells=cells, size=size, amplitude=amplitude)
    vertical, horizontal = np.mgrid[0:size, 0:size] + 0.5
    frames = np.empty((len(states), size, size, 3), dtype=np.uint8)
    for index, balls in enumerate(states):
        image = still
        if world.background == "full":
            brightness = generator.uniform(0.9, 1.1)
            image = still * brightness + smooth_noise(generator, cells=4, size=size, amplitude=0.1)
            image = image + generator.normal(0, 0.02, size=image.shape)
        for ball, colour in zip(balls, BALL_COLOURS, strict=True):
            distance = np.hypot(horizontal - ball[0], vertical - ball[1])
            cover = np.clip(world.radius + 0.5 - distance, 0, 1)
            image = image * (1 - cover) + colour[:, None, None] * cover
        frames[index] = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
    return frames


def write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode RGB frames, uint8 (frames, height, width, 3), to a video file of constant rate."""
    rate = Fraction(fps).limit_denominator(100_000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        # Colours at half the resolution take an even number of rows and columns.
        stream.pix_fmt = "yuv444p" if stream.height % 2 or stream.width % 2 else "yuv420p"
        # With B-frames x264's macroblock tree reads memory that it never wrote: the same clip came out differently.
        # At 32 pixels it still does, about once in 100 times; `mbtree=0` would end that, and change all videos.
        stream.options = {"crf": "18", "preset": "veryfast", "bf": "0"}
        # Many small clips are encoded side by side: threads inside one encoder would only fight over the cores.
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_ball_clip(folder: Path, index: int, world: BallWorld, *, seed: int) -> Path:
    """Simulate, render and encode `clip_<index>.mp4`; the CSV beside it is written last, so who has one is whole."""
    path = folder / f"clip_{index:05d}.mp4"
    if not path.with_suffix(".csv").exists():
        generator = np.random.default_rng([seed, index])
        states = simulate_balls(world, generator)
        write_video(path, render_balls(states, world, generator), world.fps)
        write_table(path.with_suffix(".csv"), state_columns(states), world.fps)
    return path


def state_columns(states: np.ndarray) -> dict[str, np.ndarray]:
    """What `simulate_balls` returned by column, (frames,) each."""
    positions, velocities = (part.reshape(len(states), -1) for part in np.split(states, 2, axis=2))
    return dict(zip((*STATE_COLUMNS, *VELOCITY_COLUMNS), np.hstack([positions, velocities]).T, strict=True))


def write_table(path: Path, columns: dict[str, np.ndarray], fps: float) -> None:
    """Write a CSV beside a video, a value of each column for each frame, whole or not at all."""
    frame = np.arange(len(next(iter(columns.values()))))
    unfinished = path.with_suffix(".csv.tmp")
    formats, header = ["%d", "%.6f", *["%.4f"] * len(columns)], ",".join(["frame", "time_s", *columns])
    table = np.column_stack([frame, frame / fps, *columns.values()])
    np.savetxt(unfinished, table, formats, delimiter=",", header=header, comments="")
    unfinished.replace(path)


def write_ball_videos(folder: Path, clips: int, world: BallWorld, *, seed: int) -> list[Path]:
    """Write `clips` clips into `folder` on all cores, continuing where an interrupted run stopped.

    The clips of one seed are the same on every machine and for every number of cores.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return on_all_cores(partial(write_ball_clip, folder, world=world, seed=seed), clips, name=folder.name)


def on_all_cores(write: Callable[[int], Result], number: int, *, name: str) -> list[Result]:
    """Call a function with 0, 1, ... in processes side by side."""
    bar = {"unit": "clip", "desc": f"rendering {name}", "leave": False}
    return process_map(write, range(number), max_workers=joblib.cpu_count(), **bar)  # each of chunks would count as one
