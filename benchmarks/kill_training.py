r"""Kill both trainers again and again, resume them each time, and prove that nothing is lost.

  python benchmarks/kill_training.py --kills 20 --terms 5

Each trainer runs once undisturbed, on 1 process and on 2 (torchrun). Then the same run is struck at random moments, in
its start-up, between steps and while it saves: SIGKILL to one rank or to all processes with their launcher in turn,
SIGTERM to the launcher or to one rank in turn. After some kills a file of the newest checkpoint, or of the newest two,
is cut short, deleted, or a bit in it is turned. Each time the run is resumed. When it comes to its end, its artefact,
its last training state (weights, optimiser, random numbers, places in the data, averages, the best so far), its
curve and its metrics must be those of the undisturbed run, bit for bit. If there were not enough blows by then, the
next run is begun.
"""

import csv
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from tqdm import tqdm

from data.synthetic import BallWorld, write_ball_clip
from jepa.encoder import EncoderConfig, create_encoder
from pipelines.checkpoints import COMPLETE, find_fault
from pipelines.stage import require, run_stage, write_json

Stage = Literal["pretrain_encoder", "train_predictor"]
Variant = Literal["plain", "averaged"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
ARTEFACTS = {"pretrain_encoder": "encoder", "train_predictor": "predictor"}
# A rank's share of the frames is three times what it may hold: several blocks an epoch, others on each rank.
OPTIONS = {
    "pretrain_encoder": "--videos {world}/train --fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 "
    "--expander.width 16 --batch-size 16 --shuffle-memory 300kB",
    "train_predictor": "--train-cache {world}/cache/train --validation-cache {world}/cache/val --predictor.width 16 "
    "--predictor.context 3 --predictor.dropout 0.1 --batch-size 8 --rollout-steps 2 --validation-horizon 5",
}
MORE_OPTIONS = {
    "pretrain_encoder": "--micro-batch-size 8 --optimizer.ema-decay 0.9",
    "train_predictor": "--members 2 --optimizer.ema-decay 0.9",
}
"""Of the variant `averaged`: states beyond weights and optimiser."""
TIMES = ("seconds", "samples_per_second", "frames_per_second", "windows_per_second", "data_wait_fraction",
         "memory_gigabytes")  # fmt: skip
"""What is measured with a clock, and differs between any two runs."""
FORKING = threading.Lock()
"""Starting a process asks after all others, in whatever thread: of two that ask after one at once, one gets 255."""
LONGEST_END_S = 60.0
"""Within which all processes of a run must be gone after one of them was struck."""


@dataclass(frozen=True)
class Options:
    """Kill both trainers at random moments, resume them, and compare them with undisturbed runs."""

    kills: int = 20
    """SIGKILLs for each trainer and number of processes; a quarter of them is followed by damage to checkpoints."""
    terms: int = 5
    """SIGTERMs likewise."""
    stages: tuple[Stage, ...] = ("pretrain_encoder", "train_predictor")
    """Trainers."""
    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes."""
    variants: tuple[Variant, ...] = ("plain", "averaged")
    """`averaged`: with a moving average of the weights, and micro-batches (encoder) or two members (predictor)."""
    steps: int = 250
    """Of a run."""
    preload: bool = False
    """Fork runs from a process that has loaded the libraries, and without torchrun, to save time."""
    seed: int = 0
    """Of the moments."""
    output_dir: Path = Path("runs/benchmarks/kill_training")
    """Where results.json is left, and what differs."""


def main(options: Options) -> None:
    """The story: for each trainer train undisturbed, then strike and resume, strike and resume, and compare."""
    require(options.kills + options.terms > 0, "--kills and --terms are 0: there is nothing to do")
    trials = [
        Trial(stage, processes, variant, options.steps, options.preload)
        for stage in options.stages for variant in options.variants for processes in options.processes
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        world = make_world(Path(scratch) / "world")
        bar = tqdm(total=len(trials) * (options.kills + options.terms), unit="blow")
        for index, trial in enumerate(trials):
            bar.set_description(str(trial))
            generator = np.random.default_rng([options.seed, index])
            blows = plan(options.kills, options.terms, generator)
            trial.prove(world, Path(scratch) / str(index), blows, generator, options.output_dir, bar.update)
            bar.write("\n".join([str(trial), *(f"  {fault}" for fault in trial.faults)]))
        bar.close()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", {str(trial): trial.tally() for trial in trials})
    print(table([{"run": str(trial)} | trial.tally() for trial in trials]))
    faults = sum(len(trial.faults) for trial in trials)
    require(not faults, f"{faults} faults, see above; what differs was kept in {options.output_dir}")
    print("all bit-equal to the undisturbed runs")


@dataclass(frozen=True)
class Blow:
    """What is done to a run, once."""

    signal: signal.Signals
    target: Literal["rank", "all"]
    """One rank at random; or all processes (SIGKILL), or the launcher alone, which is to tell them (SIGTERM)."""
    moment: Literal["start-up", "training", "saving"]
    damaged: int = 0
    """How many of the newest checkpoints are damaged afterwards."""


def plan(kills: int, terms: int, generator: np.random.Generator) -> list[Blow]:
    """Blows of all kinds in random order."""
    moments: list[Literal["start-up", "training", "saving"]] = ["training", "saving", "training", "start-up"]
    targets: list[Literal["rank", "all"]] = ["rank", "all"]
    blows = [
        Blow(
            signal.SIGKILL, targets[(index + index // 4) % 2], moments[index % 4],
            damaged=1 + index // 4 % 2 if index % 4 == 0 else 0,
        )
        for index in range(kills)
    ]  # fmt: skip
    blows += [Blow(signal.SIGTERM, targets[index % 2], "training") for index in range(terms)]
    return [blows[index] for index in generator.permutation(len(blows))]


class Life:
    """One start of a stage, from its first process to its last.

    Args:
        stage: its name.
        arguments: its command line.
        processes: how many; two and more are started by torchrun.
        output: file that all of them write to.
        preload: fork them from a process that has loaded the libraries, and without torchrun.
    """

    def __init__(self, stage: str, arguments: list[str], processes: int, output: Path, preload: bool) -> None:
        self.output, self.processes = output, processes
        script = str(ROOT / "pipelines" / f"{stage}.py")
        self.began = time.monotonic()
        self.launcher: subprocess.Popen[bytes] | None = None
        if preload:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["pipelines.pretrain_encoder", "pipelines.train_predictor"])
            self.forked = [
                context.Process(target=run_forked, args=(script, arguments, environment, output))
                for environment in environments(processes)
            ]
            with FORKING:
                for process in self.forked:
                    process.start()
            self.seen = {process.pid for process in self.forked if process.pid}
            return
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        with output.open("w") as file:
            self.launcher = subprocess.Popen(
                [*command, script, *arguments], stdout=file, stderr=file, env=os.environ | ENVIRONMENT, cwd=ROOT,
                start_new_session=True,
            )  # fmt: skip
        self.seen = {self.launcher.pid}

    def said(self) -> str:
        """All that it has printed so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def shown(self, steps: int) -> list[int]:
        """What its progress bar has shown, of so many steps; the first is where it began."""
        return [int(step) for step in re.findall(rf"\| (\d+)/{steps} \[", self.said())]

    def has_trained(self, steps: int) -> bool:
        """Whether it has done a step of a run of so many: its progress bar has moved."""
        return len(set(self.shown(steps))) > 1

    def ranks(self) -> list[int]:
        """The processes that train, as far as they have been started."""
        if self.launcher is None:
            return sorted(self.seen)
        if self.processes == 1:
            return [self.launcher.pid]
        return [process for process in descendants(self.launcher.pid) if rank_of(process) is not None]

    def is_over(self) -> bool:
        """Whether all of its processes are gone."""
        if self.launcher is not None:
            self.launcher.poll()
            self.seen |= set(descendants(self.launcher.pid))
        return not any(map(is_alive, self.seen))

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False, poll_s: float = 0.005) -> bool:
        """Wait for all of its processes to be gone, or for something else; False if nothing came in time."""
        deadline = time.monotonic() + seconds
        while not (self.is_over() or until()):
            if time.monotonic() >= deadline:
                return False
            time.sleep(poll_s)
        return True

    def exit_code(self) -> int | None:
        """Of the launcher; without one, the first that is not 0."""
        if self.launcher is not None:
            return self.launcher.wait()
        with FORKING:
            for process in self.forked:
                process.join()
            return next((process.exitcode for process in self.forked if process.exitcode), 0)

    def strike(self, number: signal.Signals, pid: int | None = None) -> None:
        """Send a signal to a process; by default SIGKILL to all, any other one to the launcher."""
        if pid is not None:
            targets = [pid]
        elif number != signal.SIGKILL and self.launcher is not None:
            targets = [self.launcher.pid]
        elif self.launcher is not None:
            with suppress(ProcessLookupError):
                os.kill(self.launcher.pid, signal.SIGSTOP)  # it shall not start another one meanwhile
            targets = descendants(self.launcher.pid)
            self.seen |= set(targets)
        else:
            targets = self.ranks()
        for target in targets:
            with suppress(ProcessLookupError):
                os.kill(target, number)


@dataclass
class Trial:
    """A trainer on so many processes, its undisturbed run, and what was found out."""

    stage: Stage
    processes: int
    variant: Variant
    steps: int
    preload: bool
    faults: list[str] = field(default_factory=list)
    """What must not be."""
    counts: Counter[str] = field(default_factory=Counter)
    exit_codes: Counter[int | None] = field(default_factory=Counter)
    """After SIGTERM."""
    ends_s: dict[str, float] = field(default_factory=lambda: {"SIGKILL": 0.0, "SIGTERM": 0.0})
    """The longest time between a blow and the end of the last process."""
    lives: int = 0

    def __str__(self) -> str:
        return f"{self.stage} x {self.processes}" + (f", {self.variant}" if self.variant != "plain" else "")

    def prove(
        self, world: Path, folder: Path, blows: list[Blow], generator: np.random.Generator, keep: Path,
        tick: Callable[[], Any] = lambda: None,
    ) -> None:  # fmt: skip
        """Run undisturbed, then strike and resume until all blows are dealt, and compare each run that ends.

        Args:
            world: videos and caches.
            folder: for the runs; it is removed.
            blows: to be dealt, in this order.
            generator: of the moments.
            keep: where a run that differs goes, beside the undisturbed one.
            tick: called after each blow.
        """
        folder.mkdir(parents=True)
        undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
        life = self.start(world, undisturbed)
        try:
            life.wait(600, lambda: life.has_trained(self.steps))
            self.start_up_s = time.monotonic() - life.began
            life.wait(600)
            self.training_s = time.monotonic() - life.began - self.start_up_s
            require(life.exit_code() == 0, f"the undisturbed run failed: {life.said()[-1000:]}")
            remaining, damaged, said = list(blows), list[Path](), ""
            while remaining or disturbed.exists():
                life = self.start(world, disturbed)
                struck = bool(remaining) and self.deal(remaining[0], life, disturbed, generator)
                if not struck:
                    require(life.wait(600), f"{self}: a run does not come to its end: {life.said()[-1000:]}")
                    code = life.exit_code()
                    if not self.expect(code == 0, f"a resumed run ended with {code}: {life.said()[-1000:]}"):
                        break
                said += life.said()
                self.counts["resumed after step 0"] += any(life.shown(self.steps)[:1])
                finished = (disturbed / "metrics.json").exists()
                if finished or life.has_trained(self.steps):
                    for checkpoint in damaged:
                        self.expect(f"warning: {checkpoint} is not complete (" in said, f"no warning of {checkpoint}")
                    damaged = []
                if finished:  # the blow may have come after that: the next run gets it
                    self.judge(disturbed, undisturbed, keep)
                elif struck:
                    self.look_into(blow := remaining.pop(0), life, disturbed)
                    if blow.damaged:
                        said, damaged = "", [*damaged, *self.damage(disturbed, blow.damaged, generator)]
                    tick()
        finally:
            life.strike(signal.SIGKILL)
            life.wait(10)
            shutil.rmtree(folder)

    def start(self, world: Path, output: Path) -> Life:
        """Begin a run, or go on with it."""
        options = f"{OPTIONS[self.stage]} " + (MORE_OPTIONS[self.stage] if self.variant == "averaged" else "")
        options += f" --steps {self.steps} --log-every 5 --checkpoints.every-steps 7 --checkpoints.keep 3 --tracker csv"
        arguments = [*options.format(world=world).split(), "--output-dir", str(output)]
        arguments += ["--resume"] if output.exists() else []
        self.lives += 1
        said = output.with_name(f"{output.name}_{self.lives}.txt")
        return Life(self.stage, arguments, self.processes, said, self.preload)

    def deal(self, blow: Blow, life: Life, output: Path, generator: np.random.Generator) -> bool:
        """Strike at the moment that is meant, and see what becomes of the run; False if it ended before."""
        before = unfinished(output)
        if blow.moment == "start-up":
            life.wait(generator.uniform(0, self.start_up_s))
        else:
            life.wait(600, lambda: life.has_trained(self.steps))
            # Half of what there is to do, so that a run is struck more than once.
            life.wait(generator.uniform(0, self.training_s / 2))
            if blow.moment == "saving":
                life.wait(600, lambda: unfinished(output) != before, poll_s=0)
                time.sleep(generator.uniform(0, 0.01))  # about as long as it takes
        if life.is_over():
            return False
        ranks = life.ranks()
        victim = int(generator.choice(ranks)) if blow.target == "rank" and ranks else None
        struck = time.monotonic()
        life.strike(blow.signal, victim)
        gone = life.wait(LONGEST_END_S)
        seconds = time.monotonic() - struck
        name = blow.signal.name
        self.ends_s[name] = max(self.ends_s[name], seconds)
        self.expect(gone, f"processes are still there {LONGEST_END_S:.0f} s after {name} to {blow.target}")
        if not gone:
            life.strike(signal.SIGKILL)
            life.wait(10)
        return True

    def look_into(self, blow: Blow, life: Life, output: Path) -> None:
        """Count a blow that came in time; SIGTERM must have saved."""
        self.counts[f"{blow.signal.name} {blow.moment}"] += 1
        if blow.moment == "saving":
            self.counts["half a checkpoint left"] += bool(unfinished(output))
        if blow.signal == signal.SIGKILL:
            return
        code = life.exit_code()
        self.exit_codes[code] += 1
        if life.launcher is None or self.processes == 1:
            self.expect(code == 128 + signal.SIGTERM, f"SIGTERM ended in exit code {code}: {life.said()[-1000:]}")
        saved = re.search(r"stopped and saved after step (\d+): add --resume", life.said())
        if self.expect(saved is not None, f"SIGTERM did not save: {life.said()[-1000:]}"):
            assert saved is not None
            checkpoint = output / "training_state" / f"step_{int(saved[1]):08d}"
            fault = find_fault(checkpoint)
            self.expect(not fault, f"SIGTERM left {checkpoint} unfinished: {fault}")
            self.expect(checkpoint == newest(output)[-1], f"SIGTERM left {checkpoint}, which is not the newest")

    def damage(self, output: Path, count: int, generator: np.random.Generator) -> list[Path]:
        """Damage the newest checkpoints that are complete."""
        chosen = [checkpoint for checkpoint in newest(output) if not find_fault(checkpoint)][-count:]
        for checkpoint in chosen:
            self.counts[damage(checkpoint, generator)] += 1
        return chosen

    def judge(self, run: Path, undisturbed: Path, keep: Path) -> None:
        """Compare a run that came to its end with the undisturbed one, and clear it away."""
        self.counts["runs compared"] += 1
        found = differences(run, undisturbed, ARTEFACTS[self.stage])
        if not self.expect(not found, f"a run differs in {len(found)} values: {', '.join(found[:5])}, ..."):
            for folder in (run, undisturbed):
                kept = keep / f"{self}, {self.counts['runs compared']}, {folder.name}".replace(" ", "_")
                shutil.copytree(folder, kept, dirs_exist_ok=True)
        shutil.rmtree(run)

    def expect(self, condition: bool, fault: str) -> bool:
        """Note a fault unless the condition holds."""
        if not condition:
            self.faults.append(fault)
        return condition

    def tally(self) -> dict[str, Any]:
        """What was done and found, as a row of a table."""
        at = {name: [self.counts[f"{name} {moment}"] for moment in ("start-up", "training", "saving")]
              for name in ("SIGKILL", "SIGTERM")}  # fmt: skip
        return {
            "SIGKILL": f"{sum(at['SIGKILL'])} ({' + '.join(map(str, at['SIGKILL']))})",
            "half saved": self.counts["half a checkpoint left"],
            "SIGTERM": sum(at["SIGTERM"]),
            "exit codes": " ".join(f"{count} x {code}" for code, count in sorted(self.exit_codes.items(), key=str)),
            "cut, deleted, flipped": " + ".join(str(self.counts[kind]) for kind in ("cut", "deleted", "flipped")),
            "gone within s": " / ".join(f"{seconds:.1f}" for seconds in self.ends_s.values()),
            "resumed after step 0": self.counts["resumed after step 0"],
            "runs compared": self.counts["runs compared"],
            "faults": len(self.faults),
        }


def make_world(folder: Path, clips: int = 12, preload: bool = False) -> Path:
    """Videos of balls, an encoder, and what it makes of them."""
    small = BallWorld(size=32, radius=3, frames=48, fps=8)
    torch.manual_seed(0)
    create_encoder(EncoderConfig(embedding_dimension=16, image_size=(32, 32))).eval().save_pretrained(
        folder / "encoder"
    )
    for seed, (split, count) in enumerate({"train": clips, "val": clips // 3}.items()):
        (folder / split).mkdir()
        for index in range(count):
            write_ball_clip(folder / split, index, small, seed)
        arguments = f"--videos {folder}/{split} --encoder {folder}/encoder --fps 8 --output-dir {folder}/cache/{split}"
        life = Life("cache_embeddings", arguments.split(), 1, folder / f"{split}.txt", preload)
        require(life.exit_code() == 0, f"the cache could not be made: {life.said()[-1000:]}")
    return folder


def environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    if processes == 1:
        return [ENVIRONMENT]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
    return [
        ENVIRONMENT | meeting
        | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]  # fmt: skip


def run_forked(script: str, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    """A stage in a process that was forked after the libraries had been loaded."""
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)  # too late for OMP_NUM_THREADS
    tqdm.set_lock(threading.RLock())  # its own one would be left behind in the system by a kill
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def descendants(pid: int) -> list[int]:
    """A process and all that it has started; torchrun gives each of its workers a session of its own."""
    children: list[int] = []
    with suppress(OSError):  # it may be gone by now
        for task in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (task / "children").read_text().split())
    return [pid, *(process for child in children for process in descendants(child))]


def rank_of(pid: int) -> int | None:
    """The rank of a process that torchrun has started; None for any other."""
    with suppress(OSError):
        found = re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
        return int(found[1]) if found else None
    return None


def is_alive(pid: int) -> bool:
    """Whether a process is there and not a zombie, which nobody may ever fetch."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def newest(output: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((output / "training_state").glob("step_*"))


def unfinished(output: Path) -> set[tuple[Path, int]]:
    """Checkpoints that were not finished, with the time of their last change."""
    found = set()
    for path in (output / "training_state").glob(".tmp.step_*"):
        with suppress(FileNotFoundError):
            found.add((path, path.stat().st_ctime_ns))
    return found


def damage(checkpoint: Path, generator: np.random.Generator) -> str:
    """Cut a random file of a checkpoint short, delete it, or turn a bit in it; returns which of these."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    path = files[generator.integers(len(files))]
    kind = str(generator.choice(["cut", "deleted", "flipped"]))
    size = path.stat().st_size
    if kind == "deleted":
        path.unlink()
    elif kind == "cut" or path.name == COMPLETE:  # a bit of its white space would mean nothing
        kind = "cut"
        os.truncate(path, int(generator.integers(size - 1)))
    else:
        content = bytearray(path.read_bytes())
        content[generator.integers(size)] ^= 1 << int(generator.integers(8))
        path.write_bytes(content)
    return kind


def differences(run: Path, undisturbed: Path, artefact: str) -> list[str]:
    """What is not the same, bit for bit, in two runs that came to their end."""
    found = []
    ours, theirs = (load_file(folder / artefact / "model.safetensors") for folder in (run, undisturbed))
    found += [f"{artefact} {name}" for name in unequal(ours, theirs)]
    last, its_like = (newest(folder)[-1] for folder in (run, undisturbed))
    if last.name != its_like.name:
        return [*found, f"the last checkpoint: {last.name} instead of {its_like.name}"]
    for name in sorted({path.name for folder in (last, its_like) for path in folder.iterdir()} - {COMPLETE}):
        if (last / name).exists() and (its_like / name).exists():
            found += [f"{name} {where}" for where in unequal(load(last / name), load(its_like / name))]
        else:
            found.append(f"{name} is in one of them only")
    for name in ("logs/curve.csv", "metrics.json"):
        found += [f"{name} {where}" for where in unequal(load(run / name), load(undisturbed / name))]
    return found


def load(path: Path) -> Any:
    """The content of a file of a run, but for times."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".json":
        return {name: value for name, value in json.loads(path.read_text()).items() if name not in TIMES}
    if path.suffix == ".csv":
        with path.open() as file:
            return [{name: cell for name, cell in row.items() if name not in TIMES} for row in csv.DictReader(file)]
    return torch.load(path, weights_only=False)  # written by ourselves


def unequal(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures are not the same, bit for bit."""
    if type(one) is not type(other):
        return [f"{where}: {type(one).__name__} instead of {type(other).__name__}"]
    if isinstance(one, dict):
        if list(one) != list(other):
            return [f"{where}: other names"]
        return [found for name in one for found in unequal(one[name], other[name], f"{where}/{name}")]
    if isinstance(one, list | tuple):
        missing = object()
        pairs = enumerate(zip_longest(one, other, fillvalue=missing))
        return [found for index, pair in pairs for found in unequal(*pair, f"{where}/{index}")]
    if isinstance(one, torch.Tensor):
        one, other = one.numpy(), other.numpy()
    if isinstance(one, np.ndarray):
        # Bytes, because NaN is not equal to itself, and -0 is to 0.
        same = (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
        return [] if same else [f"{where}: other numbers"]
    return [] if repr(one) == repr(other) else [f"{where}: {one!r} instead of {other!r}"]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows with the same columns, in Markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    run_stage(main, Options)
