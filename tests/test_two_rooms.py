"""Two rooms: nobody goes through a wall, and chance is of the seed."""

import numpy as np
import pytest

from benchmarks.two_rooms import write_room_clip
from data.clock import read_on_clock
from data.sidecar import read_sidecar
from data.two_rooms import (
    ACTION_COLUMNS,
    DOOR,
    FAR_WALL,
    FPS,
    LONGEST,
    NEAR_WALL,
    REACHED,
    SIZE,
    STATE_COLUMNS,
    Layout,
    TwoRooms,
    is_free,
    move,
    render_rooms,
    stroll,
)


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_nobody_is_in_a_wall_and_rooms_are_changed_by_the_door() -> None:
    generator, changed, blocked = chance(), 0, []
    for _ in range(100):
        layout = Layout.draw(generator)
        positions, actions = stroll(layout, 60, generator)
        assert is_free(positions, layout).all()
        lengths = np.linalg.norm(actions, axis=1)
        assert (lengths <= LONGEST + 1e-9).all()
        (crossed,) = np.diff(positions[:, 0] > layout.wall_x).nonzero()
        assert (np.abs(positions[crossed, 1] - layout.door_y) <= DOOR + LONGEST).all()
        changed += len(crossed) > 0
        blocked.append(np.abs(np.diff(positions, axis=0) - actions[:-1]).max(axis=1) > 1e-9)
    assert 25 <= changed <= 60
    assert 0.1 < np.concatenate(blocked).mean() < 0.35


@pytest.mark.parametrize("action", [(1.5, 0.0), (-1.5, 0.0), (0.0, 1.5), (0.0, -1.5), (1.2, 1.2), (0.0, 0.0)])
def test_a_move_is_what_was_done_or_stops_on_this_side(action: tuple[float, float]) -> None:
    layout, generator = Layout(30, 30), chance()
    starts = np.stack(np.meshgrid(np.linspace(4.1, 59.9, 60), np.linspace(4.1, 59.9, 60)), axis=-1).reshape(-1, 2)
    starts = starts[is_free(starts, layout)]
    ends = move(starts, np.tile(action, (len(starts), 1)), layout, generator)
    assert np.isfinite(ends).all()
    assert is_free(ends, layout).all()
    whole = np.abs(ends - starts - action).max(axis=1) < 1e-9
    # The middle of a straight way is in no wall either, and what was stopped would have met one.
    assert is_free(starts + np.array(action) / 2, layout)[whole].all()
    assert whole.mean() > 0.9 or action == (0.0, 0.0)


def test_the_world_is_the_seeds_and_says_when_the_goal_is_near() -> None:
    world = TwoRooms()
    first, info = world.reset(3)
    again, _ = TwoRooms().reset(3)
    np.testing.assert_array_equal(first, again)
    assert first.shape == info["goal"].shape == (SIZE, SIZE, 3)
    assert not info["is_success"]
    assert (world.position[0] > world.layout.wall_x) != (world.goal[0] > world.layout.wall_x)
    world.position = world.goal + np.array([REACHED - 0.1, 0])
    _, info = world.step(np.zeros(2))
    assert info["is_success"]
    _, far = world.step(np.array([100.0, 0.0]))
    assert far["state"][0] <= min(world.goal[0] + REACHED + LONGEST, FAR_WALL)


def test_a_picture_shows_dot_walls_and_door() -> None:
    picture = render_rooms(np.array([[12.0, 50.0]]), Layout(30, 20))[0]
    assert np.unravel_index(picture[..., 0].argmax(), (SIZE, SIZE)) == (50, 12)
    walls = picture[..., 2] > 0
    assert walls[int(NEAR_WALL)].all()
    assert walls[:, int(FAR_WALL)].all()
    assert walls[5:60, 30].sum() == 55 - 9
    assert not walls[20, 30]


def test_clips_are_videos_with_tables(tmp_path) -> None:
    path = write_room_clip(tmp_path, 0, 12, seed=0)
    frames = list(read_on_clock(path, (SIZE, SIZE), fps=FPS))
    assert len(frames) == 12
    times = np.array([frame.time_s for frame in frames])
    table = read_sidecar(path, times, columns=(*STATE_COLUMNS, *ACTION_COLUMNS), tolerance_s=0.01)
    for frame, (x, y) in zip(frames, table[:, :2], strict=True):
        row, column = np.unravel_index(frame.frame[0].argmax(), (SIZE, SIZE))
        assert abs(column - x) <= 1
        assert abs(row - y) <= 1
