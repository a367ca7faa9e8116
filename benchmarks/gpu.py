r"""All that is owed on a GPU, in one command that may be cut at any moment: the most valuable first.

  python -m benchmarks.gpu --pack .gpu                          # here: what has to be carried, and how to run it
  python -m benchmarks.gpu --budget-minutes 8 --output-dir DIR  # there; again for what there was no time for
  python -m benchmarks.gpu --rehearse --output-dir DIR          # on a CPU, at 1 % of the size
  python -m benchmarks.gpu --document                           # docs/gpu/*.json into docs/performance.md

Each measurement is a process with a time limit, so a hang or a crash costs only itself. `DIR/results.json` is written
after each; what it, or a file of `--earlier`, holds already is skipped, what failed is tried again. Material is taken
from `.gpu` where that is, or from `$JEPA_SHARED`: a driving clip, and parts of CIFAR-10 and MNIST.
"""

import os
import platform
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import ROOT, markdown, read_json, shared
from benchmarks.pack import pack
from data.files import write_whole
from jepa.config import Bounded, Positive
from pipelines.run.command import run_command
from pipelines.run.files import flat, write_json

DOCUMENT, COMMITTED = ROOT / "docs" / "performance.md", ROOT / "docs" / "gpu"
BEGIN, END = "<!-- GPU table: python -m benchmarks.gpu --document -->", "<!-- end of the GPU table -->"
COPIES, TAIL, RESERVE_S, LEAST_S = 12, 3000, 5.0, 20.0
"""Of the driving clip; characters of a process's output that are kept; seconds kept back; less is not worth a start."""
MNIST = "--encoder.embedding-dimension 256 --views.light-amplitude 0 --views.pixel-noise 0 --tracker none"


@dataclass(frozen=True)
class Options(Bounded):
    """Measure on a GPU what is owed."""

    budget_minutes: Positive = 8.0
    """All has ended by then."""
    output_dir: Path = Path("runs/benchmarks/gpu/results")
    """Folder for results.json."""
    work_dir: Path = Path("runs/benchmarks/gpu/work")
    """Folder for videos, caches, runs and the whole output of each measurement."""
    earlier: tuple[Path, ...] = ()
    """Results whose measurements are not made again."""
    only: tuple[str, ...] = ()
    """Names of the measurements to make; all by default."""
    rehearse: bool = False
    """Everything at about 1 % of its size."""
    pack: Path | None = None
    """Write what has to be carried into this folder instead, and say how to run it."""
    document: bool = False
    """Put the table of docs/gpu/*.json into docs/performance.md instead."""


class Measurement(NamedTuple):
    """A process, and what is wanted of it."""

    limit_s: float
    command: str
    """Words after python's; FOLDER and VIDEOS are put in."""
    small: str
    """Words that follow in a rehearsal: of an option that is given twice, the last one counts."""
    figures: dict[str, tuple[str, str]]
    """Where it is in the results: what it is called, and its bar."""


TESTED = {
    "tests passed": ("of `tests/test_device.py`, tests that pass", ""),
    "tests failed": ("of `tests/test_device.py`, tests that fail", "0"),
    "tests skipped": ("of `tests/test_device.py`, tests that are skipped", "0"),
}
MEASUREMENTS = {
    "correctness": Measurement(
        90, "-m pytest tests/test_device.py -m 'not slow' -p no:cacheprovider --tb=short -vv --durations=0 "
        "--junitxml=FOLDER/results.xml", "", TESTED,
    ),
    "commands": Measurement(
        200, "-m pytest tests/test_device.py -m slow -p no:cacheprovider --tb=short -vv --durations=0 "
        "--junitxml=FOLDER/results.xml", "",
        {key: (f"of its slow ones, {label.removeprefix('of `tests/test_device.py`, ')}", bar)
         for key, (label, bar) in TESTED.items()},
    ),
    "training": Measurement(
        120, "-m benchmarks.training --output-dir FOLDER --trainers encoder --videos VIDEOS --rounds 1 "
        "--backbone resnet18 --size 112 --batch-size 256 --steps 100 "
        "--encoder-options='--precision bf16 --execution compiled'",
        "--backbone small_conv --size 32 --batch-size 16 --steps 4 --encoder-options='--precision bf16'",
        {"encoder: samples per second": ("encoder, resnet18 at 112 px, bf16, compiled: pairs of frames a second", ""),
         "encoder: share of the time waiting for data": ("its share of waiting for data", "≤ .05"),
         "encoder: of the plain loop": ("of a plain eager float32 loop", "≥ 2.5")},
    ),
    "steps": Measurement(
        90, "-m benchmarks.steps --output-dir FOLDER --backbone resnet18 --size 112 --batch-size 256",
        "--backbone small_conv --size 32 --batch-size 16 --repeats 2",
        {name: (f"the same encoder, milliseconds: {name}", "")
         for name in ("copy to the device", "views", "objective", "float32", "bf16", "bf16 compiled",
                      "float32, algorithms searched", "bf16, algorithms searched",
                      "bf16 compiled, algorithms searched")},
    ),
    "caching": Measurement(
        90, "-m benchmarks.embed --output-dir FOLDER --videos VIDEOS --backbone vit_small_patch14_dinov2 "
        "--pooling native --size 224 --precision bf16 --batch-size 256 --rounds 2",
        "--backbone small_conv --size 32 --pooling flatten --rounds 1",
        {"both: frames per second": ("caching, ViT-S/14 at 224 px, bf16: frames a second", ""),
         "of the slower of decoder and encoder alone": ("of the slower of decoding and encoding alone", "≥ .9"),
         "threads that decode": ("threads that decode", "")},
    ),
    "images": Measurement(
        170, "-m benchmarks.images --output-dir FOLDER",
        "--seconds 6 --probe-every 2 --backbone small_conv --widths 64 64 --batch-size 32 --fraction .02 --no-compiled",
        {"images per second": ("CIFAR-10, VICReg, resnet18: images a second, of two views each", ""),
         "share of the time making views": ("its share of making views", "≤ .05"),
         "linear probe": ("linear probe at the end", ""),
         "minutes to 90 %, projected": ("minutes to 90 % linear, projected", "≤ 30, then ≤ 10"),
         "minutes for 1000 epochs of 50000 images": ("minutes for 1,000 epochs of 50,000 images", "")},
    ),
    "moving_mnist": Measurement(
        200, "-m benchmarks.moving_mnist --output-dir FOLDER --seeds 0 --clips 3000 300 "
        f"--encoder-options='--steps 1500 --encoder.backbone resnet18 --batch-size 256 --precision bf16 {MNIST}' "
        "--predictor-options='--steps 4000 --rollout-steps 7 --precision bf16 --predictor.width 1024 --tracker none'",
        f"--clips 12 6 --encoder-options='--steps 4 --batch-size 16 {MNIST}' "
        "--predictor-options='--steps 20 --rollout-steps 2 --predictor.width 32 --tracker none'",
        {"0.measures.mAP over 1 to 7, model": ("Moving MNIST: mAP over horizons 1 to 7", "eb_jepa publishes .607"),
         "0.measures.mAP over 1 to 7, true frames": ("its ceiling, true frames", "")},
    ),
    "predictor": Measurement(
        60, "-m benchmarks.training --output-dir FOLDER --trainers predictor --rounds 1 "
        "--batch-size 1024 --width 1024 --dimension 512 --steps 40",
        "--batch-size 16 --width 32 --dimension 8 --steps 4",
        {"predictor: samples per second": ("predictor of gpu_80gb.yaml, 512 numbers, float32: windows a second", ""),
         "predictor: of the plain loop": ("of a loop over windows on the device", "≥ .9"),
         "predictor: share of the time waiting for data": ("its share of waiting for data", "≤ .05")},
    ),
    "rollout": Measurement(
        60, "-m benchmarks.rollout --output-dir FOLDER --width 1024 --dimension 512 --clips 1024",
        "--width 32 --dimension 8 --clips 8 --horizon 20 --rounds 1",
        {f"{kind}.{key}": (f"rollout, {kind}, 1024 wide, {name}: imagined frames a second", "")
         for kind in ("mlp", "transformer")
         for key, name in (("imagined frames a second", "float32"), ("the same in bf16", "bf16"))},
    ),
    "grid": Measurement(
        45, "-m benchmarks.rollout --output-dir FOLDER --width 256 --dimension 384 --grid 16 16 --clips 64 --horizon 8",
        "--width 32 --dimension 8 --grid 3 4 --clips 2 --horizon 4 --rounds 1",
        {f"transformer.{key}": (f"rollout, transformer, 16x16 cells, 256 wide, {name}: imagined frames a second", "")
         for key, name in (("imagined frames a second", "float32"), ("the same in bf16", "bf16"))},
    ),
}  # fmt: skip
"""In the order of their value. Later work adds its own."""


def main(options: Options) -> None:
    """The story: pack, or document; or measure one after the other within the budget, and print the table."""
    if options.pack is not None:
        return pack(options.pack)
    if options.document:
        return document()
    ends = time.monotonic() + 60 * options.budget_minutes - RESERVE_S
    if (ROOT / ".gpu").exists():
        os.environ["JEPA_SHARED"] = str(ROOT / ".gpu")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    path = options.output_dir / "results.json"
    results = read_json(path) if path.exists() else {"device": describe_device(), "measurements": {}}
    made = [results["measurements"], *(read_json(file)["measurements"] for file in options.earlier)]
    done = {name for found in made for name, one in found.items() if "failed" not in one}
    for name, measurement in MEASUREMENTS.items():
        if name in done or name not in (options.only or MEASUREMENTS):
            continue
        if (left := ends - time.monotonic()) < LEAST_S:
            print(f"{name}: no time left")
            break
        results["measurements"][name] = measure(name, measurement, left, options)
        write_json(path, results)
    print(table({results["device"]["name"]: results["measurements"]}))
    return None


def measure(name: str, measurement: Measurement, left_s: float, options: Options) -> dict[str, Any]:
    """Run a process within its limit, in a rehearsal the budget: its figures, seconds, memory, and why it failed."""
    kind = "rehearsed" if options.rehearse else "whole"
    folder = options.work_dir.absolute() / kind / name
    log = folder / "output.log"
    folder.mkdir(parents=True, exist_ok=True)
    limit_s = left_s if options.rehearse else min(left_s, measurement.limit_s)
    command: list[str] = []
    for word in shlex.split(measurement.command + (f" {measurement.small}" if options.rehearse else "")):
        command += copy_videos(folder, 1 if options.rehearse else COPIES) if word == "VIDEOS" else [
            word.replace("FOLDER", str(folder))]  # fmt: skip
    print(f"{name}, at most {limit_s:.0f} s: {' '.join(command)}"[:400], flush=True)
    began, failed, memory = time.monotonic(), "", 0.0
    with log.open("wb") as output:
        # Threads of a rehearsal would wait in busy loops for cores that others use.
        environment = os.environ | ({"LOKY_MAX_CPU_COUNT": "1", "OMP_NUM_THREADS": "1"} if options.rehearse else {})
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        while process.poll() is None and time.monotonic() - began < limit_s:
            memory = max(memory, gpu_memory_mb())
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if process.poll() is None:
            failed = f"stopped after {limit_s:.0f} s"
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        elif process.returncode:
            failed = f"exit code {process.returncode}"
        process.wait()
    figures = read_figures(folder)
    if not failed and (missing := [key for key in measurement.figures if key not in figures]):
        failed = f"no {missing[0]}"
    found = {"figures": figures, "seconds": time.monotonic() - began, "gpu_memory_mb": memory}
    print(f"  {failed or 'done'} after {found['seconds']:.0f} s", flush=True)
    tail = log.read_text(errors="replace")[-TAIL:]
    return found | ({"failed": failed, "output": tail} if failed else {})


def copy_videos(folder: Path, copies: int) -> list[str]:
    """The driving clip, as often as there are videos to be, each with an end of its own: doubles would be left out."""
    paths = [folder.parent / "videos" / f"{number:02}.mp4" for number in range(copies)]
    paths[0].parent.mkdir(exist_ok=True)
    for number, path in enumerate(paths):
        if not path.exists():
            free = (16).to_bytes(4) + b"free" + number.to_bytes(8)  # a box that readers pass over
            path.write_bytes(shared("driving/b_01.mp4").read_bytes() + free)
    return list(map(str, paths))


def read_figures(folder: Path) -> dict[str, Any]:
    """What a process has left: numbers of results.json by dotted names, or of pytest's results.xml."""
    if (path := folder / "results.xml").exists():
        suite = next(ElementTree.parse(path).getroot().iter("testsuite"))
        tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
        failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
        return {"tests passed": tests - failed - skipped, "tests failed": failed, "tests skipped": skipped}
    if not (path := folder / "results.json").exists():
        return {}
    found = read_json(path)
    return flat(found if isinstance(found, dict) else {str(at): value for at, value in enumerate(found)})


def gpu_memory_mb() -> float:
    """What is in use on the GPU, by all processes; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        return float(subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.split()[0])
    return 0.0


def describe_device() -> dict[str, str]:
    """What all was measured on and with."""
    asked = {"driver": ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
             "commit": ["git", "rev-parse", "HEAD"]}  # fmt: skip
    said = {"name": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {os.cpu_count()} cores"}
    for name, command in asked.items():
        try:
            said[name] = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            said[name] = ""
    return said | {"torch": torch.__version__, "python": platform.python_version(), "cores": str(os.cpu_count())}


def table(devices: dict[str, dict[str, Any]]) -> str:
    """What is measured and what is owed, a column for each device."""
    rows: list[list[object]] = [["GPU: measured / owed", "bar", *(devices or ["owed"])]]
    for name, measurement in MEASUREMENTS.items():
        for key, (label, bar) in measurement.figures.items():
            cells = [cell(of_device.get(name, {}), key) for of_device in devices.values()]
            rows.append([label, bar, *(cells or ["owed"])])
    return markdown(rows)


def cell(found: dict[str, Any], key: str) -> str:
    """A figure, or why there is none."""
    value = found.get("figures", {}).get(key)
    absent = "none" if key in found.get("figures", {}) else "owed"
    figure = (
        absent if value is None else f"{value:,.4g}" if isinstance(value, float) and value < 1e4 else f"{value:,.0f}"
    )
    return f"{figure} ({found['failed']})" if "failed" in found else figure


def document() -> None:
    """Put the table of all committed results into the documentation."""
    found = [read_json(path) for path in sorted(COMMITTED.glob("*.json"))]
    made = table({results["device"]["name"]: results["measurements"] for results in found})
    before, rest = DOCUMENT.read_text().split(BEGIN)
    write_whole(DOCUMENT, f"{before}{BEGIN}\n\n{made}\n\n{END}{rest.split(END)[1]}".encode())


if __name__ == "__main__":
    run_command(main, Options)
