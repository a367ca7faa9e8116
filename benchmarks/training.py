r"""Training as the commands do it against a plain loop over data that are there already, and its waiting for data.

  python -m benchmarks.training --rounds 3
  python -m benchmarks.training --rounds 3 --backbone resnet18 --size 112

Encoder: `pretrain_encoder.py` on the driving clips of `$JEPA_SHARED/driving`, from video, beside an eager float32 loop
of the same network, views, objective and optimiser over decoded batches on the device. Predictor: `train_predictor.py`
on a cache of random embeddings beside the same steps on windows that lie on the device. Contestants take turns; medians
of samples per second, which leave out start-up, validation and logging for all alike.
"""

import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import joblib
import numpy as np
import torch

from benchmarks.common import FPS, run, shared, write_cache, write_results
from data.cache import EmbeddingCache
from data.clips import FrameClips
from data.manifest import check_videos
from data.windows import Windows
from jepa.config import Bounded, PositiveInt
from jepa.encoder import EncoderConfig, create_encoder
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines import pretrain_encoder, train_predictor
from pipelines.run.command import run_command

VIDEO_FPS = 8.0
HELD_BATCHES = 8


@dataclass(frozen=True)
class Options(Bounded):
    """Time the two trainers."""

    rounds: PositiveInt = 3
    """Turns of each contestant; the median counts."""
    backbone: str = "small_conv"
    """The encoder's."""
    size: PositiveInt = 64
    """Height and width of the frames in pixels."""
    batch_size: PositiveInt = 128
    """Pairs of frames; and windows, for the predictor."""
    steps: PositiveInt = 60
    """Steps of the encoder that are timed, after as many that are not; ten times as many of the predictor."""
    encoder_options: str = "--precision bf16"
    """Options of `pretrain_encoder.py`."""
    videos: tuple[Path, ...] = ()
    """Other videos than the driving clips."""
    dimension: PositiveInt = 64
    """Numbers of an embedding that the predictor learns from."""
    width: PositiveInt = 512
    """Width of the predictor."""
    trainers: tuple[str, ...] = ("encoder", "predictor")
    """Trainers to time."""
    output_dir: Path = Path("runs/benchmarks/training")
    """Where runs and results.json are left."""


def main(options: Options) -> None:
    """The story: for each trainer, the command and the plain loop in turns; compare."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(joblib.cpu_count())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    print(f"{options.backbone}, {options.size}x{options.size}, batch {options.batch_size}, on {name}")
    contestants = {"encoder": encoder_contestants, "predictor": predictor_contestants}
    results: dict[str, float] = {}
    for trainer in options.trainers:
        results |= compare(trainer, *contestants[trainer](options, device), options)
    write_results(options.output_dir, {"device": name, **results})


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


def last_entry(command: str, folder: Path, steps: int, *given: object) -> tuple[float, float]:
    """Samples per second and share of waiting in the second half of a run of twice so many steps."""
    logging = {"log-every": steps, "tracker": "none", "checkpoint-every": 10**9}
    run(command, *given, {"steps": 2 * steps, "output-dir": folder, "overwrite": True}, logging)
    last = json.loads((folder / "curve.jsonl").read_text().splitlines()[-1])
    return last["samples_per_second"], last["data_wait_fraction"]


def encoder_contestants(
    options: Options, device: torch.device
) -> tuple[Callable[[], tuple[float, float]], Callable[[], float]]:
    """The command, from video; and an eager float32 loop over decoded batches on the device."""
    paths = options.videos or tuple(sorted(shared("driving").glob("*.mp4")))
    size = (options.size, options.size)
    # Flattened maps of large backbones would make a head larger than they are.
    pooling = "flatten" if options.backbone == "small_conv" else "average"
    network = {"encoder.backbone": options.backbone, "encoder.image-size": size, "encoder.pooling": pooling}
    given = [{"videos": paths, "fps": VIDEO_FPS, "batch-size": options.batch_size}, network,
             shlex.split(options.encoder_options)]  # fmt: skip
    videos, _ = check_videos(paths, fps=VIDEO_FPS, manifest=options.output_dir / "videos.jsonl")
    clips = FrameClips(videos, size, fps=VIDEO_FPS, batch_size=options.batch_size)
    batches = [batch.frames.to(device) for batch in islice(clips.batches({}), HELD_BATCHES)]
    config = EncoderConfig(backbone=options.backbone, image_size=size, pooling=pooling)
    same = pretrain_encoder.Options(videos=paths, encoder=config)
    learner = pretrain_encoder.Pretraining(create_encoder(config), same).to(device)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, fused=False)
    generator = torch.Generator(device).manual_seed(0)

    def step(index: int) -> None:
        frames = same.views(batches[index % HELD_BATCHES], generator)
        _, outputs, error = learner(frames)
        optimizer.zero_grad()
        pretrain_encoder.loss_of(outputs, error, same, generator).loss.backward()
        optimizer.step()

    folder = options.output_dir / "encoder"
    return (
        lambda: last_entry("pretrain_encoder", folder, options.steps, *given),
        lambda: rate(step, options.steps, options.batch_size, device),
    )


def predictor_contestants(
    options: Options, device: torch.device
) -> tuple[Callable[[], tuple[float, float]], Callable[[], float]]:
    """The command, from a cache of random embeddings; and the same steps on windows that lie on the device."""
    caches = {"train-cache": options.output_dir / "cache", "validation-cache": options.output_dir / "validation"}
    for seed, folder in enumerate(caches.values()):
        generator = np.random.default_rng(seed)
        clips = ((f"/{folder.name}_{clip}.mp4", generator.normal(size=(64, options.dimension))) for clip in range(500))
        write_cache(folder, clips, options.dimension)
    cache, config = EmbeddingCache(caches["train-cache"]), MLPConfig(width=options.width)
    ahead = train_predictor.Options().rollout_steps
    predictor = Predictor(config, cache.shape, fps=FPS, encoder_fingerprint="benchmark")
    losses = train_predictor.Losses(predictor, torch.ones(ahead)).to(device)
    windows, draws = Windows(cache, config.context + ahead), torch.Generator().manual_seed(0)
    held = [windows.take(windows.sample(options.batch_size, draws)).to(device) for _ in range(HELD_BATCHES)]
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

    folder, steps, given = options.output_dir / "predictor", 10 * options.steps, {"batch-size": options.batch_size}
    given["predictor.width"] = options.width
    return (
        lambda: last_entry("train_predictor", folder, steps, caches, given),
        lambda: rate(step, steps, options.batch_size, device),
    )


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
