"""What benchmarks work out themselves, beside what the commands report."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common, decoded, hidden_parts, robot
from benchmarks.detection import average_precision, occupied_cells
from data.synthetic import BallWorld, render_balls, simulate_balls, write_ball_videos
from jepa.bootstrap import Bootstrap
from pipelines.run.command import UserError
from pipelines.run.files import write_json

ROOT = Path(__file__).parents[1]


def test_a_benchmark_can_be_run_as_a_script_from_anywhere(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, str(ROOT / "benchmarks/robot.py"), "--help"]
    said = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "--train" in said.stdout, said.stderr


def test_a_forecast_is_compared_with_the_best_simple_guess_at_each_horizon(tmp_path):
    curves = {
        "model": np.full(20, 0.5), "copy_last": np.ones(20), "ridge": np.linspace(0.4, 0.8, 20), "mean": np.full(20, 2),
    }  # fmt: skip
    records = {name: [{"relative_to_copy_last": value} for value in curve] for name, curve in curves.items()}
    write_json(tmp_path / "rollout.json", {"predictors": records, "truth": [{}]})
    found = common.figures(tmp_path).measures
    assert found["of the best simple guess, worst horizon"] == pytest.approx(0.5 / 0.4)
    assert found["of the best simple guess, 20 ahead"] == pytest.approx(0.5 / 0.8)
    assert found["of ridge, mean over horizons"] == pytest.approx(np.mean(0.5 / curves["ridge"]))


def test_balls_are_found_by_their_colours():
    world = BallWorld(background="plain")
    states = simulate_balls(world, np.random.default_rng(3))
    pictures = torch.from_numpy(render_balls(states, world, np.random.default_rng(0))).movedim(3, 1)[None] / 255
    apart = np.linalg.norm(states[:, 0, :2] - states[:, 1, :2], axis=1) > 2 * world.radius
    found = decoded.positions(pictures, torch.full((3, 64, 64), decoded.GREY))[0]
    np.testing.assert_allclose(found[apart], states[apart][:, :, :2], atol=0.5)


# The robot


def test_errors_are_compared_with_copying_and_in_pairs_by_clips():
    generator = np.random.default_rng(0)
    hard = np.repeat(generator.uniform(0.5, 2, size=8), 5)[:, None] * [1, 3]  # clips differ, alike for everyone
    factors = {"copying": 1.0, "true": 0.2, "none": 0.4, "shuffled": 1.6}
    found = robot.relative({name: factor * hard for name, factor in factors.items()}, Bootstrap(np.arange(40) // 5))
    expected = {"true": 0.2, "none": 0.4, "shuffled": 1.6, "true_of_none": 0.5, "none_of_shuffled": 0.25}
    for name, value in expected.items():
        assert [found[name]["1"], found[name]["2"]] == pytest.approx([value, value])
        np.testing.assert_allclose(found[name]["intervals"]["2"], [value, value])  # of pairs, not of each alone
    assert "0.500 (0.500 to 0.500)" in robot.table(found)


def test_the_last_seventh_of_the_clips_is_held_out_and_folders_come_in_pairs(tmp_path):
    for folder, count in (("train", 56), ("test", 3)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number:02}.mp4").touch()
    options = robot.Options(train=tmp_path / "train", test=tmp_path / "test")
    divided = robot.divide(options)
    assert {name: len(clips) for name, clips in divided.items()} == {"train": 48, "val": 8, "test": 3}
    assert divided["val"][0].stem == "48"
    with pytest.raises(UserError, match="belong together"):
        robot.divide(robot.Options(train=tmp_path / "train"))
    with pytest.raises(UserError, match="hold 3 and 56 mp4 files: too few"):
        robot.divide(robot.Options(train=tmp_path / "test", test=tmp_path / "train"))


# Moving MNIST


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


# Hidden parts


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)], ids=["vector", "grid"])
def test_hidden_parts_are_measured_beside_what_is_simple(tmp_path, shape, write_cache, make_clip):
    generator = np.random.default_rng(0)
    for split, clips in (("train", 6), ("val", 3), ("test", 3)):
        made = []
        for index in range(clips):
            walk = generator.normal(size=(60, *shape)).cumsum(axis=0).astype(np.float32)
            made.append(make_clip(f"/{split}_{index}.mp4", 60, embeddings=walk))
        write_cache(tmp_path / "run" / "cache" / split, made, shape=shape)
    options = hidden_parts.Options(
        runs=(tmp_path / "run",), seeds=(0,), context=8, steps=4, output_dir=tmp_path / "out",
        options="--tracker none --predictor.width 16 --predictor.heads 2 --validation-horizon 10 --batch-size 8",
    )  # fmt: skip
    hidden_parts.main(options)
    ((found,),) = common.read_json(tmp_path / "out" / "results.json").values()
    assert found["gap of 4, of the line: model"] == pytest.approx(1, abs=0.3)  # hardly trained, it is the line
    assert found["gap of 4, of the line: copying"] > 1.5  # of a random walk in the middle of a gap: 2
    assert ("half hidden, the same in all frames, of holding: model" in found) == (len(shape) > 1)
