r"""Training as the stages do it: against a plain loop over data that are there already, and how long it waits for data.

  python benchmarks/training.py --rounds 3 --backbone resnet18 --size 112
  python benchmarks/training.py --rounds 3 --encoder-options="--compute.precision bf16"

Encoder: `pretrain_encoder.py` on the driving clips of `$JEPA_SHARED/driving` (default `../shared/driving`), from video,
beside an eager float32 loop of the same network, views, objective and optimiser over decoded batches on the device.
Predictor: `train_predictor.py` on a cache of random embeddings beside the same steps on windows that lie on the device.
Contestants take turns; medians of samples per second, which leave out start-up, validation and logging for all alike.

  python benchmarks/training.py --time-preset configs/presets/laptop_cpu.yaml

Time and memory of a shipped preset on this machine instead: both stages with it for a few steps, and what the whole run
would take at that rate. On one of 8 GPUs it is a projection that leaves out what they say to each other.
"""

import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import joblib
import numpy as np
import torch
import yaml
from torch import Tensor

from data.embedding_cache import CacheWriter, ClipKey, EmbeddedClip, EmbeddingCache, Provenance
from data.frames import FramePairs
from data.manifest import check_videos
from data.video import IMAGE_FPS, TRANSFORM
from data.views import ViewsConfig, make_views
from data.windows import Windows
from jepa.encoder import EncoderConfig, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import ObjectiveConfig, objective
from jepa.predictor import Predictor, PredictorConfig
from pipelines.pretrain_encoder import Pretraining
from pipelines.stage import require, run_stage, write_json
from pipelines.train_predictor import Losses
from pipelines.train_predictor import Options as TrainOptions

ROOT = Path(__file__).parent.parent
FPS = 8.0
HELD_BATCHES = 8


@dataclass(frozen=True)
class Options:
    """Time the two trainers."""

    rounds: int = 3
    """Turns of each contestant; the median counts."""
    backbone: str = "small_conv"
    """Of the encoder."""
    size: int = 64
    """Height and width of the frames in pixels."""
    batch_size: int = 128
    """Frames, each with two views; and windows, for the predictor."""
    steps: int = 60
    """Of the encoder that are timed, after as many that are not; ten times as many of the predictor."""
    encoder_options: str = "--compute.precision bf16"
    """For `pretrain_encoder.py`."""
    predictor_options: str = ""
    """For `train_predictor.py`."""
    time_preset: Path | None = None
    """Time this preset instead; only `videos`, `stages`, `steps` and `output_dir` count beside it."""
    stages: tuple[str, ...] = ("encoder", "predictor")
    """Which to time."""
    videos: tuple[Path, ...] = ()
    """Other videos than the driving clips."""
    output_dir: Path = Path("runs/benchmarks/training")
    """Where runs and results.json are left."""


def main(options: Options) -> None:
    """The story: for each trainer, the stage and the plain loop in turns; compare."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    folder = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared")) / "driving"
    paths = options.videos or tuple(sorted(folder.glob("*.mp4")))
    require(bool(paths), f"{folder}: the clips to measure on are not there; set JEPA_SHARED")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(joblib.cpu_count())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    if options.time_preset is not None:
        time_preset(options.time_preset, paths, options, name)
        return
    print(f"{options.backbone}, {options.size}x{options.size}, batch {options.batch_size}, on {name}")
    results: dict[str, float] = {}
    if "encoder" in options.stages:
        results |= compare(
            "encoder", lambda: train_encoder(paths, options), plain_encoder(paths, options, device), options
        )
    if "predictor" in options.stages:
        cache = write_cache(options.output_dir / "cache")
        results |= compare(
            "predictor", lambda: train_predictor(cache, options), plain_predictor(cache, options, device), options
        )
    write_json(options.output_dir / "results.json", {"device": name, **results})


def compare(
    name: str, stage: Callable[[], tuple[float, float]], plain: Callable[[], float], options: Options
) -> dict[str, float]:
    """Both in turns: samples per second, their ratio, and the stage's share of waiting."""
    turns = [(*stage(), plain()) for _ in range(options.rounds)]
    ours, waiting, theirs = (float(np.median(column)) for column in zip(*turns, strict=True))
    results = {
        f"{name}: samples per second": ours,
        f"{name}: of the plain loop": float(np.median([mine / other for mine, _, other in turns])),
        f"{name}: share of the time waiting for data": waiting,
        f"{name}: plain loop, samples per second": theirs,
    }
    for what, value in results.items():
        print(f"  {what:50} {value:.4g}")
    return results


def time_preset(preset: Path, paths: tuple[Path, ...], options: Options, device: str) -> None:
    """Both stages with a preset for a few steps; the rate, the memory, and the time of the whole run."""
    folder = options.output_dir.absolute()
    cache, validation = (write_cache(folder / name) for name in ("cache", "validation"))
    sections = yaml.safe_load(preset.read_text())
    inputs: dict[str, list[object]] = {
        "pretrain_encoder": ["--videos", *paths, "--fps", FPS],
        "train_predictor": ["--train-cache", cache, "--validation-cache", validation],
    }
    print(f"{preset.name} on {device}")
    for stage, arguments in inputs.items():
        steps = options.steps * (10 if stage == "train_predictor" else 1)
        last = run(stage, ["--preset", preset.absolute(), *arguments, "--steps", 2 * steps, "--log-every", steps],
                   folder / stage)  # fmt: skip
        per_second, waiting = rates(last)
        minutes = sections[stage]["steps"] * sections[stage]["batch_size"] / per_second / 60
        print(
            f"  {stage}: {per_second:.4g} samples/s, waiting {waiting:.1%}, "
            f"memory {float(last['memory_gigabytes']):.2f} GB, "
            f"{sections[stage]['steps']:,} steps in {minutes:.1f} minutes"
        )


def rates(last: dict[str, str]) -> tuple[float, float]:
    """Samples per second and share of waiting."""
    return float(last["samples_per_second"]), float(last["data_wait_fraction"])


def run(stage: str, arguments: list[object], folder: Path) -> dict[str, str]:
    """Run a stage; the last entry of its curve, which is of the second half of it."""
    command = [sys.executable, ROOT / "pipelines" / f"{stage}.py", *arguments, "--output-dir", folder,
               "--tracker", "csv", "--overwrite", "--checkpoints.every-steps", 10**9]  # fmt: skip
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    require(done.returncode == 0, f"{stage} failed: {done.stderr[-2000:]}")
    with (folder / "logs" / "curve.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def train_encoder(paths: tuple[Path, ...], options: Options) -> tuple[float, float]:
    """The stage, from video."""
    return rates(run(
        "pretrain_encoder",
        ["--videos", *paths, "--fps", FPS, "--steps", 2 * options.steps, "--log-every", options.steps,
         "--batch-size", options.batch_size, "--encoder.backbone", options.backbone,
         "--encoder.image-size", options.size, options.size, "--encoder.pooling", pooling(options),
         *shlex.split(options.encoder_options)],
        options.output_dir.absolute() / "encoder",
    ))  # fmt: skip


def pooling(options: Options) -> str:
    """Flattened maps of large backbones would make a head larger than they are."""
    return "flatten" if options.backbone == "small_conv" else "average"


def plain_encoder(paths: tuple[Path, ...], options: Options, device: torch.device) -> Callable[[], float]:
    """An eager float32 loop over decoded batches on the device."""
    size = (options.size, options.size)
    videos = check_videos(paths, FPS, options.output_dir / "videos.jsonl", IMAGE_FPS, False).videos
    pairs = FramePairs(videos, size, FPS, options.batch_size, seed=0)
    batches = [(batch.frames.to(device), batch.following.to(device)) for batch in islice(pairs, HELD_BATCHES)]
    pairs.close()
    config = EncoderConfig(backbone=options.backbone, image_size=size, pooling=pooling(options))  # type: ignore[arg-type]
    encoder = create_encoder(config)
    network = Pretraining(encoder, Expander(encoder.embedding_dimension, ExpanderConfig())).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=False)
    generator, directions = torch.Generator(device).manual_seed(0), torch.Generator().manual_seed(0)

    def step(index: int) -> None:
        views = make_views(*batches[index % HELD_BATCHES], ViewsConfig(), generator)
        _, outputs = network(torch.cat(views))
        first, second = outputs.chunk(2)
        optimizer.zero_grad()
        objective(first, second, ObjectiveConfig(), directions).loss.backward()
        optimizer.step()

    return lambda: rate(step, options.steps, options.batch_size, device)


def write_cache(folder: Path, clips: int = 500, length: int = 64, dimension: int = 64) -> Path:
    """A cache of random embeddings."""
    if not folder.exists():
        provenance = Provenance(
            encoder_fingerprint="benchmark", embedding_dimension=dimension, fps=FPS, image_fps=IMAGE_FPS,
            image_size=(64, 64), transform=TRANSFORM, dtype="float16", versions={},
        )  # fmt: skip
        ticks = np.arange(length)
        with CacheWriter(folder, provenance) as writer:
            for clip in range(clips):
                embeddings = np.random.default_rng(clip).normal(size=(length, dimension)).astype(np.float32)
                key = ClipKey(f"{folder.name}_{clip}.mp4", 1, 1, 0.0)
                writer.add(EmbeddedClip(key, embeddings, ticks / FPS, ticks))
    return folder


def train_predictor(cache: Path, options: Options) -> tuple[float, float]:
    """The stage, from the cache."""
    steps, validation = 10 * options.steps, write_cache(options.output_dir / "validation")
    return rates(run(
        "train_predictor",
        ["--train-cache", cache.absolute(), "--validation-cache", validation.absolute(),
         "--steps", 2 * steps, "--log-every", steps, "--batch-size", options.batch_size,
         *shlex.split(options.predictor_options)],
        options.output_dir.absolute() / "predictor",
    ))  # fmt: skip


def plain_predictor(folder: Path, options: Options, device: torch.device) -> Callable[[], float]:
    """The same steps on windows that lie on the device."""
    cache, config = EmbeddingCache(folder), PredictorConfig()
    predictor = Predictor(config, cache.provenance.embedding_dimension, FPS, "benchmark").to(device)
    steps = TrainOptions().rollout_steps
    losses = Losses(predictor, torch.ones(steps, device=device))
    windows = Windows(cache, config.context + steps)
    times_s = ((torch.arange(steps) + 1.0) / FPS).expand(1, options.batch_size, -1).to(device)
    chance = torch.Generator()
    generator = torch.Generator().manual_seed(0)
    drawn = [windows.sample(options.batch_size, generator)[0] for _ in range(HELD_BATCHES)]
    held: list[tuple[Tensor, Tensor]] = [
        (part[None].to(device), torch.randn_like(part)[None].to(device)) for part in drawn
    ]
    optimizer = torch.optim.AdamW(losses.parameters(), lr=1e-3, fused=True)

    def step(index: int) -> None:
        part, noise = held[index % HELD_BATCHES]
        window = predictor.standardise(part)
        past = window[:, :, : config.context] + 0.1 * predictor.change_std * noise[:, :, : config.context]
        terms = losses(past, window, times_s, chance)
        optimizer.zero_grad()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(losses.parameters(), 1.0)
        optimizer.step()

    return lambda: rate(step, 10 * options.steps, options.batch_size, device)


def rate(step: Callable[[int], None], steps: int, samples: int, device: torch.device) -> float:
    """Samples per second of a loop, after a few steps that do not count."""
    for index in range(steps // 10):
        step(index)
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.monotonic()
    for index in range(steps):
        step(index)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return steps * samples / (time.monotonic() - began)


if __name__ == "__main__":
    run_stage(main, Options)
