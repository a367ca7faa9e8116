import csv
import hashlib

import numpy as np
import pytest

from benchmarks.reading import read_frames
from benchmarks.stochastic_walls import RandomWalls
from benchmarks.synthetic_events import simulate_pair, write_ball_pairs
from data.sidecar import read_sidecar
from data.synthetic import (
    BALL_COLOURS,
    STATE_COLUMNS,
    VELOCITY_COLUMNS,
    BallWorld,
    render_balls,
    simulate_balls,
    smooth_noise,
    write_ball_clip,
    write_ball_videos,
    write_video,
)
from data.video import probe_video

LONG = BallWorld(frames=300)


def simulate(seed, world=LONG):
    return simulate_balls(world, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def long_runs():
    """States of six worlds, 300 frames each."""
    return np.stack([simulate(seed) for seed in range(6)])


def test_energy_is_conserved(long_runs):
    energy = (long_runs[..., 2:] ** 2).sum(axis=(2, 3))
    np.testing.assert_allclose(energy, np.broadcast_to(energy[:, :1], energy.shape), rtol=1e-9)
    # Energy is passed between the balls: they do collide.
    of_one = (long_runs[:, :, 0, 2:] ** 2).sum(axis=-1)
    assert (of_one.max(axis=1) > 1.2 * of_one.min(axis=1)).all()


def test_balls_stay_inside_reach_the_walls_and_hardly_overlap(long_runs):
    position = long_runs[..., :2]
    assert LONG.radius <= position.min() < LONG.radius + 2
    assert LONG.size - LONG.radius - 2 < position.max() <= LONG.size - LONG.radius
    distance = np.linalg.norm(position[:, :, 0] - position[:, :, 1], axis=-1)
    assert 2 * LONG.radius - 1 < distance.min() < 2 * LONG.radius + 2


def test_balls_move_by_their_velocity(long_runs):
    step = np.diff(long_runs[..., :2], axis=1)
    free = np.isclose(long_runs[:, 1:, :, 2:], long_runs[:, :-1, :, 2:]).all(axis=-1)
    assert 0.5 < free.mean() < 1
    np.testing.assert_allclose(step[free], long_runs[:, :-1, :, 2:][free], atol=1e-9)


def test_the_default_world_of_a_seed_stays_the_same():
    generator = np.random.default_rng([3, 1])
    world = BallWorld(frames=60)
    states = simulate_balls(world, generator)
    # Rounded: the last bits of a sine may differ between machines.
    assert hashlib.sha256(states.round(3).tobytes()).hexdigest()[:16] == "963c31a52b1feb04"
    frames = render_balls(states, world, generator)
    assert frames.astype(int).sum() == 70_895_756


def test_random_walls_keep_speed_and_forget_direction():
    world = RandomWalls(frames=400)
    states = np.stack([simulate(seed, world) for seed in range(4)])
    position, energy = states[..., :2], (states[..., 2:] ** 2).sum(axis=(2, 3))
    assert position.min() >= world.radius
    assert position.max() <= world.size - world.radius
    np.testing.assert_allclose(energy, np.broadcast_to(energy[:, :1], energy.shape), rtol=1e-9)
    mirrored = simulate(0, BallWorld(frames=400))
    same = (states[0] == mirrored).all(axis=(1, 2))
    assert same[0]  # the same beginning, until the first wall
    assert not same[100:].any()


EVENTS = ("reverse", "freeze", "pass_through")


@pytest.fixture(scope="module")
def pairs():
    """Lawful and impossible states and the frame of the event, eight of each event."""
    return {
        event: [simulate_pair(BallWorld(), np.random.default_rng([7, index]), event) for index in range(8)]
        for event in EVENTS
    }


@pytest.mark.parametrize("event", EVENTS)
def test_twins_have_the_same_past_and_differ_from_the_event_on(pairs, event):
    for lawful, impossible, at in pairs[event]:
        assert 10 <= at < 30
        np.testing.assert_array_equal(impossible[:at, :, :2], lawful[:at, :, :2])  # as far as it can be seen
        assert (impossible[at:] != lawful[at:]).any(axis=(1, 2)).all()


def test_one_ball_turns_round_in_mid_air(pairs):
    for lawful, impossible, at in pairs["reverse"]:
        np.testing.assert_allclose(impossible[at : at + 3, 0, 2:], -lawful[at - 1 : at + 2, 0, 2:])
        np.testing.assert_array_equal(impossible[at : at + 3, 1], lawful[at : at + 3, 1])
        # Lawful afterwards: no energy is lost.
        np.testing.assert_allclose((impossible[..., 2:] ** 2).sum(axis=(1, 2)), (lawful[0, :, 2:] ** 2).sum())


def test_frozen_balls_hold_still_to_the_end(pairs):
    for lawful, impossible, at in pairs["freeze"]:
        np.testing.assert_array_equal(impossible[at:, :, :2], np.broadcast_to(lawful[at - 1, :, :2], (40 - at, 2, 2)))


def test_balls_pass_through_each_other_where_they_should_bounce(pairs):
    nearest = []
    for lawful, impossible, at in pairs["pass_through"]:
        of_lawful, distance = (np.linalg.norm(one[:, 0, :2] - one[:, 1, :2], axis=1) for one in (lawful, impossible))
        assert of_lawful.min() > 11
        nearest.append(distance[at : at + 8].min())
        # The balls are solid again once they have parted.
        parted = at + 1 + int((distance[at + 1 :] >= 12).argmax())
        assert distance[parted:].min() > 11
    assert np.median(nearest) < 9


def test_pairs_are_real_videos_with_one_background(tmp_path):
    world = BallWorld(size=32, radius=3, frames=16)
    write_ball_pairs(tmp_path, 2, world, seed=4, event="freeze")
    for index in range(2):
        paths = [tmp_path / kind / f"clip_{index:05d}.mp4" for kind in ("lawful", "impossible")]
        lawful, impossible = (
            np.stack([frame for frame, _ in read_frames(path, (32, 32))]).astype(int) for path in paths
        )
        tables = [list(csv.DictReader(path.with_suffix(".csv").read_text().splitlines())) for path in paths]
        no_event, event = ([int(row["event"]) for row in rows] for rows in tables)
        assert (sum(no_event), sum(event)) == (0, 1)
        at = event.index(1)
        difference = np.abs(impossible - lawful)
        flicker = np.median(np.abs(np.diff(lawful, axis=0)))
        # The encoder looks ahead, so noise differs; away from the balls both flicker alike, to the end.
        assert max(np.median(difference[:at]), np.median(difference[at:])) < flicker / 2
        assert difference[at:].max(axis=(1, 2, 3)).min() > 30
        assert np.median(np.abs(np.diff(impossible[at:], axis=0))) > flicker / 2
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}
    write_ball_pairs(tmp_path, 2, world, seed=4, event="freeze")
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.mp4")}


def test_smooth_noise_meets_its_grid():
    noise = smooth_noise(np.random.default_rng(0), cells=5, size=65, amplitude=0.25)
    assert noise.shape == (3, 65, 65)
    assert np.abs(np.diff(noise, axis=1)).max() <= 0.5 / 16 + 1e-9
    grid = np.random.default_rng(0).uniform(-0.25, 0.25, size=(3, 5, 5))
    np.testing.assert_allclose(noise[:, ::16, ::16], grid, atol=1e-12)


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
    states = simulate([5, 0], world)
    expected = np.concatenate([states[..., :2].reshape(12, 4), states[..., 2:].reshape(12, 4)], axis=1)
    np.testing.assert_allclose(np.array(rows, float)[:, 2:], expected, atol=1e-4)
    assert [int(row[0]) for row in rows] == list(range(12))


def test_what_lay_in_memory_before_does_not_change_a_video(tmp_path):
    world = BallWorld(size=64, frames=12)
    generator = np.random.default_rng(0)
    frames = render_balls(simulate_balls(world, generator), world, generator)
    clutter, videos = [], set()
    for _ in range(300):  # with B-frames 1 encoding in 25 came out differently
        clutter += [np.full(generator.integers(5_000), generator.integers(256), dtype=np.uint8) for _ in range(3)]
        del clutter[generator.integers(len(clutter)) :: 3]
        write_video(tmp_path / "clip.mp4", frames, world.fps)
        videos.add((tmp_path / "clip.mp4").read_bytes())
    assert len(videos) == 1


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
