"""`Run`: a trainer's order, whatever disturbs it. Nothing is lost, and every bit is as undisturbed."""

import gc
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import time
from itertools import pairwise

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import nn

from data.account import Account
from pipelines.run import devices, run
from pipelines.run.checkpoints import find_fault
from pipelines.run.command import Finished, Interrupted, UserError, explain, run_command
from pipelines.run.devices import cores_of_this_process, start_accelerator
from pipelines.run.files import differences, to_json
from pipelines.run.run import Run, decayed_groups, lr_at, step_generator
from pipelines.run.training import OptimizerOptions
from tests import toy_trainer

FORKS = multiprocessing.get_context("forkserver")
TIMES = {"seconds", "samples_per_second", "data_wait_fraction"}
"""What is measured with a clock, and differs between any two runs."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As at the start of a process; accelerate keeps its state for as long as that lives."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in before.items():
        signal.signal(number, handler)


def train(path, disturbed=None, **options):
    """A run of the toy in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    defaults = {"output_dir": path, "tracker": ("none",), "log_every": 4, "checkpoint_every": 5}
    with pytest.MonkeyPatch.context() as patch:
        if disturbed:
            patch.setenv("TOY_DISTURBED", disturbed)
        try:
            toy_trainer.main(toy_trainer.Options(**(defaults | options)))
        except BaseException as error:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.default_int_handler)
            raise error.with_traceback(None) from None  # which would keep the run, and its lock, alive
        finally:
            gc.collect()
    return path


def states(path):
    return sorted(int(state.stem.removeprefix("step_")) for state in (path / "training_state").glob("step_*.pt"))


def logged(path):
    return [json.loads(row) for row in (path / "curve.jsonl").read_text().splitlines()]


def left(path):
    """What a run has left: weights, state, curve and metrics."""
    newest = max((path / "training_state").glob("step_*.pt"))
    state = torch.load(newest, weights_only=True, map_location="cpu")
    weights = {str(file.relative_to(path)): load_file(file) for file in path.glob("*/model.safetensors")}
    records = {"curve": logged(path), "metrics": json.loads((path / "metrics.json").read_text())}
    return records | {"state": state, "weights": weights}


def differing(one, other):
    """Names of what two runs have left that is not equal to the bit, but for times."""
    one, other = (spelled_out(left(path)) for path in (one, other))
    return [name for name, _, _ in differences(one, other) if name.rpartition(".")[2] not in TIMES]


def spelled_out(value):
    """Lists as dictionaries, whose parts have names."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return to_json(value) if items is None else {str(name): spelled_out(item) for name, item in items}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run") / "whole")


def test_schedule_warms_up_over_a_tenth_and_ends_at_zero():
    rates = [lr_at(step, 100, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[100] == pytest.approx(0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert lr_at(55, 100, 2.0) == pytest.approx(1 + math.cos(math.pi / 2))
    assert lr_at(249, 50_000, 2.0) == 1.0  # after half of 500 steps
    assert lr_at(0, 3, 2.0) == 2.0  # too short for any


def test_step_randomness_depends_on_seed_step_and_rank_only():
    def draw(seed, step, rank):
        return torch.rand(4, generator=step_generator(seed, step, rank, torch.device("cpu"))).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]}) == 5


def test_biases_and_normalisation_do_not_decay_and_only_what_is_trained_is_moved():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    network[3].requires_grad_(False)
    decayed, undecayed = decayed_groups(network, 0.1)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.1, 0.0)
    assert {id(weight) for weight in decayed["params"]} == {id(network[0].weight), id(network[2].weight)}
    assert len(undecayed["params"]) == 3


def test_a_run_leaves_what_it_promises(undisturbed):
    path = undisturbed
    metrics = json.loads((path / "metrics.json").read_text())
    rows = logged(path)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert {"validation", "loss", "bias", "learning_rate", "gradient_norm", *(TIMES - {"seconds"})} < rows[0].keys()
    best = min(rows, key=lambda row: row["validation"])
    assert (metrics["best_step"], metrics["validation"]) == (best["step"], best["validation"])
    assert (metrics["steps"], metrics["undefined"], metrics["collapsed"]) == (12, None, False)
    assert states(path) == [10, 12]
    network = toy_trainer.make_network(toy_trainer.Options())
    network.load_state_dict(load_file(path / "sum" / "model.safetensors"))
    assert toy_trainer.judge(network)["validation"] == pytest.approx(best["validation"], rel=1e-6)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_stopped_and_resumed_equals_an_undisturbed_one(number, undisturbed, tmp_path):
    for step in (2, 6):
        with pytest.raises(Interrupted, match=f"stopped and saved after step {step + 1}: add --resume") as stopped:
            train(tmp_path, f"{number.name} {step} 0", resume=step > 2)
        assert explain(pickle.loads(pickle.dumps(stopped.value)))[0] == 128 + number
        assert states(tmp_path)[-1] == step + 1
    with (tmp_path / "curve.jsonl").open("a") as curve:
        curve.write('{"step": 8, "loss": 1}\n{"step": 12, "lo')  # logged before a kill, and torn by it
    train(tmp_path, resume=True)
    assert differing(tmp_path, undisturbed) == []


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    toy = Run(toy_trainer.Options(output_dir=tmp_path, tracker=("none",)), "toy_trainer", ())
    toy._receive(signal.SIGTERM, None)
    toy._receive(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        toy._receive(signal.SIGINT, None)


@pytest.mark.parametrize("cut", ["write_json", "save_artefact", "RunFolder.finish"])
def test_a_run_that_was_killed_while_it_left_its_results_leaves_them_resumed(cut, undisturbed, tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Run, "finish", with_account)
    with monkeypatch.context() as patch:
        patch.setattr(f"pipelines.run.run.{cut}", die)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path)
    assert not json.loads((tmp_path / "run.json").read_text())["finished"]
    train(tmp_path, resume=True)
    assert differing(tmp_path, undisturbed) == []
    assert json.loads((tmp_path / "account.json").read_text())["read_s"] == {"a.mp4": 2.0}
    with pytest.raises(Finished):
        train(tmp_path, resume=True)


finish = run.Run.finish


def with_account(self, metrics, artefacts, **others):
    finish(self, metrics, artefacts, account=Account(read_s={"a.mp4": 2.0}), **others)


def test_more_steps_go_on_from_the_last_one(tmp_path, undisturbed, capsys):
    train(tmp_path, steps=8)
    with pytest.raises(Finished, match="is finished: nothing to do"):
        train(tmp_path, steps=8, resume=True)
    train(tmp_path, steps=12, resume=True)
    said = capsys.readouterr().out
    assert "resuming with steps = 12 instead of 8: the learning rate follows the new schedule" in said
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[2]["learning_rate"] == lr_at(11, 12, 1e-2)
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 12


def test_a_run_that_lost_its_training_state_does_not_begin_again_by_itself(tmp_path):
    train(tmp_path, steps=8)
    kept = {name: (tmp_path / name).read_bytes() for name in ("run.json", "metrics.json", "curve.jsonl")}
    shutil.rmtree(tmp_path / "training_state")
    with pytest.raises(
        UserError, match=r"training_state holds no whole .* \(there is none\): restore it, or add --over"
    ):
        train(tmp_path, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept
    train(tmp_path, overwrite=True)


def test_a_run_that_was_killed_before_its_first_state_begins_again(undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "_save", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path)
    train(tmp_path, resume=True)
    assert differing(tmp_path, undisturbed) == []


def test_a_run_that_diverges_stops_names_its_data_and_goes_on_slower(tmp_path, capsys):
    line = r"not finite in step 7, with 6\.mp4: look at .* the newest checkpoint, of step 5, is from before"
    with pytest.raises(UserError, match=line):
        train(tmp_path, "nan 6 0")
    assert states(tmp_path) == [0, 5]
    train(tmp_path, resume=True, optimizer=OptimizerOptions(learning_rate=1e-3))
    assert "resuming with optimizer.learning_rate = 0.001 instead of 0.01" in capsys.readouterr().out


def test_collapse_is_said_once_and_not_before_anything_could_spread_out(tmp_path, capsys):
    train(tmp_path, steps=60, log_every=20, data="collapsing")
    assert capsys.readouterr().out.count("COLLAPSE") == 1
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["first_collapse_step"], metrics["collapse_alarms"]) == (60, ["no spread"])


def test_curves_are_means_over_an_entrys_steps(tmp_path):
    each, fours = (logged(train(tmp_path / str(every), log_every=every)) for every in (1, 4))
    for index, row in enumerate(fours):
        losses = [one["loss"] for one in each[4 * index : 4 * index + 4]]
        assert row["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


def test_rates_are_those_of_training_and_not_of_validation(tmp_path, monkeypatch):
    judge = toy_trainer.judge
    monkeypatch.setattr(toy_trainer, "judge", lambda network: time.sleep(0.5) or judge(network))
    train(tmp_path, steps=3, log_every=1)
    assert (
        max(row["samples_per_second"] for row in logged(tmp_path)) > 20
    )  # with the half seconds, 4 samples a step would be at most 8 a second


def test_states_are_saved_by_minutes_too(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    train(tmp_path, checkpoint_every=1000, steps=7)
    assert states(tmp_path) == [6, 7]


def test_a_tracker_goes_on_where_it_was_and_must_exist(tmp_path):
    with pytest.raises(UserError, match=r"--tracker tensorbord is not installed or does not exist: there are"):
        train(tmp_path, tracker=("tensorbord",))
    with pytest.raises(Interrupted):
        train(tmp_path, "SIGTERM 3 0", tracker=("tensorboard",))
    train(tmp_path, tracker=("tensorboard",), resume=True)
    assert len(list((tmp_path / "logs" / "toy_trainer").glob("events.out.tfevents.*"))) == 2


@pytest.mark.parametrize(("processes", "cores"), [("1", 6), ("4", 1), ("8", 1), ("2", 3)])
def test_cores_are_those_granted_shared_with_other_processes(processes, cores, monkeypatch):
    monkeypatch.setattr(devices.joblib, "cpu_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert cores_of_this_process() == cores


@pytest.mark.parametrize(
    ("chosen", "launched", "expected"),
    [(None, False, 6), (None, True, 6), ("1", True, 6), ("1", False, None), ("2", True, None), ("2", False, None)],
)
def test_one_process_computes_on_all_cores_unless_told_otherwise(chosen, launched, expected, monkeypatch):
    for name, value in (("OMP_NUM_THREADS", chosen), ("ACCELERATE_MIXED_PRECISION", "no" if launched else None)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    threads = []
    monkeypatch.setattr(devices.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(devices.joblib, "cpu_count", lambda: 6)
    start_accelerator()
    assert threads == ([] if expected is None else [expected])


def test_what_cannot_be_started_is_refused():
    with pytest.raises(UserError, match="fp16 needs a GPU: take --precision bf16 or fp32"):
        start_accelerator("fp16")


def in_fork(arguments, output, environment, limit, main):
    """In a new process: the toy, as its command line would run it."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    sys.argv = ["toy_trainer.py", *arguments.split()]
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run_command(main or toy_trainer.main, toy_trainer.Options)


class Process:
    """A process that runs the toy."""

    def __init__(self, arguments, output, environment=None, limit=0, main=None):
        self.output = output
        options = f"--tracker none --log-every 4 --checkpoint-every 5 {arguments}"
        given = (options, output, environment or {}, limit, main)
        self.process = FORKS.Process(target=in_fork, args=given, daemon=True)
        self.process.start()

    def ends(self, code=0, within=60):
        """What it has said."""
        self.process.join(within)
        assert self.process.exitcode == code, self.output.read_text()
        said = self.output.read_text()
        assert "Traceback" not in said
        assert said.count("error:") <= 1
        return said


def start_ranks(folder, arguments, environment=None):
    """Two ranks without a launcher that would clean up after them; arguments of each, or of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    both = [arguments] * 2 if isinstance(arguments, str) else arguments
    places = [rank_environment(rank, port) | (environment or {}) for rank in range(2)]
    return [Process(both[rank], folder / f"rank_{rank}.log", places[rank]) for rank in range(2)]


def rank_environment(rank, port):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", **address}


@pytest.mark.usefixtures("forks")
class TestProcesses:
    def test_two_ranks_that_were_stopped_killed_and_resumed_equal_undisturbed_ones(self, tmp_path):
        for rank in start_ranks(tmp_path / "a", f"--output-dir {tmp_path}/whole"):
            rank.ends()
        options = f"--output-dir {tmp_path}/run --resume"
        for rank in start_ranks(tmp_path / "b", options, {"TOY_DISTURBED": "SIGTERM 2 1"}):
            rank.ends(128 + signal.SIGTERM)
        killed, other = start_ranks(tmp_path / "c", options, {"TOY_DISTURBED": "SIGKILL 7 0"})
        killed.ends(-signal.SIGKILL)
        assert "another process has ended, as its own message says, or was never reached (" in other.ends(1)
        assert states(tmp_path / "run") == [3, 5]
        for rank in start_ranks(tmp_path / "d", options):
            rank.ends()
        assert differing(tmp_path / "run", tmp_path / "whole") == []
        own = Process(f"{options} --steps 20", tmp_path / "own.log")
        assert "step_00000012.pt was saved by 2 processes, and 1 are running: resume with 2" in own.ends(1)

    def test_ranks_with_other_options_end_at_once(self, tmp_path):
        options = f"--output-dir {tmp_path}/run"
        first, second = start_ranks(tmp_path, [options, f"{options} --noise 3"])
        assert "rank 1 has options.noise = 3.0, rank 0 has 0.1: start all of them with the same" in first.ends(1)
        assert "error" not in second.ends(1)
        assert not (tmp_path / "run").exists()

    def test_a_number_that_is_none_on_one_rank_ends_both(self, tmp_path):
        options = f"--output-dir {tmp_path}/run"
        for rank in start_ranks(tmp_path, options, {"TOY_DISTURBED": "nan 6 1"}):
            assert "not finite in step 7" in rank.ends(1)
        assert states(tmp_path / "run") == [0, 5]

    def test_a_rank_that_waits_for_others_in_vain_says_so(self, tmp_path):
        process = Process("", tmp_path / "log", rank_environment(0, 0), main=impatient)
        assert "or was never reached (" in process.ends(1)

    def test_killed_while_saving_or_training_nothing_is_lost(self, undisturbed, tmp_path):
        options = f"--output-dir {tmp_path}/run --resume"
        for step in (1, 6, 11):
            Process(options, tmp_path / "log", {"TOY_DISTURBED": f"SIGKILL {step} 0"}).ends(-signal.SIGKILL)
        (tmp_path / "run" / "training_state" / ".tmp.pt").write_bytes(b"half")
        Process(options, tmp_path / "log").ends()
        assert differing(tmp_path / "run", undisturbed) == []
        assert states(tmp_path / "run") == [10, 12]

    def test_a_full_disk_is_one_line_and_costs_nothing_that_was_whole(self, undisturbed, tmp_path):
        options = f"--output-dir {tmp_path}/run"
        Process(options, tmp_path / "a.log", {"TOY_DISTURBED": "SIGTERM 2 0"}).ends(128 + signal.SIGTERM)
        said = Process(f"{options} --resume", tmp_path / "b.log", limit=4000).ends(1)
        assert re.search(r"error: .*: what was complete before is kept", said)
        assert not find_fault(tmp_path / "run" / "training_state" / "step_00000003.pt")
        Process(f"{options} --resume", tmp_path / "c.log").ends()
        assert differing(tmp_path / "run", undisturbed) == []

    def test_a_second_live_resume_is_one_line(self, tmp_path):
        options = f"--output-dir {tmp_path}/run --resume"
        first = Process(options, tmp_path / "a.log", {"TOY_DISTURBED": "SIGSTOP 3 0"})
        while not states(tmp_path / "run"):
            time.sleep(0.05)
        assert "is in use by another process" in Process(options, tmp_path / "b.log").ends(1)
        os.kill(first.process.pid, signal.SIGCONT)
        first.ends()
        assert "is finished: nothing to do" in Process(options, tmp_path / "c.log").ends(0)

    def test_a_mistake_is_one_line_with_its_option(self, tmp_path):
        said = Process(f"--output-dir {tmp_path}/run --network.width 13", tmp_path / "log").ends(1)
        assert "error: --network.width is 13: take any other number" in said


def impatient(_):
    """A trainer that waits a second for the others."""
    devices.LONGEST_WAIT = devices.datetime.timedelta(seconds=1)
    start_accelerator()
