"""What names tell: each kind by some siblings."""

import random
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from data.image_order import order_of

START = datetime(2024, 5, 1, 23, 59, 58, 900_000, tzinfo=UTC)
EVENTS_S = [0, 0.15, 0.2, 0.25, 0.3, 0.35, 1.4, 1.45, 5.8]
"""When images were taken: at no steady rate, across midnight."""
SLOW_S = [2 * second for second in range(45)]
UNEVEN_S = [2.137 * second for second in range(45)]


def moments(pattern, times_s=EVENTS_S):
    return [(START + timedelta(seconds=second)).strftime(pattern) for second in times_s]


def milliseconds(pattern):
    return [name[:-3] for name in moments(pattern)]


def epochs(write):
    return [write(int(START.timestamp() * 1e6 + round(second * 1e6)) * 1000) for second in EVENTS_S]


def order_after_shuffling(stems, suffix=".png"):
    names = [stem + suffix for stem in stems]
    return order_of(random.Random(0).sample(names, len(names)))


def assert_reads(stems, times, are_seconds):
    found = order_after_shuffling(stems)
    assert (found[0], found[2]) == ([f"{stem}.png" for stem in stems], are_seconds)
    if times is not None:
        np.testing.assert_allclose(found[1], times, atol=2e-6)


@pytest.mark.parametrize(
    "pattern",
    [
        "img{}_left", "{}_cam_image_array_", "frame_{}.rgb", "{}_of_1205", "image ({})", "frame-{}", "v2.0_{:06}.jpg",
        "frame-{:06}.color", "sh010_v02.{:04}", "20240501_123005_{:04}", "2024-05-01_{:04}", "clip_\\{:03}",
        "2011_09_26_drive_0001_sync_{:010}", "b1c9c847-3bda4659-{:07}", "{}", "{:06}", "{:040}", "1600x900_{}", "№{}",
    ],
)  # fmt: skip
def test_the_only_number_that_varies_counts_and_keeps_gaps(pattern):
    numbers = [0, 1, 2, 3, 9, 10, 11, 40, 59, 60, 61, 98, 99, 100, 101, 1000, 1001]
    assert_reads([pattern.format(number) for number in numbers], numbers, are_seconds=False)


@pytest.mark.parametrize("pattern", ["{:06}", "frame{:04}", "img{:03}.x"])
def test_a_gap_is_no_end_of_a_day_where_numbers_have_other_digits(pattern):
    for numbers in ([*range(1, 6), *range(20, 25)], [*range(10), *range(40, 60)], [*range(9), *range(44, 53)]):
        times = [number - numbers[0] for number in numbers]
        assert_reads([pattern.format(number) for number in numbers], times, are_seconds=False)


@pytest.mark.parametrize(
    ("stems", "times"),
    [
        ([f"{number}" for number in range(-3, 4)], range(7)),
        ([f"t_{number}" for number in range(-12, 3)], range(15)),
        ([f"{number:03}" for number in range(0, 2000, 50)], range(40)),
        ([f"{number}ms" for number in range(-400, -99, 100)], range(4)),
        (["0", "5", "10", "20"], [0, 1, 2, 4]),
        (["0", "1", "10", "11", "20", "21"], [0, 1, 10, 11, 20, 21]),
        ([f"{10**30 + number}" for number in (0, 1, 3)], [0, 1, 3]),
        # Several numbers that run along with each other.
        ([f"{number:04}_{round(number * 33.3)}" for number in range(90)], range(90)),
        ([f"{number}-{number + 1}" for number in range(8, 12)], range(4)),
        (["1.8", "1.9", "1.10", "1.11"], range(4)),  # no decimals
        ([f"00.{number:02}" for number in range(5, 50)], range(45)),
    ],
)
def test_steps_signs_and_numbers_side_by_side(stems, times):
    assert_reads(stems, times, are_seconds=False)


@pytest.mark.parametrize(
    ("stems", "times_s"),
    [
        # Unix time.
        (epochs(lambda ns: f"{ns / 1e9:.6f}"), EVENTS_S),
        (epochs(lambda ns: f"left_{ns}"), EVENTS_S),
        (epochs(lambda ns: f"n015-2018-07-24-11-22-45+0800__CAM_FRONT__{ns // 1000}"), EVENTS_S),
        (epochs(lambda ns: f"{ns // 10**6}_rgb"), EVENTS_S),
        (epochs(lambda ns: f"{ns // 10**9}_{ns % 10**9:09}"), EVENTS_S),
        ([f"{number:04}_{name}" for number, name in enumerate(epochs(lambda ns: f"{ns // 1000}"))], EVENTS_S),
        ([f"{1_700_000_000 + second}" for second in SLOW_S], SLOW_S),
        # Dates.
        (milliseconds("%Y-%m-%d_%H-%M-%S.%f"), EVENTS_S),
        (milliseconds("PXL_%Y%m%d_%H%M%S%f"), EVENTS_S),
        (milliseconds("192.168.1.10_01_%Y%m%d%H%M%S%f_MOTION"), EVENTS_S),
        (moments("%Y-%m-%dT%H:%M:%S.%fZ"), EVENTS_S),
        ([f"10-15-{second:02}-{at * 100:03}" for second in (1, 2) for at in range(10)], np.arange(20) / 10),
        (moments("cam1 %Y.%m.%d %H.%M.%S,%f"), EVENTS_S),
        (moments("IMG_%Y%m%d_%H%M%S", SLOW_S), SLOW_S),
        (moments("Screenshot %Y-%m-%d at %H.%M.%S", SLOW_S), SLOW_S),
        (moments("image-%Y%m%d%H%M%S", SLOW_S), SLOW_S),
        (moments("%Y%m%d%H%M", [60 * second for second in SLOW_S]), [60 * second for second in SLOW_S]),
        (moments("%Y-%m-%d_%H-%M", [600 * second for second in SLOW_S]), [600 * second for second in SLOW_S]),
        (moments("%Y-%m-%d", [86400 * second for second in SLOW_S]), [86400 * second for second in SLOW_S]),
        (moments("%Y%m%d_%H%M%S_%f", np.arange(90) / 30), np.arange(90) / 30),
        # A counter beside them, at more than a second: the fraction counts.
        ([f"{at:04}_{name}" for at, name in enumerate(moments("%Y%m%d_%H%M%S_%f", UNEVEN_S))], UNEVEN_S),
        ([f"{name}_{at}" for at, name in enumerate(moments("%d-%m-%Y_%H-%M-%S-%f", UNEVEN_S))], UNEVEN_S),
        ([f"{at}_{1_700_000_000 + second:.6f}".replace(".", "_") for at, second in enumerate(UNEVEN_S)], UNEVEN_S),
        # Without a date, by units or by what is carried.
        ([f"{second // 60:02}-{second % 60:02}" for second in SLOW_S], SLOW_S),
        ([f"frame_{second // 60:02}_{second % 60:02}" for second in SLOW_S], SLOW_S),
        ([f"{second // 60}m{second % 60}s" for second in SLOW_S], SLOW_S),
        ([f"09-{second // 60:02}-{second % 60:02}" for second in SLOW_S], SLOW_S),
        ([f"09-{second // 60:02}-{second % 60:02}" for second in (5, 7, 100, 1234, 3000)], [0, 2, 95, 1229, 2995]),
        ([f"09.{second // 60:02}.{second % 60:02}" for second in SLOW_S[:20]], SLOW_S[:20]),
        ([f"09{second // 60:02}{second % 60:02}" for second in SLOW_S], SLOW_S),
        ([f"frame-{number * 40}ms" for number in range(40)], np.arange(40) / 25),
        ([f"t={number * 40}ms" for number in range(40)], np.arange(40) / 25),
        ([f"{number / 25:.3f}" for number in range(40)], np.arange(40) / 25),
        ([f"{number / 25}" for number in range(40)], np.arange(40) / 25),
        ([f"t_{number / 25:.2f}" for number in range(80)], np.arange(80) / 25),
        ([f"x{number / 25:06.3f}.rgb" for number in range(80)], np.arange(80) / 25),
        ([f"{second // 60:02}.{second % 60:02}" for second in SLOW_S], SLOW_S),
        # With the day or the month before the year, and in other units.
        ([f"cam_05-01-2024_10.00.{second:02}" for second in SLOW_S[:8]], SLOW_S[:8]),
        ([f"{day}.2024 at 12:00:00" for day in ("30.01", "31.01", "01.02")], [0, 86400, 172800]),
        ([f"{day}_120000" for day in ("12302023", "12312023", "01012024")], [0, 86400, 172800]),
        ([f"{number * 50}us" for number in range(40)], np.arange(40) * 5e-5),
        ([f"{number}min" for number in range(5)], np.arange(5) * 60),
    ],
)  # fmt: skip
def test_times_are_read_as_times(stems, times_s):
    assert_reads(stems, times_s, are_seconds=True)


@pytest.mark.parametrize(
    ("stems", "series"),
    [
        ([f"{number:04}_{side}" for number in range(4) for side in ("left", "right")], ["0000_left", "0000_right"]),
        ([f"{kind}{number}" for number in range(3) for kind in ("rgb", "mask", "depth")], ["depth0", "mask0", "rgb0"]),
        ([f"cam{camera}_{number:03}" for number in range(9) for camera in (0, 1)], ["cam0_000", "cam1_000"]),
        ([f"cam{at % 2}_{1_700_000_000_000 + at}" for at in range(10)], ["cam0_1700000000000", "cam1_1700000000001"]),
        ([f"{scene}.{number:03}" for scene in (1, 2, 3) for number in range(1, 9)], ["1.001", "2.001", "3.001"]),
        ([f"{scene:02}_{number:02}" for scene in (1, 2) for number in range(1, 25)], ["01_01", "02_01"]),
        ([f"clip_{which}\\{number:03}" for number in range(3) for which in "ab"], ["clip_a\\000", "clip_b\\000"]),
        ([f"20240501_12300{at // 5}-{at % 5:02}" for at in range(10)], ["20240501_123000-00", "20240501_123001-00"]),
        (["1", "2", "3", "cover"], ["1", "cover"]),
        (["a", "b", "c", "d"], ["a", "b", "c"]),
        (["01", "1", "2"], ["01", "1", "2"]),
        ([f"t_{number / 2}" for number in range(-9, -1)], ["t_-1.0", "t_-1.5"]),
        ([f"{1_700_000_000_000 + 33 * at}.{at * 37 % 1000:03}" for at in range(60)], ["1700000000000.000"]),
        (["t_0.04", "t_0.1", "t_0.12"], ["t_0.04", "t_0.1"]),  # counted, or after a point?
        ([f"{1_700_000_000_000 + 33 * at}.{at % 2}" for at in range(9)], ["1700000000000.0", "1700000000033.1"]),
    ],
)
def test_several_series_and_no_order_are_refused(stems, series):
    with pytest.raises(
        ValueError, match=rf"its {len(stems)} images do not tell one order \(.*\): give each"
    ) as refused:
        order_after_shuffling(stems)
    assert all(f"{stem}.png (" in str(refused.value) for stem in series)


@pytest.mark.parametrize(
    "stems",
    [
        [f"DSC_{number:04}" for number in (9998, 9999, 1, 2)],
        [f"{number % 1000:03}" for number in range(990, 1020)],
        ["23-59-58", "23-59-59", "00-00-00", "00-00-01"],
        ["235900", "000000", "000100"],
        # Days and months in an order that no form has.
        ["23-59-59_2024-01-31", "00-00-00_2024-02-01", "00-00-01_2024-02-01"],
        ["31-1_12-00-58", "31-1_12-00-59", "1-2_12-01-00", "1-2_12-01-01"],
        ["01-02-2024_12-00-00", "02-02-2024_12-00-00"],  # one day, or one month
        # Units without the coarser one.
        [f"{(900 + 50 * at) % 1000:03}ms" for at in range(15)],
        [f"img_{(950 + 10 * at) % 1000}ms" for at in range(80)],
        [f"{(900_000 + 5000 * at) % 10**6}us" for at in range(100)],
        [f"{(50 + at) % 60}s" for at in range(40)],
        [f"{(50 + at) % 60}min" for at in range(30)],
        [f"{(3590 + at) // 60 % 60:02}-{(3590 + at) % 60:02}" for at in range(30)],
        [f"{(3590 + at) // 60 % 60}m{(3590 + at) % 60}s" for at in range(30)],
        [f"{(45 + at) // 60 or 12:02}-{(45 + at) % 60:02}-00" for at in range(30)],  # half days
        # Hours, and hours and minutes, over midnight; weeks and days over the end of a year.
        *([f"{START + timedelta(minutes=10 * at):{form}}" for at in range(30)] for form in ("%H-%M", "%H%M", "%H.%M")),
        [f"{(22 + at) % 24:02}" for at in range(12)],
        [f"W{(49 + at) % 52 + 1:02}" for at in range(10)],
        *([f"{START + timedelta(days=242 + at):{form}}" for at in range(30)] for form in ("%j", "%m%d")),
        # At uneven steps, a wide one from the end to the beginning.
        [f"{START + timedelta(seconds=at):%H-%M-%S}" for at in (-65, -30, -16, -9, -2, 33, 40, 47, 61)],
        [f"IMG_{(9900 + at) % 10000:04}" for at in (0, 7, 14, 49, 56, 63, 98, 133, 140, 147, 154)],
        # Days in orders that no form has, for so long that the clock does not betray it.
        *([f"{START + timedelta(minutes=10 * at):{form}}" for at in range(60, 160)] for form in (
            "%H-%M-%S_%d-%m-%Y", "%d-%m %H.%M.%S", "%d%m_%H%M", "%d_%H-%M-%S", "%m%d_%H%M%S",
            "%H%M%S_%Y-%m-%d", "%d%b_%H%M%S",
        )),
    ],
)  # fmt: skip
def test_what_may_have_begun_again_is_refused(stems):
    with pytest.raises(ValueError, match="names of its"):
        order_after_shuffling(stems)


@pytest.mark.parametrize(
    ("form", "step_s"),
    [
        # Days and months in other orders, years of two digits: at one pace over midnight.
        *((form, 2) for form in (
            "%d%m%y%H%M%S", "%y%m%d%H%M%S", "ch01_%y%m%d%H%M%S", "%m%d%y_%H%M%S", "%d-%m-%y %H.%M.%S",
            "%d.%m.%y %H.%M.%S", "%d%m%Y%H%M%S", "RING_%m%d%Y_%H%M%S",
        )),
        *((form, 9 * 3600) for form in ("%Y-%d-%m %H.%M.%S", "%Y%d%m_%H%M%S")),
        # Clocks of twelve hours.
        *((form, 2) for form in (
            "Screenshot %Y-%m-%d at %-I.%M.%S %p", "Screenshot %Y-%m-%d at %-I.%M.%S\u202f%p", "%Y%m%d_%I%M%S%p",
            "Photo %d-%m-%Y, %I %M %S %p", "WhatsApp Image %Y-%m-%d at %-I.%M.%S %p", "%m-%d-%Y_%-I-%M-%S_%p",
        )),
        *((form, 3600) for form in ("%Y-%m-%d %I.%M.%S %p", "%Y-%m-%d_%-I.%M%p", "%Y-%m-%d_%I%p", "%d%m%y_%I%M%S%p")),
        *((form, 3600) for form in ("%Y%m%d%H", "%d%m%y%H%M", "%y%m%d%H%M")),
        *((form, 86400) for form in ("%d-%m-%Y", "%m-%d-%Y", "%Y-%d-%m", "%d%m%Y", "%d%m%y120000", "%y%m%d120000")),
    ],
)  # fmt: skip
def test_dates_and_half_days_of_all_orders(form, step_s):
    times_s = [at * step_s for at in range(45)]
    assert_reads(moments(form, times_s), times_s, are_seconds=True)


def test_half_days_in_other_words_and_without_a_date():
    names = ["截屏2024-05-01 下午11.59.58", "截屏2024-05-02 上午12.00.00", "截屏2024-05-02 上午1.00.03"]
    assert_reads(names, [0, 2, 3605], are_seconds=True)
    names = [f"{(45 + at) // 60 or 12:02}-{(45 + at) % 60:02}-00PM" for at in range(30)]
    assert_reads(names, np.arange(30) * 60, are_seconds=True)
    assert_reads([f"clip1a.m{number}" for number in (2, 3, 10)], [0, 1, 8], are_seconds=False)  # no half day
    names = [f"shot at 0{hour}.59 {half}M" for half in "AP" for hour in (1, 2)]
    assert_reads(names, [0, 1, 12, 13], are_seconds=False)


@pytest.mark.parametrize(
    "stems",
    [
        # Days of one month, or months of one day; the first of months is ISO's.
        [f"2026-{day:02}-11" for day in range(2, 9)],
        [f"2026-{day:02}-11_12-00-00" for day in range(2, 9)],
        ["03-05-26 10.00.00", "04-05-26 10.00.07", "04-05-26 10.00.31"],
        ["281126", "301126", "021226", "051226"],
        ["261128", "261130", "261202", "261205"],
        # Seconds or minutes of 2020, or of 2012.
        [f"2001051005{second:02}" for second in range(20)],
        # Minutes and seconds at more than a minute, among numbers.
        [f"{90 * at // 60:02}{90 * at % 60:02}" for at in range(30)],
        ["2024-05-01 10.05.03 AM", "2024-05-01 10.05.05 AM", "2024-05-01 10.05.09"],
        *([f"{(40 + step * at) % 60:02}{unit}" for at in range(60 // step - 2)]
          for step in (2, 3, 5, 10) for unit in ("", "s", "min")),
        *([f"{(700 + step * at) % 1000:03}ms" for at in range(1000 // step - 2)] for step in (20, 40, 70)),
    ],
)  # fmt: skip
def test_what_may_be_read_in_two_ways_is_refused(stems):
    with pytest.raises(ValueError, match=r"the names of its images (may be|have AM or PM|may begin again)"):
        order_after_shuffling(stems)


def test_a_counter_behind_a_time_is_no_fraction_of_a_second():
    names = [f"{START + timedelta(seconds=at / 4):%Y%m%d_%H%M%S}_{at:03}" for at in range(400)]
    assert_reads(names, range(400), are_seconds=False)
    for names in (  # that begin again
        [f"{START + timedelta(seconds=at / 4):%Y%m%d_%H%M%S}_{(985 + at) % 1000:03}" for at in range(40)],
        [f"DJI_{START + timedelta(seconds=2 * at):%Y%m%d%H%M%S}_{(9989 + at) % 9999 + 1:04}_V" for at in range(40)],
    ):
        with pytest.raises(ValueError, match="do not tell one order"):
            order_after_shuffling(names)


def test_numbers_stay_numbers_and_months_months():
    assert_reads([f"{number:06}" for number in range(10150, 10350) if number % 7], None, are_seconds=False)
    assert_reads([f"S2_2024-{month:02}-01" for month in (1, 2, 3, 4)], np.array([0, 31, 60, 91]) * 86400, True)
    assert_reads([f"{number:02}" for number in range(0, 60, 2) if number != 30], None, are_seconds=False)
    assert_reads([f"{second}s" for second in range(60) if second != 30], None, are_seconds=True)
    # Days of two digits are no hours, minutes of a clock with three numbers no seconds.
    assert_reads(["02.11.26", "03.11.26", "04.11.26"], [0, 1, 2], are_seconds=False)
    assert_reads([f"shot 00.{2 * minute:02}.00" for minute in range(20)], range(20), are_seconds=False)


@pytest.mark.parametrize(
    "zones",
    [
        ("+0200", "+0100"), ("+02:00", "+01:00"), ("-0500", "-0400"), (" UTC+2", " UTC+1"), ("GMT-3", "GMT+4"),
        ("+05:30", "+0545"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("pattern", ["2024-10-27T02-{}-00{}", "20241027_02{}00.123{}", "02-{}-00{}"])
def test_time_zones_are_one_and_the_same(pattern, zones):
    before, after = ([pattern.format(f"{minute:02}", zone) for minute in range(56, 60)] for zone in zones)
    assert order_after_shuffling(before)[0] == [f"{name}.png" for name in before]
    with pytest.raises(ValueError, match=r"time zones \(.*\): take one"):
        order_after_shuffling(before[:2] + after[2:])
    counted = [f"20241027_1200{at:02}-{at + 1:04}" for at in range(8)]
    assert_reads(counted, range(8), are_seconds=True)


@pytest.mark.parametrize("pattern", ["{:06}_10", "{0:06}-{0:06}", "{:06}_0"])
def test_six_digits_are_no_clock_because_a_number_follows(pattern):
    assert_reads([pattern.format(number) for number in range(40)], range(40), are_seconds=False)


def test_the_same_number_under_two_suffixes_are_two_images():
    with pytest.raises(ValueError, match=r"one order \(1\.jpg \(2\), 1\.png \(2\)\)"):
        order_of(["1.jpg", "2.jpg", "1.png", "2.png"])
    assert order_of(["2.JPG", "10.jpg", "1.jpeg"])[0] == ["1.jpeg", "2.JPG", "10.jpg"]


@pytest.mark.parametrize("seed", range(40))
def test_random_series_in_random_styles(seed):
    draw = random.Random(seed)
    steps = [draw.choice([1, 1, 1, 1, 1, 1, draw.randrange(2, 60)]) for _ in range(draw.randrange(5, 120))]
    numbers = list(np.cumsum([draw.randrange(2000), *steps]))
    times = np.array(numbers) - numbers[0]
    before, after = (draw.choice(["", "img", "cam2_", "a-", "take 3 ", "x1y2_", "№"]) for _ in range(2))
    write = draw.choice(
        [
            lambda number: f"{before}{number}{after and '_' + after}",
            lambda number: f"{before}{number:08}{after and '.' + after}",
            lambda number: f"{before}{1_600_000_000 * 10**6 + number * 40_000}",
            lambda number: f"{before}{START + timedelta(milliseconds=40 * int(number)):%Y%m%d-%H%M%S.%f}",
            lambda number: f"{1_600_000_000 + number / 25:.2f}",
        ]
    )
    names, found, are_seconds = order_after_shuffling(list(map(write, numbers)))
    assert names == [f"{write(number)}.png" for number in numbers]
    np.testing.assert_allclose(found, times / 25 if are_seconds else times, atol=2e-6)


DAILY, OFTEN = (
    [START + timedelta(days=at * is_daily, seconds=7 * at) for at in range(9)] for is_daily in (True, False)
)


@pytest.mark.parametrize("moments", [DAILY, OFTEN])
@pytest.mark.parametrize(
    "form", ["vlcsnap-%Y-%m-%d-%Hh%Mm%Ss123", "%Y%m%d_%Hh%Mm%Ss", "%Y-%m-%d %Hh %Mm %Ss", "cam 2 %d.%m.%Y %Hh%Mm%S"]
)
def test_a_clock_with_letters_belongs_to_the_date_in_front_of_it(form, moments):
    names = [f"{moment:{form}}.png" for moment in moments]
    order, times_s, are_seconds = order_of(names[::-1])
    assert order == names
    assert are_seconds
    assert times_s.tolist() == [(moment - moments[0]).total_seconds() for moment in moments]


@pytest.mark.parametrize(
    "form", ["%d-%b-%Y_%H-%M-%S", "%Y-%-m-%-d_%H%M%S", "%H.%M.%S %d.%m.%Y", "day_%H-%M-%S_%Y-%m-%d", "%d %B_%H.%M.%S"]
)
def test_a_date_that_changes_beside_a_clock_is_not_left_out(form):
    with pytest.raises(ValueError, match="names of its"):
        order_of([f"{moment:{form}}.png" for moment in DAILY])


@pytest.mark.parametrize("minutes", [1, 10])
@pytest.mark.parametrize(
    "form", ["%d.%m.%Y %H-%M", "%d-%m-%Y_%H-%M", "%m-%d-%Y %H.%M", "%y-%m-%d_%H-%M", "%Y-%m-%d %H-%M"]
)
def test_hours_and_minutes_behind_a_date_are_no_minutes_and_seconds(form, minutes):
    names = [f"{START + timedelta(minutes=minutes * at):{form}}.png" for at in range(12)]
    order, times_s, are_seconds = order_of(names[::-1])
    assert order == names
    assert are_seconds
    assert times_s.tolist() == [60 * minutes * at for at in range(12)]


@pytest.mark.parametrize("form", ["{:%Y%m%d}_{:04}", "{:%d-%m-%Y}_{:04}", "{:%Y-%m-%d}_{:03}", "{:04}_{:%Y-%m-%d}"])
def test_a_counter_goes_on_over_days(form):
    numbers = list(range(90, 150))
    days = [START + timedelta(days=(number - 90) // 25) for number in numbers]
    pairs = zip(numbers, days, strict=True) if form.startswith("{:04}") else zip(days, numbers, strict=True)
    names = [form.format(*pair) + ".png" for pair in pairs]
    order, times_s, are_seconds = order_of(names[::-1])
    assert order == names
    assert not are_seconds
    assert times_s.tolist() == list(range(60))


@pytest.mark.parametrize(
    ("form", "unit_s"),
    [("{}h", 3600), ("{}min", 60), ("{}msec", 1e-3), ("{:012}ns", 1e-9), ("{}ns", 1e-9)],
)
def test_a_number_with_its_unit_is_a_time(form, unit_s):
    names = [f"cam {form.format(7 * at)}.png" for at in range(12)]
    order, times_s, are_seconds = order_of(names[::-1])
    assert order == names
    assert are_seconds
    assert times_s == pytest.approx([7 * at * unit_s for at in range(12)])
