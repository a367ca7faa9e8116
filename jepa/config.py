"""Configurations that check themselves: frozen dataclasses whose fields are annotated with bounds."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from jepa.errors import ConfigurationError


class Bounds:
    """The range of a number, in words and as a test; NaN lies in no range."""

    def __init__(self, words: str, hold: Callable[[float], bool]) -> None:
        self.words, self.hold = words, hold


Positive = Annotated[float, Bounds("above 0", lambda value: value > 0)]
NotNegative = Annotated[float, Bounds("at least 0", lambda value: value >= 0)]
PositiveInt = Annotated[int, Bounds("at least 1", lambda value: value >= 1)]
NotNegativeInt = Annotated[int, Bounds("at least 0", lambda value: value >= 0)]
SeveralInt = Annotated[int, Bounds("at least 2", lambda value: value >= 2)]
Share = Annotated[float, Bounds("at least 0 and below 1", lambda value: 0 <= value < 1)]


@dataclass(frozen=True)
class Bounded:
    """Base of configurations. A field, or one of a tuple, outside its annotated bounds is a `ConfigurationError`."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value, hint = getattr(self, field.name), hints[field.name]
            marks = [mark for inner in (hint, *get_args(hint)) for mark in getattr(inner, "__metadata__", ())]
            for mark in marks:
                if isinstance(mark, Bounds) and not all(map(mark.hold, _numbers(value))):
                    raise ConfigurationError(field.name, f"is {shown(value)}: it must be {mark.words}")


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)


def shown(value: Any) -> str:
    """A number, or several, as on a command line."""
    return " ".join(map(shown, value)) if isinstance(value, tuple | list) else f"{value:g}"
