"""Worlds to act in: the two rooms, and any environment of gymnasium that draws pictures."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    fps: float
    low: np.ndarray  # least actions, (A,)
    high: np.ndarray  # largest actions, (A,)
    longest: float | None  # length of an action, at most
    columns: Sequence[str]  # names of the state's numbers

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode; all chance is of the seed."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """What comes of an action (A,)."""


class GymWorld:
    """An environment of gymnasium. Raises `WorldError` where it is not there, draws nothing, or takes other actions."""

    longest: float | None = None
    columns: Sequence[str] = ()

    def __init__(self, name: str) -> None:
        try:
            gymnasium = import_module("gymnasium")
        except ImportError as error:
            raise WorldError(f"world {name} takes gymnasium: pip install gymnasium, or take {TWO_ROOMS}") from error
        try:
            self.env: Any = gymnasium.make(name, render_mode="rgb_array")
        except Exception as error:  # of the environment's own making
            raise WorldError(f"world {name}: gymnasium cannot make it ({_reason(error)})") from error
        space = self.env.action_space
        is_row = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.shape[0] > 0
        if not is_row or not space.is_bounded():
            raise WorldError(f"world {name} takes actions of {space}: they must be bounded numbers in a row")
        self.name, self.low, self.high = name, space.low.astype(float), space.high.astype(float)
        rate = self.env.metadata.get("render_fps") or 10
        if not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise WorldError(f"world {name} has render_fps = {rate!r}: it must be pictures per second")
        self.fps = float(rate)
        self.shape: tuple[int, ...] = ()  # of the pictures of this episode

    def reset(self, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
        """A new episode."""
        with self._said("begin anew"):
            _, info = self.env.reset(seed=seed)
        self.shape = ()
        return self._picture(), _known(info)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
        """What comes of an action; whether the episode is over for the environment makes no difference."""
        with self._said("take a step"):
            _, _, _, _, info = self.env.step(action.astype(self.env.action_space.dtype))
        return self._picture(), _known(info)

    def _picture(self) -> np.ndarray:
        with self._said("be drawn"):
            picture = np.asarray(self.env.render())
        if not _is_picture(picture):
            what = f"{picture.dtype} {picture.shape}"
            raise WorldError(f"world {self.name} draws no picture, but {what}: it must be uint8 (H, W, 3)")
        if self.shape not in ((), picture.shape):
            changed = f"{self.shape} and then {picture.shape}"
            raise WorldError(f"world {self.name} draws pictures {changed} in one episode: they must be of one size")
        self.shape = picture.shape
        return picture.copy()  # it may draw the next one into the same memory

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """An error of the environment's own making, such as a library that is not installed, is one line."""
        try:
            yield
        except Exception as error:
            raise WorldError(f"world {self.name} cannot {what} ({_reason(error)}): mend it, or take another") from error


def _reason(error: Exception) -> str:
    """An error of whatever kind in one line."""
    return f"{' '.join(str(error).split()) or repr(error):.200}"


def _is_picture(value: Any) -> bool:
    """RGB uint8 (H, W, 3): of other numbers nobody knows what is white."""
    shown = isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3 and value.size > 0
    return shown and value.dtype == np.uint8


def _known(info: Any) -> dict[str, Any]:
    """What a `World` may say: environments use the same words for other things, such as a goal that is a position."""
    said = info if isinstance(info, dict) else {}
    known = {"goal": said["goal"]} if _is_picture(said.get("goal")) else {}
    success = np.asarray(said.get("is_success"))
    is_one = success.size == 1 and success.dtype.kind in "biuf"
    return known | ({"is_success": bool(success.item())} if is_one else {})


def open_world(name: str) -> World:
    """The world of that name. Raises `WorldError`."""
    return TwoRooms() if name == TWO_ROOMS else GymWorld(name)
