import os

import av
import numpy as np
import pytest
from PIL import Image

from benchmarks.reading import read_frames
from data.errors import DataError, VideoError
from data.sidecar import SidecarError, columns_beside, read_sidecar

TABLE = "frame,time_s,speed,steering\n0,0.0,10,-1\n1,0.1,11,-0.5\n2,0.25,12,0\n3,0.7,13,0.5\n"


@pytest.fixture
def video(tmp_path):
    (tmp_path / "clip.csv").write_text(TABLE)
    return tmp_path / "clip.mp4"


NAN = np.nan


@pytest.mark.parametrize(
    ("table", "times_s", "tolerance_s", "speeds"),
    [
        (TABLE, [0.04, 0.06, 0.2, 0.45, 0.5, 0.75, 0.0], 0.25, [10, 11, 12, 12, 13, 13, 10]),
        ("time_s,speed\n0.5,7\n", [0.4, 0.5, 0.6], 0.11, [7, 7, 7]),  # a single row serves both sides
        ("time_s,speed\n0.5,7\n0.0,5\n0.2,6\n", [0.0, 0.21, 0.5], 0.1, [5, 6, 7]),  # in no order
        ("time_s, speed\n0.5, 7\n", [0.5], 0.1, [7]),  # a blank after each comma
        # Before its first row, after its last one, and where it pauses, a table says nothing.
        ("time_s,speed\n1.0,5\n1.1,6\n2.0,7\n", [0.0, 0.9, 1.06, 1.5, 1.9, 2.3], 0.125, [NAN, 5, 6, NAN, 7, NAN]),
    ],
)
def test_nearest_row_of_each_frame(video, table, times_s, tolerance_s, speeds):
    video.with_suffix(".csv").write_text(table)
    values = read_sidecar(video, np.array(times_s), columns=["speed"], tolerance_s=tolerance_s)
    np.testing.assert_array_equal(values, np.array(speeds)[:, None])


def test_columns_come_in_the_order_asked_for(video):
    values = read_sidecar(video, np.array([0.25, 0.0]), columns=["steering", "speed"], tolerance_s=0.01)
    assert values.tolist() == [[0, 12], [-1, 10]]


def test_one_table_with_the_columns_is_enough_and_none_is_an_error(video):
    without = video.with_name("without.mp4")
    assert columns_beside([without, video], ["speed"]) == ("speed",)
    with pytest.raises(SidecarError, match="no column 'brake'"):
        columns_beside([video, without], ["brake"])


@pytest.mark.parametrize("clock", ["time_s", "frame"])
def test_a_clock_that_begins_again_is_refused(video, clock, encode_video):
    encode_video(video, 4, rate=10)
    lines = [f"{at if clock == 'frame' else at / 10},{speed + at}" for speed in (0, 30) for at in range(4)]
    table = video.with_suffix(".csv")
    table.write_text("\n".join([f"{clock},speed", *lines]))
    with pytest.raises(SidecarError, match=r"says several things of 0.000 s in clip.mp4: does its clock begin again"):
        read_sidecar(video, np.arange(4) / 10, columns=["speed"], tolerance_s=0.05)
    table.write_text("\n".join([f"{clock},speed", *lines[:4], lines[0]]))  # one row twice is no contradiction
    assert read_sidecar(video, np.arange(4) / 10, columns=["speed"], tolerance_s=0.05)[:, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("patterns", "columns"),
    [
        (["ste*", "s*"], ("steering", "speed")),
        (["*"], ("speed", "steering", "arm[0]")),  # what says when is no value
        (["arm[0]"], ("arm[0]",)),  # a name is meant before a pattern
        (["s???d", "arm*"], ("speed", "arm[0]")),
    ],
)
def test_patterns_stand_for_the_columns_of_the_table(video, patterns, columns):
    lines = zip(TABLE.splitlines(), ("arm[0]", *"0123"), strict=True)
    video.with_suffix(".csv").write_text("\n".join(f"{line},{value}" for line, value in lines))
    assert columns_beside([video], patterns) == columns
    with pytest.raises(SidecarError, match=r"no column 'b\*' among frame, time_s, speed"):
        columns_beside([video], ["speed", "b*"])


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        (TABLE, "brake", "no column 'brake' among frame, time_s, speed, steering"),
        ("second,speed\n0,1\n", "speed", "no column 'time_s' or 'frame' among second, speed"),
        ("time_s,speed\n", "speed", "no rows"),
        ("time_s,speed\n0.0,fast\n", "speed", "table of numbers.*fast"),
        ("time_s,speed\nnan,1\n", "speed", "a value that is not a number"),
        ("time_s,speed\n0,0,1,5\n0,1,1,7\n", "speed", "a row of more cells than columns"),  # decimal commas
        ("time_s,speed\n0,1\n1,2,3\n", "speed", "a row of more cells than columns"),
        ("time_s,speed,speed\n0,1,2\n", "speed", "several columns 'speed'"),
        ("time_s,speed,speed\n0,1,2\n", "s*", "several columns 'speed'"),
        ("time_s,time_s,speed\n0,1,2\n", "speed", "several columns 'time_s'"),
        ("time_s;speed\n0,5;1,5\n", "speed", "its columns are parted by ';': save it with commas"),
        ("time_s\tspeed\n0\t1\n", "speed", r"its columns are parted by '\\t'"),
        ("time_s,höhe\n0.0,1\n".encode("latin-1"), "höhe", "in UTF-8"),
        (b"time_s,speed\n0.0," + b"7" * 200_000 + b"\n", "speed", "table of numbers"),
        ('time_s,speed,note\n0,1,"x\n0.5,2,"x\n1,3,y\n', "speed", "cannot be read as a table"),  # quotes left open
        (lambda path: path, "speed", "No such file"),
        (os.mkfifo, "speed", "it is no file"),
    ],
)
def test_unusable_tables_say_why(video, table, column, message):
    path = video.with_suffix(".csv")
    if callable(table):
        path.unlink()
        table(path)
    else:
        path.write_bytes(table.encode() if isinstance(table, str) else table)
    with pytest.raises(SidecarError, match=rf"clip\.csv: .*{message}"):
        read_sidecar(video, np.zeros(1), columns=[column], tolerance_s=0.1)


@pytest.mark.parametrize("name", ["drive", "drive.01", "clip.mp4", "v1.2.final"])
def test_the_table_of_a_folder_has_all_of_its_name(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "drive.csv").touch()
    (tmp_path / "clip.csv").touch()
    (tmp_path / f"{name}.csv").write_text("time_s,speed\n0.0,7\n")
    assert read_sidecar(tmp_path / name, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[7]]


def test_a_cameras_table_has_a_name_in_capitals(video):
    table = video.with_suffix(".csv")
    table.rename(video.with_suffix(".CSV")).write_text("time_s,speed\n0.0,7\n")
    assert read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[7]]
    table.write_text("time_s,speed\n0.0,8\n")  # the usual name comes first
    assert read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[8]]
    table.unlink()
    table.symlink_to("nowhere")  # even if it leads nowhere
    with pytest.raises(SidecarError, match=r"clip\.csv: .*No such file"):
        read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1)


def test_a_name_too_long_for_a_table_costs_no_other_video(video):
    video.with_suffix(".csv").write_text("time_s,speed\n0.0,7\n")
    too_long = video.with_name("a" * 252 + ".ts")  # with .csv one more than there may be
    assert columns_beside([too_long, video], ["speed"]) == ("speed",)


def test_empty_cells_at_the_end_and_columns_that_nobody_asks_for_are_no_fault(video):
    video.with_suffix(".csv").write_text("time_s,speed,a,a,,\n0.0,7,1,2,,\n0.5,8,1,2,,,\n")
    assert read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[7]]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-8"])
def test_tables_as_spreadsheets_save_them(video, encoding):
    video.with_suffix(".csv").write_text("time_s,höhe\n0.0,7\n", encoding=encoding)
    assert read_sidecar(video, np.zeros(1), columns=["höhe"], tolerance_s=0.1).tolist() == [[7]]


@pytest.fixture
def uneven(tmp_path, encode_video):
    """A video of uneven rate, and the state of some of its frames."""
    (tmp_path / "uneven.csv").write_text("speed,frame\n13,3\n10,0\n12,2\n")
    return encode_video(tmp_path / "uneven.mp4", [0.0, 0.1, 0.25, 0.7, 0.8])


@pytest.mark.parametrize("name", ["video.mp4", "images", "gone"])
def test_frames_are_not_counted_where_some_were_lost(tmp_path, encode_video, damage_video, name):
    video = tmp_path / name
    if video.suffix:
        pictures = np.random.default_rng(0).integers(0, 256, (60, 48, 80, 3), dtype=np.uint8)
        encode_video(video, 60, pictures, options={"g": "20", "bf": "0", "sc_threshold": "0"})
        damage_video(video, 20, skipped=1500, mask=0x55)
    else:
        video.mkdir()
        for number in range(5):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(video / f"{number}.png")
        (video / "2.png").unlink()
        if name == "images":
            (video / "2.png").write_bytes(b"damaged")
    table = tmp_path / f"{video.stem}.csv"
    table.write_text("frame,speed\n0,7\n")
    with pytest.raises(SidecarError, match=rf"it counts frames, and {name} has lost some \(.*\): give time_s"):
        read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1)
    table.write_text("time_s,speed\n0,7\n")
    assert read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[7]]


def test_frames_are_counted_where_the_end_alone_is_missing(tmp_path, encode_video):
    video = encode_video(tmp_path / "cut.mkv", 50, options={"bf": "0"})
    with av.open(str(video)) as container:
        positions = [packet.pos for packet in container.demux(video=0) if packet.size]
    video.write_bytes(video.read_bytes()[: positions[30]])
    with pytest.raises(VideoError, match="ends at"):
        list(read_frames(video, (32, 80)))
    (tmp_path / "cut.csv").write_text("frame,speed\n0,7\n")
    assert read_sidecar(video, np.zeros(1), columns=["speed"], tolerance_s=0.1).tolist() == [[7]]


def test_frames_are_counted_where_there_are_no_times(uneven):
    values = read_sidecar(uneven, np.array([0.0, 0.05, 0.25, 0.69, 0.8]), columns=["speed"], tolerance_s=0.11)
    assert values[:, 0].tolist() == [10, 10, 12, 13, 13]
    values = read_sidecar(uneven, np.array([0.0, 0.4]), columns=["speed"], tolerance_s=0.1)
    np.testing.assert_array_equal(values[:, 0], [10, NAN])


@pytest.mark.parametrize("frame", ["5", "-1", "1.5"])
def test_frames_that_are_not_in_the_video(uneven, frame):
    uneven.with_suffix(".csv").write_text(f"frame,speed\n0,1\n{frame},2\n")
    with pytest.raises(SidecarError, match=rf"there is no frame {frame} in uneven\.mp4: it has 5, counted from 0"):
        read_sidecar(uneven, np.zeros(1), columns=["speed"], tolerance_s=0.1)


def test_times_are_taken_before_frames(uneven):
    uneven.with_suffix(".csv").write_text("frame,time_s,speed\n900,0.0,1\n901,0.5,2\n")
    assert read_sidecar(uneven, np.array([0.5, 0.0]), columns=["speed"], tolerance_s=0.1)[:, 0].tolist() == [2, 1]


def test_a_table_that_says_hardly_anything_is_on_another_clock(video):
    video.with_suffix(".csv").write_text("time_s,speed\n" + "".join(f"{40 * at},{at}\n" for at in range(100)))
    with pytest.raises(SidecarError, match=r"no row within 0\.020 s of most frames: .* from 0\.000 to 3960\.000 s"):
        read_sidecar(video, np.arange(100) / 25, columns=["speed"], tolerance_s=0.02)
    # Of a long recording, of which the video is a part, or of its first moment.
    for table, found in (([at / 25 for at in range(5000)], 100), ([at / 1000 for at in range(20)], 1)):
        video.with_suffix(".csv").write_text("time_s,speed\n" + "".join(f"{time_s},1\n" for time_s in table))
        values = read_sidecar(video, np.arange(100) / 25, columns=["speed"], tolerance_s=0.02)
        assert np.isfinite(values).sum() == found


def test_a_table_that_says_nothing_at_all_is_on_another_clock(video):
    video.with_suffix(".csv").write_text("time_s,speed\n5000,5\n6000,6\n")  # milliseconds
    message = r"clip\.csv: no row within 0\.125 s of any frame: .* from 5000\.000 to 6000\.000 s, .* 0\.000 to 3\.000 s"
    with pytest.raises(SidecarError, match=message) as refused:
        read_sidecar(video, np.arange(4.0), columns=["speed"], tolerance_s=0.125)
    assert isinstance(refused.value, DataError)
