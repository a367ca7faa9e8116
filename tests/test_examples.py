"""The examples: what they work out, and that each runs in its smallest form."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from examples import cifar10
from examples.adaptation import adapt
from examples.direct_predictor import DirectConfig
from examples.sentence_jepa import SentenceEncoder, embed
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence
from pipelines.run.encoders import load_encoder

ROOT = Path(__file__).resolve().parents[1]
HORIZON, D = 4, 3


def run(script: str, *words: object) -> str:
    """What an example prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, f"examples/{script}.py", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Learning while watching


def drive(laps: int = 8, length: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forecasts that copy on a road driven round and round; past, future, and when they were begun."""
    generator = torch.Generator().manual_seed(0)
    road = torch.randn(length, D, generator=generator).repeat(laps, 1)
    road = road + 0.05 * torch.randn(road.shape, generator=generator)
    windows = road.unfold(0, 2 + HORIZON, 1).mT
    past, future = windows[:, :2], windows[:, 2:]
    return past[:, -1:].expand_as(future), past, future, torch.arange(len(past))


@pytest.mark.parametrize("seen", [1, 30, 120])
def test_what_had_not_been_seen_teaches_nothing(seen):
    forecasts, past, future, begun = drive()
    begun = begun + 7 * (begun > 100)  # a gap in time: more is seen than has been forecast
    found = adapt(forecasts, past, future, begun)
    unknown = torch.cat([future[:seen], torch.full_like(future[seen:], torch.nan)])
    without = adapt(forecasts, past, unknown, begun)
    untouched = int((begun < begun[seen] + HORIZON).sum())  # begun before the first unknown future had been seen
    assert torch.equal(without[:untouched], found[:untouched])
    assert without[untouched:].isnan().any(dim=2).all()  # all later ones learn from it


def test_a_road_that_comes_again_is_learned():
    forecasts, past, future, begun = drive()
    found = adapt(forecasts, past, future, begun)
    assert torch.equal(found[:HORIZON], forecasts[:HORIZON])
    assert (found - future)[160:].square().mean() < 0.2 * (forecasts - future)[160:].square().mean()


def test_where_nothing_is_to_be_learned_little_is_lost():
    generator = torch.Generator().manual_seed(0)
    past = torch.randn(600, 2, D, generator=generator)
    future = past[:, -1:] + torch.randn(600, HORIZON, D, generator=generator)
    forecasts = future + torch.randn(future.shape, generator=generator)
    found = adapt(forecasts, past, future, torch.arange(600))
    assert (found - future).square().mean() < 1.02 * (forecasts - future).square().mean()


# A predictor of one's own


def test_a_direct_forecast_is_made_once_and_then_anew_from_what_was_predicted():
    torch.manual_seed(0)
    config = DirectConfig(width=16, depth=2, context=3, horizon=4)
    predictor = Predictor(config, (5,), fps=4.0, encoder_fingerprint="abc").eval()
    torch.nn.init.normal_(predictor.head.weight)
    past = Sequence.on_clock(torch.randn(2, 6, 5), 4.0)
    with torch.no_grad():
        found = rollout(predictor, past, Future.ticks(8, 4.0))
        assert torch.allclose(found[:, :1], predictor(past))
        again = Sequence.on_clock(torch.cat([past.embeddings, found[:, :4]], dim=1), 4.0)
        assert torch.allclose(found[:, 4:], rollout(predictor, again, Future.ticks(4, 4.0)), atol=1e-5)
        # Of the first forecast no step looks at what was predicted before it.
        _, state = predictor.step(past, None)
        wrong = Sequence.on_clock(found[:, :1] + 1, 4.0)
        assert torch.allclose(
            predictor.step(wrong, state)[0] - wrong.embeddings, found[:, 1:2] - found[:, :1], atol=1e-5
        )


# Making a VICReg


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A zip of noisy pictures, each class with a colour of its own."""
    path, generator = tmp_path_factory.mktemp("images") / "images.zip", np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", 40), ("test", 20)):
            for number, colour in enumerate(("red", "green", "blue")):
                for index in range(count):
                    pixels = generator.normal(60, 30, (20, 20, 3))
                    pixels[..., number] += 120
                    with archive.open(f"{split}/{colour}/{index:03}.png", "w") as file:
                        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "png")
    return path


def test_batches_are_a_function_of_seed_step_and_rank(images, tmp_path):
    options = cifar10.Options(images=images, output_dir=tmp_path, batch_size=10, steps=20, workers=0)
    train = cifar10.read_images(images, "train", options)
    assert (train.pixels.shape, train.classes) == ((120, 32, 32, 3), ["blue", "green", "red"])
    batches = list(cifar10.draw_batches(train, options, rank=1, ranks=2, place={}))
    (late,) = list(cifar10.draw_batches(train, options, rank=1, ranks=2, place={"step": 19}))
    assert torch.equal(late.views, batches[19].views)
    assert (late.views.shape, late.place) == ((10, 2, 3, 32, 32), {"step": 20})
    assert not torch.equal(batches[0].views[:, 0], batches[0].views[:, 1])
    assert cifar10.Views(train, options, rank=0, ranks=2).epoch_steps == 6


@pytest.mark.slow
def test_cifar10_runs_and_collapse_is_seen(images, tmp_path):
    small = f"--images {images} --steps 80 --batch-size 24 --log-every 80 --tracker none --workers 0".split()
    small += ["--expander.widths", "64", "8"]
    said = run("cifar10", *small, "--output-dir", tmp_path / "healthy")
    assert (tmp_path / "healthy" / "tsne.png").stat().st_size > 1000
    accuracy = json.loads((tmp_path / "healthy" / "accuracy.json").read_text())
    assert accuracy.keys() == {"embedding", "expander output", "untrained", "pixels (PCA)"}
    assert accuracy["embedding"]["knn"] > 0.8
    assert "COLLAPSE" not in said
    assert load_encoder(tmp_path / "healthy" / "encoder").shape == (128,)
    collapsed = ["--objective.variance-weight", "0", "--output-dir", tmp_path / "collapsed"]
    run("cifar10", *small, *collapsed)
    assert json.loads((tmp_path / "collapsed" / "metrics.json").read_text())["collapse_alarms"]


# A sentence JEPA


def test_padding_does_not_change_an_embedding():
    torch.manual_seed(0)
    encoder = SentenceEncoder(words=30, dimension=8, depth=2)
    alone = embed(encoder, torch.tensor([[7, 9, 4]]))
    together = encoder(torch.tensor([[7, 9, 4, 0, 0, 0], [5, 6, 7, 8, 9, 3]]))
    torch.testing.assert_close(together[:1], alone)
    assert (together[1] - alone[0]).abs().max() > 0.1


@pytest.mark.slow
def test_the_sentence_jepa_runs_and_a_small_variance_weight_collapses(tmp_path):
    rng = np.random.default_rng(0)

    def sentence():
        nouns, verbs = rng.choice(["plane", "flute", "pizza", "horse"], 3), rng.choice(["takes", "plays", "eats"], 2)
        return f"The {nouns[0]} {verbs[0]} a {nouns[1]}, and {verbs[1]} the {nouns[2]}."

    for split in ("train", "dev"):
        pairs = [(sentence(), sentence()) for _ in range(60)]
        rows = [(*pair, 5 * len(set(pair[0].split()) & set(pair[1].split())) / 9) for pair in pairs]
        with (tmp_path / f"stsb-en-{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    stds = {}
    for weight in (0.1, 25.0):
        small = "--split dev --seeds 0 --steps 120 --batch-size 16 --crop-words 4 --dimension 8 --expander.widths 8"
        words = ["--text", tmp_path, *small.split(), "--learning-rate", 1e-2, "--objective.variance-weight", weight,
                 "--output-dir", tmp_path / str(weight)]  # fmt: skip
        assert "| jepa |" in run("sentence_jepa", *words)
        (record,) = json.loads((tmp_path / str(weight) / "results.json").read_text())["runs"]
        assert record["untrained"].keys() >= {"spearman", "spearman_whitened", "std", "effective_rank"}
        stds[weight] = record["jepa"]["output_std"]
    # Of whole sentences, which are more alike than the crops that the objective holds at 1.
    assert stds[0.1] < 0.05 < 0.2 < stds[25.0]


# All that start from caches


@pytest.fixture(scope="module")
def caches(tmp_path_factory, write_cache, make_clip):
    """Clips of random walks, for training, validation and test."""
    folder = tmp_path_factory.mktemp("caches")
    for seed, (split, clips) in enumerate({"train": 6, "val": 6, "test": 3}.items()):
        made = [make_clip(f"/{split}_{index}.mp4", 60, seed=100 * seed + index) for index in range(clips)]
        for clip in made:
            clip.columns["embeddings"] = clip.columns["embeddings"].cumsum(axis=0)
        write_cache(folder / split, made)
    return folder


@pytest.mark.slow
def test_examples_on_caches_run(caches, tmp_path):
    data = ["--train-cache", caches / "train", "--validation-cache", caches / "val", "--tracker", "none", "--steps", 12]
    direct = ["--predictor.kind", "direct", "--predictor.horizon", 5, "--predictor.width", 8, "--rollout-steps", 5]
    run("direct_predictor", "train_predictor", *data, *direct, "--output-dir", tmp_path / "direct")
    said = run("direct_predictor", "evaluate_rollout", "--predictor", tmp_path / "direct", "--cache", caches / "test",
               "--output-dir", tmp_path / "evaluation")  # fmt: skip
    assert "error relative to copying" in said
    run("direct_predictor", "train_predictor", *data, "--predictor.width", 8, "--output-dir", tmp_path / "mlp")
    said = run(
        "adaptation", "--cache", caches / "test", "--predictor", tmp_path / "mlp", "--output-dir", tmp_path / "out"
    )
    assert "adapting" in said
