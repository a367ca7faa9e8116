r"""Training as the commands do it against a plain loop over data that are there already, and its waiting for data.

  python -m benchmarks.training --rounds 3 --backbone resnet18 --size 112
  python -m benchmarks.training --rounds 3 --encoder-options="--precision bf16"

Encoder: `pretrain_encoder.py` on the driving clips of `$JEPA_SHARED/driving` (default `../shared/driving`), from video,
beside an eager float32 loop of the same network, views, objective and optimiser over decoded batches on the device.
Predictor: `train_predictor.py` on a cache of random embeddings beside the same steps on windows that lie on the device.
Contestants take turns; medians of samples per second, which leave out start-up, validation and logging for all alike.
"""

import json
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

from benchmarks.common import ROOT, script, shared, words
from data.cache import ClipKey, Column, EmbeddingCache, Provenance
from data.cache_writer import CacheWriter, EmbeddedClip
from data.clips import FrameClips
from data.manifest import check_videos
from data.video import IMAGE_FPS, TRANSFORM
from data.windows import Windows
from jepa.encoder import EncoderConfig, create_encoder
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines import pretrain_encoder, train_predictor
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

FPS = 8.0
HELD_BATCHES = 8


@dataclass(frozen=True)
class Options:
    """Time the two trainers."""

    rounds: int = 3
    """Turns of each contestant; the median counts."""
    backbone: str = "small_conv"
    """The encoder's."""
    size: int = 64
    """Height and width of the frames in pixels."""
    batch_size: int = 128
    """Pairs of frames; and windows, for the predictor."""
    steps: int = 60
    """Steps of the encoder that are timed, after as many that are not; ten times as many of the predictor."""
    encoder_options: str = "--precision bf16"
    """Options of `pretrain_encoder.py`."""
    predictor_options: str = ""
    """Options of `train_predictor.py`."""
    trainers: tuple[str, ...] = ("encoder", "predictor")
    """Which to time."""
    output_dir: Path = Path("runs/benchmarks/training")
    """Where runs and results.json are left."""


def main(options: Options) -> None:
    """The story: for each trainer, the command and the plain loop in turns; compare."""
    require(options.rounds > 0, f"--rounds is {options.rounds}: it must be positive")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(joblib.cpu_count())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{options.backbone}, {options.size}x{options.size}, batch {options.batch_size}, on {name}")
    results: dict[str, float] = {}
    if "encoder" in options.trainers:
        paths = tuple(sorted(shared("driving").glob("*.mp4")))
        plain = plain_encoder(paths, options, device)
        results |= compare("encoder", lambda: command_encoder(paths, options), plain, options)
    if "predictor" in options.trainers:
        cache = write_cache(options.output_dir / "cache")
        plain = plain_predictor(cache, options, device)
        results |= compare("predictor", lambda: command_predictor(cache, options), plain, options)
    write_json(options.output_dir / "results.json", {"device": name, **results})


def compare(
    name: str, command: Callable[[], tuple[float, float]], plain: Callable[[], float], options: Options
) -> dict[str, float]:
    """Both in turns: samples per second, their ratio, and the command's share of waiting."""
    turns = [(*command(), plain()) for _ in range(options.rounds)]
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


def last_entry(command: str, folder: Path, *given: object) -> tuple[float, float]:
    """Samples per second and share of waiting in the second half of a run."""
    options = words(*given, {"output-dir": folder, "tracker": "none", "overwrite": True, "checkpoint-every": 10**9})
    done = subprocess.run([sys.executable, *script(command), *options], capture_output=True, text=True, cwd=ROOT)
    require(done.returncode == 0, f"{command} failed: {done.stderr[-2000:]}")
    last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    return last["samples_per_second"], last["data_wait_fraction"]


def command_encoder(paths: tuple[Path, ...], options: Options) -> tuple[float, float]:
    """The command, from video."""
    steps = {"steps": 2 * options.steps, "log-every": options.steps, "batch-size": options.batch_size}
    network = {"encoder.backbone": options.backbone, "encoder.image-size": [options.size] * 2,
               "encoder.pooling": pooling(options)}  # fmt: skip
    given = ({"videos": paths, "fps": FPS}, steps, network, shlex.split(options.encoder_options))
    return last_entry("pretrain_encoder", options.output_dir / "encoder", *given)


def pooling(options: Options) -> str:
    """Flattened maps of large backbones would make a head larger than they are."""
    return "flatten" if options.backbone == "small_conv" else "average"


def plain_encoder(paths: tuple[Path, ...], options: Options, device: torch.device) -> Callable[[], float]:
    """An eager float32 loop over decoded batches on the device."""
    size = (options.size, options.size)
    videos, _ = check_videos(paths, fps=FPS, manifest=options.output_dir / "videos.jsonl")
    clips = FrameClips(videos, size, fps=FPS, batch_size=options.batch_size)
    batches = [batch.frames.to(device) for batch in islice(clips.batches({}), HELD_BATCHES)]
    config = EncoderConfig(backbone=options.backbone, image_size=size, pooling=pooling(options))  # type: ignore[arg-type]
    same = pretrain_encoder.Options(videos=paths, encoder=config)
    network = pretrain_encoder.Pretraining(create_encoder(config), same).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=False)
    generator = torch.Generator(device).manual_seed(0)

    def step(index: int) -> None:
        frames = pretrain_encoder.relight(batches[index % HELD_BATCHES], same.views, generator)
        _, outputs, error = network(frames)
        optimizer.zero_grad()
        pretrain_encoder.loss_of(outputs, error, same, generator).loss.backward()
        optimizer.step()

    return lambda: rate(step, options.steps, options.batch_size, device)


def write_cache(folder: Path, clips: int = 500, length: int = 64, dimension: int = 64) -> Path:
    """A cache of random embeddings."""
    if not folder.exists():
        provenance = Provenance(
            encoder="benchmark", encoder_fingerprint="benchmark", fps=FPS, image_fps=IMAGE_FPS, image_size=(64, 64),
            window=1, transform=TRANSFORM, precision="fp32", columns={"embeddings": Column("float16", (dimension,))},
            versions={},
        )  # fmt: skip
        ticks = np.arange(length)
        with CacheWriter(folder, provenance) as writer:
            for clip in range(clips):
                embeddings = np.random.default_rng(clip).normal(size=(length, dimension)).astype(np.float32)
                key = ClipKey(f"{folder.name}_{clip}.mp4", 1, 1, 0.0)
                writer.add(EmbeddedClip(key, {"embeddings": embeddings}, ticks / FPS, ticks))
    return folder


def command_predictor(cache: Path, options: Options) -> tuple[float, float]:
    """The command, from the cache."""
    steps, validation = 10 * options.steps, write_cache(options.output_dir / "validation")
    given = {"train-cache": cache, "validation-cache": validation, "steps": 2 * steps, "log-every": steps,
             "batch-size": options.batch_size}  # fmt: skip
    folder = options.output_dir / "predictor"
    return last_entry("train_predictor", folder, given, shlex.split(options.predictor_options))


def plain_predictor(folder: Path, options: Options, device: torch.device) -> Callable[[], float]:
    """The same steps on windows that lie on the device."""
    cache, config, steps = EmbeddingCache(folder), MLPConfig(), train_predictor.Options().rollout_steps
    predictor = Predictor(config, cache.shape, fps=FPS, encoder_fingerprint="benchmark")
    losses = train_predictor.Losses(predictor, torch.ones(steps)).to(device)
    windows, generator = Windows(cache, config.context + steps), torch.Generator().manual_seed(0)
    held = [windows.take(windows.sample(options.batch_size, generator)).to(device) for _ in range(HELD_BATCHES)]
    noise, chance = [0.1 * torch.randn_like(part[:, : config.context]) for part in held], torch.Generator(device)
    optimizer = torch.optim.AdamW(losses.parameters(), lr=1e-3, fused=True)

    def step(index: int) -> None:
        window = held[index % HELD_BATCHES]
        past = window[:, : config.context] + noise[index % HELD_BATCHES]
        terms = losses(past, window[:, config.context :], chance)
        optimizer.zero_grad()
        (terms["rollout_loss"] + terms["one_step_loss"]).backward()
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
    run_command(main, Options)
