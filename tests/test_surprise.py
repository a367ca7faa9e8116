"""Scoring a stream: which moments are found, that length costs no memory, that nothing half is left behind."""

import copy
import csv
import json
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.decoder import VideoError
from data.manifest import check_videos
from data.synthetic import write_video
from data.video import TimedFrame
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.energy import calibrate_energy, energy, prediction_errors
from jepa.predictor import Predictor, PredictorConfig
from pipelines import score_surprise
from pipelines.score_surprise import Curve, Options, Scored, is_peak, main, picture_names, score, score_frames

CONTEXT = 4
FPS = 10


@pytest.fixture(scope="module")
def models():
    """A small encoder and an untrained predictor, which copies, with the usual errors of random walks."""
    torch.manual_seed(0)
    encoder = FrameEncoder(EncoderConfig(embedding_dimension=4, image_size=(32, 32))).eval()
    config = PredictorConfig(context=CONTEXT, width=8, depth=1)
    predictor = Predictor(config, 4, float(FPS), encoder.fingerprint(), energy_horizon=2).eval()
    walks = torch.randn(400, CONTEXT + 2, 4).cumsum(dim=1) * 0.01
    calibrate_energy(predictor, prediction_errors(predictor, walks[:, :CONTEXT], walks[:, CONTEXT:]))
    return encoder, predictor


def make_frames(number, jumps=()):
    """A grey that hardly changes, but for the frames in which it jumps."""
    level = 120 + np.random.default_rng(0).integers(-1, 2, size=number)
    for sign, jump in zip([1, -1] * len(jumps), jumps, strict=False):
        level[jump:] += sign * 90
    return np.broadcast_to(level[:, None, None, None], (number, 32, 32, 3)).astype(np.uint8)


@pytest.fixture
def video(tmp_path):
    write_video(tmp_path / "video.mp4", make_frames(60, jumps=(20, 40)), FPS)
    return check_videos([tmp_path / "video.mp4"], FPS, progress=False).videos[0]


def test_moments_are_where_something_happens_with_the_frames_around_them(models, video):
    found = score(*models, video)
    assert {moment.peak.time_s for moment in found.moments[:2]} == {2.0, 4.0}
    for peak, around in found.moments[:2]:
        np.testing.assert_allclose([one.time_s for one in around], peak.time_s + np.arange(-2, 3) / FPS)
        levels = [one.frame.mean() for one in around]
        assert np.abs(np.diff(levels)).argmax() == 1  # the jump is into the marked frame
        assert abs(levels[2] - levels[1]) > 60
        assert around[2] is peak
        assert peak.percentile == 100  # more than all of ordinary video
    energies = [moment.peak.energy for moment in found.moments]
    assert energies == sorted(energies, reverse=True)
    times_s = np.sort([moment.peak.time_s for moment in found.moments])
    assert np.diff(times_s).min() > CONTEXT / FPS  # one event is one moment
    assert len(score(*models, video, moments=1).moments) == 1


class Stale(Predictor):
    """It expects the oldest embedding that it is shown to come again, however far ahead: the longest of all echoes."""

    def advance(self, embeddings, gaps, state, latent=None):
        oldest = embeddings[:, :1] if state is None else state
        return oldest, oldest


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_an_event_and_its_echo_are_one_moment(models, tmp_path, horizon):
    encoder, _ = models
    predictor = Stale(PredictorConfig(context=CONTEXT, width=8, depth=1), 4, float(FPS), "", energy_horizon=4).eval()
    walks = torch.randn(400, CONTEXT + 4, 4).cumsum(dim=1) * 0.01
    calibrate_energy(predictor, prediction_errors(predictor, walks[:, :CONTEXT], walks[:, CONTEXT:]))
    write_video(tmp_path / "flash.mp4", make_frames(60, jumps=(20, 21)), FPS)
    (flash,) = check_videos([tmp_path / "flash.mp4"], FPS, progress=False).videos
    energies = np.array([frame.energy for frame in score_frames(encoder, predictor, flash, None, horizon)])
    echo = 20 + horizon + CONTEXT - 1
    assert set(np.argsort(energies)[-2:]) == {20, echo}  # both tower above all others
    assert energies[[20, echo]].min() > 10 * np.delete(energies, [20, echo]).max()
    first, second = score(encoder, predictor, flash, horizon=horizon, moments=2).moments
    assert first.peak.energy > 10 * second.peak.energy


@pytest.mark.parametrize("horizon", [1, 2])
def test_a_stream_gives_the_energies_of_the_whole_sequence(models, video, monkeypatch, horizon):
    encoder, predictor = models
    monkeypatch.setattr(score_surprise, "FRAMES_PER_CHUNK", 7)
    streamed = list(score_frames(encoder, predictor, video, None, horizon))
    before = CONTEXT + horizon - 1
    assert [one.energy for one in streamed[:before]] == [-np.inf] * before
    with torch.no_grad():
        embeddings = predictor.standardise(encoder(torch.from_numpy(np.stack([one.frame for one in streamed]))))
        for at in range(before, 60):
            begun = at + 1 - horizon
            alone = energy(predictor, embeddings[None, begun - CONTEXT : begun], embeddings[None, begun : at + 1])[
                0, -1
            ]
            assert streamed[at].energy == pytest.approx(float(alone), rel=1e-3, abs=1e-5)


def test_energy_begins_anew_after_a_gap(models, video, monkeypatch):
    frame = np.zeros((3, 32, 32), np.uint8)
    ticks = [*range(6), *range(10, 16), *range(20, 23)]
    monkeypatch.setattr(
        score_surprise, "read_on_clock", lambda *_, **__: (TimedFrame(frame, tick / FPS, tick) for tick in ticks)
    )
    scored = [round(one.time_s * FPS) for one in score_frames(*models, video, None, 1) if one.energy > -np.inf]
    assert scored == [4, 5, 14, 15]


def test_neighbours_of_a_greater_energy_are_no_moments():
    window = [Scored(value, 0, 0, 0, np.empty(0)) for value in (1.0, 3.0, 2.0, 3.0, 1.0)]
    assert [is_peak(window, at) for at in range(5)] == [False, True, False, False, False]
    assert is_peak([None, window[0], None], 1)
    assert not is_peak([window[0]._replace(energy=-np.inf)] * 3, 1)


@pytest.mark.parametrize("number", [1, 15, 16, 17, 1000])
def test_a_curve_stays_short_and_keeps_its_peaks(monkeypatch, number):
    monkeypatch.setattr(score_surprise, "CURVE_POINTS", 16)
    values = np.random.default_rng(0).exponential(size=number)
    curve = Curve(max)
    for time_s, value in enumerate(values):
        curve.add((value, 50.0, float(time_s)))
    assert len(curve.points) <= 16
    assert len(curve.points) >= min(number, 8)
    assert max(curve.points)[0] == values.max()
    times_s = [point[2] for point in curve.points]
    assert times_s == sorted(times_s)
    assert all(values[int(time_s)] == value for value, _, time_s in curve.points)
    if number < 16:
        assert len(curve.points) == number


def test_agreement_is_averaged_over_equal_parts_of_a_video(models, video, monkeypatch):
    """However long it is: here points were merged twice."""
    encoder, predictor = models[0], copy.deepcopy(models[1])
    torch.nn.init.normal_(predictor.members[0].head.weight)
    monkeypatch.setattr(score_surprise, "CURVE_POINTS", 16)
    monkeypatch.setattr(score_surprise, "SPANS", 7)
    written = []
    found = score(encoder, predictor, video, write=written.append)
    agreements, times_s = (np.array([getattr(one, name) for one in written]) for name in ("agreement", "time_s"))
    assert len(written) == 60 - CONTEXT
    assert np.ptp(agreements) > 0.1
    parts = np.array_split(np.arange(len(written)), np.cumsum([8] * 6))  # 14 points of 4 frames, 2 points to a part
    np.testing.assert_allclose(found.spans[:, 0], [times_s[part].mean() for part in parts], rtol=1e-6)
    np.testing.assert_allclose(found.spans[:, 1], [agreements[part].mean() for part in parts], rtol=1e-5)


def test_memory_does_not_depend_on_the_length(models, video, monkeypatch):
    """Of NumPy and Python objects; a stream of the same frames, four times as long."""
    frame = np.zeros((3, 32, 32), np.uint8)
    monkeypatch.setattr(score_surprise, "CURVE_POINTS", 64)

    def peak_bytes(length):
        frames = (TimedFrame(frame + tick % 7, tick / FPS, tick) for tick in range(length))
        monkeypatch.setattr(score_surprise, "read_on_clock", lambda *_, **__: frames)
        written = 0

        def write(_):
            nonlocal written
            written += 1

        tracemalloc.start()
        found = score(*models, video, write=write)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert written == found.frames == length - CONTEXT
        return peak

    short, long = peak_bytes(1000), peak_bytes(4000)
    assert long < short + 100_000  # a list of times and energies alone would take more


@pytest.fixture
def run(models, tmp_path):
    """Score videos and leave the results in `out`."""
    for model, name in zip(models, ("encoder", "predictor"), strict=True):
        model.save_pretrained(tmp_path / name)
    options = Options((), tmp_path / "encoder", tmp_path / "predictor", tmp_path / "out")

    def run(*videos, **changes):
        main(replace(options, videos=videos, **changes))
        return options.output_dir

    return run


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def read_picture(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_the_stage_leaves_tables_and_pictures(run, video, tmp_path):
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other" / "video.mp4", make_frames(30), FPS)
    write_video(tmp_path / "short.mp4", make_frames(3), FPS)
    out = run(tmp_path, moments=2)
    rows, moments = read_table(out / "surprise.csv"), read_table(out / "moments.csv")
    assert len(rows) == 60 + 30 - 2 * CONTEXT
    assert [row["rank"] for row in moments if row["video"] == str(video.path)] == ["1", "2"]
    for row in moments:
        assert {name: row[name] for name in row if name != "rank"} in rows
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["videos"], metrics["refused_videos"]) == (2, 1)
    assert metrics["mean_energy"] == pytest.approx(np.mean([float(row["energy"]) for row in rows]), rel=1e-3)
    for folder in ("pictures", "moments"):
        pictures = sorted((out / folder).iterdir())
        assert [path.name for path in pictures] == ["0_video.png", "2_video.png"]
        assert all(read_picture(path).std() > 10 for path in pictures)
    # A row of pictures for each moment, the marked one in red.
    sheet = read_picture(out / "moments" / "2_video.png")
    red = (np.abs(sheet - [214, 39, 40]).sum(axis=2) < 30).any(axis=1)
    assert np.diff(red.astype(int)).clip(min=0).sum() == 2


def test_an_interrupted_run_leaves_nothing_and_keeps_what_was_there(run, video, monkeypatch):
    monkeypatch.setattr(score_surprise, "draw", lambda *_: None)
    out = run(video.path)
    assert [path.name for path in (out / "moments").iterdir()] == ["video.png"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(score_surprise, "draw_moments", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(video.path, overwrite=True, moments=1)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # Killed, a run leaves its unfinished folder: the next one throws it away.
    monkeypatch.setattr(score_surprise, "draw_moments", lambda *_: None)
    (out / ".tmp.surprise" / "pictures").mkdir(parents=True)
    run(video.path, overwrite=True, moments=1)
    assert len(read_table(out / "moments.csv")) == 1
    assert not (out / ".tmp.surprise").exists()


def test_mistakes_are_named(run, video, models, tmp_path):
    with pytest.raises(Exception, match="--moments is 0"):
        run(video.path, moments=0)
    for horizon in (0, 3):
        with pytest.raises(Exception, match=f"--horizon is {horizon}: .* for 1 to 2 steps"):
            run(video.path, horizon=horizon)
    write_video(tmp_path / "short.mp4", make_frames(3), FPS)
    short = check_videos([tmp_path / "short.mp4"], FPS, progress=False).videos[0]
    with pytest.raises(VideoError, match=r"short\.mp4: no unbroken stretch of 5 frames"):
        score(*models, short)


def test_pictures_of_videos_of_one_name_keep_apart(tmp_path):
    assert picture_names([tmp_path / "a.mp4", tmp_path / "b.mp4"]) == ["a.png", "b.png"]
    names = picture_names([tmp_path / "a.mp4", tmp_path / "x" / "a.mp4", tmp_path / "a_0.mp4"])
    assert len(set(names)) == 3
