"""Configurations that check themselves: frozen dataclasses whose fields are annotated with types and bounds."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from jepa.errors import ConfigurationError


class Bounds:
    """The range of a number, in words and as a test; NaN lies in no range."""

    def __init__(self, words: str, hold: Callable[[float], bool]) -> None:
        self.words, self.hold = words, hold


LARGEST, LARGEST_INT = sys.float_info.max, 2**32 - 1
Positive = Annotated[float, Bounds("above 0, and finite", lambda value: 0 < value <= LARGEST)]
NotNegative = Annotated[float, Bounds("at least 0, and finite", lambda value: 0 <= value <= LARGEST)]
PositiveInt = Annotated[int, Bounds("at least 1, and below 2^32", lambda value: 1 <= value <= LARGEST_INT)]
NotNegativeInt = Annotated[int, Bounds("at least 0, and below 2^32", lambda value: 0 <= value <= LARGEST_INT)]
Side = Annotated[int, Bounds("from 1 to 16384", lambda value: 1 <= value <= 2**14)]
SeveralInt = Annotated[int, Bounds("at least 2, and below 2^32", lambda value: 2 <= value <= LARGEST_INT)]
Share = Annotated[float, Bounds("at least 0 and below 1", lambda value: 0 <= value < 1)]


@dataclass(frozen=True)
class Bounded:
    """Base of configurations. A field of another type, or outside its annotated bounds, is a `ConfigurationError`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            require_fits(field.name, getattr(self, field.name), hints[field.name])


def require_fits(name: str, value: Any, hint: Any) -> None:
    """Raises `ConfigurationError` where a value is of another type than its hint, or it or one of a tuple too large."""
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError as error:
        raise ConfigurationError(name, f"is {value!r:.60}: {error}") from error
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    for mark in (mark for inner in (hint, *get_args(hint)) for mark in getattr(inner, "__metadata__", ())):
        if isinstance(mark, Bounds) and not all(map(mark.hold, numbers)):
            raise ConfigurationError(name, f"is {shown(value)}: it must be {mark.words}")


def shown(value: Any) -> str:
    """A number, or several, as on a command line."""
    return " ".join(map(shown, value)) if isinstance(value, tuple) else f"{value:.12g}"
