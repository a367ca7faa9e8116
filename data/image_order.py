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
PERIODS_NS |= {"minute": [UNITS_NS["hour"], 24 * UNITS_NS["minute"]], "number": [24, 53, 366, 1131, 60]}
"""After how long a number of a unit, the coarsest of a name, begins again; minutes may be hours, numbers days, 1231."""
DAY_NS = 24 * UNITS_NS["hour"]
NUMBER = re.compile(r"(?P<number>(?<![^\W_]|[ )])-\d+|\d+)")  # a minus behind a letter, a digit or a space is none
_OF = {"Y": r"(?P<year>(?:19|20)\d\d)", "y": r"(?P<year>\d\d)", "m": r"(?P<month>0[1-9]|1[0-2])"}
_OF |= {"d": r"(?P<day>0[1-9]|[12]\d|3[01])", "N": r"(?!\d{4}\D?(?:0[1-9]|1[0-2])\D?01)" + _OF["Y"]}  # not ISO's first
_DAY, *_ = DATES = [  # ISO's first
    rf"(?<!\d){_OF[order[0]]}(?P<a>[-_.]?){_OF[order[1]]}(?P=a){_OF[order[2]]}"
    for order in ("Ymd", "Ndm", "dmY", "mdY", "ymd", "dmy", "mdy")
]
_HOUR, _MINUTE, _SECOND = r"(?P<hour>[01]\d|2[0-3])", r"(?P<minute>[0-5]\d)", r"(?P<second>[0-5]\d)"
_CLOCK = rf"{_HOUR}(?P<b>[-_.: ]?){_MINUTE}(?P=b){_SECOND}"
ZONED = re.compile(
    rf"{_CLOCK}(?:[.,]?\d+)?[ _]?(?P<zone>(?:UTC|GMT|\+)[+-]?\d{{1,2}}(?::?[034][05])?|-\d\d:?[034][05])(?!\d)"
)
HALF_DAY = re.compile(  # a clock of twelve hours: in English, and in Chinese, Japanese and Korean
    r"(?:(?P<early>上午|午前|오전)|(?P<late>下午|午後|오후))?\s?"
    r"(?<!\d)(?<!(?<!\d)(?<!\d[-_.])\d{4}[-_.])(?<!\d{4}[-_.]\d\d[-_.])"  # a day or a month is no hour
    rf"(?P<hour>1[0-2]|0?[1-9])(?:(?P<b>[-_.: ]?){_MINUTE}(?:(?P=b){_SECOND})?)?(?!\d)"
    r"(?(early)|(?(late)|[-_\s]?(?P<half>[AaPp])\.?[Mm]\.?(?![^\W_])))"
)
LETTERED = re.compile(  # behind a date, such as VLC's own 2024-05-01-06h30m05s123
    r"(?<=\d)([-_T ]{1,3})(\d\d)h ?([0-5]\d)m ?([0-5]\d)s?(\d{3})?(?!\w)"
)
OTHER_DATE = re.compile(  # a day that is beside a time, and not in front of it
    r"(?i)(?<!\d)(?:(?:19|20)\d\d[-_.]?\d\d?[-_.]?\d\d?(?!\d)|\d\d?[-_.]\d\d?[-_.](?:19|20)\d\d"
    r"|\d\d?[-_. ]?(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec))"
)
OTHER_CLOCK = re.compile(r"(?<!\d)\d\d([-_.:])\d\d\1\d\d(?!\d)")
_EPOCH = r"(?<!\d)(?P<second>1[1-9]\d{8})"  # seconds since 1970, in the years 2004 to 2033
_PART, _DIGITS = r"(?P<fraction>\d{9}|\d{6}|\d{3}|(?<=\d{14})\d+)", r"(?P<fraction>\d+)"
_BEGIN, _END = r"(?<![\d.])(?<!(?<![^\W_])-)", r"(?!\d)"
DATED = [  # to the second, to the minute but for what is Unix time, to the hour
    *(rf"{date}\D{{0,4}}{_CLOCK}(?:[.,]?{_PART})?{_END}" for date in DATES),
    *(rf"(?!1[1-9]\d{{8}}(?!\d)){date}(?<=\d{{6}}){_HOUR}{_MINUTE}{_END}" for date in DATES),
    rf"{_DAY}(?<=\d{{8}}){_HOUR}{_END}",
]
FORMS = [  # and what is carried into when the finer number is over; evidence for a time: 1 such a carry, 2 others, too
    ([rf"(?<!\d){date}\D{{0,4}}{_CLOCK}[-_.,]{_PART}{_END}" for date in DATES], "second", 1),
    ([rf"{_EPOCH}[-_.,]{_PART}{_END}"], "second", 1),
    (DATED, "", 0),
    ([rf"{_EPOCH}(?:[.,]?(?P<fraction>(?<=\D)\d+|\d{{9}}|\d{{6}}|\d{{3}}))?{_END}"], "", 0),
    ([rf"{_BEGIN}(?:(?P<milli>\d+)ms(ec)?|(?P<micro>\d+)[uµμ]s|(?P<minute>\d+)min|(?P<hour>\d+)h)(?![a-z\d])"], "", 0),
    ([rf"{_BEGIN}(?P<number>\d+)ns(?![a-z])"], "", 0),
    ([rf"{_BEGIN}(?:(?P<hour>\d+)h)?(?:(?P<minute>\d+)m)?(?P<second>\d+)(?:\.{_DIGITS})?s(?:ec)?(?![a-z])"], "", 0),
    ([rf"{date}\D{{1,4}}(?=\d\d[-_.:h]){_HOUR}[-_.:h]?{_MINUTE}{_END}" for date in DATES], "", 0),
    ([rf"{date}{_END}" for date in DATES[:4]], "", 0),
    # Two or three numbers, unless the finer one begins at the same place again and again, as frames of scenes do.
    ([rf"^{_HOUR}(?P<b>[-_.:]){_MINUTE}(?P=b){_SECOND}(?:[.,]{_DIGITS})?$"], "minute", 0),
    ([rf"^(?P<second>0|[1-9]\d{{0,5}}|\d{{1,6}}(?=\.\d{{3}}))\.{_DIGITS}$"], "second", 0),
    ([rf"(?<!\d){_DAY}\D{{0,4}}{_CLOCK}[-_.,](?P<fraction>\d\d?){_END}"], "second", 1),
    ([rf"(?<!\d){_CLOCK}[-_.,]{_DIGITS}{_END}"], "second", 2),
    ([rf"{date}\D{{0,4}}{_HOUR}{_MINUTE}{_END}" for date in DATES[:4]], "hour", 2),
    ([rf"{_BEGIN}(?P<second>\d{{1,6}})\.{_DIGITS}(?!\d|\.\d)"], "second", 2),
    ([rf"(?<!\d){_CLOCK}(?:\.{_DIGITS})?{_END}"], "minute", 2),
    ([rf"(?<!\d)(?P<minute>\d\d?)(?P<b>[-_.:m]?){_SECOND}{_END}(?!(?P=b)\d\d(?!\d))"], "minute", 2),
    ([NUMBER.pattern, *(rf"{form}(?<=\d{{4}}){_END}" for form in (*DATES, _CLOCK, _MINUTE + _SECOND))], "", 0),
]


def order_of(names: Sequence[str]) -> tuple[list[str], np.ndarray, bool]:
    """Images in the order that their names tell, when, and whether that is in seconds.

    Times, float64 (T,), begin at 0; of names that are no times in usual steps. `ValueError` where no order is told.
    """
    stems = [splitext(name)[0] for name in names]
    if len({HALF_DAY.search(stem) is None for stem in stems}) > 1:
        raise ValueError("some of the names of its images have AM or PM, and some have none: take one clock")
    stems = [LETTERED.sub(r"\1\2.\3.\4.\5", HALF_DAY.sub(_on_24_hours, stem)) for stem in stems]
    zones = {match["zone"] for stem in stems for match in ZONED.finditer(stem)}
    if len(zones) > 1:
        raise ValueError(f"the names of its images are of several time zones ({', '.join(sorted(zones))}): take one")
    # Where all have a year of four digits, two digits are none.
    is_full = any(all(re.search(rf"{date}(?!\d)", stem) for stem in stems) for date in DATES[:4])
    for patterns, coarse, evidence in FORMS:
        likely = [pattern for pattern in patterns if not (is_full and _OF["y"] in pattern)]
        readings = [_ordered(stems, re.compile(pattern), coarse, evidence) for pattern in likely]
        if any(readings):
            times, order = zip(*_surest(readings), strict=True)
            is_number = patterns[0] == NUMBER.pattern
            unit = median_low([other - one for one, other in pairwise(times)]) if is_number else UNITS_NS["second"]
            return [names[at] for at in order], np.array([(time - times[0]) / unit for time in times]), not is_number
    raise ValueError(
        f"the names of its {len(names):,} images do not tell one order ({_series(names)}): "
        "give each series a folder of its own, and each image a number or a time"
    )


def _on_24_hours(match: re.Match[str]) -> str:
    """The same moment on a clock of 24 hours, with seconds."""
    hour = int(match["hour"]) % 12 + 12 * bool(match["late"] or match["half"] in ("P", "p"))
    return f"{hour:02}.{match['minute'] or '00'}.{match['second'] or '00'}"


def _surest(readings: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The first, the usual one, or where that tells nothing the only sure one: even, or going on from day to day.

    Raises `ValueError` where it may be one or the other, as numbers may be that are days of one year in other steps.
    """
    usual, sure = readings[0], []
    different = {tuple((time - read[0][0], at) for time, at in read): read for read in readings[::-1] if read}
    for read in (read for read in different.values() if read is not usual):
        steps, others = ([other - one for (one, _), (other, _) in pairwise(ordered)] for ordered in (read, usual))
        are_days = bool(usual) and usual[0][0] < DAY_NS <= read[0][0] and sum(steps) < 366 * DAY_NS
        is_odd = are_days and len({step / other for step, other in zip(steps, others, strict=True)}) > 1
        is_even = len(set(steps)) == 1 != len(set(others))
        sure += [read] * (is_odd or is_even or _goes_on([time for time, _ in read], DAY_NS, 2))
    if len(different) > 1 and (bool(sure) if usual else len(sure) != 1):
        raise ValueError("the names of its images may be times of several kinds: write such as 2024-05-31_23-59-58")
    return usual or (sure or [*different.values()])[0]


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
        # No digits may have a zero too many: 010 beside 9 may be a tenth, and .10 beside .9 the tenth.
        given = map(re.Match.groupdict, column)
        digits = [one.get("number", "").lstrip("-") or (one.get("fraction") or "")[::-1] for one in given]
        times, shortest = [time for time, _ in ordered], min(map(len, digits))
        is_padded = any(len(text) > shortest and text.startswith("0") for text in digits)
        if len(set(times)) == len(times) and numbers == sorted(numbers) and not is_padded:
            is_one = len({NUMBER.sub("#", rest) for rest in rests}) <= 1 and not _begins_again(times, numbers, column)
            if is_one and (not coarse or _goes_on(times, UNITS_NS[coarse], evidence)):
                units = {*column[0].re.groupindex}
                other = OTHER_DATE if "number" not in units and times[-1] < DAY_NS else OTHER_CLOCK
                is_apart = other is OTHER_DATE or ("year" in units and not {"hour", "second"} & units)
                if is_apart and len({(other.search(rest) or [""])[0] for rest in rests}) > 1:
                    raise ValueError("the names of its images have dates beside times: write 2024-05-31_23-59-58")
                return ordered
    return []


def _value(match: re.Match[str]) -> int:
    """A number, or a time in nanoseconds. Raises `ValueError` if there is no such day."""
    groups = match.groupdict()
    value = sum(int(groups[unit]) * UNITS_NS[unit] for unit in UNITS_NS if groups.get(unit))
    value += int(f"{groups.get('fraction') or '':0<9.9}")
    if groups.get("year"):
        year, month, day = map(int, match.group("year", "month", "day"))
        value += DAY_NS * date(year + 2000 * (year < 100), month, day).toordinal()
    return value


def _begins_again(values: list[int], numbers: list[list[int]], column: Sequence[re.Match[str]]) -> bool:
    """Whether this is no clock; `ValueError` if it, or a counter, may have gone around, or jumps where others turn."""
    steps = [other - one for one, other in pairwise(values)]
    unit = next(unit for unit in ("year", *UNITS_NS) if column[0].groupdict().get(unit))
    periods, digits = PERIODS_NS.get(unit, []), max(len(match[0]) for match in column)
    if unit == "number":  # of hours, weeks or days with as many digits
        periods = [10 ** len(str(values[-1])), *(period for period in periods if len(str(period)) == digits)]
    periods = [period for period in periods if values[-1] <= 2 * period]
    usual, beside = median_low(steps), list(zip(steps, pairwise(numbers), strict=False))
    # Days and scenes change seldom; what runs along with a counter changes with each image.
    turns = [by for by, (one, other) in beside if one != other]
    if len(turns) > len(steps) // 2:
        turns = [by for by, (one, other) in beside if any(map(int.__lt__, other, one))]
    least = 0 if unit in ("second", "milli", "micro") else 1 / 2
    *others, longest = sorted(steps)
    around = [period for period in periods if 0 < period - values[-1] + values[0] <= max([2 * usual, *others[-1:]])]
    is_around = any(longest > max(5 * usual, least * period) for period in around)
    # Where all else is even, of a clock, a jump tells as well unless it is of two steps: there an image is missing.
    is_clock = unit != "number" or (usual > 1 and around[-1:] == [60] and {len(match[0]) for match in column} == {2})
    if around and is_clock and others and others[-1] <= 1.2 * others[0]:
        is_around |= longest > 2.2 * usual or 1.2 * usual < longest < 1.8 * usual
    if is_around or (periods and max(turns, default=0) > 5 * usual):
        raise ValueError("the names of its images may begin again: put dates before times, and years first")
    # Where hours change alone, they may be days before months and years of two digits.
    return unit == "hour" and values[0] % UNITS_NS["minute"] > 0 == sum(step % UNITS_NS["minute"] for step in steps)


def _goes_on(times_ns: list[int], coarse_ns: int, evidence: int) -> bool:
    """Whether times go on where the finer number is over: at their pace, or at other places than all at one."""
    pairs = [(one, other, one // coarse_ns < other // coarse_ns) for one, other in pairwise(times_ns)]
    carries = [other - one for one, other, is_carried in pairs if is_carried]
    within = [other - one for one, other, is_carried in pairs if not is_carried]
    begins = [other % coarse_ns for _, other, is_carried in pairs if is_carried]
    if not carries or not within:
        return evidence <= len(carries[:1])
    is_steady = median(within) / 1.5 <= median(carries) <= 1.5 * max(within)
    # What goes on by a little, whatever the time between, is a counter; once it may begin again.
    is_counter = sorted((other - one) % coarse_ns for one, other, _ in pairs)[-2] <= coarse_ns / 100 < median(carries)
    return not is_counter and (is_steady or (evidence < 2 and max(begins) - min(begins) >= coarse_ns / 4))


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
