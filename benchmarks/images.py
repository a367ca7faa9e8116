r"""CIFAR-10 with everything on the device: images, views, training and probe. How long to 90 % by a linear probe?

  python -m benchmarks.images --seconds 120

`examples/cifar10.py` makes its views in processes of the CPU, image by image; here they are made of whole batches on
the device. Network, expander and objective are the example's. Every few seconds, which do not count, a linear probe is
fitted on all training images; a power law through the later half of its errors says when they would be 10 %. Needs
`cifar10.zip`, or a part of it, in `$JEPA_SHARED/images`. Writes `results.json` after each probe.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn

from benchmarks.common import shared
from examples import cifar10
from jepa.config import Bounded, Positive, PositiveInt
from jepa.encoder import EncoderConfig, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import VICReg
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

WARMUP, GOAL, MOST_MINUTES = 200, 0.1, 7 * 24 * 60
"""Steps in which the learning rate grows to what it stays; error to be reached, and no projection is longer."""
IMAGES, EPOCHS = 50_000, 1000
"""What public benchmarks train on, and for how long."""


@dataclass(frozen=True)
class Options(Bounded):
    """Train an encoder of still images with all data on the device."""

    seconds: Positive = 120.0
    """Time to train."""
    probe_every: Positive = 12.0
    """Seconds of training between two probes."""
    backbone: str = "resnet18"
    """The encoder's; a ResNet begins with 3x3 pixels."""
    widths: tuple[PositiveInt, ...] = (2048, 2048, 2048)
    """The expander's."""
    batch_size: PositiveInt = 512
    """Images, each with two views."""
    learning_rate: Positive = 1e-3
    """AdamW's."""
    fraction: Positive = 1.0
    """Share of the images that is used."""
    compiled: bool = True
    """Compile the network."""
    output_dir: Path = Path("runs/benchmarks/images")
    """Folder for results.json."""


def main(options: Options) -> None:
    """The story: images onto the device, train and probe in turn, project."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = EncoderConfig(backbone=options.backbone, image_size=(32, 32), pooling="average", embedding_dimension=0)
    read = cifar10.Options(images=shared("images/cifar10.zip"), encoder=config)
    train, test = (split_on_device(split, read, options.fraction, device) for split in ("train", "test"))
    enough = f"{len(train[1])} images do not fill a batch of {options.batch_size}: take more, or a larger --fraction"
    require(len(train[1]) >= options.batch_size, enough)
    torch.manual_seed(0)
    encoder = create_encoder(config)
    if options.backbone.startswith("resnet"):
        encoder.backbone.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        encoder.backbone.maxpool = nn.Identity()
    network = cifar10.Network(encoder, Expander(encoder.shape[-1], ExpanderConfig(widths=options.widths)))
    network = network.to(device).to(memory_format=torch.channels_last)
    if options.compiled:
        network.compile()
    make_views = torch.compile(augment) if options.compiled else augment
    steps, curve, trained, done = train_steps(network, make_views, train[0], options), [], 0.0, 0
    next(steps)  # compiles
    while trained < options.seconds:
        began, views_s = time.monotonic(), 0.0
        while (now := time.monotonic() - began) < min(options.probe_every, options.seconds - trained):
            views_s += next(steps)
            done += 1
        trained += now
        curve.append({"seconds": trained, "images": done * options.batch_size, "accuracy": probe(encoder, train, test)})
        report(curve, views_s / now, len(train[1]), options)
        print(f"  {trained:6.1f} s, {done:,} steps: {100 * curve[-1]['accuracy']:.2f} %", flush=True)


def split_on_device(split: str, read: cifar10.Options, fraction: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 32, 32) and their classes (N,)."""
    images = cifar10.read_images(read.images, split, read, every=round(1 / fraction))
    pixels = rearrange(torch.from_numpy(images.pixels), "n h w c -> n c h w")
    return pixels.to(device), torch.from_numpy(images.labels).to(device)


def train_steps(
    network: cifar10.Network, make_views: Callable[[Tensor], Tensor], images: Tensor, options: Options
) -> Iterator[float]:
    """Train for ever; at each step the seconds that its views took, with the device's queue empty before and after."""
    device, objective = images.device, VICReg()
    generator = torch.Generator(device).manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=1e-4, fused=True)
    step = 0
    while True:
        for chosen in torch.randperm(len(images), generator=generator, device=device).split(options.batch_size):
            if len(chosen) < options.batch_size:
                break
            batch = images[chosen]
            wait_for(device)
            began = time.monotonic()
            views = make_views(torch.cat([batch, batch]))
            wait_for(device)
            views_s = time.monotonic() - began
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * min(1.0, (step + 1) / WARMUP)
            with torch.autocast(device.type, torch.bfloat16):
                outputs = network(views)
            objective(*outputs.chunk(2), generator=generator).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            yield views_s


def wait_for(device: torch.device) -> None:
    """Until what a GPU was asked for is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def augment(images: Tensor) -> Tensor:
    """The example's views, each image's its own, drawn from torch's own generator, with which a compiler can work.

    uint8 (B, 3, H, W) to float in [0, 1].
    """

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((len(images), *shape), device=images.device)

    area, ratio = draw(0.2, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    place = images.new_zeros(len(images), 2, 3, dtype=torch.float32)
    place[:, 0, 0], place[:, 1, 1] = width * draw(-1, 1).sign(), height  # flipped, half of them
    place[:, 0, 2], place[:, 1, 2] = (1 - width) * draw(-1, 1), (1 - height) * draw(-1, 1)
    grid = functional.affine_grid(place, list(images.shape), align_corners=False)
    views = functional.grid_sample(images.float() / 255, grid, padding_mode="reflection", align_corners=False)
    jittered = (draw(0, 1, 1, 1, 1) < 0.8).float()
    views = views * (1 + 0.4 * jittered * draw(-1, 1, 1, 1, 1))  # brightness, then contrast
    mean = views.mean(dim=(1, 2, 3), keepdim=True)
    views = mean + (views - mean) * (1 + 0.4 * jittered * draw(-1, 1, 1, 1, 1))
    jittered = jittered[..., 0]
    saturation = (1 + 0.2 * jittered * draw(-1, 1, 1, 1)) * (draw(0, 1, 1, 1) > 0.2)  # or grey
    matrices = colours(0.1 * jittered * draw(-1, 1, 1, 1), saturation)
    views = torch.einsum("b k c, b c h w -> b k h w", matrices, views)
    return torch.where(draw(0, 1, 1, 1, 1) < 0.1, torch.where(views > 0.5, 1 - views, views), views).clamp(0, 1)


def colours(turn: Tensor, saturation: Tensor) -> Tensor:
    """Matrices (B, 3, 3) that turn the hue by a share of the circle and scale the saturation, both (B, 1, 1)."""
    one, third = torch.eye(3, device=turn.device), torch.full((3, 3), 1 / 3, device=turn.device)
    cross = (one.roll(1, 0) - one.roll(-1, 0)) / math.sqrt(3)
    angle = 2 * math.pi * turn
    return third + saturation * (angle.cos() * (one - third) + angle.sin() * cross)


def probe(encoder: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    """Share of the test images that a linear probe of the embeddings classifies rightly."""
    encoder.eval()
    with torch.no_grad(), torch.autocast(train[0].device.type, torch.bfloat16):
        known, asked = (torch.cat([encoder(part).float() for part in split[0].split(1000)]) for split in (train, test))
    encoder.train()
    mean, std = known.mean(dim=0), known.std(dim=0) + 1e-6
    known, asked = (known - mean) / std, (asked - mean) / std
    linear = nn.Linear(known.shape[1], 10, device=known.device)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(200):
        loss = functional.cross_entropy(linear(known), train[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float((linear(asked).argmax(dim=1) == test[1]).float().mean())


def report(curve: list[dict[str, float]], views_share: float, images: int, options: Options) -> None:
    """Leave what is known so far."""
    rate = curve[-1]["images"] / curve[-1]["seconds"]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", {
        "images per second": rate,
        "share of the time making views": views_share,
        "linear probe": curve[-1]["accuracy"],
        "training images": images,
        "minutes to 90 %, projected": minutes_to_goal(curve),
        f"minutes for {EPOCHS} epochs of {IMAGES} images": EPOCHS * IMAGES / rate / 60,
        "curve": curve,
    })  # fmt: skip


def minutes_to_goal(curve: list[dict[str, float]]) -> float:
    """When a power law through the later half of the errors is at the goal; NaN where that is not within a week."""
    later = curve[len(curve) // 2 :]
    if len(later) < 2:
        return math.nan
    seconds = np.log([point["seconds"] for point in later])
    errors = np.log([1 - point["accuracy"] + 1e-9 for point in later])
    slope, start = np.polyfit(seconds, errors, 1)
    minutes = np.exp(min((math.log(GOAL) - start) / slope, 99)) / 60 if slope < 0 else math.inf
    return float(minutes) if minutes < MOST_MINUTES else math.nan


if __name__ == "__main__":
    run_command(main, Options)
