"""Still images in, an encoder trained on them, and how well it tells classes apart: the stages as they are run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data.views import ViewsConfig
from jepa.encoder import EncoderConfig, FrameEncoder
from pipelines.artefacts import load_expander
from pipelines.pretrain_encoder import Options as PretrainOptions
from pipelines.pretrain_encoder import main as pretrain_main
from pipelines.probe_encoder import Options, main, untrained
from pipelines.stage import UserError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory, write_images):
    folder = tmp_path_factory.mktemp("data") / "images"
    write_images(folder / "train", {"a": 30, "b": 30, "c": 30})
    write_images(folder / "test", {"a": 8, "b": 8, "c": 8}, seed=1)
    return folder


def pretrain(images, output, *more, **changes):
    options = {
        "images": images, "output-dir": output, "views.kind": "cifar", "steps": 100, "batch-size": 16, "log-every": 100,
        "encoder.image-size": "16 16", "encoder.embedding-dimension": 8, "expander.width": 16, "tracker": "none",
        "checkpoints.every-steps": 10,
    } | changes  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return [sys.executable, "pipelines/pretrain_encoder.py", *words, *more]


def call(command):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "encoder"
    finished = call(pretrain(images, folder))
    assert finished.returncode == 0, finished.stderr
    return folder, finished


def test_training_on_images_says_what_it_read_and_how_good_it_gets(run):
    folder, finished = run
    assert "90 images of 3 classes" in finished.stdout
    assert f"/images --encoder {folder}/encoder" in finished.stdout
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["images"] == 90
    assert metrics["refused_images"] == 0
    for name in ("embedding_knn", "expander_knn", "embedding_linear", "expander_linear"):
        assert 0 < metrics[f"{name}_accuracy"] <= 1
    assert not any("over time" in alarm for alarm in metrics["collapse_alarms"])
    assert load_expander(folder / "expander").output_dimension == 16


def test_killed_training_on_images_equals_undisturbed(images, run, tmp_path):
    folder = tmp_path / "encoder"
    process = subprocess.Popen(
        pretrain(images, folder), cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not any((folder / "training_state").glob("step_000000[1-5]0")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = call(pretrain(images, folder, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    for part in ("encoder", "expander"):
        weights = [(one / part / "model.safetensors").read_bytes() for one in (folder, run[0])]
        assert weights[0] == weights[1]
    metrics = [json.loads((one / "metrics.json").read_text()) for one in (folder, run[0])]
    for name in metrics[0].keys() - {"seconds", "frames_per_second"}:
        assert metrics[0][name] == metrics[1][name], name


@pytest.mark.parametrize(
    ("where", "changes", "said"),
    [
        ("", {"batch-size": 91}, "90 images are fewer than a batch of 91: lower --batch-size"),
        ("nowhere.zip", {}, "nowhere.zip: there is no folder of images and no zip file here"),
    ],
)
def test_mistakes_end_in_one_line(images, tmp_path, where, changes, said):
    finished = call(pretrain(images / where, tmp_path / "encoder", **changes))
    assert finished.returncode == 1
    assert said in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"images": Path("x")}, "--views.kind is neighbours, which still images do not have"),
        ({"images": Path("x"), "videos": (Path("y"),)}, "says what to train on: give one of them"),
        ({}, "says what to train on: give one of them"),
        ({"images": Path("x"), "views": ViewsConfig(kind="cifar"), "fps": 2.0}, "--fps says how videos are sampled"),
    ],
)
def test_options_that_do_not_go_together(options, said):
    with pytest.raises(UserError, match=said):
        pretrain_main(PretrainOptions(**options))


def probe(images, run, tmp_path, **changes):
    options = {"neighbours": (5,), "epochs": 2, "output_dir": tmp_path / "probes"}
    main(Options(images=images, encoder=run[0] / "encoder", **options | changes))
    return json.loads((tmp_path / "probes" / "probes.json").read_text())


def test_probes_of_a_trained_encoder(images, run, tmp_path, capsys):
    found = probe(images, run, tmp_path, epochs=20)  # one batch each
    assert (found["train_images"], found["test_images"], found["classes"]) == (90, 24, 3)
    assert set(found["accuracy"]) == {
        "embedding", "expander output", "untrained embedding", "pixels (principal components)"
    }  # fmt: skip
    for name, row in found["accuracy"].items():
        assert row["knn_5_top5"] == row["ridge_top5"] == 1
        assert ("linear_top1" in row) == (name in ("embedding", "expander output"))
        assert row["ridge_top1"] > 0.8  # the colours are plain
        assert row.get("linear_top1", 1) > 0.8
    assert "linear top1" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "probes" / "metrics.json").read_text())
    assert metrics["embedding_knn_5_top1"] == found["accuracy"]["embedding"]["knn_5_top1"]
    with pytest.raises(UserError, match="already holds a finished run"):
        probe(images, run, tmp_path)


def test_a_part_of_the_images(images, run, tmp_path):
    found = probe(images, run, tmp_path, fraction=0.5, epochs=0)
    assert (found["train_images"], found["test_images"]) == (45, 12)
    assert "linear_top1" not in found["accuracy"]["embedding"]


def test_more_neighbours_than_images_are_called_what_they_are(images, run, tmp_path):
    found = probe(images, run, tmp_path, neighbours=(20, 200, 300), epochs=0)
    assert [kind for kind in found["accuracy"]["embedding"] if kind.endswith("top1")] == [
        "knn_20_top1", "knn_90_top1", "ridge_top1"
    ]  # fmt: skip


def test_damaged_and_streamed_images_are_left_out_with_their_labels(images, run, tmp_path):
    damaged = tmp_path / "images"
    shutil.copytree(images, damaged)
    for index in range(10, 20):
        (damaged / "train" / "b" / f"{index:03d}.png").write_bytes(b"no image")
    (damaged / "test" / "c" / "000.png").write_bytes(b"no image")
    for memory in ("1GB", "1kB"):
        found = probe(damaged, run, tmp_path, memory=memory, overwrite=True)
        assert len(found["refused"]) == 11
        assert (found["train_images"], found["test_images"]) == (80, 23)
        for row in found["accuracy"].values():
            assert row["ridge_top1"] > 0.8
        assert (found["accuracy"]["embedding"]["ridge_top1"] * 23) % 1 == pytest.approx(0, abs=1e-9)  # of 23 images


def test_an_untrained_encoder_keeps_a_frozen_backbone():
    for frozen in (True, False):
        encoder = FrameEncoder(EncoderConfig(image_size=(16, 16), embedding_dimension=4, frozen_backbone=frozen))
        new = untrained(encoder)
        assert not torch.equal(new.head.weight, encoder.head.weight)
        same = [
            torch.equal(one, other)
            for one, other in zip(new.backbone.parameters(), encoder.backbone.parameters(), strict=True)
        ]
        assert all(same) if frozen else not all(same)


def test_images_that_cannot_be_probed(images, run, tmp_path, write_images):
    with pytest.raises(UserError, match="has no parts of the names train and test"):
        probe(images / "train", run, tmp_path)
    write_images(tmp_path / "other", {"a": 2, "z": 2})
    with pytest.raises(UserError, match="has the classes a, z, not those of"):
        probe(images, run, tmp_path, test_images=tmp_path / "other")
    with pytest.raises(UserError, match="not in folders named after classes"):
        probe(images / "train" / "a", run, tmp_path, test_images=images / "test")
    with pytest.raises(UserError, match="--fraction is 0"):
        probe(images, run, tmp_path, fraction=0)
