"""What benchmarks work out themselves, beside what the commands report."""

import csv
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from benchmarks import common, detection, driving, forty_thousand_clips
from benchmarks.common import table_by_horizon, table_of_measures, words
from benchmarks.detection import average_precision, fit_detection_head, occupied_cells
from benchmarks.digits import DIGIT_SIZE, SIZE, SPEED, STATE_COLUMNS, render_digits, simulate_digits, write_digit_videos
from data.cache import EmbeddingCache
from data.clock import read_on_clock
from data.synthetic import BallWorld, write_ball_videos
from pipelines.run.files import write_json


def test_words_of_a_command_line():
    given = ["--fps", 4, {"videos": (Path("/a"), Path("/b")), "predictor.kind": "mlp", "resume": True}]
    assert words(given) == ["--fps", "4", "--videos", "/a", "/b", "--predictor.kind", "mlp", "--resume"]


def test_tables_hold_means_and_ranges_of_seeds():
    errors = [{"model": [0.1, 0.2]}, {"model": [0.3, 0.6]}]
    assert table_by_horizon(errors).splitlines() == [
        "| steps ahead | 1 | 5 |",
        "| --- | --- | --- |",
        "| model | 0.200 (0.100 to 0.300) | 0.400 (0.200 to 0.600) |",
    ]
    runs = {"one": [{"rank": 1.0}, {"rank": 2.0, "seconds": 9.0}], "other": [{"rank": 3.0}]}
    assert table_of_measures(runs).splitlines()[2:] == [
        "| rank | 1.500 (1.000 to 2.000) | 3.000 (3.000 to 3.000) |",
        "| seconds | 9.000 (9.000 to 9.000) |  |",  # training is timed only where it ran from its beginning
    ]


def test_a_forecast_is_compared_with_the_best_simple_guess_at_each_horizon(tmp_path):
    curves = {
        "model": np.full(20, 0.5),
        "copy_last": np.ones(20),
        "ridge": np.linspace(0.4, 0.8, 20),
        "mean": np.full(20, 2),
    }
    records = {name: [{"relative_to_copy_last": value} for value in curve] for name, curve in curves.items()}
    write_json(tmp_path / "rollout.json", {"predictors": records, "truth": [{}]})
    found = common.figures(tmp_path).measures
    assert found["of the best simple guess, worst horizon"] == pytest.approx(0.5 / 0.4)
    assert found["of the best simple guess, 20 ahead"] == pytest.approx(0.5 / 0.8)
    assert found["of ridge, mean over horizons"] == pytest.approx(np.mean(0.5 / curves["ridge"]))


def test_a_recording_is_cut_at_a_key_frame_and_keeps_its_frames_and_its_table(tmp_path):
    """A frame in so many seconds shows its number; 20 s at 10 fps, a key frame every 3 s."""
    path = tmp_path / "a.mp4"
    frames = np.repeat(np.arange(200, dtype=np.uint8)[:, None, None, None], 32, 1).repeat(32, 2).repeat(3, 3)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "30", "sc_threshold": "0", "crf": "1"})
        stream.width = stream.height = 32
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file).writerows([["frame", "time_s", "speed"], *([n, n / 10, n] for n in range(200))])
    head, tail = driving.cut_recording(path, tmp_path)
    for part, first, last in ((head, 0, 129), (tail, 150, 199)):
        shown = [round(float(timed.frame.mean())) for timed in read_on_clock(part, (32, 32), fps=10.0)]
        assert abs(shown[0] - first) <= 1
        assert abs(shown[-1] - last) <= 3  # a picture that is shown late may come early
        with part.with_suffix(".csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == len(shown)
        assert [int(row["speed"]) for row in rows] == list(range(first, first + len(rows)))
        assert [int(row["frame"]) for row in rows] == list(range(len(rows)))
        assert float(rows[-1]["time_s"]) == pytest.approx((len(rows) - 1) / 10, abs=0.11)


def test_small_caches_are_the_first_shards_of_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(forty_thousand_clips, "CLIPS_PER_SHARD", 2)
    options = forty_thousand_clips.Options(frames=5, dimension=4)
    for number in (4, 6):  # goes on where it stopped
        clips = forty_thousand_clips.make_clips(number, options, seed=0)
        common.write_cache(tmp_path / "cache", clips, 4, clips_per_shard=2)
    assert EmbeddingCache(tmp_path / "cache").frames == 30
    assert len(EmbeddingCache(forty_thousand_clips.first_shards(tmp_path / "cache", 4)).clips) == 4


# Moving MNIST


def test_digits_bounce_off_walls_and_lie_where_their_centres_say():
    centres = simulate_digits(60, np.random.default_rng(0))
    assert centres.min() >= DIGIT_SIZE / 2
    assert centres.max() <= SIZE - DIGIT_SIZE / 2
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=2)
    assert np.median(steps) == pytest.approx(SPEED)
    frames = render_digits(centres[:1], np.stack([np.full((28, 28), 100, np.uint8), np.full((28, 28), 200, np.uint8)]))
    for digit, value in ((1, 200), (0, 100)):
        x, y = centres[0, digit].round().astype(int)
        assert frames[0, y, x, 0] in (value, 200)


def test_digit_videos_are_written_once_with_their_centres(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28), dtype=np.uint8)
    for _ in range(2):
        paths = write_digit_videos(tmp_path, 2, images, frames=6, seed=3)
    assert [path.name for path in paths] == ["clip_00000.mp4", "clip_00001.mp4"]
    rows = list(csv.DictReader(paths[1].with_suffix(".csv").read_text().splitlines()))
    expected = simulate_digits(6, np.random.default_rng([3, 1])).reshape(6, 4)
    np.testing.assert_allclose([[float(row[column]) for column in STATE_COLUMNS] for row in rows], expected, atol=1e-3)


def test_cells_are_those_of_the_centres_row_by_row_also_on_the_rim():
    positions = torch.tensor([[[0.0, 0.0], [63.9, 8.0]], [[15.9, 56.0], [8.0, 63.9]], [[64.0, -1.0], [64.0, -1.0]]])
    occupied = occupied_cells(positions, 64).reshape(3, 8, 8)  # x, y
    assert [cells.nonzero().tolist() for cells in occupied] == [[[0, 0], [1, 7]], [[7, 1]], [[0, 7]]]


def test_average_precision_is_the_mean_precision_at_each_hit_and_weights_are_repetitions():
    logits, occupied = torch.tensor([[4.0, 1.0], [3.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert average_precision(logits, occupied) == pytest.approx((1 / 1 + 2 / 3) / 2)  # hits at ranks 1 and 3 of 4
    repeated = torch.tensor([2, 1])
    expected = average_precision(logits.repeat_interleave(repeated, 0), occupied.repeat_interleave(repeated, 0))
    assert average_precision(logits, occupied, np.array([2.0, 1.0])) == pytest.approx(expected)


def test_a_head_learns_where_objects_are_and_its_best_is_kept(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(4, 12, generator=generator)

    def make(count):
        positions = 64 * torch.rand(count, 2, 2, generator=generator)
        return (positions.flatten(1) / 20 - 1.6) @ mixing, occupied_cells(positions, 64, cells=4)

    train, validation = make(2000), make(200)
    head = fit_detection_head(train, validation, steps=300)
    with torch.no_grad():
        assert average_precision(head(validation[0]), validation[1]) > 0.6
    monkeypatch.setattr(detection, "VALIDATE_EVERY", 1)
    kept, precisions = [], iter([0.1, 0.9, 0.3])
    monkeypatch.setattr(detection, "average_precision", lambda logits, _: kept.append(logits) or next(precisions))
    head = fit_detection_head(train, validation, steps=3)
    assert torch.equal(head(validation[0]), kept[1])


@pytest.mark.slow
def test_a_recipe_makes_a_model_and_its_evaluation_and_does_nothing_twice(tmp_path):
    world = BallWorld(size=32, radius=3, frames=40, fps=8)
    videos = {split: tmp_path / split for split in ("train", "val", "test")}
    for seed, folder in enumerate(videos.values()):
        write_ball_videos(folder, 6, world, seed=seed)
    recipe = common.Recipe(
        fps=8,
        encoder=["--steps", "4", "--tracker", "none", "--encoder.image-size", "32", "32", "--batch-size", "16"],
        predictor=["--steps", "4", "--tracker", "none", "--predictor.width", "8"],
        columns=("ball_1_x", "ball_2_y"),
    )
    options = common.SeedOptions(seeds=(0,), output_dir=tmp_path / "runs")
    for _ in range(2):
        common.measure_seeds(
            options, lambda seed, folder: common.figures(common.make_model(folder, videos, recipe, seed), "probe_r2")
        )
        (found,) = common.read_json(tmp_path / "runs" / "results.json")
        assert len(found["tables"]["probe_r2"]["truth"]) == len(common.HORIZONS)
        assert found["measures"]["of ridge, mean over horizons"] > 0
    assert "everything: seconds" not in found["measures"]  # nothing was made anew
