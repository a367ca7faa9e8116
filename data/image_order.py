"""The order and the times of images, by their names alone.

Names may differ in one time or in one number; other numbers must run along with it. Of the forms that all names have,
the surest that puts them into one order is taken. Several series side by side, and names that do not tell their order,
are refused: nothing is guessed.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from itertools import pairwise
from os.path import splitext
from statistics import median, median_low

import numpy as np

UNITS_NS = {"hour": 3600 * 10**9, "minute": 60 * 10**9, "second": 10**9, "milli": 10**6, "micro": 1000, "number": 1}
PERIODS_NS = {unit: [UNITS_NS[coarser]] for unit, coarser in pairwise(reversed(UNITS_NS))}
PERIODS_NS |= {"hour": [12 * UNITS_NS["hour"], 24 * UNITS_NS["hour"]], "micro": [UNITS_NS["milli"], UNITS_NS["second"]]}
"""After how long a number of a unit, the coarsest of a name, begins again."""
NUMBER = re.compile(r"(?P<number>(?<![^\W_]|[ )])-\d+|\d+)")  # a minus behind a letter, a digit or a space is none
_DAY = r"(?<!\d)(?P<year>(?:19|20)\d\d)(?P<a>[-_.]?)(?P<month>0[1-9]|1[0-2])(?P=a)(?P<day>0[1-9]|[12]\d|3[01])"
_DD, _MM, _YYYY = r"(?P<day>0[1-9]|[12]\d|3[01])", r"(?P<month>0[1-9]|1[0-2])", r"(?P<year>20\d\d)"
_HOUR, _MINUTE, _SECOND = r"(?P<hour>[01]\d|2[0-3])", r"(?P<minute>[0-5]\d)", r"(?P<second>[0-5]\d)"
_CLOCK = rf"{_HOUR}(?P<b>[-_.: ]?){_MINUTE}(?P=b){_SECOND}"
ZONED = re.compile(
    rf"{_CLOCK}(?:[.,]?\d+)?[ _]?(?P<zone>(?:UTC|GMT|\+)[+-]?\d{{1,2}}(?::?[034][05])?|-\d\d:?[034][05])(?!\d)"
)
_EPOCH = r"(?<!\d)(?P<second>1[1-9]\d{8})"  # seconds since 1970, in the years 2004 to 2033
_PART, _DIGITS = r"(?P<fraction>\d{9}|\d{6}|\d{3})", r"(?P<fraction>\d+)"
_BEGIN = r"(?<![\d.])(?<!(?<![^\W_])-)"
_END = r"(?!\d)(?!.*\d\s?[AaPp]\.?[Mm](?![A-Za-z]))"  # half days begin again: they are read as numbers
_DATED = r"(?<!\d)%s(?P<a>[-_.]?)%s(?P=a)" + rf"{_YYYY}\D{{0,4}}{_CLOCK}(?:[.,]?{_PART})?{_END}"
DAY_MONTH, MONTH_DAY = _DATED % (_DD, _MM), _DATED % (_MM, _DD)
FORMS = [  # and what is carried into when the finer number is over; evidence for a time: 1 such a carry, 2 others, too
    (rf"{_DAY}\D{{0,4}}{_CLOCK}(?:[.,]?{_PART})?{_END}", "", 0),
    *((dates, "", 0) for dates in (DAY_MONTH, MONTH_DAY)),
    (rf"{_DAY}{_CLOCK}(?<=\d{{14}}){_DIGITS}{_END}", "", 0),
    (rf"{_EPOCH}(?:[.,]?(?P<fraction>(?<=\D)\d+|\d{{9}}|\d{{6}}|\d{{3}}))?{_END}", "", 0),
    (rf"{_BEGIN}(?:(?P<milli>\d+)ms|(?P<micro>\d+)[uµμ]s|(?P<minute>\d+)min)(?![a-z])", "", 0),
    (rf"{_BEGIN}(?:(?P<hour>\d+)h)?(?:(?P<minute>\d+)m)?(?P<second>\d+)(?:\.{_DIGITS})?s(?:ec)?(?![a-z])", "", 0),
    (rf"{_DAY}(?:(?<=\d{{8}})|\D{{1,4}}(?=\d\d[-_.:h])){_HOUR}[-_.:h]?{_MINUTE}{_END}", "", 0),
    (rf"{_DAY}{_END}", "", 0),
    # Two or three numbers, unless the finer one begins at the same place again and again, as frames of scenes do.
    (rf"^{_HOUR}(?P<b>[-_.:]){_MINUTE}(?P=b){_SECOND}(?:[.,]{_DIGITS})?$", "minute", 0),
    (rf"^(?P<second>0|[1-9]\d{{0,5}}|\d{{1,6}}(?=\.\d{{3}}))\.{_DIGITS}$", "second", 0),
    (rf"(?<!\d){_DAY}\D{{0,4}}{_CLOCK}[-_.,]{_DIGITS}{_END}", "second", 1),
    (rf"(?<!\d){_CLOCK}[-_.,]{_DIGITS}{_END}", "second", 2),
    (rf"{_DAY}\D{{0,4}}{_HOUR}{_MINUTE}{_END}", "hour", 2),
    (rf"{_EPOCH}[-_]{_PART}{_END}", "second", 1),
    (rf"{_BEGIN}(?P<second>\d{{1,6}})\.{_DIGITS}(?!\d|\.\d)", "second", 2),
    (rf"(?<!\d){_CLOCK}(?:\.{_DIGITS})?{_END}", "minute", 2),
    (rf"(?<!\d)(?P<minute>\d\d?)[-_.:m]?{_SECOND}{_END}", "minute", 2),
    (NUMBER.pattern, "", 0),
]


def order_of(names: Sequence[str]) -> tuple[list[str], np.ndarray, bool]:
    """Images in the order that their names tell, when, and whether that is in seconds.

    Times, float64 (T,), begin at 0; of names that are no times in usual steps. `ValueError` where no order is told.
    """
    stems = [splitext(name)[0] for name in names]
    zones = {match["zone"] for stem in stems for match in ZONED.finditer(stem)}
    if len(zones) > 1:
        raise ValueError(f"the names of its images are of several time zones ({', '.join(sorted(zones))}): take one")
    for pattern, coarse, evidence in FORMS:
        if ordered := _ordered(stems, re.compile(pattern), coarse, evidence):
            times, order = zip(*ordered, strict=True)
            is_number = pattern == NUMBER.pattern
            months = _ordered(stems, re.compile(MONTH_DAY), "", 0) if pattern == DAY_MONTH else []
            if months and [time - months[0][0] for time, _ in months] != [time - times[0] for time in times]:
                raise ValueError("the names of its images may have the day or the month first: put the year first")
            unit = median_low([other - one for one, other in pairwise(times)]) if is_number else UNITS_NS["second"]
            return [names[at] for at in order], np.array([(time - times[0]) / unit for time in times]), not is_number
    raise ValueError(
        f"the names of its {len(names):,} images do not tell one order ({_series(names)}): "
        "give each series a folder of its own, and each image a number or a time"
    )


def _ordered(stems: list[str], pattern: re.Pattern[str], coarse: str, evidence: int) -> list[tuple[int, int]]:
    """Times, or numbers, in order, and the places of their stems; empty if this form does not tell one order."""
    matches = []
    for stem in stems:
        matches.append(list(pattern.finditer(stem)))
        if not matches[-1] or len(matches[-1]) != len(matches[0]):
            return []
    for column in zip(*matches, strict=True):
        try:
            ordered = sorted((_value(match), at) for at, match in enumerate(column))
        except ValueError:  # the thirtieth of February
            continue
        rests = [f"{stems[at][: column[at].start()]}T{stems[at][column[at].end() :]}" for _, at in ordered]
        rests = rests if len(set(rests)) > 1 else []
        numbers = [[int(number) for number in NUMBER.findall(rest)] for rest in rests]
        if (
            all(one < other for (one, _), (other, _) in pairwise(ordered))
            and len({NUMBER.sub("#", rest) for rest in rests}) <= 1
            and all(one <= other for one, other in pairwise(numbers))
            and _are_padded_alike(column)
            and not _begins_again([value for value, _ in ordered], numbers, column[0])
            and (not coarse or _goes_on([time for time, _ in ordered], UNITS_NS[coarse], evidence))
        ):
            return ordered
    return []


def _value(match: re.Match[str]) -> int:
    """A number, or a time in nanoseconds. Raises `ValueError` if there is no such day."""
    value = sum(int(match[unit]) * UNITS_NS[unit] for unit in match.re.groupindex.keys() & UNITS_NS if match[unit])
    if "fraction" in match.re.groupindex:
        value += int(f"{match['fraction'] or '':0<9.9}")
    if "year" in match.re.groupindex and match["year"]:
        value += 24 * UNITS_NS["hour"] * date(*map(int, match.group("year", "month", "day"))).toordinal()
    return value


def _are_padded_alike(matches: Sequence[re.Match[str]]) -> bool:
    """Whether no digits have a zero too many: 010 beside 9 may be a tenth, and .10 beside .9 the tenth."""
    groups = map(re.Match.groupdict, matches)
    digits = [one.get("number", "").lstrip("-") or (one.get("fraction") or "")[::-1] for one in groups]
    shortest = min(map(len, digits))
    return not any(len(text) > shortest and text.startswith("0") for text in digits)


def _begins_again(values: list[int], numbers: list[list[int]], match: re.Match[str]) -> bool:
    """Raises `ValueError` if a counter or clock may have gone around, or jumps where numbers beside it turn."""
    steps = [other - one for one, other in pairwise(values)]
    unit = next(unit for unit in ("year", *UNITS_NS) if match.groupdict().get(unit))
    periods = [10 ** len(str(values[-1])), 60] if unit == "number" else PERIODS_NS.get(unit, [])
    periods = [period for period in periods if values[-1] <= 2 * period]
    usual, beside = median_low(steps), list(zip(steps, pairwise(numbers), strict=False))
    # Days and scenes change seldom; what runs along with a counter changes with each image.
    turns = [by for by, (one, other) in beside if one != other]
    if len(turns) > len(steps) // 2:
        turns = [by for by, (one, other) in beside if any(map(int.__lt__, other, one))]
    least = 0 if unit in ("second", "milli", "micro") else 1 / 2
    around = [period for period in periods if period > values[-1] - values[0] >= period - 2 * usual]
    is_around = any(max(steps) > max(5 * usual, least * period) for period in around)
    if is_around or (periods and max(turns, default=0) > 5 * usual):
        raise ValueError("the names of its images may begin again: put dates before times, and years first")
    return False


def _goes_on(times_ns: list[int], coarse_ns: int, evidence: int) -> bool:
    """Whether times go on where the finer number is over: at their pace, or at other places than all at one."""
    pairs = [(one, other, one // coarse_ns < other // coarse_ns) for one, other in pairwise(times_ns)]
    carries = [other - one for one, other, is_carried in pairs if is_carried]
    within = [other - one for one, other, is_carried in pairs if not is_carried]
    begins = [other % coarse_ns for _, other, is_carried in pairs if is_carried]
    if not carries or not within:
        return evidence <= len(carries[:1])
    is_steady = median(within) / 1.5 <= median(carries) <= 1.5 * max(within)
    return is_steady or (evidence < 2 and max(begins) - min(begins) >= coarse_ns / 4)


def _series(names: Sequence[str]) -> str:
    """The largest series among some names, each by its first image, and how many it has."""
    kinds: Sequence[str] = [NUMBER.sub("#", name) for name in names]
    if len(set(kinds)) == 1:  # then by the number of which there are fewest
        columns = [column for column in zip(*map(NUMBER.findall, names), strict=True) if len(set(column)) > 1]
        kinds = min(columns, key=lambda column: len(set(column)), default=names)
    series = defaultdict(list)
    for kind, name in sorted(zip(kinds, names, strict=True)):
        series[kind].append(name)
    largest = sorted(series.values(), key=len, reverse=True)
    more = [f"{len(largest) - 3:,} more"] if len(largest) > 3 else []
    return ", ".join([f"{images[0]} ({len(images):,})" for images in largest[:3]] + more)
