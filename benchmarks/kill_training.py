r"""Kill both trainers again and again, resume them each time, and prove that nothing is lost.

  python -m benchmarks.kill_training --kills 20 --terms 5

Each trainer runs once undisturbed, on 1 process and on 2 (torchrun). Then the same run is struck at random moments, in
its start-up, between steps and while it saves: SIGKILL to one rank or to all processes with their launcher in turn,
SIGTERM to the launcher or to one rank in turn. After some kills the newest checkpoint is cut short, or a bit in it is
turned, if there is an older one. Each time the run is resumed. When it comes to its end, its
artefacts, its last training state (weights, optimiser, places in the data, averages, the best so far), its curve and
its metrics must be those of the undisturbed run, bit for bit. If there were not enough blows by then, the next run is
begun. It stops at the first fault, and leaves both runs.
"""

import json
import re
import shutil
import signal
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.common import make_encoder, markdown, run, write_results
from benchmarks.lives import Life
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded, NotNegativeInt, PositiveInt
from pipelines.run.checkpoints import find_fault
from pipelines.run.command import require, run_command

Moment = Literal["start-up", "training", "saving"]

ARTEFACTS = {"pretrain_encoder": ("encoder",), "train_predictor": ("predictor", "calibration")}
# A rank's share of the frames is three times what it may hold: several blocks an epoch, others on each rank.
OPTIONS = {
    "pretrain_encoder": "--videos {world}/train --fps 8 --encoder.image-size 32 32 --encoder.embedding-dimension 8 "
    "--expander.widths 16 16 --batch-size 16 --shuffle-memory 3e-4",
    "train_predictor": "--train-cache {world}/cache/train --validation-cache {world}/cache/val --predictor.width 16 "
    "--predictor.context 3 --predictor.dropout 0.1 --batch-size 8 --rollout-steps 2 --validation-horizon 5 "
    "--actions ball_1_?",
}
TIMES = ("seconds", "samples_per_second", "data_wait_fraction")
"""What is measured with a clock, and differs between any two runs."""
LONGEST_END_S = 60.0
"""Time within which all processes of a run must be gone after one of them was struck."""


@dataclass(frozen=True)
class Options(Bounded):
    """Kill both trainers at random moments, resume them, and compare them with undisturbed runs."""

    kills: NotNegativeInt = 20
    """SIGKILLs for each trainer and number of processes; a quarter of them is followed by damage to checkpoints."""
    terms: NotNegativeInt = 5
    """SIGTERMs likewise."""
    steps: PositiveInt = 250
    """Steps of a run."""
    output_dir: Path = Path("runs/benchmarks/kill_training")
    """Where the runs and results.json are left."""


def main(options: Options) -> None:
    """The story: for each trainer train undisturbed, then strike and resume, strike and resume, and compare."""
    shutil.rmtree(options.output_dir, ignore_errors=True)
    world, rows = make_world(options.output_dir / "world"), []
    for trainer in OPTIONS:
        for processes in (1, 2):
            trial = Trial(trainer, processes, world, options.output_dir / f"{trainer}_{processes}", options.steps)
            trial.prove(plan(options.kills, options.terms, trial.generator))
            kills = [trial.counts[f"SIGKILL {moment}"] for moment in ("start-up", "training", "saving")]
            rows.append({
                "run": f"{trainer} x {processes}",
                "SIGKILL": f"{sum(kills)} ({' + '.join(map(str, kills))})",
                "SIGTERM": trial.counts["SIGTERM training"],
                "cut, flipped": " + ".join(str(trial.counts[kind]) for kind in ("cut", "flipped")),
                **{name: trial.counts[name] for name in ("half saved", "resumed after step 0", "runs compared")},
            })  # fmt: skip
            print(markdown([list(rows[0]), list(rows[-1].values())]), flush=True)
    write_results(options.output_dir, rows)
    print(markdown([list(rows[0]), *(list(row.values()) for row in rows)]))
    print("all bit-equal to the undisturbed runs")


def make_world(folder: Path, clips: int = 12) -> Path:
    """Videos of balls, and embeddings of them."""
    encoder = make_encoder(folder / "encoder", size=32, dimension=16)
    for seed, (split, count) in enumerate({"train": clips, "val": clips // 3}.items()):
        write_ball_videos(folder / split, count, BallWorld(size=32, radius=3, frames=48, fps=8), seed=seed)
        run("cache_embeddings", {"videos": folder / split, "encoder": encoder, "fps": 8},
            "--columns", "ball_1_x", "ball_1_y", "--output-dir", folder / "cache" / split)  # fmt: skip
    return folder


@dataclass(frozen=True)
class Blow:
    """What is done to a run, once."""

    signal: signal.Signals
    target: Literal["rank", "all"]
    """One rank at random; or all processes (SIGKILL), or the launcher alone, which is to tell them (SIGTERM)."""
    moment: Moment
    damages: bool = False
    """Whether the newest checkpoint is damaged afterwards."""


def plan(kills: int, terms: int, generator: np.random.Generator) -> list[Blow]:
    """Blows of all kinds in random order."""
    moments: list[Moment] = ["training", "saving", "training", "start-up"]
    targets: list[Literal["rank", "all"]] = ["rank", "all"]
    blows = []
    for index in range(kills):
        target, moment = targets[(index + index // 4) % 2], moments[index % 4]
        blows.append(Blow(signal.SIGKILL, target, moment, damages=index % 4 == 0))
    blows += [Blow(signal.SIGTERM, targets[index % 2], "training") for index in range(terms)]
    return [blows[index] for index in generator.permutation(len(blows))]


class Trial:
    """A trainer on so many processes: its undisturbed run, and one that is struck and resumed, in a folder."""

    def __init__(self, trainer: str, processes: int, world: Path, folder: Path, steps: int) -> None:
        self.trainer, self.processes, self.world, self.steps = trainer, processes, world, steps
        self.undisturbed, self.disturbed = folder / "undisturbed", folder / "disturbed"
        self.generator, self.counts = np.random.default_rng(processes), Counter[str]()
        folder.mkdir(parents=True)

    def prove(self, blows: list[Blow]) -> None:
        """Run undisturbed, then strike and resume until all blows are dealt, and compare each run that ends.

        Raises:
            UserError: a run does not end, does not save, or differs.
        """
        life = self.start(self.undisturbed)
        life.wait(600, lambda: self.has_trained(life))
        self.start_up_s = time.monotonic() - life.began
        self.training_s = life.end() - self.start_up_s
        remaining = list(blows)
        while remaining or self.disturbed.exists():
            life = self.start(self.disturbed)
            try:
                struck = bool(remaining) and self.deal(remaining[0], life)
                if not struck:
                    life.end()
            finally:
                life.kill()
            self.counts["resumed after step 0"] += any(self.shown(life)[:1])
            if (self.disturbed / "metrics.json").exists():  # if the blow came after that, the next run gets it
                found = differences(self.disturbed, self.undisturbed, ARTEFACTS[self.trainer])
                require(not found, f"{self.disturbed} differs: {', '.join(found[:5])}")
                self.counts["runs compared"] += 1
                shutil.rmtree(self.disturbed)
            elif (
                struck and max(self.shown(life), default=0) < self.steps
            ):  # not while it calibrates, after its last step
                self.look_into(remaining.pop(0), life)

    def start(self, output: Path) -> Life:
        """Begin a run, or go on with it."""
        given = {"steps": self.steps, "log-every": 5, "checkpoint-every": 7, "tracker": "none", "output-dir": output}
        options = [*OPTIONS[self.trainer].format(world=self.world.absolute()).split(), given, "--resume"]
        return Life(self.processes, f"pipelines/{self.trainer}.py", options, output=output.with_suffix(".txt"))

    def shown(self, life: Life) -> list[int]:
        """Steps that its progress bar has shown; the first is where it began."""
        return [int(step) for step in re.findall(rf"\| (\d+)/{self.steps} \[", life.said())]

    def has_trained(self, life: Life) -> bool:
        """Whether it has done a step: its progress bar has moved."""
        return len(set(self.shown(life))) > 1

    def deal(self, blow: Blow, life: Life) -> bool:
        """Strike at the moment that is meant, and see the run end; False if it ended before."""
        before = unfinished(self.disturbed)
        if blow.moment == "start-up":
            life.wait(self.generator.uniform(0, self.start_up_s))
        else:
            life.wait(600, lambda: self.has_trained(life))
            # Half of what there is to do, so that a run is struck more than once.
            life.wait(self.generator.uniform(0, self.training_s / 2))
            if blow.moment == "saving":
                life.wait(600, lambda: unfinished(self.disturbed) != before, poll_s=0)
                time.sleep(self.generator.uniform(0, 0.01))  # about as long as it takes
        if life.is_over():
            return False
        ranks = life.ranks() if blow.target == "rank" else []
        if blow.target == "all" and blow.signal == signal.SIGKILL:
            life.kill()
        else:
            life.strike(blow.signal, int(self.generator.choice(ranks)) if ranks else None)
        require(life.wait(LONGEST_END_S), f"processes are still there {LONGEST_END_S:.0f} s after {blow}")
        return True

    def look_into(self, blow: Blow, life: Life) -> None:
        """Count a blow that came in time, and damage what it left; SIGTERM must have saved."""
        self.counts[f"{blow.signal.name} {blow.moment}"] += 1
        self.counts["half saved"] += blow.moment == "saving" and bool(unfinished(self.disturbed))
        whole = [checkpoint for checkpoint in checkpoints(self.disturbed) if not find_fault(checkpoint)]
        if blow.signal == signal.SIGTERM:
            code, said = life.launcher.returncode, life.said()
            require(self.processes > 1 or code == 128 + signal.SIGTERM, f"SIGTERM ended in {code}: {said[-1000:]}")
            saved = re.search(r"stopped and saved after step (\d+): add --resume", said)
            is_newest = saved and whole and whole[-1].name == f"step_{int(saved[1]):08d}.pt"
            require(bool(is_newest), f"SIGTERM did not save: {whole} are there: {said[-1000:]}")
        if blow.damages and len(whole) > 1:  # of the only one nothing would be left to resume
            self.counts[damage(whole[-1], self.generator)] += 1


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted((output / "training_state").glob("step_*.pt"))


def unfinished(output: Path) -> set[tuple[Path, int]]:
    """Checkpoints that were not finished, with the time of their last change."""
    found = set()
    for path in (output / "training_state").glob(".tmp.*"):
        with suppress(FileNotFoundError):
            found.add((path, path.stat().st_ctime_ns))
    return found


def damage(checkpoint: Path, generator: np.random.Generator) -> str:
    """Cut a checkpoint short, or turn a bit in it; returns which of these."""
    content = bytearray(checkpoint.read_bytes())
    place = int(generator.integers(len(content)))
    kind = str(generator.choice(["cut", "flipped"]))
    if kind == "cut":
        del content[place:]
    else:
        content[place] ^= 1 << int(generator.integers(8))
    checkpoint.write_bytes(content)
    return kind


def differences(run: Path, undisturbed: Path, artefacts: tuple[str, ...]) -> list[str]:
    """What is not the same, bit for bit, in two runs that came to their end."""
    both = (run, undisturbed)
    last, its_like = (checkpoints(folder)[-1] for folder in both)
    found = [] if last.name == its_like.name else [f"the last checkpoint: {last.name} instead of {its_like.name}"]
    pairs = [(last, its_like)]
    for name in (*(f"{artefact}/model.safetensors" for artefact in artefacts), "curve.jsonl", "metrics.json"):
        pairs.append((run / name, undisturbed / name))
    return found + [str(ours) for ours, theirs in pairs if fingerprint(ours) != fingerprint(theirs)]


def fingerprint(path: Path) -> str:
    """The content of a file of a run, but for times."""
    if path.suffix == ".safetensors":
        return repr(spelled_out(load_file(path)))
    if path.suffix == ".pt":
        return repr(spelled_out(torch.load(path, weights_only=True)))
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return repr([spelled_out(json.loads(line)) for line in lines])


def spelled_out(value: Any) -> Any:
    """Nested containers without times, and with tensors as their bytes: NaN is not equal to itself."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: spelled_out(part) for name, part in sorted(value.items(), key=str) if name not in TIMES}
    return [spelled_out(part) for part in value] if isinstance(value, list | tuple) else value


if __name__ == "__main__":
    run_command(main, Options)
