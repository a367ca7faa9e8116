"""Worlds to act in: the two rooms, and any environment of gymnasium that draws pictures."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from data.errors import DataError
from data.two_rooms import TwoRooms

TWO_ROOMS = "two-rooms"


class WorldError(DataError):
    """A world that cannot be acted in; the message names it and the reason."""


class World(Protocol):
    """A world: it shows a picture, RGB uint8 (H, W, 3), and is acted in by numbers (A,).

    What else it says of a moment may hold a `goal`, a picture, true numbers as `state`, and whether it `is_success`.
    """

    @property
    def fps(self) -> float: ...
    @property
    def low(self) -> np.ndarray:
        """Least actions, (A,)."""

    @property
    def high(self) -> np.ndarray:
        """Largest actions, (A,)."""

    @property
    def longest(self) -> float | None:
        """Length of an action, at most."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of the state's numbers."""

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode; all chance is of the seed."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """What comes of an action (A,)."""


class GymWorld:
    """An environment of gymnasium. Raises `WorldError` where it is not there, draws nothing, or takes other actions."""

    longest, columns = None, ()

    def __init__(self, name: str) -> None:
        try:
            gymnasium = import_module("gymnasium")
        except ImportError as error:
            raise WorldError(f"world {name} takes gymnasium: pip install gymnasium, or take {TWO_ROOMS}") from error
        try:
            self.env: Any = gymnasium.make(name, render_mode="rgb_array")
        except Exception as error:  # of the environment's own making
            reason = " ".join(str(error).split()) or repr(error)
            raise WorldError(f"world {name}: gymnasium cannot make it ({reason:.200})") from error
        space = self.env.action_space
        if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1 or not space.is_bounded():
            raise WorldError(f"world {name} takes actions of {space}: they must be bounded numbers in a row")
        self.low, self.high = space.low.astype(float), space.high.astype(float)
        self.fps = float(self.env.metadata.get("render_fps") or 10)

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode."""
        _, info = self.env.reset(seed=seed)
        return self._picture(), _known(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """What comes of an action; whether the episode is over for the environment makes no difference."""
        _, _, _, _, info = self.env.step(action.astype(self.env.action_space.dtype))
        return self._picture(), _known(info)

    def _picture(self) -> np.ndarray:
        try:
            picture = np.asarray(self.env.render())
        except Exception as error:  # of the environment's own making, such as a library that is not installed
            raise WorldError(f"{self.env} cannot be drawn ({' '.join(str(error).split()):.200})") from error
        if not _is_picture(picture):
            raise WorldError(f"{self.env} draws no picture, but {picture.dtype} {picture.shape}")
        return picture.astype(np.uint8)


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3


def _known(info: dict[str, Any]) -> dict[str, Any]:
    """What a `World` may say: environments use the same words for other things, such as a goal that is a position."""
    known = {"goal": info["goal"]} if _is_picture(info.get("goal")) else {}
    return known | ({"is_success": bool(info["is_success"])} if "is_success" in info else {})


def open_world(name: str) -> World:
    """The world of that name. Raises `WorldError`."""
    return TwoRooms() if name == TWO_ROOMS else GymWorld(name)
