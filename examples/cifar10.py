r"""Making a VICReg: an encoder of still images that never sees a label, and what it knows of classes in the end.

  python examples/cifar10.py --images cifar10.zip --output-dir runs/cifar10
  python examples/cifar10.py --images cifar10.zip --output-dir runs/collapse --objective.variance-weight 0 --steps 300
  python examples/cifar10.py --images cifar10.zip --output-dir runs/resnet18 --steps 58500 --precision bf16 \
      --encoder.backbone resnet18 --encoder.pooling average --encoder.embedding-dimension 0 \
      --expander.widths 2048 2048 2048 --optimizer.learning-rate 1e-3

The same expander, objectives and alarms as for video; the two views are one image, cropped and coloured twice, by
torchvision. The first line reaches 57 % by nearest neighbours on two cores; the second collapses, and the alarm says
so (the expander's outputs all become one point, which two views always agree on); the third is a ResNet-18, on a GPU.

`--images` is a zip of `train/CLASS/*.jpg` and `test/CLASS/*.jpg`. Leaves `encoder/`, `accuracy.json` (test images
classified by the nearest training images and by linear evaluation, on the embeddings, the expander's outputs, the
untrained encoder and principal components of the pixels), `tsne.png` and the logs. Ctrl-C saves; --resume goes on.
"""

import copy
import io
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler, normalize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from jepa.config import NotNegativeInt, PositiveInt, SeveralInt
from jepa.diagnostics import encoder_alarms
from jepa.encoder import EncoderConfig, FrameEncoder, create_encoder
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import Objective, VICReg
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json
from pipelines.run.run import Run
from pipelines.run.training import OptimizerOptions, RunOptions

NEIGHBOURS, TEMPERATURE = 20, 0.07
"""As in Wu et al. 2018 (arXiv:1805.01978), who take 200 neighbours on ImageNet."""
WATCHED, DRAWN = 512, 2000
"""Test images that the alarms look at while training, and that t-SNE shows."""


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Train an encoder of still images without labels, and probe it."""

    images: Path
    """Zip of images, `train/CLASS/*.jpg` and `test/CLASS/*.jpg`."""
    output_dir: Path = Path("runs/cifar10")
    """Where the encoder, its accuracies and the logs are left."""
    steps: PositiveInt = 4000
    """Optimiser steps."""
    batch_size: SeveralInt = 256
    """Images in a batch, on each process, each with two views."""
    log_every: PositiveInt = 500
    """Steps between two entries in the log, each with a check for collapse."""
    workers: NotNegativeInt = 2
    """Processes that make views."""
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(image_size=(32, 32), embedding_dimension=128))
    expander: ExpanderConfig = field(default_factory=lambda: ExpanderConfig(widths=(512, 512, 512)))
    objective: Objective = field(default_factory=VICReg)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)


def main(options: Options) -> None:
    """Decode the images, train until two views agree and images differ, probe, save."""
    run = Run(options, "cifar10", ("encoder", "accuracy.json", "tsne.png"))
    train, test = (read_images(options.images, split, options) for split in ("train", "test"))
    encoder = create_encoder(options.encoder)
    untrained = copy.deepcopy(encoder).to(run.device).eval()
    network = Network(encoder, Expander(encoder.shape[-1], options.expander))
    run.begin({"images": str(options.images), "train": len(train.labels)},
              f"{len(train.labels):,} images of {len(train.classes)} classes")  # fmt: skip
    trained = run.prepare(network, options.optimizer)

    for step, batch in run.steps(
        lambda place: draw_batches(train, options, rank=run.rank, ranks=run.ranks, place=place)
    ):
        first, second = trained(rearrange(batch.views, "b v c h w -> (v b) c h w")).chunk(2)  # (B, E) each
        terms = options.objective(first, second, generator=run.generator(step, shared=True))
        run.update(terms.loss, terms.unweighted)
        if run.due:
            embeddings, outputs = embed_both(network, test.pixels[:: max(1, len(test.pixels) // WATCHED)], run.device)
            run.log({}, encoder_alarms(embeddings[:, None], outputs[:, None]))

    metrics: dict[str, Any] = {}
    artefacts: dict[str, tuple[str, Any, nn.Module]] = {}
    if run.is_main:
        accuracy, embedded = probe(network, untrained, (train, test), run.device)
        write_json(options.output_dir / "accuracy.json", accuracy)
        draw_tsne(embedded, test, options.output_dir / "tsne.png")
        metrics = {f"{name}_{kind}": value for name, row in accuracy.items() for kind, value in row.items()}
        for name, row in accuracy.items():
            print(f"{name:20}" + "".join(f"{kind:>8} {100 * value:6.2f} %" for kind, value in row.items()))
        artefacts = {"encoder": ("encoder", encoder.config, encoder)}
    run.finish(metrics, artefacts)


class Images(NamedTuple):
    """Decoded images of one split."""

    pixels: np.ndarray
    """uint8 (N, H, W, 3)."""
    labels: np.ndarray
    """int64 (N,), which of the classes."""
    classes: list[str]


def read_images(path: Path, split: str, options: Options, *, every: int = 1) -> Images:
    """Decode the images of a split, or one of so many. Raises `UserError` if there are none."""
    require(path.is_file() and zipfile.is_zipfile(path), f"{path}: there is no zip of images here")
    height, width = options.encoder.image_size
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.startswith(f"{split}/") and name.count("/") == 2)
        names = [name for name in names if not name.endswith("/")]
        require(bool(names), f"{path} holds no images {split}/CLASS/*")
        names = names[::every]
        folders = [name.split("/")[1] for name in names]
        classes = sorted(set(folders))
        decoded = (Image.open(io.BytesIO(archive.read(name))).convert("RGB").resize((width, height)) for name in names)
        pixels = np.stack([np.asarray(image) for image in decoded])
    return Images(pixels, np.array([classes.index(folder) for folder in folders]), classes)


class Batch(NamedTuple):
    """What a step learns from."""

    views: Tensor
    """uint8 (B, 2, 3, H, W)."""
    place: dict[str, int]
    """Where the next batch begins."""


class Views(Dataset[Batch]):
    """Batches by the number of their step: a function of seed, step and rank."""

    def __init__(self, images: Images, options: Options, *, rank: int, ranks: int) -> None:
        self.images, self.options, self.rank, self.ranks = images, options, rank, ranks
        share = len(images.labels) // ranks
        require(share >= options.batch_size, f"--batch-size is {options.batch_size}, and a rank has {share} images")
        self.epoch_steps = share // options.batch_size
        self.augment = v2.Compose([
            v2.RandomResizedCrop(images.pixels.shape[1:3], scale=(0.2, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomSolarize(threshold=128, p=0.1),
            v2.PILToTensor(),
        ])  # fmt: skip

    def __getitem__(self, step: int) -> Batch:
        epoch, at = divmod(step, self.epoch_steps)
        order = np.random.default_rng([self.options.seed, epoch]).permutation(len(self.images.labels))
        chosen = order[self.rank :: self.ranks][at * self.options.batch_size :][: self.options.batch_size]
        torch.manual_seed(int(np.random.SeedSequence([self.options.seed, step, self.rank]).generate_state(1)[0]))
        pictures = [Image.fromarray(pixels) for pixels in self.images.pixels[chosen]]
        views = [torch.stack([self.augment(picture), self.augment(picture)]) for picture in pictures]
        return Batch(torch.stack(views), {"step": step + 1})


def draw_batches(images: Images, options: Options, *, rank: int, ranks: int, place: dict[str, int]) -> Iterator[Batch]:
    """Batches of all images in a new order each epoch, from a place on."""
    views = Views(images, options, rank=rank, ranks=ranks)
    steps = range(place.get("step", 0), options.steps)
    yield from DataLoader(views, batch_size=None, sampler=steps, num_workers=options.workers)


class Network(nn.Module):
    """Encoder and expander as one module; frames uint8 (B, 3, H, W) -> expander outputs (B, E)."""

    def __init__(self, encoder: FrameEncoder, expander: Expander) -> None:
        super().__init__()
        self.encoder, self.expander = encoder, expander

    def forward(self, frames: Tensor) -> Tensor:
        outputs: Tensor = self.expander(self.encoder(frames))
        return outputs


@torch.no_grad()
def embed(module: Callable[[Tensor], Tensor], pixels: np.ndarray, device: torch.device) -> np.ndarray:
    """What a module in evaluation mode makes of images (N, H, W, 3), float32 (N, D)."""
    parts = [torch.from_numpy(part).to(device) for part in np.array_split(pixels, -(-len(pixels) // 512))]
    return torch.cat([module(rearrange(part, "b h w c -> b c h w")).float().cpu() for part in parts]).numpy()


def embed_both(network: Network, pixels: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """Embeddings (N, D) and expander outputs (N, E) as in evaluation, of a network that goes on training."""
    network.eval()
    both = [torch.from_numpy(embed(module, pixels, device)) for module in (network.encoder, network)]
    network.train()
    return both[0], both[1]


def probe(
    network: Network, untrained: FrameEncoder, images: tuple[Images, Images], device: torch.device
) -> tuple[dict[str, dict[str, float]], np.ndarray]:
    """Accuracies by representation and kind of probe, and the test images' embeddings (N, D)."""
    network.eval()
    train, test = images
    found = {
        name: [embed(module, split.pixels, device) for split in images]
        for name, module in {"embedding": network.encoder, "expander output": network, "untrained": untrained}.items()
    }
    flat = [split.pixels.reshape(len(split.pixels), -1).astype(np.float32) / 255 for split in images]
    every = max(1, len(flat[0]) // 5000)
    components = PCA(
        min(len(flat[0][::every]), found["embedding"][0].shape[1]), svd_solver="randomized", random_state=0
    )
    components.fit(flat[0][::every])
    found["pixels (PCA)"] = [components.transform(part) for part in flat]
    accuracy = {}
    for name, (known, asked) in found.items():
        neighbours = KNeighborsClassifier(min(NEIGHBOURS, len(known)), weights=vote).fit(normalize(known), train.labels)
        linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, tol=1e-3)).fit(known, train.labels)
        accuracy[name] = {"knn": float(neighbours.score(normalize(asked), test.labels)),
                          "linear": float(linear.score(asked, test.labels))}  # fmt: skip
    return accuracy, found["embedding"][1]


def vote(distances: np.ndarray) -> np.ndarray:
    """Weights of neighbours at distances between unit vectors: exp(cosine / temperature), but for a factor."""
    return np.exp(-np.square(distances) / 2 / TEMPERATURE)


def draw_tsne(embeddings: np.ndarray, images: Images, path: Path) -> None:
    """Leave a picture: embeddings (N, D) in the plane, coloured by class."""
    every = max(1, len(embeddings) // DRAWN)
    shown, labels = embeddings[::every], images.labels[::every]
    plane = TSNE(perplexity=min(30, len(shown) / 4), init="pca", random_state=0).fit_transform(shown)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axis = figure.subplots()
    for number, name in enumerate(images.classes):
        x, y = plane[labels == number].T
        axis.scatter(x, y, s=5, color=f"C{number % 10}", label=name)
    axis.set(xticks=[], yticks=[], title=f"t-SNE of {len(shown):,} test images")
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main, Options)
