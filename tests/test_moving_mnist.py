import csv
import sys

import numpy as np
import pytest

from data.moving_mnist import (
    DIGIT_SIZE,
    STATE_COLUMNS,
    VELOCITY_COLUMNS,
    DigitWorld,
    read_digits,
    render_digits,
    simulate_digits,
    write_digit_clip,
    write_digit_videos,
)
from data.sidecar import read_sidecar
from data.video import probe_video, read_frames

WORLD = DigitWorld(frames=300)


@pytest.fixture(scope="module")
def long_runs():
    """States of eight worlds, 300 frames each."""
    return np.stack([simulate_digits(WORLD, np.random.default_rng(seed)) for seed in range(8)])


@pytest.fixture(scope="module")
def images():
    """Twenty pictures of 28 x 28: a bright square each, of its own brightness."""
    pictures = np.zeros((20, DIGIT_SIZE, DIGIT_SIZE), dtype=np.uint8)
    pictures[:, 10:18, 10:18] = np.linspace(100, 250, 20).astype(np.uint8)[:, None, None]
    return pictures


def test_digits_keep_their_speed_and_stay_inside(long_runs):
    speed = np.linalg.norm(long_runs[..., 2:], axis=-1)
    np.testing.assert_allclose(speed, WORLD.speed, rtol=1e-9)
    position = long_runs[..., :2]
    assert position.min() >= DIGIT_SIZE / 2
    assert position.max() <= WORLD.size - DIGIT_SIZE / 2
    assert position.min() < DIGIT_SIZE / 2 + 1
    assert position.max() > WORLD.size - DIGIT_SIZE / 2 - 1


def test_digits_move_by_their_velocity_between_walls(long_runs):
    step = np.diff(long_runs[..., :2], axis=1)
    velocity = long_runs[..., 2:]
    free = np.isclose(velocity[:, 1:], velocity[:, :-1])
    assert 0.8 < free.mean() < 0.99
    np.testing.assert_allclose(step[free], velocity[:, :-1][free], atol=1e-9)
    # At a wall, only the velocity across it turns round.
    np.testing.assert_allclose(np.abs(velocity[:, 1:]), np.abs(velocity[:, :-1]), atol=1e-9)
    assert (np.abs(step) <= np.abs(velocity[:, :-1]) + 1e-9).all()


def test_digits_pass_through_each_other(long_runs):
    distance = np.linalg.norm(long_runs[:, :, 0, :2] - long_runs[:, :, 1, :2], axis=-1)
    assert distance.min() < 2


def test_digits_are_drawn_at_whole_pixels_the_brighter_above(images):
    states = np.zeros((2, 2, 4))
    states[0, :, :2] = [[14.4, 14.6], [50, 50]]
    states[1, :, :2] = [[30, 30], [30, 34]]
    frames = render_digits(states, images[[0, 19]], DigitWorld())
    assert frames.shape == (2, 64, 64, 3)
    assert frames.dtype == np.uint8
    assert (frames == frames[..., :1]).all()
    grey = frames[..., 0]
    assert set(np.unique(grey)) == {0, 100, 250}
    rows, columns = (grey[0] == 100).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (11, 18, 10, 17)
    rows, _ = (grey[1] == 250).nonzero()
    assert (rows.min(), rows.max()) == (30, 37)
    rows, _ = (grey[1] == 100).nonzero()
    assert (rows.min(), rows.max()) == (26, 29)


def test_the_csv_says_where_the_decoded_digits_are(tmp_path, images):
    world = DigitWorld()
    path = write_digit_clip(tmp_path, 3, images[[0, 19]], world, seed=1)
    info = probe_video(path)
    assert (info.height, info.width, info.codec) == (64, 64, "h264")
    frames, times_s = zip(*read_frames(path, (64, 64)), strict=True)
    np.testing.assert_allclose(times_s, np.arange(20) / 10, atol=1e-4)
    states = read_sidecar(path, np.array(times_s), STATE_COLUMNS, tolerance_s=1e-4).reshape(-1, 2, 2)
    seen = 0
    for frame, (_, bright) in zip(frames, states, strict=True):
        rows, columns = (frame.mean(axis=0) > 190).nonzero()
        centre = np.array([columns.mean(), rows.mean()]) + 0.5
        np.testing.assert_allclose(centre, bright, atol=1)
        seen += len(rows)
    assert seen > 20 * 50
    with path.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["frame", "time_s", *STATE_COLUMNS, *VELOCITY_COLUMNS]
    written = np.array([[float(row[name]) for name in (*STATE_COLUMNS, *VELOCITY_COLUMNS)] for row in rows])
    expected = simulate_digits(world, np.random.default_rng([1, 3]))
    np.testing.assert_allclose(written[:, :4].reshape(-1, 2, 2), expected[..., :2], atol=1e-4)
    np.testing.assert_allclose(written[:, 4:].reshape(-1, 2, 2), expected[..., 2:], atol=1e-4)


def test_an_interrupted_run_goes_on_and_seeds_decide(tmp_path, images):
    world = DigitWorld(frames=3)
    whole, half = write_digit_videos(tmp_path / "once", 2, images, world, seed=0)
    wanted = half.with_suffix(".csv").read_text(), [frame for frame, _ in read_frames(half, (64, 64))]
    # Killed between the video and its table: a clip without a table is not whole.
    half.with_suffix(".csv").unlink()
    half.write_bytes(b"half a video")
    before = whole.stat().st_mtime_ns
    write_digit_videos(tmp_path / "once", 3, images, world, seed=0)  # and more of them are the same
    assert whole.stat().st_mtime_ns == before
    assert half.with_suffix(".csv").read_text() == wanted[0]
    np.testing.assert_array_equal([frame for frame, _ in read_frames(half, (64, 64))], wanted[1])
    assert len(list((tmp_path / "once").iterdir())) == 6
    other, _ = write_digit_videos(tmp_path / "other", 2, images, world, seed=1)
    assert other.with_suffix(".csv").read_text() != whole.with_suffix(".csv").read_text()


def test_splits_share_no_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["data.moving_mnist"], "VALIDATION_DIGITS", 3)
    numbered = np.arange(12, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
    np.savez(tmp_path / "mnist.npz", train_images=numbered[:10], test_images=numbered[10:])
    splits = {name: digits[:, 0, 0].tolist() for name, digits in read_digits(tmp_path / "mnist.npz").items()}
    assert splits == {"train": [0, 1, 2, 3, 4, 5, 6], "val": [7, 8, 9], "test": [10, 11]}
