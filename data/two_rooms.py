"""Two rooms and a door between them: a world to act in, simulated, rendered and encoded here.

A dot goes through a picture of 65x65 pixels; a wall with one door divides it. The rules are those of eb_jepa's Two
Rooms (facebookresearch/eb_jepa), written anew; lengths are in pixels, x to the right, y downwards.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

SIZE, NEAR_WALL, FAR_WALL = 65, 4.0, 60.0
"""Pixels of the picture's sides; where the outer walls are, in x and in y."""
DOOR, HALF_WALL = 4.0, 1.0
"""Half the height of the door and half the width of the wall that it is in."""
LONGEST = 1.8
"""Length of a move, at most."""
REACHED = 4.5
"""Who is nearer to the goal has reached it."""
FPS = 10
STATE_COLUMNS, ACTION_COLUMNS = ("dot_x", "dot_y", "wall_x", "door_y"), ("action_x", "action_y")


class Layout(NamedTuple):
    """Where the wall and its door are; of several rooms side by side, arrays (N,)."""

    wall_x: Any
    door_y: Any

    @classmethod
    def draw(cls, generator: np.random.Generator) -> "Layout":
        """One of the 1,125, each equally likely."""
        return cls(int(generator.integers(20, 45)), int(generator.integers(10, 55)))


def move(positions: np.ndarray, actions: np.ndarray, layout: Layout, generator: np.random.Generator) -> np.ndarray:
    """Where dots at positions (N, 2) are after actions (N, 2), which a wall may stop.

    Of the walls that the way crosses the nearest one counts. There the dot stays, with noise that keeps its side.
    """
    (x, y), (dx, dy) = positions.T, actions.T
    left, right = layout.wall_x - HALF_WALL, layout.wall_x + HALF_WALL
    top, bottom = layout.door_y - DOOR, layout.door_y + DOOR
    shares, normals = [], []

    def meet(line: Any, start: np.ndarray, way: np.ndarray, across: int, is_solid: Any) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (line - start) / way
            reached = (share >= 0) & (share <= 1) & (way != 0) & is_solid(share)
        shares.append(np.where(reached, share, np.inf))
        normals.append(across)

    for line, outwards in ((NEAR_WALL, -1), (FAR_WALL, 1)):
        meet(line, x, dx, 0, lambda _, outwards=outwards: dx * outwards > 0)
        meet(line, y, dy, 1, lambda _, outwards=outwards: dy * outwards > 0)
    beside_door = lambda share: np.abs(y + share * dy - layout.door_y) > DOOR  # noqa: E731
    meet(left, x, dx, 0, lambda share: (dx > 0) & beside_door(share))
    meet(right, x, dx, 0, lambda share: (dx < 0) & beside_door(share))
    in_wall = lambda share: np.abs(x + share * dx - layout.wall_x) < HALF_WALL  # noqa: E731
    meet(top, y, dy, 1, lambda share: (dy < 0) & in_wall(share))
    meet(bottom, y, dy, 1, lambda share: (dy > 0) & in_wall(share))

    share = np.min(shares, axis=0)  # (N,)
    noise = 0.5 * generator.standard_normal(positions.shape)
    # In a corner both walls are met.
    is_met = np.array(shares) <= share + 1e-9
    is_across = np.stack([is_met[np.equal(normals, axis)].any(axis=0) for axis in (0, 1)], axis=1)  # (N, 2)
    noise = np.where(is_across, -np.sign(actions) * np.abs(noise), noise)
    met = positions + np.where(np.isfinite(share), share, 0)[:, None] * actions
    # Near a corner, noise along one wall would lead through another.
    noise = np.where(is_across | is_free(met + noise, layout)[:, None], noise, 0)
    return np.where(np.isfinite(share)[:, None], met + noise, positions + actions)


def is_free(positions: np.ndarray, layout: Layout) -> np.ndarray:
    """Whether positions (N, 2) are in a room or in the door, bool (N,)."""
    is_inside = ((positions > NEAR_WALL) & (positions < FAR_WALL)).all(axis=1)
    is_beside = np.abs(positions[:, 0] - layout.wall_x) > HALF_WALL
    return is_inside & (is_beside | (np.abs(positions[:, 1] - layout.door_y) < DOOR))


def render_rooms(positions: np.ndarray, layout: Layout) -> np.ndarray:
    """Pictures, RGB uint8 (T, 65, 65, 3), of dots at positions (T, 2) in one layout: dots are red, walls are blue."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    distance = np.hypot(columns - positions[:, 0, None, None], rows - positions[:, 1, None, None])
    walls = np.isin(columns, (NEAR_WALL, FAR_WALL)) | np.isin(rows, (NEAR_WALL, FAR_WALL))
    walls |= (np.abs(columns - layout.wall_x) <= HALF_WALL) & (np.abs(rows - layout.door_y) > DOOR)
    pictures = np.zeros((len(positions), SIZE, SIZE, 3), np.uint8)
    pictures[..., 0] = 255 * np.exp(-(distance**2) / (2 * 1.3**2)) + 0.5
    pictures[..., 2] = 255 * walls
    return pictures


def draw_actions(generator: np.random.Generator, number: int, *, first: float | None = None) -> np.ndarray:
    """Moves (number, 2) of somebody who strolls, in `first` direction (radians) or any: each turns a little."""
    directions = np.cumsum(generator.vonmises(0, 5, size=number))
    directions += (generator.uniform(-np.pi, np.pi) if first is None else first) - (directions[0] if number else 0)
    lengths = np.empty(0)
    while len(lengths) < number:
        drawn = generator.normal(1.0, 0.4, size=2 * number)
        lengths = np.concatenate([lengths, drawn[(drawn >= 0.2) & (drawn <= LONGEST)]])
    return lengths[:number, None] * np.stack([np.cos(directions), np.sin(directions)], axis=1)


def walk(start: np.ndarray, actions: np.ndarray, layout: Layout, generator: np.random.Generator) -> np.ndarray:
    """Positions (T + 1, 2) from a start (2,) by actions (T, 2)."""
    positions = [start]
    for action in actions:
        positions.append(move(positions[-1][None], action[None], layout, generator)[0])
    return np.array(positions)


def stroll(layout: Layout, frames: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Positions and actions, (frames, 2) each, of a clip; 35 % are made to pass through the door."""
    if generator.random() >= 0.35:
        actions = draw_actions(generator, frames)
        start = place_in_room(layout, generator.random() < 0.5, generator, margin=0.5)
        return walk(start, actions, layout, generator)[:-1], actions
    # From a point in the door one way to the one side and, backwards in time, one to the other.
    at, side = int(generator.integers(1, frames)), np.pi * (generator.random() < 0.5)
    height = np.clip(generator.normal(layout.door_y, 1.4), layout.door_y - 3.9, layout.door_y + 3.9)
    door = np.array([layout.wall_x + generator.uniform(-1, 1), height])
    first, second = (side + turn + generator.uniform(-np.pi / 4, np.pi / 4) for turn in (0, np.pi))
    onwards = draw_actions(generator, frames - at, first=first)
    after = walk(door, onwards, layout, generator)[:-1]
    before = walk(door, draw_actions(generator, at, first=second), layout, generator)
    return np.concatenate([before[:0:-1], after]), np.concatenate([-np.diff(before, axis=0)[::-1], onwards])


def place_in_room(layout: Layout, is_right: bool, generator: np.random.Generator, *, margin: float) -> np.ndarray:
    """A point (2,), uniform over one of the rooms but for a margin along its walls."""
    near, far = NEAR_WALL + margin, FAR_WALL - margin
    beside = margin + HALF_WALL
    ends = (layout.wall_x + beside, far) if is_right else (near, layout.wall_x - beside)
    return np.array([generator.uniform(*ends), generator.uniform(near, far)])


class TwoRooms:
    """The world: from a start in one room to a goal in the other, shown as a picture. See `data.worlds.World`."""

    fps, low, high = float(FPS), -LONGEST * np.ones(2), LONGEST * np.ones(2)
    longest: float | None = LONGEST
    columns: Sequence[str] = STATE_COLUMNS

    def __init__(self, layout: Layout | None = None) -> None:
        self.always = layout

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A new layout, if it is not always the same, start and goal; all chance is of the seed."""
        self.generator = np.random.default_rng(seed)
        self.layout, to_right = Layout.draw(self.generator), self.generator.random() < 0.5
        self.layout = self.always or self.layout
        self.position, self.goal = (
            place_in_room(self.layout, is_right, self.generator, margin=2.6) for is_right in (not to_right, to_right)
        )
        return self._moment()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """A move (2,), cut to the longest one."""
        action = action * min(1.0, LONGEST / max(1e-9, float(np.linalg.norm(action))))
        self.position = move(self.position[None], action[None], self.layout, self.generator)[0]
        return self._moment()

    def _moment(self) -> tuple[np.ndarray, dict[str, Any]]:
        picture, goal = render_rooms(np.stack([self.position, self.goal]), self.layout)
        is_near = bool(np.linalg.norm(self.position - self.goal) < REACHED)
        return picture, {"goal": goal, "state": np.array([*self.position, *self.layout]), "is_success": is_near}
