r"""Beside the stages: how well do an encoder's embeddings tell classes of still images apart?

  python pipelines/probe_encoder.py --images cifar10.zip --encoder runs/encoder/encoder --output-dir runs/probe_encoder

`--images` is a folder or a zip with `train` and `test` (or `val`), each with a folder for each class; or give the test
images apart with --test-images. Everything is fitted on training images, and judged on test images:

  knn     votes of the nearest training embeddings by cosine (k = 20 and 200, temperature .07)
  ridge   closed form, its penalty chosen by leave-one-out: seconds
  linear  the usual linear evaluation: a linear classifier trained by SGD on the frozen encoder, with random crops and
          mirroring; its learning rate is chosen on a tenth of the training images that it never learns from

Beside the embeddings: the expander's outputs, the same encoder with new weights (a frozen backbone keeps its own), and
as many principal components of the pixels. Leaves `probes.json`, `metrics.json` and `config.json`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from data.images import Images, find_images
from data.views import Augmentation, augment
from jepa.classification import LinearProbes, accuracy, knn_scores, ridge_scores
from jepa.encoder import FrameEncoder
from pipelines.artefacts import load_encoder, load_expander
from pipelines.optimizer import lr_at
from pipelines.stage import RunFolder, counted, parse_bytes, require, run_stage, write_json

BATCH = 256
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Learning rates of the linear probe, to choose among, at batches of 256."""
LINEAR_VIEW = Augmentation(smallest_crop=0.08, jitter_probability=0, grey_probability=0)
"""Random crop and mirroring, as is usual in linear evaluation."""
HELD_OUT = 10
"""One of so many training images is held out from the linear probe, to choose its learning rate by."""

Representation = Callable[[Tensor], Tensor]
"""Frames (B, 3, H, W), float in [0, 1], to (B, D)."""


@dataclass(frozen=True)
class Options:
    """Classify still images by their embeddings."""

    images: Path
    """A folder, or a zip, with a folder of images for each class, in `train` and `test` or `val` where it has both."""
    encoder: Path = Path("runs/encoder/encoder")
    """The encoder; of a run's folder that holds its expander too, this is probed as well."""
    test_images: Path | None = None
    """Where the test images are, if not beside the training images."""
    neighbours: tuple[int, ...] = (20, 200)
    """Of the nearest-neighbour classifiers; of fewer training images, all."""
    epochs: int = 100
    """Passes over the training images of the linear probe; 0 to leave it out, for it takes by far the longest."""
    fraction: float = 1.0
    """Share of the training and test images that is used, evenly over all: to see quickly that everything works."""
    memory: str = "8GB"
    """Most memory for decoded images; they are kept on the GPU, where there is one."""
    seed: int = 0
    """Of the untrained encoder, and of the linear probe's weights, order and crops."""
    output_dir: Path = Path("runs/probe_encoder")
    """Where the results are left."""
    overwrite: bool = False
    """Replace the results in the output folder."""


def main(options: Options) -> None:
    """The story: load, embed, classify in three ways, print."""
    require(options.epochs >= 0, f"--epochs is {options.epochs}: it must be at least 0")
    require(0 < options.fraction <= 1, f"--fraction is {options.fraction:g}: it must lie above 0 and not above 1")
    shown = " ".join(map(str, options.neighbours)) or "empty"
    require(min(options.neighbours, default=0) > 0, f"--neighbours is {shown}: give one or more positive numbers")
    memory = parse_bytes(options.memory, "--memory")
    output = RunFolder(options.output_dir, ("probes.json",))
    output.require_unfinished(options.overwrite)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(options.encoder).to(device)
    train, test = load_images(options, encoder.config.image_size, memory, device)
    classes = len(train.found.classes)
    inputs = {"train": str(train.found.root), "test": str(test.found.root), "encoder": encoder.fingerprint()}
    output.prepare(options, overwrite=True, inputs=inputs)

    torch.manual_seed(options.seed)
    representations: dict[str, Representation] = {"embedding": encoder}
    if (options.encoder.parent / "expander").is_dir():
        expander = load_expander(options.encoder.parent / "expander").to(device)
        representations["expander output"] = lambda frames: expander(encoder(frames))
    representations["untrained embedding"] = untrained(encoder)
    representations["pixels (principal components)"] = principal_components(train, encoder.embedding_dimension, device)
    results: dict[str, dict[str, float]] = {}
    for name, represent in representations.items():
        (known, train_labels), (asked, test_labels) = (
            embed_labelled(represent, images, name, device) for images in (train, test)
        )
        scores = {
            f"knn_{k}": knn_scores(known, train_labels, asked, classes, k)
            for k in sorted({min(k, len(known)) for k in options.neighbours})
        } | {"ridge": ridge_scores(known, train_labels, asked)}  # fmt: skip
        if options.epochs and name in ("embedding", "expander output"):
            scores["linear"] = linear_scores(represent, known, asked, train, options, name)
        results[name] = {
            f"{kind}_top{top}": accuracy(value, test_labels, top) for kind, value in scores.items() for top in (1, 5)
        }
    record: dict[str, Any] = {
        "train_images": len(known),
        "test_images": len(asked),
        "classes": classes,
        "refused": train.refused | test.refused,
        "accuracy": results,
    }
    write_json(options.output_dir / "probes.json", record)
    output.finish({f"{name.split(' (')[0].replace(' ', '_')}_{kind}": value
                   for name, row in results.items() for kind, value in row.items()})  # fmt: skip
    print(table(record))
    print(f"wrote {options.output_dir}/probes.json")


def load_images(options: Options, size: tuple[int, int], memory: int, device: torch.device) -> tuple[Images, Images]:
    """Training and test images, decoded where they fit in memory; classes are told by their folders' names."""
    train = Images(find_images(options.images, "train"), size)
    test = Images(find_images(options.test_images or options.images, "test"), size)
    classes = len(train.found.classes)
    require(classes > 1, f"{train.found.root}: its images are not in folders named after classes, at least two of them")
    require(
        train.found.root.resolve() != test.found.root.resolve(),
        f"{train.found.root} has no parts of the names train and test: name the test images with --test-images",
    )
    require(
        train.found.classes == test.found.classes,
        f"{test.found.root} has the classes {', '.join(test.found.classes)}, not those of {train.found.root}: "
        f"{', '.join(train.found.classes)}",
    )
    for images in (train, test):
        count = len(images.found.names)
        images.keep(np.linspace(0, count, round(count * options.fraction), endpoint=False).astype(int).tolist())
        if images.bytes_needed <= memory / 2:
            images.load(device)
    missing = classes - len(train.found.labels.unique())
    require(not missing, f"{train.found.root}: {missing} of its {classes} classes have no readable image in it")
    print(f"{counted(len(train.found.names), 'training image')}, {counted(len(test.found.names), 'test image')}, "
          f"{classes} classes; {len(train.refused) + len(test.refused)} refused")  # fmt: skip
    return train, test


def principal_components(images: Images, components: int, device: torch.device) -> Representation:
    """A projection of pixels on their principal components, from 5,000 of the images at most."""
    every = -(-len(images.found.names) // 5000)
    pixels = images.read(range(0, len(images.found.names), every)).to(device).flatten(1).float() / 255
    components = min(components, len(pixels) - 1, pixels.shape[1])
    mean = pixels.mean(dim=0)
    directions = torch.linalg.svd(pixels - mean, full_matrices=False).Vh[:components].T  # (pixels, components)
    return lambda frames: (frames.flatten(1) - mean) @ directions


def untrained(encoder: FrameEncoder) -> FrameEncoder:
    """The same encoder with new weights, but for those of a frozen backbone, which training never moved."""
    new = FrameEncoder(encoder.config).to(encoder.pixel_mean.device).eval()
    if encoder.config.frozen_backbone:
        new.backbone.load_state_dict(encoder.backbone.state_dict())
    return new


def embed_labelled(represent: Representation, images: Images, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) of all images that can be read, and their classes."""
    embeddings = embed(represent, images, name, device)
    labels = images.labels(range(len(images.found.names))).to(device)
    return embeddings[labels >= 0], labels[labels >= 0]


@torch.inference_mode()
def embed(represent: Representation, images: Images, name: str, device: torch.device) -> Tensor:
    """All images as they are, (N, D), on the device that the representation is computed on."""
    rows = range(len(images.found.names))
    starts = tqdm(rows[::BATCH], unit="batch", desc=f"{name}, {images.found.root.name}", leave=False)
    parts = []
    for start in starts:
        frames = images.read(rows[start : start + BATCH])
        parts.append(represent(frames.to(device).float() / 255).float())
    return torch.cat(parts)


def linear_scores(
    represent: Representation, known: Tensor, asked: Tensor, train: Images, options: Options, name: str
) -> Tensor:
    """Scores (M, classes) of test images by the linear probe, at the rate that is best on held-out training images."""
    rows = np.flatnonzero(train.labels(range(len(train.found.names))) >= 0)
    held_out, learnt = rows[::HELD_OUT], np.delete(rows, np.s_[::HELD_OUT])
    probes = LinearProbes(known.mean(dim=0), known.std(dim=0), len(train.found.classes), RATES).to(known.device)
    optimizer = torch.optim.SGD(probes.parameter_groups(), momentum=0.9)
    size = min(BATCH, len(learnt))
    total = options.epochs * (len(learnt) // size)
    bar = tqdm(total=total, unit="step", desc=f"linear probe, {name}", leave=False)
    for step, chosen in enumerate(batches(learnt, size, options.epochs, options.seed)):
        generator = torch.Generator(known.device).manual_seed(options.seed * 2**32 + step)
        frames = train.read(chosen.tolist()).to(known.device)
        with torch.no_grad():
            embeddings = represent(augment(frames.float() / 255, LINEAR_VIEW, generator))
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total, 0, group["peak_rate"])
        loss = probes.loss(embeddings, train.found.labels[chosen].to(known.device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
    bar.close()
    with torch.inference_mode():
        labels = train.found.labels[held_out]
        best = int(np.argmax([accuracy(scores, labels) for scores in probes(known[::HELD_OUT])]))
        return probes(asked)[best]


def batches(rows: np.ndarray, size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Full batches of rows in a new order for each epoch."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(rows)
        yield from rearrange(order[: len(order) // size * size], "(steps batch) -> steps batch", batch=size)


def table(record: dict[str, Any]) -> str:
    """The results on one screen, in per cent."""
    kinds = list(record["accuracy"]["embedding"])
    lines = [f"{'accuracy in per cent':32}" + "".join(f"{kind.replace('_', ' '):>15}" for kind in kinds)]
    for name, row in record["accuracy"].items():
        cells = [f"{100 * row[kind]:>15.2f}" if kind in row else f"{'':15}" for kind in kinds]
        lines.append(f"{name:32}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_stage(main, Options)
