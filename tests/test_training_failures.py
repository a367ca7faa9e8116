"""Training when things go wrong: kills, stops, broken checkpoints. Nothing is lost, and every bit is as undisturbed.

The proof at length, with torchrun, is benchmarks/kill_training.py; here are its short form and the pieces one by one.
"""

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from benchmarks import kill_training
from benchmarks.kill_training import Blow, Life, Trial
from pipelines.checkpoints import COMPLETE, CheckpointConfig, Checkpoints, find_fault, seal
from pipelines.stage import Interrupted, UserError, write_json
from pipelines.training import Progress

KILL, TERM = signal.SIGKILL, signal.SIGTERM


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return kill_training.make_world(tmp_path_factory.mktemp("kill_training") / "world", clips=6, preload=True)


def test_killed_stopped_and_damaged_runs_equal_undisturbed_ones(world, tmp_path):
    """Side by side: both trainers on one process, and one of them on two, which nobody but themselves watches."""
    one = [Blow(KILL, "all", "saving", damaged=1), Blow(TERM, "all", "training"), Blow(KILL, "rank", "training")]
    two = [Blow(TERM, "rank", "training"), Blow(KILL, "rank", "training")]
    trials = [
        (Trial("pretrain_encoder", 1, "averaged", steps=60, preload=True), one),
        (Trial("train_predictor", 1, "averaged", steps=60, preload=True), one),
        (Trial("pretrain_encoder", 2, "plain", steps=40, preload=True), two),
    ]

    def prove(trial, blows):
        trial.prove(world, tmp_path / str(trial), blows, np.random.default_rng(0), tmp_path / "differs")
        return trial.faults

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(lambda both: prove(*both), trials)) == [[], [], []]
    for trial, blows in trials:
        assert sum(count for name, count in trial.counts.items() if name.startswith("SIG")) == len(blows)
        assert trial.counts["resumed after step 0"] > 0  # SIGTERM has saved


def checkpoints(folder, **options):
    """A network that has been trained for a moment, and what saves it."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    network, optimizer = accelerator.prepare(network, torch.optim.AdamW(network.parameters()))
    network(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    config = CheckpointConfig(**{"every_steps": 10, "every_minutes": 60.0, "keep": 2} | options)
    return Checkpoints(accelerator, folder, config, Progress(place={"batch": 0}), lambda: None, lambda: None), network


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def spoil(checkpoint):
    os.truncate(checkpoint / "model.safetensors", 10)


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "step_00000001"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(100)))
    (folder / "inner" / "state.bin").write_bytes(b"state")
    (folder / "empty").touch()
    seal(folder, {"step": 1, "processes": 1})
    return folder


def test_a_sealed_folder_has_no_fault(sealed):
    assert find_fault(sealed) == ""
    assert set(json.loads((sealed / COMPLETE).read_text())["files"]) == {"weights.bin", "inner/state.bin", "empty"}
    (sealed / "notes.txt").write_text("mine")  # what was not there when it was sealed is nobody's business
    assert find_fault(sealed) == ""


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: os.truncate(folder / "weights.bin", 99), "weights.bin has changed"),
        (lambda folder: os.truncate(folder / "inner" / "state.bin", 0), "inner/state.bin has changed"),
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda folder: (folder / "weights.bin").write_bytes(bytes([1, *range(1, 100)])), "weights.bin has changed"),
        (lambda folder: (folder / COMPLETE).unlink(), "complete.json is missing"),
        (lambda folder: os.truncate(folder / COMPLETE, 40), "complete.json cannot be read"),
        (lambda folder: os.truncate(folder / COMPLETE, 0), "complete.json cannot be read"),
        (lambda folder: (folder / COMPLETE).write_text("[]"), "complete.json cannot be read"),
        (lambda folder: (folder / COMPLETE).write_text("{}"), "complete.json cannot be read"),
        (lambda folder: (folder / COMPLETE).write_bytes(b"\xff\xfe"), "complete.json cannot be read"),
        (shutil.rmtree, "complete.json is missing"),
    ],
)
def test_every_fault_is_found_and_named(sealed, harm, fault):
    harm(sealed)
    assert fault in find_fault(sealed)
    assert "\n" not in find_fault(sealed)


def test_a_broken_checkpoint_costs_one_line_and_the_way_from_an_older_one(tmp_path, capsys):
    saver, network = checkpoints(tmp_path, keep=3)
    weights = {}
    for step in (0, 10, 20):
        with torch.no_grad():
            network.weight += step
        weights[step] = network.weight.detach().clone()
        saver.progress.place = {"batch": step}
        saver.save(step)
    spoil(tmp_path / "step_00000020")
    resumed, network = checkpoints(tmp_path, keep=3)
    assert resumed.load_newest() == 10
    assert torch.equal(network.weight, weights[10])
    assert resumed.progress.place == {"batch": 10}
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"warning: {tmp_path}/step_00000020 is not complete (model.safetensors has changed" in warning
    for step in (0, 10):
        spoil(tmp_path / f"step_{step:08d}")
    assert checkpoints(tmp_path)[0].load_newest() is None
    assert capsys.readouterr().err.count("is not complete") == 3


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(tmp_path, keep):
    saver, _ = checkpoints(tmp_path, keep=keep)
    for step in (0, 5, 100, 20_000):
        saver.save(step)
    assert names(tmp_path) == [f"step_{step:08d}" for step in (0, 5, 100, 20_000)][-keep:]
    modified = (tmp_path / "step_00020000").stat().st_mtime_ns
    saver.save(20_000)
    assert (tmp_path / "step_00020000").stat().st_mtime_ns == modified  # that has been done


@pytest.mark.parametrize("keep", [1, 2])
def test_a_broken_checkpoint_takes_no_place_of_a_sound_one(tmp_path, keep):
    """It has a higher number than what is saved next."""
    saver, _ = checkpoints(tmp_path, keep=2)
    for step in (40, 50):
        saver.save(step)
        spoil(tmp_path / f"step_{step:08d}")
    resumed, _ = checkpoints(tmp_path, keep=keep)
    assert resumed.load_newest() is None
    for step in (0, 3, 45):
        resumed.save(step)
        assert find_fault(tmp_path / f"step_{step:08d}") == ""
    assert names(tmp_path) == ["step_00000003", "step_00000045"][-keep:]


def test_half_a_checkpoint_of_a_killed_run_is_no_obstacle_and_goes(tmp_path):
    for step in (7, 14):
        (tmp_path / f".tmp.step_{step:08d}").mkdir()
        (tmp_path / f".tmp.step_{step:08d}" / "model.safetensors").write_bytes(b"half")
        (tmp_path / f".tmp.step_{step:08d}" / "old.bin").write_bytes(b"of another life")
    saver, _ = checkpoints(tmp_path)
    assert saver.load_newest() is None
    saver.save(7)
    assert names(tmp_path) == ["step_00000007"]
    assert find_fault(tmp_path / "step_00000007") == ""
    assert not (tmp_path / "step_00000007" / "old.bin").exists()


def test_another_number_of_processes_is_refused(tmp_path):
    saver, _ = checkpoints(tmp_path)
    saver.save(5)
    recorded = json.loads((tmp_path / "step_00000005" / COMPLETE).read_text())
    write_json(tmp_path / "step_00000005" / COMPLETE, recorded | {"processes": 2})
    with pytest.raises(UserError, match=r"step_00000005 was saved by 2 processes, and 1 are running: resume with 2"):
        checkpoints(tmp_path)[0].load_newest()


def test_states_are_saved_by_steps_and_by_minutes(tmp_path):
    saver, _ = checkpoints(tmp_path, every_steps=3)
    for step in range(1, 8):
        saver.after_step(step)
    assert names(tmp_path) == ["step_00000003", "step_00000006"]
    by_minutes, _ = checkpoints(tmp_path / "minutes", every_steps=1000, every_minutes=0.2 / 60)
    by_minutes.after_step(1)
    assert not (tmp_path / "minutes").exists()
    time.sleep(0.2)
    by_minutes.after_step(2)
    by_minutes.after_step(3)  # the time begins anew
    assert names(tmp_path / "minutes") == ["step_00000002"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_step_under_way_and_saves_it(tmp_path, number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    saver, _ = checkpoints(tmp_path)
    try:
        saver.listen()
        saver.after_step(4)
        assert not list(tmp_path.iterdir())
        os.kill(os.getpid(), number)
        with pytest.raises(Interrupted, match=r"stopped and saved after step 5: add --resume") as stopped:
            saver.after_step(5)
        assert stopped.value.exit_code == 128 + number
        assert names(tmp_path) == ["step_00000005"]
        assert find_fault(tmp_path / "step_00000005") == ""
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)  # the second one stops at once
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_what_is_not_worth_a_checkpoint_leaves_none(tmp_path):
    saver, _ = checkpoints(tmp_path)
    saver.save(0)

    def settle():
        raise UserError("the loss is not finite")

    saver.settle = settle
    with pytest.raises(UserError, match="not finite"):
        saver.save(10)
    assert names(tmp_path) == ["step_00000000"]


def test_resuming_with_another_number_of_processes_ends_in_one_line(world, tmp_path):
    arguments = f"--steps 4 --checkpoints.every-steps 2 --tracker none --output-dir {tmp_path}/run"
    options = kill_training.OPTIONS["train_predictor"].format(world=world).split() + arguments.split()
    life = Life("train_predictor", options, 1, tmp_path / "one.txt", preload=True)
    assert life.exit_code() == 0, life.said()
    (tmp_path / "run" / "metrics.json").unlink()  # as if it had been killed just before its end
    life = Life("train_predictor", [*options, "--resume"], 2, tmp_path / "two.txt", preload=True)
    assert life.exit_code() == 1
    assert "Traceback" not in life.said()
    assert life.said().count("error:") == 1
    assert "step_00000004 was saved by 1 processes, and 2 are running: resume with 1" in life.said()
