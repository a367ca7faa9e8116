"""Impossible events among the balls of `data.synthetic`, each clip with its lawful twin, to test surprise."""

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from data.synthetic import (
    BallWorld,
    begin_motion,
    move_balls,
    on_all_cores,
    render_balls,
    state_columns,
    write_table,
    write_video,
)

Event = Literal["reverse", "freeze", "pass_through"]
"""What cannot happen. `reverse`: a ball turns round in mid-air. `freeze`: both balls hold still for the rest of the
clip. `pass_through`: the balls go through each other where they should bounce, once."""
MID_AIR = 2
"""A ball is in mid-air if nothing bounces within this many frames."""


def simulate_event(world: BallWorld, generator: np.random.Generator, *, event: Event, at: int) -> np.ndarray:
    """States as from `simulate_balls`, float64 (frames, 2, 4), with one event; all else stays lawful.

    Args:
        world: the box and the balls; its walls are mirrors.
        generator: draws how the balls begin.
        event: what happens.
        at: the first frame that shows the event; `pass_through` waits from there on for the next collision.
    """
    motion = begin_motion(world, generator)
    states = np.empty((world.frames, 2, 4))
    is_passing, has_passed = False, event != "pass_through"
    for frame in range(world.frames):
        states[frame] = np.concatenate(motion, axis=1)
        position, velocity = motion
        if frame + 1 == at and event == "reverse":
            motion = position, velocity * [[-1], [1]]
        if frame + 1 == at and event == "freeze":
            motion = position, np.zeros_like(velocity)
        following = move_balls(motion, world, generator)
        if not has_passed and frame + 1 >= at:
            through = move_balls(motion, world, generator, do_collide=False)
            is_passing = is_passing or not np.array_equal(through, following)
            following = through
            has_passed = is_passing and bool(np.linalg.norm(through[0][0] - through[0][1]) >= 2 * world.radius)
        motion = following
    return states


def simulate_pair(world: BallWorld, generator: np.random.Generator, event: Event) -> tuple[np.ndarray, np.ndarray, int]:
    """A lawful clip, its impossible twin, float64 (frames, 2, 4) each, and the first frame in which they differ.

    The event falls into the middle half of the clip. `reverse` and `freeze` happen in mid-air, `pass_through` at the
    first collision of the balls in that half.
    """
    first, last = world.frames // 4, world.frames * 3 // 4
    while True:
        seed, at = generator.integers(2**32), int(generator.integers(first, last))
        if event == "pass_through":
            at = first
        lawful = simulate_event(world, np.random.default_rng(seed), event=event, at=world.frames + 1)
        impossible = simulate_event(world, np.random.default_rng(seed), event=event, at=at)
        differ = np.flatnonzero((lawful != impossible)[..., :2].any(axis=(1, 2)))  # positions: velocities are not seen
        if len(differ) and differ[0] < last and (event == "pass_through" or _in_mid_air(lawful, impossible, at)):
            return lawful, impossible, int(differ[0])


def _in_mid_air(lawful: np.ndarray, impossible: np.ndarray, at: int) -> bool:
    """Whether no ball of either twin bounces within `MID_AIR` frames of the frame that shows the event first."""
    around = lawful[at - 1 - MID_AIR : at + MID_AIR + 1, :, 2:]
    after = impossible[at : at + MID_AIR + 1, :, 2:]
    return np.ptp(around, axis=0).max() == np.ptp(after, axis=0).max() == 0


def write_ball_pair(folder: Path, index: int, *, world: BallWorld, seed: int, event: Event) -> None:
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
        shows_event = (np.arange(world.frames) == event_at).astype(int)
        write_table(path.with_suffix(".csv"), state_columns(states) | {"event": shows_event}, world.fps)


def write_ball_pairs(folder: Path, pairs: int, world: BallWorld, *, seed: int, event: Event) -> None:
    """Write pairs of clips into a folder on all cores, continuing where an interrupted run stopped."""
    on_all_cores(partial(write_ball_pair, folder, world=world, seed=seed, event=event), pairs, name=folder.name)
