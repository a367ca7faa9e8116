import csv
import hashlib

import numpy as np
import pytest

from benchmarks.reading import read_frames
from data.sidecar import read_sidecar
from data.synthetic import (
    BALL_COLOURS,
    STATE_COLUMNS,
    VELOCITY_COLUMNS,
    BallWorld,
    render_balls,
    simulate_balls,
    write_ball_clip,
    write_ball_videos,
    write_video,
)
from data.video import probe_video


def test_the_default_world_of_a_seed_stays_the_same():
    generator = np.random.default_rng([3, 1])
    world = BallWorld(frames=60)
    states = simulate_balls(world, generator)
    # Rounded: the last bits of a sine may differ between machines.
    assert hashlib.sha256(states.round(3).tobytes()).hexdigest()[:16] == "963c31a52b1feb04"
    frames = render_balls(states, world, generator)
    assert frames.astype(int).sum() == 70_895_756


@pytest.mark.parametrize(
    ("background", "is_textured", "flickers"), [("plain", 0, 0), ("textured", 1, 0), ("full", 1, 1)]
)
def test_backgrounds_are_plain_still_or_flickering(background, is_textured, flickers):
    world = BallWorld(frames=3, background=background)
    states = np.full((3, 2, 4), -100.0)  # no ball in sight
    frames = render_balls(states, world, np.random.default_rng(0)).astype(float)
    assert frames.shape == (3, 64, 64, 3)
    changes, textures = np.abs(np.diff(frames, axis=0)).mean(), frames[0].std(axis=(0, 1))
    assert changes > 3 if flickers else changes == 0
    assert ((textures > 10) if is_textured else (textures == 0)).all()


@pytest.mark.parametrize("background", ["plain", "full"])
def test_the_csv_says_where_the_decoded_balls_are(tmp_path, background):
    world = BallWorld(background=background)
    path = write_ball_clip(tmp_path, 3, world, seed=1)
    info = probe_video(path)
    assert (info.height, info.width, info.codec) == (64, 64, "h264")
    assert info.average_fps == pytest.approx(10, rel=0.01)
    frames, times_s = zip(*read_frames(path, (64, 64)), strict=True)
    assert len(frames) == world.frames
    np.testing.assert_allclose(times_s, np.arange(40) / 10, atol=1e-4)
    states = read_sidecar(path, np.array(times_s), columns=STATE_COLUMNS, tolerance_s=1e-4).reshape(-1, 2, 2)
    vertical, horizontal = np.mgrid[0:64, 0:64] + 0.5
    for frame, balls in zip(frames, states, strict=True):
        for ball, colour in zip(balls, 255 * BALL_COLOURS, strict=True):
            inside = np.hypot(horizontal - ball[0], vertical - ball[1]) < world.radius - 2
            assert np.abs(frame[:, inside].mean(axis=1) - colour).max() < 20
            like_it = np.abs(frame - colour[:, None, None]).sum(axis=0) < 120
            near = np.hypot(horizontal - ball[0], vertical - ball[1]) < world.radius + 4
            centre = np.array([horizontal[like_it & near].mean(), vertical[like_it & near].mean()])
            np.testing.assert_allclose(centre, ball, atol=1)
            if background == "plain":
                # And nowhere else.
                assert not like_it[~near].any()


def test_the_csv_has_velocities_and_one_row_a_frame(tmp_path):
    world = BallWorld(frames=12)
    path = write_ball_clip(tmp_path, 0, world, seed=5)
    with path.with_suffix(".csv").open(newline="") as file:
        columns, *rows = csv.reader(file)
    assert columns == ["frame", "time_s", *STATE_COLUMNS, *VELOCITY_COLUMNS]
    states = simulate_balls(world, np.random.default_rng([5, 0]))
    expected = np.concatenate([states[..., :2].reshape(12, 4), states[..., 2:].reshape(12, 4)], axis=1)
    np.testing.assert_allclose(np.array(rows, float)[:, 2:], expected, atol=1e-4)
    assert [int(row[0]) for row in rows] == list(range(12))


def test_clips_of_one_seed_are_the_same_in_every_run(tmp_path):
    world = BallWorld(frames=6)  # of 32 pixels x264 now and then makes another video, see `write_video`
    once = write_ball_videos(tmp_path / "once", 3, world, seed=7)
    assert [path.name for path in once] == ["clip_00000.mp4", "clip_00001.mp4", "clip_00002.mp4"]
    again = write_ball_clip(tmp_path, 1, world, seed=7)
    tables = [path.with_suffix(".csv").read_text() for path in once]
    assert again.with_suffix(".csv").read_text() == tables[1]
    (other,) = write_ball_videos(tmp_path / "other", 1, world, seed=8)
    assert len({*tables, other.with_suffix(".csv").read_text()}) == 4
    for (one, _), (two, _) in zip(read_frames(once[1], (64, 64)), read_frames(again, (64, 64)), strict=True):
        np.testing.assert_array_equal(one, two)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    world = BallWorld(size=32, frames=3)
    whole = write_ball_clip(tmp_path, 0, world, seed=0)
    half = write_ball_clip(tmp_path, 1, world, seed=0)
    wanted = half.with_suffix(".csv").read_text()
    # Killed between the video and its table: a clip without a table is not whole.
    half.with_suffix(".csv").unlink()
    half.write_bytes(b"half a video")
    before = whole.stat().st_mtime_ns
    write_ball_videos(tmp_path, 2, world, seed=0)
    assert whole.stat().st_mtime_ns == before
    assert half.with_suffix(".csv").read_text() == wanted
    assert len(list(read_frames(half, (32, 32)))) == 3
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".csv", ".csv", ".mp4", ".mp4"]


@pytest.mark.parametrize("fps", [10, 29.97, 0.5])
def test_videos_keep_their_rate(tmp_path, fps):
    frames = np.zeros((4, 32, 48, 3), dtype=np.uint8)
    write_video(tmp_path / "a.mp4", frames, fps)
    times_s = [time_s for _, time_s in read_frames(tmp_path / "a.mp4", (32, 48))]
    np.testing.assert_allclose(times_s, np.arange(4) / fps, atol=1e-4)
