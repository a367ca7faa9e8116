"""Configurations that check themselves: frozen dataclasses whose fields are annotated with bounds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from jepa.errors import ConfigurationError


class Bounds:
    """The range of a number."""

    def __init__(
        self, low: float = -math.inf, high: float = math.inf, *, open_low: bool = False, open_high: bool = True
    ) -> None:
        self.low, self.high, self.open_low, self.open_high = low, high, open_low, open_high

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return low if self.high == math.inf else f"{low} and {'below' if self.open_high else 'at most'} {self.high:g}"

    def hold(self, value: float) -> bool:
        """Whether a value lies inside; NaN lies in no range."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)


Positive = Annotated[float, Bounds(0, open_low=True)]
NotNegative = Annotated[float, Bounds(0)]
PositiveInt = Annotated[int, Bounds(1)]
NotNegativeInt = Annotated[int, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True)
class Bounded:
    """Base of configurations.

    Raises:
        ConfigurationError: a field lies outside the bounds that it is annotated with, alone or inside a tuple.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            inner = [
                hint for hint in (hints[field.name], *get_args(hints[field.name])) if hasattr(hint, "__metadata__")
            ]
            bounds = [bound for hint in inner for bound in hint.__metadata__ if isinstance(bound, Bounds)]
            for bound in bounds:
                for number in _numbers(value):
                    if not bound.hold(number):
                        raise ConfigurationError(field.name, f"is {_shown(value)}: it must be {bound}")


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else () if value is None else (value,)


def _shown(value: Any) -> str:
    return " ".join(map(_shown, value)) if isinstance(value, tuple | list) else f"{value:g}"
