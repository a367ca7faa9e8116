"""What can go wrong in a night ends in one line: in real processes, forked from one that has everything imported."""

import importlib
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator

from data.synthetic import BallWorld, write_ball_clip
from pipelines import compute, guards
from pipelines.checkpoints import find_fault
from pipelines.compute import MemoryEstimate, start_accelerator
from pipelines.guards import FiniteGuard, Heartbeat, memory_advice, require_agreement, summary
from pipelines.stage import UserError, _explain, run_stage

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
pytestmark = pytest.mark.usefixtures("forks")
SMALL = "--fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 --expander.width 16 --tracker none"
QUICK = {"SILENCE_S": 2.0, "BEAT_S": 0.2, "GRACE_S": 1.0}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(6):
        write_ball_clip(folder, index, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
    return folder


@dataclass(frozen=True)
class Nothing:
    """No options."""


def run_in_fork(stage, arguments, output, folder, environment, patches, memory_for_steps):
    """In the new process: a stage, as its command line would run it."""
    with open(output, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ.update(environment)
    for name, value in patches.items():
        setattr(compute if hasattr(compute, name) else guards, name, value)
    sys.argv = [str(ROOT / "pipelines" / f"{stage}.py"), *arguments.split()]
    if callable(stage):
        run_stage(lambda _: stage(), Nothing)
        return
    module = importlib.import_module(f"pipelines.{stage}")
    if memory_for_steps:
        memory_advice = module.memory_advice

        def limited(*arguments):
            if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
                limit = psutil.Process().memory_info().vms + memory_for_steps
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            return memory_advice(*arguments)

        module.memory_advice = limited
    run_stage(module.main, module.Options)


class Run:
    """A process that runs a stage."""

    def __init__(self, stage, arguments, output, folder=ROOT, environment=None, patches=None, memory_for_steps=0):
        self.output = Path(output)
        given = (stage, arguments, str(output), str(folder), environment or {}, patches or {}, memory_for_steps)
        self.process = FORKS.Process(target=run_in_fork, args=given, daemon=True)
        self.process.start()

    def said(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait_until(self, pattern):
        while not re.search(pattern, self.said()):
            assert self.process.is_alive(), self.said()
            time.sleep(0.02)

    def kill(self, number):
        os.kill(self.process.pid, number)

    def succeeds(self):
        self.process.join(60)
        assert self.process.exitcode == 0, self.said()
        return self.said()

    def fails(self, within=60):
        """The one line that it ends in."""
        self.process.join(within)
        assert self.process.exitcode == 1, self.said()
        assert "Traceback" not in self.said()
        assert "frame #" not in self.said()
        lines = [line for line in self.said().splitlines() if "error:" in line]
        assert len(lines) == 1, self.said()
        return lines[0]


def start_ranks(stage, arguments, folder, patches=None, places=None):
    """Two ranks without a launcher that would clean up after them; arguments of each, or of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [arguments] * 2 if isinstance(arguments, str) else arguments
    return [
        Run(
            stage, both[rank], folder / f"rank_{rank}.log", places[rank] if places else ROOT,
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(port)}, patches,
        )
        for rank in range(2)
    ]  # fmt: skip


CACHED = "--batch-size 16 --predictor.width 16 --predictor.context 3 --validation-horizon 5 --tracker none"


@pytest.mark.parametrize("stage", ["pretrain_encoder", "train_predictor"])
def test_a_run_that_diverges_stops_and_goes_on_slower(stage, videos, tmp_path, write_cache, make_clip):
    if stage == "pretrain_encoder":
        options = f"--videos {videos} --batch-size 16 {SMALL}"
    else:
        clips = [make_clip(f"{index}.mp4", 24, seed=index) for index in range(6)]
        train, validation = write_cache(tmp_path / "train", clips[:4]), write_cache(tmp_path / "val", clips[4:])
        options = f"--train-cache {train} --validation-cache {validation} {CACHED}"
    options += f" --output-dir {tmp_path}/run --steps 6 --optimizer.warmup-steps 0"
    line = Run(stage, f"{options} --optimizer.learning-rate 1e30", tmp_path / "first.log").fails()
    assert "not finite in step 2, with frames of" in line
    assert ".mp4" in line
    (kept,) = (tmp_path / "run" / "training_state").iterdir()
    assert f"from before: {kept}." in line
    assert not find_fault(kept)
    assert not (tmp_path / "run" / "metrics.json").exists()
    said = Run(stage, f"{options} --optimizer.learning-rate 1e-3 --resume", tmp_path / "second.log").succeeds()
    assert "resuming with" in said
    assert (tmp_path / "run" / "metrics.json").exists()


def test_the_advised_part_of_a_batch_fits(videos, tmp_path):
    options = f"--videos {videos} --output-dir {tmp_path}/run --steps 1 --batch-size 128 {SMALL} "
    options = options.replace("--encoder.image-size 32 32", "--encoder.image-size 192 192")
    room = 700_000_000
    line = Run("pretrain_encoder", options, tmp_path / "first.log", memory_for_steps=room).fails()
    assert "out of memory on cpu" in line
    assert "--batch-size 128, which needs about 1." in line
    advised = re.search(r"add (--micro-batch-size (\d+))", line)
    assert 8 <= int(advised[2]) <= 64
    said = Run(
        "pretrain_encoder", f"{options} {advised[1]} --overwrite", tmp_path / "second.log", memory_for_steps=room
    ).succeeds()
    assert f"global batch 128 in parts of {advised[2]} on each" in said


@pytest.mark.parametrize("differing", ["--optimizer.learning-rate 3e-3", "--encoder.pooling average"])
def test_ranks_with_other_options_end_at_once(differing, videos, tmp_path):
    options = f"--videos {videos} --output-dir {tmp_path}/run --batch-size 16 {SMALL}"
    first, second = start_ranks("pretrain_encoder", [options, f"{options} {differing}"], tmp_path)
    name, value = differing.removeprefix("--").replace("-", "_").split()
    assert f"rank 1 has options.{name} = {value.replace('3e_3', '0.003')}" in first.fails(within=20)
    second.process.join(20)
    assert second.process.exitcode == 1
    assert "error" not in second.said()
    assert not (tmp_path / "run").exists()


def test_ranks_that_see_other_videos_end_at_once(videos, tmp_path):
    """Two machines whose disks only look alike: one has an old list of the videos, the other has none."""
    machines = [tmp_path / "first", tmp_path / "second"]
    for machine in machines:
        shutil.copytree(videos, machine / "videos")
    options = f"--videos videos --output-dir run --batch-size 16 --steps 2 {SMALL}"
    Run("pretrain_encoder", options, tmp_path / "old.log", machines[1]).succeeds()
    write_ball_clip(machines[0] / "videos", 7, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
    first, second = start_ranks("pretrain_encoder", options, tmp_path, places=machines)
    assert "rank 1 has videos = 6, fingerprint" in (line := first.fails(within=20))
    assert "rank 0 has 7, fingerprint" in line
    second.process.join(20)
    assert second.process.exitcode == 1

    shutil.rmtree(machines[1] / "run")
    first, second = start_ranks("pretrain_encoder", options, tmp_path / "second", places=machines)
    assert "run/videos.jsonl" in second.fails(within=20)
    assert "another process has ended" in first.fails(within=20)


@pytest.mark.parametrize("dying", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "silent"])
def test_a_rank_that_dies_ends_the_others(number, dying, videos, tmp_path):
    options = f"--videos {videos} --output-dir {tmp_path}/run --batch-size 16 --steps 100000 {SMALL}"
    ranks = start_ranks("pretrain_encoder", options, tmp_path, QUICK)
    ranks[0].wait_until(r"\| [1-9]\d*/100000")
    ranks[dying].kill(number)
    line = ranks[1 - dying].fails(within=20)
    if number == signal.SIGKILL:
        assert re.search("another process has ended|contact with the first machine is lost", line)
    elif dying == 0:
        assert "the first machine has not answered for 2 s: stopped; what was complete before is kept" in line
    else:
        assert "rank 1 has not been heard of for 2 s: stopped; what was complete before is kept" in line
    ranks[dying].process.kill()


def be_slow():
    """Work that makes the other rank wait for longer than a silence may last, then an end that is not in step."""
    accelerator = start_accelerator()
    heartbeat = Heartbeat(accelerator)
    if accelerator.is_main_process:
        time.sleep(1.5 * guards.SILENCE_S)
    print("slept", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        time.sleep(0.5)  # the other would leave if it could
    heartbeat.stop()
    if not accelerator.is_main_process:
        time.sleep(0.5)  # the host of the store has left


def test_slow_work_an_uneven_end_and_a_long_sleep_of_all_are_no_alarm(tmp_path):
    ranks = start_ranks(be_slow, "", tmp_path, QUICK)
    ranks[1].wait_until("slept")
    for rank in ranks:
        rank.kill(signal.SIGSTOP)
    time.sleep(1.5 * QUICK["SILENCE_S"])
    for rank in ranks:
        rank.kill(signal.SIGCONT)
    for rank in ranks:
        assert "error" not in rank.succeeds()


def be_lost():
    """The main thread is busy when the store goes; it is the heart that notices."""
    accelerator = start_accelerator()
    Heartbeat(accelerator)
    print("here", flush=True)
    time.sleep(0.5 if accelerator.is_main_process else 30)
    os._exit(1)


def test_the_end_of_the_store_is_noticed_by_a_busy_rank(tmp_path):
    _, second = start_ranks(be_lost, "", tmp_path, QUICK)
    assert "contact with the first machine is lost" in second.fails(within=20)


def test_a_rank_that_waits_for_others_in_vain_says_so(tmp_path):
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = Run(be_slow, "", tmp_path / "log", environment=alone, patches={"LONGEST_START": timedelta(seconds=1)})
    assert "not all processes have met (Timed out after 2 seconds waiting for clients" in run.fails(within=20)


@pytest.fixture
def states(tmp_path):
    for step in (5, 10):
        (tmp_path / f"step_{step:08d}").mkdir()
    return tmp_path


def watch(states, loss, norm=1.0, scale=None, videos=9):
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    guard = FiniteGuard(SimpleNamespace(scaler=scaler, device=torch.device("cpu")), states)
    guard.watch(11, [Path(f"{index}.mp4") for index in range(videos)], torch.tensor(loss), torch.tensor(norm))
    return guard


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_guard_names_step_videos_and_the_newest_checkpoint(bad, states):
    watch(states, 1.0)
    for values in ((bad, 1.0), (1.0, bad)):
        with pytest.raises(UserError) as raised:
            watch(states, *values)
        assert "not finite in step 12, with frames of 0.mp4, 1.mp4, 2.mp4, 3.mp4, 4.mp4 and 4 more" in str(raised.value)
        assert f"{states}/step_00000010." in str(raised.value)


def test_guard_leaves_gradients_of_fp16_to_the_scaler(states):
    watch(states, 1.0, float("inf"), scale=1024.0).check_scale(12)
    watch(states, 1e30, 1.0).check_scale(12)
    with pytest.raises(UserError):
        watch(states, float("nan"), 1.0, scale=1024.0)
    with pytest.raises(UserError):
        watch(states, 1.0, float("inf"))
    with pytest.raises(UserError, match="not finite in fp16"):  # the scaler has skipped one step after the other
        watch(states, 1.0, float("inf"), scale=1e-6).check_scale(12)


def test_guard_looks_at_a_step_when_the_next_is_under_way_and_at_all_before_a_checkpoint(states, monkeypatch):
    class Event:
        """A GPU that is always ready."""

        waited = 0

        def record(self):
            pass

        def synchronize(self):
            Event.waited += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    guard = FiniteGuard(SimpleNamespace(scaler=None, device=torch.device("cuda")), states)
    one, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    guard.watch(0, [], one, one)
    assert (len(guard.watched), Event.waited) == (1, 0)
    guard.watch(1, [], one, one)
    assert (len(guard.watched), Event.waited) == (1, 1)
    guard.settle()
    assert (len(guard.watched), Event.waited) == (0, 2)
    guard.watch(2, [Path("a.mp4")], bad, one)
    with pytest.raises(UserError, match=r"step 3, with frames of a\.mp4"):
        guard.watch(3, [Path("b.mp4")], bad, one)
    guard.watched.clear()
    guard.watch(4, [Path("c.mp4")], one, bad)
    with pytest.raises(UserError, match=r"step 5, with frames of c\.mp4"):
        guard.settle()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_running_out_of_memory_is_advice_and_nothing_else_is(error, monkeypatch):
    monkeypatch.setattr(guards, "memory_capacity", lambda device: 10_000)
    monkeypatch.setattr(guards, "memory_in_use", lambda device: 1_000)
    estimate = MemoryEstimate(fixed=1_000, per_sample=100, per_waiting_sample=10)
    for samples, advised in ((128, 32), (40, 20), (1, 1)):  # 0.8 * (9,000 - 1,280) - 1,000 is room for 51
        with (
            pytest.raises(UserError, match=f"with --batch-size {samples}, which needs about 0 MB: lower to {advised}$"),
            memory_advice(estimate, samples, "--batch-size", "lower to {samples}", torch.device("cpu")),
        ):
            raise error
    with (
        pytest.raises(RuntimeError, match="shapes"),
        memory_advice(estimate, 128, "--batch-size", "{samples}", torch.device("cpu")),
    ):
        raise RuntimeError("shapes do not match")


def test_ranks_must_agree_on_each_fact(monkeypatch):
    def agree(*everyone):
        monkeypatch.setattr(guards, "gather_object", lambda own: list(everyone))
        require_agreement(Accelerator(), **everyone[0])

    agree({"options": {"a": {"b": 1}}, "videos": "x"}, {"options": {"a": {"b": 1}}, "videos": "x"})
    with pytest.raises(UserError, match=r"rank 2 has options\.a\.b = \[2\], rank 0 has \[1\]: start") as raised:
        agree(*[{"options": {"a": {"b": [number]}}} for number in (1, 1, 2)])
    assert raised.value.on_all_ranks
    for one, other in (({"a": 1}, {}), ({}, {"a": 1})):  # another version of the code
        with pytest.raises(UserError, match=r"rank 1 has options\.a = "):
            agree({"options": {"b": 0, **one}}, {"options": {"b": 0, **other}})


def test_summary_tells_lists_apart():
    assert summary(["a", "b"]) == summary(["a", "b"])
    assert len({summary(names) for names in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}) == 5


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:14544. "
            "This is typically caused by a remote worker crashing. Check the logs of the remote worker",
            "another process has ended (Connection closed by peer [10.0.0.2]:14544), its own message says why",
        ),
        ("[..pair.cc:1] Read error [::1]: Connection reset by peer", "ended (Connection reset by peer)"),
        ("[..pair.cc:1] writev [::1]: Broken pipe", "ended (Broken pipe)"),
        ("NCCL error: ncclRemoteError: A call failed possibly due to a network error", "ended (ncclRemoteError: A"),
        ("failed to recv, got 0 bytes. Connection was likely closed", "ended (failed to recv, got 0 bytes)"),
        ("Timed out after 6 seconds waiting for clients. 1/2 clients joined.", "not all processes have met (Timed out"),
        ("CUDA out of memory. Tried to allocate 2 GiB.\nand so on", "error: out of memory (CUDA out of memory): lower"),
    ],
)
def test_what_torch_says_is_said_in_one_line(message, line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    status, said = _explain(RuntimeError(message))
    assert status == 1
    assert line in said
    assert said.strip().startswith("[rank 1] error: ")
    assert "\n" not in said.strip()


@pytest.mark.parametrize(
    ("message", "ranks"),
    [
        ("[enforce fail at gloo/types.h:25] op.preamble.length <= op.nbytes. 16 vs 4", 2),
        ("NCCL error: ncclInvalidUsage: This usually reflects invalid usage of NCCL library", 2),
        ("No backend type associated with device type cpu (gloo, NCCL)", 2),
        ("Connection closed by peer", 1),
    ],
)
def test_our_own_mistakes_keep_their_traceback(message, ranks, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert _explain(RuntimeError(message)) == (1, "")
    assert message in capsys.readouterr().err
