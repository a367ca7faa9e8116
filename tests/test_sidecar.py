import numpy as np
import pytest

from data.sidecar import SidecarError, read_sidecar

TABLE = "frame,time_s,speed,steering\n0,0.0,10,-1\n1,0.1,11,-0.5\n2,0.25,12,0\n3,0.7,13,0.5\n"


@pytest.fixture
def video(tmp_path):
    (tmp_path / "clip.csv").write_text(TABLE)
    return tmp_path / "clip.mp4"


def test_nearest_row_of_each_frame(video):
    values = read_sidecar(video, np.array([0.04, 0.06, 0.2, 0.45, 0.5, 0.75, 0.0]), ["speed"], tolerance_s=0.25)
    assert values.shape == (7, 1)
    assert values[:, 0].tolist() == [10, 11, 12, 12, 13, 13, 10]


def test_columns_come_in_the_order_asked_for(video):
    values = read_sidecar(video, np.array([0.25, 0.0]), ["steering", "speed"], tolerance_s=0.01)
    assert values.tolist() == [[0, 12], [-1, 10]]


def test_a_single_row_serves_frames_on_both_sides(video):
    video.with_suffix(".csv").write_text("time_s,speed\n0.5,7\n")
    assert read_sidecar(video, np.array([0.4, 0.5, 0.6]), ["speed"], tolerance_s=0.11).tolist() == [[7], [7], [7]]


def test_missing_file(tmp_path):
    with pytest.raises(SidecarError, match=r"lap\.csv: there is no such file"):
        read_sidecar(tmp_path / "lap.mp4", np.zeros(1), ["speed"], 0.1)


@pytest.mark.parametrize(
    ("table", "column", "message"),
    [
        (TABLE, "brake", "no column 'brake' among frame, time_s, speed, steering"),
        ("frame,speed\n0,1\n", "speed", "no column 'time_s'"),
        ("", "speed", "no column 'time_s'"),
        ("time_s,speed\n", "speed", "no rows"),
        ("time_s,speed\n0.0,fast\n", "speed", "not a number .*fast"),
        ("time_s,speed\n0.0,\n", "speed", "not a number"),
        ("time_s,speed\n0.0\n", "speed", "not a number"),
        ("time_s,speed\nnow,1\n", "speed", "not a number"),
        ("time_s,speed\n0.0,nan\n", "speed", "not a number"),
        ("time_s,speed\nnan,1\n", "speed", "not a number"),
    ],
)
def test_unusable_tables_say_why(video, table, column, message):
    video.with_suffix(".csv").write_text(table)
    with pytest.raises(SidecarError, match=rf"clip\.csv: .*{message}"):
        read_sidecar(video, np.zeros(1), [column], 0.1)


def test_no_row_near_enough_names_the_worst_frame(video):
    read_sidecar(video, np.array([0.25, 0.475]), ["speed"], tolerance_s=0.23)
    with pytest.raises(SidecarError, match=r"no row within 0\.200 s of the frame at 0\.475 s"):
        read_sidecar(video, np.array([0.25, 0.475]), ["speed"], tolerance_s=0.2)
    with pytest.raises(SidecarError, match=r"at 1\.500 s"):
        read_sidecar(video, np.array([0.25, 1.5]), ["speed"], tolerance_s=0.2)
