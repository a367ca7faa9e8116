"""The account of a run: what was found, read, refused, and damaged."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from data.decoder import Damage
from data.errors import printable

EXAMPLES = 10


@dataclass
class Account:
    """What was found, and videos read, refused and damaged in a run: said at its end, and left in its folder."""

    found: Counter[str] = field(default_factory=Counter)
    """Numbers of files of each kind, as `data.folders.find_videos` counts them."""
    read_s: dict[str, float] = field(default_factory=dict)
    """Seconds of video that were read."""
    refused: dict[str, str] = field(default_factory=dict)
    """Reasons why files were not read at all."""
    doubles: dict[str, str] = field(default_factory=dict)
    """Videos whose content is that of another one, which stands for both."""
    assumed: dict[str, str] = field(default_factory=dict)
    """What was taken for granted of videos that do not say it."""
    damaged: dict[str, Damage] = field(default_factory=dict)
    """Faults inside files that were read."""

    def add(self, path: Path | str, seconds: float, damage: Damage) -> None:
        """Add a video that was read, or a part of one."""
        self.read_s[str(path)] = self.read_s.get(str(path), 0.0) + seconds
        if damage:
            self.damaged.setdefault(str(path), Damage()).add(damage)

    def merge(self, others: "Iterable[Account]") -> None:
        """Add what other processes of the same run did."""
        for other in others:
            for path, seconds in other.read_s.items():
                self.add(path, seconds, other.damaged.get(path, Damage()))
            self.refused |= other.refused

    def __str__(self) -> str:
        minutes = sum(self.read_s.values()) / 60
        corrupt = sum(damage.corrupt_frames for damage in self.damaged.values())
        text = (
            f"read {len(self.read_s):,} videos, {minutes:,.1f} minutes; refused {len(self.refused):,}; "
            f"doubles {len(self.doubles):,}; damaged {len(self.damaged):,}, {corrupt:,} corrupt frames left out"
        )
        more = self.faults | {"damaged": [f"{path}: {damage}" for path, damage in self.damaged.items()]}
        return "\n".join([*self.listing, text, *(line for title in more for line in examples(title, more[title]))])

    @property
    def listing(self) -> list[str]:
        """What was found, in one line, none where nobody has looked; and what was assumed."""
        found = [f"found {self.found.total():,} files: {listed(self.found)}"] if self.found else []
        return found + examples("assumed", [f"{path}: {what}" for path, what in self.assumed.items()])

    @property
    def faults(self) -> dict[str, list[str]]:
        """What was not read, and why."""
        doubles = [f"{path}: the same as {other}" for path, other in self.doubles.items()]
        return {"refused": list(self.refused.values()), "doubles": doubles}


def examples(title: str, reasons: list[str]) -> list[str]:
    """A line for each of the first, and one for all others."""
    more = [f"and {len(reasons) - EXAMPLES:,} more"] if len(reasons) > EXAMPLES else []
    return [f"  {title}: {printable(reason)}" for reason in reasons[:EXAMPLES] + more]


def listed(counts: Counter[str]) -> str:
    """Counts in words, the largest first: "12 .txt, 3 hidden"."""
    more = [f"{len(counts) - EXAMPLES} other kinds"] if len(counts) > EXAMPLES else []
    return ", ".join([f"{count:,} {printable(name)}" for name, count in counts.most_common(EXAMPLES)] + more)
