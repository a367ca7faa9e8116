r"""Harm what a stranger may have sent: it is refused in one line, or found by `inspect --verify`, or harmless.

  python -m benchmarks.fuzz_artefacts --mutations 200

Artefacts, a cache, training states, the record of a run, a table and a preset are made small; then
one file of them is cut off, bytes of it are flipped or, of JSON, a value is replaced by a hostile one, and what it
belongs to is opened as the commands open it. Faults, as in `benchmarks.fuzz_videos`, and two more:

- silent skip: other weights or embeddings than were written come out, and `inspect --verify` does not find them;
- too much: more than `SECONDS` of computing, or `BYTES`, beyond what opening the sound thing takes.
"""

import json
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.common import make_encoder, write_cache
from benchmarks.fuzz_videos import FuzzOptions, Outcome, fuzz, mutate
from data.cache import EmbeddingCache
from data.errors import DataError
from data.sidecar import read_sidecar
from jepa.baselines import Ridge
from jepa.calibration import Calibration
from jepa.errors import ConfigurationError
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines.pretrain_encoder import Options as Pretraining
from pipelines.run.artefacts import save_artefact
from pipelines.run.checkpoints import Checkpoints
from pipelines.run.command import UserError, run_command
from pipelines.run.encoders import load_encoder
from pipelines.run.files import write_json
from pipelines.run.folder import FORMAT, read_mark
from pipelines.run.models import calibration_artefact, load_predictor
from pipelines.run.options import parse

SECONDS, BYTES = 2.0, 300_000_000
HOSTILE = (
    None, True, -1, 0, 0.5, 10**9, 10**30, 1e308, float("inf"), float("nan"), "", "../../mine", "x" * 10_000, "\x1b[2J",
    [], {}, [[]] * 1000, json.loads("[" * 90 + "]" * 90),
)  # fmt: skip


@dataclass(frozen=True)
class Options(FuzzOptions):
    """Open harmed artefacts, caches, states, records, tables and presets, and count what goes wrong."""


def main(options: Options) -> None:
    """The story: make something sound of each kind, harm a file of it, open it in a child, judge; again and again."""
    with tempfile.TemporaryDirectory() as made:
        sound = Path(made)
        make(sound)
        paths = [path for path in sorted(sound.rglob("*")) if path.is_file() and path.name != ".lock"]

        def harm(folder: Path, generator: np.random.Generator) -> tuple[str, Path, Path]:
            chosen = paths[generator.integers(len(paths))].relative_to(sound)
            kind = chosen.parts[0]
            shutil.copytree(sound / kind, folder / kind)
            content, what = harm_file((folder / chosen).read_bytes(), chosen.suffix, generator)
            (folder / chosen).write_bytes(content)
            return f"{chosen}: {what}", folder / kind, sound / kind

        fuzz(options, harm, open_harmed)


def make(folder: Path) -> None:
    """A folder for each of `OPENERS`."""
    make_encoder(folder / "encoder", 16, 8)
    embeddings = np.random.default_rng(0).normal(size=(3, 40, 8))
    write_cache(folder / "cache", [(f"/{name}.mp4", one) for name, one in zip("abc", embeddings, strict=True)], 8)
    predictor = Predictor(MLPConfig(context=2, width=8), (8,), fps=10.0, encoder_fingerprint="ab")
    calibration = Calibration(Ridge(10.0, 2, mean=torch.zeros(8), std=torch.ones(8), on_grid=False), 3)
    (folder / "run").mkdir()
    save_artefact(folder / "run" / "predictor", "predictor", predictor.description(), predictor)
    save_artefact(folder / "run" / "calibration", *calibration_artefact(calibration, predictor, "3"))
    mark = {"format": FORMAT, "command": "train_predictor", "finished": True, "options": {}, "inputs": {"train": "3"}}
    write_json(folder / "run" / "run.json", mark)
    saver = Checkpoints(Accelerator(cpu=True), folder / "state")
    saver.save((3, {"network": predictor.state_dict(), "best": {"step": 1}}, {"place": {"step": 3}}))
    for name in ("table", "preset"):
        (folder / name).mkdir()
    rows = "".join(f"{tick / 10},{tick}\n" for tick in range(40))
    (folder / "table" / "a.csv").write_text(f"time_s,speed\n{rows}")
    (folder / "preset" / "a.yaml").write_text("pretrain_encoder:\n  batch_size: 8\n  encoder: {image_size: [16, 16]}\n")


def harm_file(content: bytes, suffix: str, generator: np.random.Generator) -> tuple[bytes, str]:
    """Another file, and what was done to it."""
    if suffix != ".json" or generator.random() < 0.5:
        return mutate(content, generator)
    value = json.loads(content)
    places = [place for place in walk(value) if place]
    *way, last = places[generator.integers(len(places))]
    inner = value
    for step in way:
        inner = inner[step]
    hostile = HOSTILE[generator.integers(len(HOSTILE))]
    inner[last] = hostile
    return json.dumps(value).encode(), f"{[*way, last]} is {hostile!r:.40}"


def walk(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values inside one of JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way, *(place for key, one in inner for place in walk(one, (*way, key)))]


def open_cache(folder: Path) -> str:
    """Embeddings in short, once they are verified."""
    cache = EmbeddingCache(folder)
    for clip in cache.clips:
        cache.unbroken_runs(clip)
        if not cache.is_intact(clip):
            raise DataError(f"{clip.key.source} is not what was written")
    return str([cache.take(clip.rows).sum() for clip in cache.clips])


def open_run(folder: Path) -> str:
    """A predictor and its calibration, and the record of their run."""
    read_mark(folder)
    predictor, calibration = load_predictor(folder)
    return weights_of(predictor) + weights_of(calibration)


def open_state(folder: Path) -> str:
    """What `--resume` would go on from."""
    state = Checkpoints(Accelerator(cpu=True), folder).load_newest()
    return str(state)


def open_preset(folder: Path) -> str:
    """Nothing is said of options: others may be asked for."""
    sys.argv = ["pretrain_encoder.py", "--videos", "x", "--preset", str(folder / "a.yaml")]
    try:
        return str(parse(Pretraining, "pretrain_encoder"))[:0]
    except SystemExit as error:
        raise UserError("the command line says why") from error


def open_table(folder: Path) -> str:
    """Nor of numbers in a table."""
    read_sidecar(folder / "a.mp4", np.arange(40) / 10, columns=["speed"], tolerance_s=0.05)
    return ""


def weights_of(module: torch.nn.Module) -> str:
    """Weights in short."""
    return str([value.double().sum().item() for value in module.state_dict().values()])


OPENERS: dict[str, Callable[[Path], str]] = {
    "encoder": lambda folder: weights_of(load_encoder(folder)),
    "run": open_run,
    "cache": open_cache,
    "state": open_state,
    "table": open_table,
    "preset": open_preset,
}
"""What opens each kind, as the commands do, and tells in short what came out."""


def open_harmed(folder: Path, sound: Path) -> Outcome:
    """What came of opening what was harmed, beside what is sound."""
    opener = OPENERS[sound.name]
    expected = opener(sound)
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = opener(folder)
        outcome = Outcome("nothing seen" if found == expected else "silent skip", "other values, and nothing is said")
    except (DataError, ConfigurationError, UserError, OSError) as error:
        outcome = Outcome("refused", str(error))
        if "\n" in str(error):
            outcome = Outcome("traceback", f"more than a line: {error}")
    except Exception:
        outcome = Outcome("traceback", traceback.format_exc())
    seconds = time.process_time() - began
    size = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
    too_much = Outcome("too much", f"{seconds:.1f} s, {size / 1e6:.0f} MB: {outcome.detail}")
    return too_much if seconds > SECONDS or size > BYTES else outcome


if __name__ == "__main__":
    run_command(main, Options)
