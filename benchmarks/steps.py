r"""Where a step of the encoder's training spends its time, in milliseconds.

  python -m benchmarks.steps --backbone resnet18 --size 112 --batch-size 256

The parts of a step alone, and the whole of it on frames that are on the device: eager in float32, and in bf16 with
channels last, as `pretrain_encoder.py` does it, eager and compiled; each also with cuDNN's search for the fastest
algorithm. What the command takes beyond that is reading, logging and saving.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import write_results
from jepa.config import Bounded, PositiveInt
from jepa.encoder import EncoderConfig, create_encoder
from pipelines import pretrain_encoder
from pipelines.run.command import run_command


@dataclass(frozen=True)
class Options(Bounded):
    """Time the parts of a step."""

    backbone: str = "small_conv"
    """The encoder's."""
    size: PositiveInt = 64
    """Height and width of the frames in pixels."""
    batch_size: PositiveInt = 128
    """Pairs of frames."""
    repeats: PositiveInt = 30
    """Steps of each kind that count."""
    output_dir: Path = Path("runs/benchmarks/steps")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: frames onto the device, the parts one by one, the whole in each way."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = (options.size, options.size)
    config = EncoderConfig(backbone=options.backbone, image_size=size, pooling="average")
    same = pretrain_encoder.Options(videos=(), encoder=config)
    held = torch.randint(256, (options.batch_size, 2, 3, *size), dtype=torch.uint8)
    held = held.pin_memory() if device.type == "cuda" else held
    frames, generator = held.to(device), torch.Generator(device).manual_seed(0)
    outputs = torch.randn(options.batch_size, 2, same.expander.widths[-1], device=device, requires_grad=True)
    parts: dict[str, Callable[[], object]] = {
        "copy to the device": lambda: held.to(device, non_blocking=True),
        "views": lambda: same.views(frames, generator),
        "objective": lambda: pretrain_encoder.loss_of([outputs], None, same, generator).loss.backward(),
    }
    results = {name: milliseconds(part, options.repeats) for name, part in parts.items()}
    for searched in (False, True):
        torch.backends.cudnn.benchmark = searched
        for kind in ("float32", "bf16", "bf16 compiled"):
            name = kind + (", algorithms searched" if searched else "")
            results[name] = milliseconds(whole_step(kind, same, frames, generator), options.repeats)
    for name, value in results.items():
        print(f"  {name:40} {value:.2f} ms")
    write_results(options.output_dir, results)


def whole_step(
    kind: str, same: pretrain_encoder.Options, frames: torch.Tensor, generator: torch.Generator
) -> Callable[[], None]:
    """A step of training with a network of its own."""
    learner = pretrain_encoder.Pretraining(create_encoder(same.encoder), same).to(frames.device)
    if kind != "float32":
        learner = learner.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if kind.endswith("compiled"):
        learner.compile()
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-3, fused=kind != "float32")

    def step() -> None:
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=kind != "float32"):
            _, outputs, error = learner(same.views(frames, generator))
        pretrain_encoder.loss_of(outputs, error, same, generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, after a few that do not count, the device's queue empty at the end."""
    for counts in (False, True):
        began = time.perf_counter()
        for _ in range(repeats if counts else 3):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began) / repeats


if __name__ == "__main__":
    run_command(main, Options)
