"""The commands one after the other, as a person calls them, and what slips they withstand together."""

import dataclasses
import gc
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from data.cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from jepa.errors import ConfigurationError
from pipelines.cli import COMMANDS
from pipelines.run.command import UserError, explain
from pipelines.run.options import parse
from tests.test_folder import everything

ROOT = Path(__file__).parent.parent
ENCODER = "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.widths 16 --batch-size 16"
PREDICTOR = "--predictor.width 16 --predictor.context 3 --batch-size 8 --rollout-steps 2 --validation-horizon 5"


def call(name, arguments):
    """A command in this process; the help of its options if they are wrong."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(f"pipelines.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
        module.main(parse(module.Options, name))


def refusal(name, arguments):
    """The one line that a mistake ends in."""
    status, line = 0, ""
    try:
        call(name, arguments)
    except Exception as error:
        status, line = explain(error)
    gc.collect()  # the lock of a run that has failed in this process
    line = line.removeprefix("\n")  # after a progress bar, which may be that of another test
    assert status == 1
    assert line.startswith("error: ")
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Videos, encoder, caches, predictor, evaluation and surprise, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("world")
    for seed, (split, clips) in enumerate({"train": 8, "val": 4, "test": 4}.items()):
        write_ball_videos(folder / split, clips, BallWorld(size=32, radius=3, frames=24, fps=8), seed=seed)
    (folder / "train" / "notes.mp4").write_text("this is no video")
    run = f"--tracker none --log-every 2 --steps 4 --output-dir {folder}"
    call("pretrain_encoder", f"--videos {folder}/train {ENCODER} {run}/encoder")
    for split in ("train", "val", "test"):
        made = f"--videos {folder}/{split} --encoder {folder}/encoder/encoder --fps 8"
        call("cache_embeddings", f"{made} --output-dir {folder}/cache/{split}")
    caches = f"--train-cache {folder}/cache/train --validation-cache {folder}/cache/val"
    call("train_predictor", f"{caches} {PREDICTOR} {run}/predictor")
    judge = f"--predictor {folder}/predictor --output-dir {folder}"
    call("evaluate_rollout", f"--cache {folder}/cache/test --horizon 4 {judge}/evaluation")
    call("score_surprise", f"--videos {folder}/test --encoder {folder}/encoder/encoder {judge}/surprise")
    return folder


def test_the_journey_leaves_what_it_promises(world):
    for artefact in ("encoder/encoder", "predictor/predictor", "predictor/calibration"):
        assert {"model.safetensors", "config.json"} <= everything(world / artefact)
    for run in ("encoder", "predictor", "evaluation", "surprise"):
        assert json.loads((world / run / "run.json").read_text())["finished"]
        json.loads((world / run / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert json.loads((world / "encoder" / "metrics.json").read_text())["refused_videos"] == 1
    assert "notes.mp4" in (world / "encoder" / "account.json").read_text()
    assert len((world / "surprise" / "peaks.csv").read_text().splitlines()) > 4  # a head and the peaks of each video


def test_a_judgement_on_what_the_model_knows_is_warned_of_and_recorded(world, tmp_path, capsys):
    for split, who in (("train", "predictor"), ("val", "calibration")):
        cache, judged = world / "cache" / split, tmp_path / split
        call("evaluate_rollout", f"--cache {cache} --horizon 9 --predictor {world}/predictor --output-dir {judged}")
        said = capsys.readouterr().err
        assert f"warning: the {who} has learned from {cache}" in said
        assert "warning: the calibration was fitted up to 5 ticks ahead" in said
    inputs = json.loads((tmp_path / "val" / "run.json").read_text())["inputs"]
    assert inputs["clips"] == inputs["calibration"]["fitted_on"]


@pytest.mark.parametrize("what", ["moved", "renamed", "deleted", "swapped for another", "added"])
def test_a_run_goes_on_with_the_same_videos_wherever_they_lie_and_with_no_others(world, tmp_path, what, capsys):
    videos = tmp_path / "elsewhere"
    shutil.copytree(world / "train", videos)
    shutil.copytree(world / "encoder", tmp_path / "encoder")
    shutil.copytree(world / "cache" / "train", tmp_path / "train")
    shutil.copytree(world / "predictor", tmp_path / "predictor")
    (one, *_), other = sorted(videos.glob("clip*.mp4")), world / "test" / "clip_00000.mp4"
    match what:
        case "renamed":
            one.rename(videos / "z.mp4")
        case "deleted":
            one.unlink()
        case "swapped for another":
            shutil.copy(other, one)
        case "added":
            shutil.copy(other, videos / "new.mp4")
    embed = f"--videos {videos} --encoder {world}/encoder/encoder --fps 8 --output-dir {tmp_path}/train"
    call("cache_embeddings", embed)
    clips = EmbeddingCache(tmp_path / "train").clips
    there = 7 if what == "swapped for another" else 8
    assert f"{there if what != 'deleted' else 7} of" in capsys.readouterr().out
    again = "--tracker none --log-every 2 --steps 4 --resume --output-dir"
    pretrain = f"--videos {videos} {ENCODER} {again} {tmp_path}/encoder"
    train = (
        f"--train-cache {tmp_path}/train --validation-cache {world}/cache/val {PREDICTOR} {again} {tmp_path}/predictor"
    )
    if what in ("moved", "renamed"):
        assert all(Path(clip.key.source).parent == videos for clip in clips)
        assert len(clips) == 8
        for name, arguments in (("pretrain_encoder", pretrain), ("train_predictor", train)):
            call(name, arguments.replace("--steps 4", "--steps 5"))
        return
    for name, arguments, inputs in (("pretrain_encoder", pretrain, "videos"), ("train_predictor", train, "train")):
        if what != "deleted" or inputs == "videos":
            line = refusal(name, arguments.replace("--steps 4", "--steps 5"))
            names = {
                "deleted": f"missing: {world / 'train' / one.name}",
                "swapped for another": f"(missing: {world / 'train' / one.name}; )?new: {one}",
                "added": f"new: {videos}/new.mp4",
            }[what]
            assert re.search(rf"began with {inputs} = 8, .* now [789], \w+ \w+; {names}: resume with the same", line)


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        (
            "pretrain_encoder",
            "--videos {world}/train --output-dir {world}",
            "holds encoder, evaluation, predictor, and no",
        ),
        ("train_predictor", "{caches} --output-dir {world}/encoder --overwrite", "holds a run of pretrain_encoder"),
        ("evaluate_rollout", "{judge} --output-dir {world}/predictor", "holds a run of train_predictor: take another"),
        ("score_surprise", "{judge} --output-dir {world}/test", "clip_00001.csv, and no run"),
        ("train_predictor", "{caches} --output-dir {world}/predictor --steps 4 {predictor}", "a finished run: add"),
        ("pretrain_encoder", "--videos {world}/nowhere --output-dir {world}/new", "no such file or folder"),
        (
            "cache_embeddings",
            "--videos {world}/train --encoder {world}/predictor/predictor --output-dir {world}/new",
            "this is no encoder",
        ),
        ("cache_embeddings", "--videos {world}/train --encoder {world}/val --output-dir {world}/new", "{world}/val"),
        ("train_predictor", "--train-cache {world}/val --output-dir {world}/new", "{world}/val"),
        ("evaluate_rollout", "--predictor {world}/encoder --output-dir {world}/new", "there is no predictor here"),
    ],
)
def test_slips_and_mistakes_are_one_line_and_harm_nothing(name, arguments, complaint, world):
    caches = f"--train-cache {world}/cache/train --validation-cache {world}/cache/val"
    places = {"world": world, "caches": caches, "judge": f"--predictor {world}/predictor", "predictor": PREDICTOR}
    before = {path: (world / path).stat().st_mtime_ns for path in everything(world)}
    assert complaint.format(**places) in refusal(name, arguments.format(**places))
    shutil.rmtree(world / "new", ignore_errors=True)
    assert {path: (world / path).stat().st_mtime_ns for path in everything(world)} == before


def test_a_run_does_not_go_on_with_caches_of_another_encoder(world, tmp_path):
    other = f"--output-dir {tmp_path}/other --steps 1 --seed 5 --tracker none"
    call("pretrain_encoder", f"--videos {world}/train {other} {ENCODER}")
    for split in ("train", "val"):
        made = f"--videos {world}/{split} --encoder {tmp_path}/other/encoder --fps 8"
        call("cache_embeddings", f"{made} --output-dir {tmp_path}/cache/{split}")
    shutil.copytree(world / "predictor", tmp_path / "predictor")
    mark = json.loads((tmp_path / "predictor" / "run.json").read_text()) | {"finished": False}
    mark["options"] |= {"train_cache": f"{tmp_path}/cache/train", "validation_cache": f"{tmp_path}/cache/val"}
    (tmp_path / "predictor" / "run.json").write_text(json.dumps(mark))
    caches = f"--train-cache {tmp_path}/cache/train --validation-cache {tmp_path}/cache/val"
    again = f"{caches} {PREDICTOR} --steps 4 --log-every 2 --tracker none --output-dir {tmp_path}/predictor --resume"
    line = refusal("train_predictor", again)
    assert re.search(r"began with provenance\.encoder\w* = .*: resume with the same data", line)


def explained(options_type, prefix=""):
    """Each option of a command as it is declared, in its first kind where there are several."""
    for field in dataclasses.fields(options_type):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(default):
            yield from explained(type(default), f"{prefix}{field.name}.")
        elif default is not None or "Config" not in str(field.type):
            yield f"--{prefix}{field.name}".replace("_", "-")


@pytest.mark.parametrize("name", COMMANDS.values())
def test_help_explains_every_option(name, monkeypatch, capsys):
    module = importlib.import_module(f"pipelines.{name}")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        parse(module.Options, name, description=module.__doc__)
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown
    lines = re.sub(r"[│╭╮╰╯─]", " ", shown)
    for option in explained(module.Options):
        if option in ("--paths", "--source", "--videos", "--what", "--cache") and "ositional" in shown:  # positional
            continue
        found = re.search(rf"{re.escape(option)}[ ,\n][^\n]*\n?\s*(.*?)\(", lines, flags=re.DOTALL)
        assert found, option
        assert len(" ".join(found[0].split())) > len(option) + 15, f"{option} is not explained"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a is 1"), "a is 1"),
        (ConfigurationError("width", "is 0"), "--network.width is 0"),
        (OSError(28, "No space left on device", "a.json"), "a.json: No space left on device: what was complete before"),
        (OSError("h5py: No space left"), "writing: h5py: No space left: what was complete before is kept"),
        (MemoryError(), "out of memory (MemoryError()): lower how much is held at a time"),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory. Tried)"),
    ],
)
def test_the_line_of_each_kind_of_error(error, line, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["toy_trainer.py", "--network.width", "0"])
    status, said = explain(error)
    assert status == 1
    assert said.startswith(f"error: {line}")


def test_a_port_that_is_taken_is_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, said = explain(RuntimeError("The server socket has failed to listen. message: address already in use"))
    assert status == 1
    assert said.endswith("address already in use): what was complete before is kept")


FREED = """
import resource
import numpy as np
from pipelines.run import command

if {kept}:
    command._keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(10_000_000)
before = faults()
for _ in range(10):
    np.ones(10_000_000)
print(faults() - before)
"""


def test_freed_memory_is_used_again():
    """Each page that is taken anew is a fault: a tensor of 80 MB has 20,000 of them."""
    found = [
        int(subprocess.check_output([sys.executable, "-c", FREED.format(kept=kept)], text=True))
        for kept in (True, False)
    ]
    assert found[0] < 1000, found
