"""The stages as a person runs them: real processes, real videos, real signals."""

import ast
import csv
import importlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.embedding_cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_clip
from data.video import read_frames
from data.windows import Windows
from jepa.energy import energy
from jepa.predictor import Predictor
from jepa.sampling import EXPECTED_OF, draw
from jepa.shrinkage import shrink
from pipelines.artefacts import load_predictor
from pipelines.presets import parse_options
from pipelines.stage import UserError, run_python

ROOT = Path(__file__).parent.parent
WORLD = BallWorld(size=32, radius=3, frames=24, fps=8)
SMALL_ENCODER = "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.width 16 --batch-size 16"
SMALL_PREDICTOR = "--predictor.width 16 --predictor.context 3 --batch-size 8 --validation-horizon 5"
STAGES = sorted(path.stem for path in (ROOT / "pipelines").glob("*.py") if "run_stage(main, " in path.read_text())
FAST = "--optimizer.learning-rate 0.01 --optimizer.warmup-steps 1 --log-every 4"
"""So that a few steps teach something."""
LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [
        *[sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--quiet"],
        *["--config_file", str(ROOT / "accelerate_config.yaml")],
    ],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def command(stage: str, options: str, launcher: str = "python") -> list[str]:
    return [*LAUNCHERS[launcher], str(ROOT / "pipelines" / f"{stage}.py"), *options.split()]


def run(stage: str, options: str, launcher: str = "python") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(stage, options, launcher), capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)


def succeed(stage: str, options: str, launcher: str = "python") -> str:
    result = run(stage, options, launcher)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def fail(stage: str, options: str) -> str:
    """The one line that a mistake ends in."""
    result = run(stage, options)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """Videos, encoder, caches and predictor, made by the stages themselves."""
    folder = tmp_path_factory.mktemp("world")
    for split, clips in {"train": 12, "val": 4, "test": 4}.items():
        (folder / split).mkdir()
        for index in range(clips):
            write_ball_clip(folder / split, index, WORLD, seed=len(split))
    (folder / "train" / "notes.mp4").write_text("this is no video")
    succeed(
        "pretrain_encoder",
        f"--videos {folder}/train --output-dir {folder}/encoder --steps 12 --log-every 5 {SMALL_ENCODER}",
        launcher="accelerate",
    )
    for split in ("train", "val", "test"):
        options = f"--videos {folder}/{split} --encoder {folder}/encoder/encoder --fps 8"
        succeed("cache_embeddings", f"{options} --output-dir {folder}/cache/{split}")
    caches = f"--train-cache {folder}/cache/train --validation-cache {folder}/cache/val"
    succeed(
        "train_predictor",
        f"{caches} --output-dir {folder}/predictor --steps 12 --log-every 5 {SMALL_PREDICTOR}",
        launcher="accelerate",
    )
    return folder


def on_test_windows(folder: Path, world: Path, horizon: int) -> tuple[Predictor, torch.Tensor]:
    """A predictor, and all windows of a context of 3 and a horizon of the test cache, standardised."""
    predictor = load_predictor(folder)
    windows = Windows(EmbeddingCache(world / "cache" / "test"), 3 + horizon)
    return predictor, predictor.standardise(windows.take(np.arange(len(windows))))


def assert_reported(folder: Path, imagined: torch.Tensor, windows: torch.Tensor) -> None:
    """The evaluation in this folder is of these futures of the windows."""
    records = json.loads((folder / "rollout.json").read_text())["predictors"]["model"]
    assert [record["horizon"] for record in records] == list(range(1, 1 + imagined.shape[1]))
    errors, copied = (
        (guess - windows[:, 3:]).square().mean(dim=(0, 2)).numpy() for guess in (imagined, windows[:, 2:3])
    )
    assert np.allclose([record["mse"] for record in records], errors, rtol=1e-4)
    assert not np.isclose(errors, copied, rtol=1e-3).any()  # it says something of its own


def test_the_journey_leaves_what_it_promises(world):
    for artefact in ("encoder/encoder", "predictor/predictor"):
        assert (world / artefact / "model.safetensors").exists()
        assert (world / artefact / "config.json").exists()
    assert list((world / "encoder" / "logs").rglob("events.out.tfevents*"))
    metrics = json.loads((world / "encoder" / "metrics.json").read_text())
    assert metrics["refused_videos"] == 1
    assert metrics["steps"] == 12
    assert not metrics["collapsed"]  # nor has it had time to spread out
    for name in ("embedding_batch_std", "embedding_time_rank", "expander_batch_rank", "expander_time_std"):
        assert metrics[name] > 0
    predicted = json.loads((world / "predictor" / "metrics.json").read_text())
    assert predicted["validation_relative_to_copy_last"] <= 1.0
    assert predicted["predicted_batch_std"] > 0
    recorded = json.loads((world / "encoder" / "config.json").read_text())
    assert "no readable" in str(recorded["inputs"]["refused"]) or "not a readable" in str(recorded["inputs"]["refused"])


def test_evaluation_reports_every_predictor_at_every_horizon(world, tmp_path):
    shown = succeed(
        "evaluate_rollout",
        f"--cache {world}/cache/test --predictor {world}/predictor/predictor --output-dir {tmp_path} --horizon 6 "
        f"--probe-cache {world}/cache/train --probe-columns ball_1_x ball_2_y",
    )
    assert "copy_last" in shown
    result = json.loads((tmp_path / "rollout.json").read_text())
    assert set(result["predictors"]) == {
        *("model", "copy_last", "linear_extrapolation", "ridge", "shrunk_ridge", "mean")
    }
    for records in result["predictors"].values():
        assert [record["horizon"] for record in records] == [1, 2, 3, 4, 5, 6]
        for record in records:
            assert record["mse_interval"] is None  # 4 clips are too few
            assert 0 <= record["retrieval_at_1"] <= 1
            assert len(record["probe_r2"]) == 2
            for to in ("copy_last", "ridge", "mean"):
                assert record[f"relative_to_{to}"] > 0
    assert all(record["relative_to_copy_last"] == 1 for record in result["predictors"]["copy_last"])
    assert (tmp_path / "rollout.png").stat().st_size > 5000


def test_a_long_video_teaches_while_it_is_watched(world, tmp_path):
    (tmp_path / "videos").mkdir()
    write_ball_clip(tmp_path / "videos", 0, replace(WORLD, frames=160), seed=9)
    succeed(
        "cache_embeddings",
        f"--videos {tmp_path}/videos --encoder {world}/encoder/encoder --fps 8 --output-dir {tmp_path}/cache",
    )
    shown = succeed(
        "evaluate_rollout",
        f"--cache {tmp_path}/cache --predictor {world}/predictor/predictor --output-dir {tmp_path}/evaluation "
        "--horizon 4",
    )
    assert "adapting: learns" in shown
    records = json.loads((tmp_path / "evaluation" / "rollout.json").read_text())["predictors"]
    for record in records["model"]:
        low, high = record["mse_interval"]
        assert low < record["mse"] < high
    for name in ("adapting_model", "adapting_ridge"):
        assert [record["horizon"] for record in records[name]] == [1, 2, 3, 4]
        assert f"  {name}" in shown
    # A model that has hardly been trained has the most to learn.
    assert records["adapting_model"][3]["mse"] < records["model"][3]["mse"]
    model, ridge = records["adapting_model"][3], records["adapting_ridge"][3]
    assert model["relative_to_adapting_ridge"] == pytest.approx(model["mse"] / ridge["mse"])
    assert ridge["relative_to_adapting_ridge_interval"] == [1, 1]
    with (tmp_path / "evaluation" / "rollout.csv").open() as file:
        assert {"adapting_model", "adapting_ridge"} < {row["predictor"] for row in csv.DictReader(file)}


def test_without_videos_to_spare_an_ensemble_is_validated_in_turn(world, tmp_path):
    options = f"--train-cache {world}/cache/train --steps 20 --rollout-steps 2 {SMALL_PREDICTOR} {FAST}"
    shown = succeed("train_predictor", f"{options} --folds 3 --members 2 --output-dir {tmp_path}/predictor")
    windows = len(Windows(EmbeddingCache(world / "cache" / "train"), 3 + 2))  # each counts once, however many learn it
    assert f"{windows:,} windows, validated on 12 clips, an ensemble of 8 members" in shown
    assert json.loads((tmp_path / "predictor" / "predictor" / "config.json").read_text())["members"] == 8
    metrics = json.loads((tmp_path / "predictor" / "metrics.json").read_text())
    assert metrics["validation_relative_to_copy_last"] <= 1
    evaluate = f"--cache {world}/cache/test --predictor {tmp_path}/predictor/predictor --horizon 6"
    succeed("evaluate_rollout", f"{evaluate} --output-dir {tmp_path}/evaluation")
    # At each step, the mean of what the members say next.
    predictor, windows = on_test_windows(tmp_path / "predictor" / "predictor", world, 6)
    sequence = windows[:, :3]
    with torch.no_grad():
        for _ in range(6):
            following = torch.stack([predictor.only([member])(sequence) for member in range(8)]).mean(dim=0)
            sequence = torch.cat([sequence, following], dim=1)
    assert_reported(tmp_path / "evaluation", shrink(sequence[:, 3:], windows[:, 2], predictor.shrinkage), windows)
    assert "holds 12 videos" in fail("train_predictor", f"{options} --folds 13 --output-dir {tmp_path}/other")


def test_surprise_is_a_row_for_each_frame_with_enough_past(world, tmp_path):
    succeed(
        "score_surprise",
        f"--videos {world}/test {world}/train/clip_00000.mp4 --encoder {world}/encoder/encoder "
        f"--predictor {world}/predictor/predictor --output-dir {tmp_path}",
    )
    with (tmp_path / "surprise.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["video", "time_s", "energy", "percentile", "agreement"]
    assert len({row["video"] for row in rows}) == 5
    first = [row for row in rows if row["video"] == rows[0]["video"]]
    assert len(first) == WORLD.frames - 3  # the context
    assert float(first[0]["time_s"]) == pytest.approx(3 / 8)
    assert all(0 <= float(row["percentile"]) <= 100 for row in rows)
    agreements = [float(row["agreement"]) for row in rows]
    assert -1 <= min(agreements) < max(agreements) <= 1
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_running_the_cache_again_embeds_only_what_is_new(world, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("clip_00000.mp4", "clip_00001.mp4"):
        shutil.copy(world / "train" / name, videos)
    options = f"--videos {videos} --encoder {world}/encoder/encoder --fps 8 --output-dir {tmp_path}/cache"
    assert "0 of 2 clips" in succeed("cache_embeddings", options)
    shards = set((tmp_path / "cache" / "shards").iterdir())
    shutil.copy(world / "train" / "clip_00002.mp4", videos)
    assert "2 of 3 clips" in succeed("cache_embeddings", options)
    assert shards < set((tmp_path / "cache" / "shards").iterdir())
    assert "3 of 3 clips" in succeed("cache_embeddings", options)
    (videos / "clip_00001.mp4").unlink()
    assert f"gone since it was embedded, its embeddings are kept: {videos}/clip_00001.mp4" in succeed(
        "cache_embeddings", options
    )
    (videos / "clip_00002.mp4").write_bytes((world / "train" / "clip_00003.mp4").read_bytes())
    shown = succeed("inspect_cache", f"--cache {tmp_path}/cache --verify")
    assert "3 clips of 3 videos, 72 embeddings" in shown
    for state in ("1 clip whose video is gone", "1 clip whose video has changed", "1 clip whose video is unchanged"):
        assert state in shown
    assert "verified: all 3 clips" in shown
    shard = next((tmp_path / "cache" / "shards").glob("*.h5"))
    with shard.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert f"delete {shard}" in fail("inspect_cache", f"--cache {tmp_path}/cache --verify")


def test_two_processes_run_both_trainers_and_share_the_cache(world, tmp_path):
    succeed(
        "pretrain_encoder",
        f"--videos {world}/train --output-dir {tmp_path}/encoder --steps 4 --phases 2 {SMALL_ENCODER}",
        launcher="torchrun",
    )
    for split in ("train", "val"):
        shown = succeed(
            "cache_embeddings",
            f"--videos {world}/{split} --encoder {tmp_path}/encoder/encoder --fps 8 --output-dir {tmp_path}/{split}",
            launcher="torchrun",
        )
        assert f"{12 if split == 'train' else 4} clips" in shown
    succeed(
        "train_predictor",
        f"--train-cache {tmp_path}/train --validation-cache {tmp_path}/val --output-dir {tmp_path}/predictor "
        f"--steps 4 --rollout-steps 2 {SMALL_PREDICTOR}",
        launcher="torchrun",
    )
    succeed(
        "train_predictor",
        f"--train-cache {tmp_path}/train --folds 2 --output-dir {tmp_path}/ensemble --steps 4 {SMALL_PREDICTOR}",
        launcher="torchrun",
    )


@pytest.mark.parametrize("stage", ["pretrain_encoder", "train_predictor"])
def test_interrupted_and_resumed_equals_undisturbed(stage, world, tmp_path):
    if stage == "pretrain_encoder":
        options, artefact = f"--videos {world}/train {SMALL_ENCODER} --steps 300 --log-every 10", "encoder"
    else:
        caches = f"--train-cache {world}/cache/train --validation-cache {world}/cache/val"
        options, artefact = f"{caches} {SMALL_PREDICTOR} --steps 300 --log-every 10", "predictor"
    succeed(stage, f"{options} --output-dir {tmp_path}/undisturbed")

    interrupted = tmp_path / "interrupted"
    process = subprocess.Popen(
        command(stage, f"{options} --output-dir {interrupted}"), env=ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    # The progress bar says when training is under way.
    assert process.stderr is not None
    shown = ""
    while not re.search(r"\| [1-9]\d*/300", shown):
        shown += process.stderr.read(20)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate()
    assert process.returncode == 128 + signal.SIGINT, rest
    assert "add --resume" in rest
    saved = sorted(path.name for path in (interrupted / "training_state").iterdir())
    assert saved[0] == "step_00000000"
    assert 0 < int(saved[1].removeprefix("step_")) < 300
    assert "unfinished run: add --resume" in fail(stage, f"{options} --output-dir {interrupted}")
    succeed(stage, f"{options} --output-dir {interrupted} --resume")

    ours, theirs = (
        load_file(tmp_path / run / artefact / "model.safetensors") for run in ("interrupted", "undisturbed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_collapse_is_announced_and_a_healthy_run_is_not(world, tmp_path):
    options = f"--videos {world}/train --steps 200 --log-every 50 {SMALL_ENCODER}"
    process = run("pretrain_encoder", f"{options} --output-dir {tmp_path}/none --objective.variance-weight 0")
    assert "COLLAPSE at step" in process.stderr + process.stdout
    metrics = json.loads((tmp_path / "none" / "metrics.json").read_text())
    assert metrics["collapsed"]
    assert metrics["first_collapse_step"] <= 200
    process = run("pretrain_encoder", f"{options} --output-dir {tmp_path}/healthy")
    assert "COLLAPSE" not in process.stderr + process.stdout
    assert json.loads((tmp_path / "healthy" / "metrics.json").read_text())["first_collapse_step"] is None


def test_mistakes_end_in_one_clear_line_and_leave_nothing(world, tmp_path):
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    train = f"--videos {world}/train --output-dir {out}"
    assert "no such file or folder" in fail("pretrain_encoder", f"--videos {tmp_path}/nowhere --output-dir {out}")
    assert "no videos in this folder" in fail("pretrain_encoder", f"--videos {empty} --output-dir {out}")
    assert "not a readable video" in fail("pretrain_encoder", f"--videos {world}/train/notes.mp4 --output-dir {out}")
    assert "perhaps you meant resnet18" in fail("pretrain_encoder", f"{train} --encoder.backbone resnet-18")
    assert "--fps is -1" in fail("pretrain_encoder", f"{train} --fps -1")
    assert "--log-every is 0" in fail("pretrain_encoder", f"{train} --log-every 0")
    assert "--batch-size 4096" in fail("pretrain_encoder", f"{train} {SMALL_ENCODER} --batch-size 4096")
    shutil.rmtree(out)  # the videos had to be decoded to know that they are too few
    assert "there is no encoder here" in fail("cache_embeddings", f"--videos {world}/train --encoder {empty}")
    assert "is not an embedding cache" in fail("train_predictor", f"--train-cache {empty} --output-dir {out}")
    caches = f"--train-cache {world}/cache/train --validation-cache {world}/cache/val --output-dir {out}"
    assert "the longest unbroken clip has 24" in fail("train_predictor", f"{caches} --predictor.context 30")
    evaluate = f"--predictor {world}/predictor/predictor --output-dir {out}"
    assert "lower the context or the horizon" in fail(
        "evaluate_rollout", f"{evaluate} --cache {world}/cache/test --horizon 40"
    )
    assert "there is no column 'speed'" in fail(
        "evaluate_rollout",
        f"{evaluate} --cache {world}/cache/test --horizon 5 --probe-cache {world}/cache/train --probe-columns speed",
    )
    assert not out.exists()
    assert "finished run: add --overwrite" in fail(
        "train_predictor", f"{caches.replace(str(out), f'{world}/predictor')} --steps 12 {SMALL_PREDICTOR}"
    )


def test_another_encoder_is_noticed_everywhere(world, tmp_path):
    succeed("pretrain_encoder", f"--videos {world}/train --output-dir {tmp_path} --steps 1 --seed 5 {SMALL_ENCODER}")
    cache = f"--videos {world}/test --encoder {tmp_path}/encoder --fps 8"
    assert "holds embeddings with encoder_fingerprint" in fail(
        "cache_embeddings", f"{cache} --output-dir {world}/cache/test"
    )
    succeed("cache_embeddings", f"{cache} --output-dir {tmp_path}/cache")
    assert "belongs to encoder" in fail(
        "evaluate_rollout",
        f"--cache {tmp_path}/cache --predictor {world}/predictor/predictor --output-dir {tmp_path}/e",
    )
    assert "was trained on embeddings" in fail(
        "score_surprise",
        f"--videos {world}/test --encoder {tmp_path}/encoder --predictor {world}/predictor/predictor "
        f"--output-dir {tmp_path}/s",
    )
    assert "belongs to encoder" in fail(
        "train_predictor",
        f"--train-cache {world}/cache/train --validation-cache {tmp_path}/cache --output-dir {tmp_path}/p",
    )


def test_a_video_shorter_than_the_context_is_named(world, tmp_path):
    write_ball_clip(tmp_path, 0, BallWorld(size=32, radius=3, frames=3, fps=8), seed=0)
    line = fail(
        "score_surprise",
        f"--videos {tmp_path}/clip_00000.mp4 --encoder {world}/encoder/encoder "
        f"--predictor {world}/predictor/predictor --output-dir {tmp_path}/out",
    )
    assert "clip_00000.mp4" in line
    assert "no unbroken stretch of 4 frames" in line
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["videos.jsonl"]


def explained(options: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each option of a stage and what stands below it in the code, nested options too."""
    statements = ast.parse(inspect.getsource(options)).body[0].body
    below = {
        one.target.id: ast.literal_eval(following.value)
        for one, following in pairwise(statements)
        if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr)
    }
    for name, kind in get_type_hints(options).items():
        if is_dataclass(kind):
            yield from explained(kind, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}".replace("_", "-"), below.get(name, "")


@pytest.mark.parametrize("stage", STAGES)
def test_help_explains_every_option(stage, monkeypatch, capsys):
    module = importlib.import_module(f"pipelines.{stage}")
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", "--help"])
    with pytest.raises(SystemExit):
        parse_options(module.Options, module.__doc__)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"pipelines/{stage}.py" in shown
    for option, explanation in explained(module.Options):
        assert explanation, f"{option} has no docstring"
        assert f" {option} " in shown.replace(",", " ")
        assert " ".join(explanation.split()[:3]) in shown, f"{option} is not explained"


def test_the_command_line_answers_help():
    assert "--verify" in succeed("inspect_cache", "--help")


def test_a_typing_error_is_answered_with_the_right_name():
    result = run("pretrain_encoder", "--videos x --objective.variance-wieght 3")
    assert result.returncode != 0
    assert "--objective.variance-weight" in result.stderr + result.stdout


def test_a_killed_cache_goes_on_where_it_was(world, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for index in range(40):
        shutil.copy(world / "train" / f"clip_{index % 12:05d}.mp4", videos / f"{index}.mp4")
    options = f"--videos {videos} --encoder {world}/encoder/encoder --fps 8 --clips-per-shard 2"
    process = subprocess.Popen(
        command("cache_embeddings", f"{options} --output-dir {tmp_path}/cache"), env=ENVIRONMENT, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    manifests = tmp_path / "cache" / "shards"
    while len(list(manifests.glob("[!.]*.json"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    kept = len(list(manifests.glob("[!.]*.json")))
    shown = succeed("cache_embeddings", f"{options} --output-dir {tmp_path}/cache")
    assert f"{2 * kept} of 40 clips are in the cache already" in shown
    assert "40 clips" in shown.splitlines()[-2]


def test_a_manifest_and_folders_of_images_go_the_same_way(world, tmp_path):
    """Indexed once, images and videos together, through every stage that reads videos."""
    for index, path in enumerate(sorted((world / "train").glob("clip_*.mp4"))[:4]):
        if index < 2:
            shutil.copy(path, tmp_path / path.name)
            continue
        (tmp_path / path.stem).mkdir()
        for number, (frame, _) in enumerate(read_frames(path, (WORLD.size, WORLD.size))):
            Image.fromarray(frame.transpose(1, 2, 0)).save(tmp_path / path.stem / f"{number:06}.png")
        if index == 3:
            shutil.make_archive(str(tmp_path / path.stem), "zip", tmp_path / path.stem)
            shutil.rmtree(tmp_path / path.stem)
    (tmp_path / "notes.mp4").write_text("this is no video")
    indexed = succeed("index_videos", f"--videos {tmp_path} --manifest {tmp_path}/all.jsonl --image-fps 8")
    assert "4 videos" in indexed
    assert "refused 1" in indexed
    assert "notes.mp4" in indexed
    succeed(
        "pretrain_encoder",
        f"--videos {tmp_path}/all.jsonl --output-dir {tmp_path}/encoder --steps 2 --image-fps 8 --shuffle-memory 1MB "
        f"{SMALL_ENCODER}",
    )
    cached = succeed(
        "cache_embeddings",
        f"--videos {tmp_path}/all.jsonl --encoder {tmp_path}/encoder/encoder --fps 8 --output-dir {tmp_path}/cache "
        "--image-fps 8",
    )
    assert "4 clips" in cached
    assert "gone since" not in cached
    assert "read 4 videos, 0.2 minutes; refused 1" in cached
    cache = EmbeddingCache(tmp_path / "cache")
    assert [clip.frames for clip in cache.clips] == [WORLD.frames] * 4
    # Images are the very pixels of the videos, so their embeddings are too.
    succeed(
        "cache_embeddings",
        f"--videos {world}/train --encoder {tmp_path}/encoder/encoder --fps 8 --output-dir {tmp_path}/originals",
    )
    originals = EmbeddingCache(tmp_path / "originals")
    for clip, original in zip(cache.clips, originals.clips, strict=False):
        assert Path(clip.key.source).stem == Path(original.key.source).stem
        np.testing.assert_array_equal(cache.clip_embeddings(clip), originals.clip_embeddings(original))
    for stage, more in (("pretrain_encoder", SMALL_ENCODER), ("cache_embeddings", "--fps 8")):
        line = fail(stage, f"--videos {tmp_path}/all.jsonl --output-dir {tmp_path}/strict --strict {more}"
                    + f" --encoder {tmp_path}/encoder/encoder" * (stage == "cache_embeddings"))  # fmt: skip
        assert "notes.mp4: not a readable video" in line


def test_amounts_of_memory_are_understood_or_refused(world, tmp_path):
    for amount in ("2QB", "-1GB", "0", "much"):
        line = fail(
            "pretrain_encoder",
            f"--videos {world}/train --output-dir {tmp_path}/out --shuffle-memory={amount} {SMALL_ENCODER}",
        )
        assert f"--shuffle-memory is {amount}" in line


def test_sampled_futures_are_measured_against_a_gaussian(world, tmp_path):
    caches = f"--train-cache {world}/cache/train --validation-cache {world}/cache/val"
    options = f"{caches} --steps 20 --rollout-steps 2 {SMALL_PREDICTOR} {FAST} --predictor.latent-dimension 2"
    succeed("train_predictor", f"{options} --output-dir {tmp_path}/latent")
    judge = f"--cache {world}/cache/test --validation-cache {world}/cache/val --horizon 4 --samples 20 --resamples 50"
    latent = f"--predictor {tmp_path}/latent/predictor --output-dir {tmp_path}/samples"
    shown = succeed("evaluate_samples", f"{judge} {latent} --point-predictor {world}/predictor/predictor")
    assert "central 90 %" in shown
    result = json.loads((tmp_path / "samples" / "samples.json").read_text())
    for name in ("model", "gaussian"):
        assert [record["horizon"] for record in result[name]] == [1, 2, 3, 4]
        for record in result[name]:
            assert record["energy_score"] > 0
            assert 0 <= record["coverage_50%"] <= record["coverage_90%"] <= 1
    assert (tmp_path / "samples" / "samples.png").stat().st_size > 5000
    # It is a predictor like any other: rollouts are the mean of samples, and surprise is marginalised over them.
    evaluate = f"--cache {world}/cache/test --predictor {tmp_path}/latent/predictor --horizon 4"
    succeed("evaluate_rollout", f"{evaluate} --output-dir {tmp_path}/evaluation")
    predictor, windows = on_test_windows(tmp_path / "latent" / "predictor", world, 4)
    samples = draw(predictor, windows[:, :3], 4, EXPECTED_OF, torch.Generator().manual_seed(0))
    expected = shrink(samples.mean(dim=0), windows[:, 2], predictor.shrinkage)
    assert_reported(tmp_path / "evaluation", expected, windows)
    surprise = (
        f"--videos {world}/test/clip_00000.mp4 --encoder {world}/encoder/encoder --output-dir {tmp_path}/surprise"
    )
    succeed("score_surprise", f"{surprise} --predictor {tmp_path}/latent/predictor")
    with (tmp_path / "surprise" / "surprise.csv").open() as file:
        found = [float(row["energy"]) for row in csv.DictReader(file)]
    predictor, windows = on_test_windows(tmp_path / "latent" / "predictor", world, 1)
    energies = energy(predictor, windows[: len(found), :3], windows[: len(found), 3:])[:, 0]
    assert np.allclose(found, energies, rtol=0.02)  # those of the video, the first in the cache

    plain = f"--predictor {world}/predictor/predictor --output-dir {tmp_path}/plain"
    assert "knows one future only: train one with" in fail("evaluate_samples", f"{judge} {plain}")
    assert "--samples is 18: a central interval" in fail(
        "evaluate_samples", f"{judge} {latent} --samples 18 --overwrite"
    )


def test_a_future_at_irregular_times_is_learned_where_clips_are_long_enough(world, tmp_path):
    caches = f"--train-cache {world}/cache/train --validation-cache {world}/cache/val"
    options = f"{caches} --steps 4 --rollout-steps 4 {SMALL_PREDICTOR} --output-dir {tmp_path}/predictor"
    succeed("train_predictor", f"{options} --longest-gap 3")
    assert "a window takes 31 embeddings" in fail("train_predictor", f"{options} --longest-gap 7 --overwrite")


def test_a_stage_within_another_runs_from_the_root_and_its_failure_is_one_line(tmp_path, monkeypatch, capfd):
    script = tmp_path / "stage.py"
    script.write_text("import os, sys\nprint(os.getcwd(), *sys.argv[1:])\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.chdir(tmp_path)
    run_python(script, 0, Path("videos"))
    assert capfd.readouterr().out.split() == [str(ROOT), "0", str(tmp_path / "videos")]
    with pytest.raises(UserError, match=r"stage\.py stopped as it says above \(exit code 3\): run this again to go on"):
        run_python(script, 3)


def test_a_stage_within_another_saves_on_ctrl_c_before_the_outer_ends(tmp_path):
    inner, outer = tmp_path / "inner.py", tmp_path / "outer.py"
    # What a shell runs in the background does not hear Ctrl-C, nor do the tests in it: these two do.
    hear = "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    inner.write_text(
        f"{hear}from pathlib import Path\nfolder = Path(sys.argv[1])\n"
        # In short naps: a signal that comes just before a long one would not wake it.
        "try:\n    (folder / 'started').touch()\n    for nap in range(1200):\n        time.sleep(0.05)\n"
        "except KeyboardInterrupt:\n    time.sleep(1)\n    (folder / 'saved').touch()\n    sys.exit(130)\n"
    )
    outer.write_text(
        f"{hear}from pathlib import Path\nfrom pipelines.stage import run_python\n"
        "run_python(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(outer), str(inner), str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (tmp_path / "started").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert (tmp_path / "saved").exists()
