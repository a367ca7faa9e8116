"""What runs on a GPU is what runs on a CPU: on CUDA where there is one, rehearsed elsewhere.

Without a GPU, what runs in this process runs on a device that is pretended; processes run on the CPU. Beside a GPU:
`python -m pytest tests/test_device.py -m ""`.
"""

import copy
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from accelerate.state import AcceleratorState
from tqdm import tqdm

from benchmarks.common import ROOT, script, words
from benchmarks.embed import new_tasks
from data.cache import Column, EmbeddingCache
from data.synthetic import BallWorld, write_ball_videos
from data.views import Neighbours
from data.windows import Windows
from jepa.encoder import EncoderConfig, create_encoder
from jepa.networks import MLPConfig, TransformerConfig
from jepa.objectives import SIGReg, VICReg
from jepa.predictor import Predictor
from pipelines import pretrain_encoder
from pipelines.pretrain_encoder import Pretraining, diagnose, loss_of
from pipelines.run.devices import start_accelerator
from pipelines.run.embed import embed_videos
from pipelines.run.evaluation import Evaluation, fit_readout
from pipelines.run.judging import calibrate, fit_ridge_on, judge, measure_embeddings
from pipelines.run.models import take_windows, windows_for
from pipelines.run.scoring import Scorer, score_videos
from pipelines.train_predictor import Losses
from tests import test_ranks
from tests.conftest import assert_near
from tests.pretend_device import pretend_device
from tests.test_run import differing, logged
from tests.test_train_predictor import turning

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CONTEXT, HORIZON, FPS = 3, 4, 4.0

pytestmark = pytest.mark.filterwarnings("default")  # drivers warn


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Nothing is rounded to TF32, and accelerate has not been started."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def on_device():
    """The GPU, or a device that is pretended."""
    return nullcontext(torch.device("cuda")) if CUDA else pretend_device()


# Objectives and encoder


@pytest.mark.parametrize("objective", [VICReg(), SIGReg()], ids=lambda objective: objective.kind)
@pytest.mark.parametrize("features", [16, 96])
def test_objectives_and_their_gradients_are_those_of_float64(objective, features):
    def run(views, generator):
        views = views.detach().clone().requires_grad_()
        terms = objective(*views, generator=generator)
        terms.loss.backward()
        return terms.loss.detach().cpu().double(), views.grad.cpu().double()

    shared = torch.randn(1, 40, features, generator=torch.Generator().manual_seed(0))
    views = shared + 0.3 * torch.randn(2, 40, features, generator=torch.Generator().manual_seed(1))
    loss, gradient = run(views.double(), torch.Generator().manual_seed(7))
    with on_device() as device:
        found = run(views.to(device), torch.Generator().manual_seed(7))
        run(views.to(device), torch.Generator(device))
    torch.testing.assert_close(found[0], loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(found[1], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize(("grid", "weight"), [((0, 0), 1.0), ((2, 3), 0.0)])
def test_an_encoder_learns_from_frames(grid, weight, tmp_path):
    config = EncoderConfig(image_size=(32, 32), grid=grid, head_widths=(16,), embedding_dimension=8)
    options = pretrain_encoder.Options(videos=(tmp_path,), encoder=config, prediction_weight=weight, slow_dimension=2)
    torch.manual_seed(0)
    network = Pretraining(create_encoder(config), options)
    frames = torch.randint(256, (4, 13, 3, 32, 32), dtype=torch.uint8)

    def embeddings_and_outputs(frames):
        embeddings, outputs, _ = network(frames)
        return [output.detach().cpu() for output in (embeddings, *outputs)]

    network.eval()
    expected = embeddings_and_outputs(frames)
    with on_device() as device:
        network.to(device)
        found = embeddings_and_outputs(frames.to(device))
        generator = torch.Generator(device).manual_seed(0)
        views = Neighbours()(network.train() and frames.to(device), generator)
        _, outputs, error = network(views)
        loss_of(outputs, error, options, generator).loss.backward()
        assert all(weights.grad.device.type == device.type for weights in network.parameters())
        metrics, _ = diagnose(network, frames.to(device))
    assert all(np.isfinite(value) for value in metrics.values())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# Predictor


@pytest.fixture(scope="module")
def caches(tmp_path_factory, make_clip, write_cache):
    """Caches to train, validate and test on, with a column that can be read off."""
    folder = tmp_path_factory.mktemp("caches")
    for number, split in enumerate(("train", "val", "test")):
        clips = []
        for clip in range(8):
            embeddings = turning(40, seed=100 * number + clip)
            speed = embeddings[:, 0].astype(np.float64)
            clips.append(make_clip(f"/{split}_{clip}.mp4", 40, embeddings=embeddings, speed=speed))
        write_cache(
            folder / split, clips, columns={"embeddings": Column("float32", (5,)), "speed": Column("float64", ())}
        )
    return {split: EmbeddingCache(folder / split) for split in ("train", "val", "test")}


NETWORKS = {
    "mlp": MLPConfig(context=CONTEXT, width=16, depth=1),
    "transformer": TransformerConfig(context=CONTEXT, width=16, depth=1, heads=2),
    "latent": MLPConfig(context=CONTEXT, width=16, depth=1, latent_dimension=2),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_forecasts_evaluation_and_surprise_are_those_of_the_cpu(caches, network):
    torch.manual_seed(0)
    predictor = Predictor(NETWORKS[network], (5,), fps=FPS, encoder_fingerprint="0123abcd", actions=("speed",))
    torch.nn.init.normal_(predictor.head.weight, std=0.3)
    torch.nn.init.normal_(predictor.network.get_submodule("embed").action_weight, std=0.3)
    measure_embeddings(predictor, caches["train"])
    held_out, windows = (windows_for(caches[split], predictor, CONTEXT + HORIZON) for split in ("val", "test"))
    ridge = fit_ridge_on(caches["train"], held_out, predictor)
    calibration, _ = calibrate(predictor, copy.deepcopy(ridge), caches["val"], horizon=HORIZON)

    def measure(device):
        assert predictor.mean.device.type == device.type
        judged, _ = judge(predictor, ridge, held_out)
        fitted, _ = calibrate(predictor, ridge, caches["val"], horizon=HORIZON)
        readout = fit_readout(caches["train"], ("speed",), predictor)
        found = Evaluation(predictor, calibration, windows, readout=readout).run(resamples=20)
        Evaluation(predictor, calibration, windows, samples=19).run(resamples=2)  # draws of its own
        scores = list(score_videos(Scorer(predictor, calibration, (HORIZON,)), windows))
        surprise = [
            [*map(float, (*score.energies, *score.percentiles, *score.cosines)), score.level] for score in scores
        ]
        blend = fitted.blend.tolist()
        return {"judge": judged, "blend": blend, "evaluation": found["predictors"], "surprise": surprise}

    stochastic = NETWORKS[network].latent_dimension > 0  # and each device has draws of its own
    expected = measure(torch.device("cpu"))
    with on_device() as device:
        predictor.to(device), calibration.to(device)
        found = measure(device)
    if not (stochastic and CUDA):
        assert_near(found, expected)


@pytest.mark.parametrize("network", NETWORKS)
def test_a_predictor_learns(caches, network):
    predictor = Predictor(NETWORKS[network], (5,), fps=FPS, encoder_fingerprint="0123abcd", actions=("speed",))
    windows = Windows(caches["train"], CONTEXT + HORIZON, predictor.actions)
    with on_device() as device:
        losses, taken = Losses(predictor, torch.ones(HORIZON)).to(device), take_windows(windows, np.arange(16), device)
        past, future = taken.embeddings[:, :CONTEXT], taken.embeddings[:, CONTEXT:]
        terms = losses(past, future, torch.Generator(device).manual_seed(0), actions=taken.actions)
        terms["rollout_loss"].backward()
        assert predictor.head.weight.grad.device.type == device.type


# Embedding


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Videos of balls, 32 pixels wide."""
    folder = tmp_path_factory.mktemp("videos")
    write_ball_videos(folder, 8, BallWorld(size=32, radius=3, frames=40, fps=8), seed=0)
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_batches_that_are_copied_while_others_are_computed_keep_their_numbers(videos, precision):
    """Bit for bit those of the same batch alone: two streams share nothing that only one of them has waited for."""
    accelerator = start_accelerator(precision)
    encoder = create_encoder(EncoderConfig(image_size=(32, 32), embedding_dimension=512, head_widths=(1024,)))
    encoder, batch = encoder.to(accelerator.device).eval(), 16
    paths, frames = tuple(sorted(videos.glob("*.mp4"))), []
    embed, cached = encoder.embed, []

    def watch(images):
        frames.append(images.cpu().clone())
        cached.append(torch.is_autocast_enabled(DEVICE) and torch.is_autocast_cache_enabled())
        return embed(images)

    encoder.embed = watch
    with tqdm(disable=True) as bar:
        tasks = list(embed_videos(
            accelerator, encoder, new_tasks(paths * 4), fps=8.0, image_fps=25.0, batch_size=batch, strict=False, bar=bar
        ))  # fmt: skip
    found = torch.from_numpy(np.concatenate([rows for task in tasks for rows in task.embeddings]))
    with torch.inference_mode(), accelerator.autocast():
        alone = torch.cat([embed(images.to(accelerator.device)).float().cpu() for images in frames])
    assert not any(cached)  # casts of weights that threads would share
    alone = {tuple(row.tolist()) for row in alone}
    assert len(found) == 4 * 8 * 40
    assert all(tuple(row.tolist()) in alone for row in found)


# Processes


def run_ranks(cases, folder, ranks, backend="gloo"):
    """Cases on one device in several processes: what each rank found, by the case on the CPU."""
    cases = [replace(case, device=DEVICE) for case in cases]
    multiprocessing.start_processes(test_ranks.work, (ranks, folder, cases, backend), ranks, start_method="spawn")
    found = zip(*(torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(ranks)), strict=True)
    return dict(zip([replace(case, device="cpu") for case in cases], found, strict=True))


@pytest.mark.slow
def test_two_processes_on_one_device_are_one(tmp_path):
    steps = [case for case in test_ranks.STEPS if case.ranks == 2 and case.dtype == torch.float64]
    layers = [case for case in test_ranks.NORMALISATIONS if case.ranks == 2 and case.dtype == torch.float64]
    found = run_ranks([*steps, *layers], tmp_path, 2)
    for case in steps:
        test_ranks.test_ranks_equal_one_process(found, case)
    for case in layers:
        test_ranks.test_batch_normalisation_is_that_of_the_whole_batch(found, case)


@pytest.mark.slow
def test_one_rank_of_nccl_is_one_process(tmp_path):
    steps = [test_ranks.Step(objective, 1, 32) for objective in test_ranks.OBJECTIVES]
    found = run_ranks(steps, tmp_path, 1, "nccl" if CUDA else "gloo")
    for case in steps:
        test_ranks.test_ranks_equal_one_process(found, case)


# Commands

STEPS = 60
COMMON = {"steps": STEPS, "log-every": 30, "tracker": "none", "checkpoint-every": 10, "batch-size": 16}
ENCODER = {"encoder.image-size": (32, 32), "encoder.embedding-dimension": 16, "fps": 8.0}
PREDICTOR = {"predictor.width": 32, "predictor.depth": 1, "predictor.context": 3, "validation-horizon": 4}
RUNS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "compiled": {"precision": "bf16", "execution": "compiled", "steps": 30},
    "whole": {"execution": "deterministic", "prediction-weight": 1.0},
    "killed": {"execution": "deterministic", "prediction-weight": 1.0},
}
"""Encoders."""


def start(command, *given):
    return subprocess.Popen([*script(command), *words(*given)], cwd=ROOT, stderr=subprocess.PIPE)


def finish(process):
    said = process.communicate()[1].decode()
    assert process.returncode == 0, said[-2000:]


def train(command, folder, *given, kill=False):
    """Run a trainer to its end; with `kill`, after some of its states it is killed and resumed."""
    process = start(command, *given, {"output-dir": folder})
    if kill:
        while process.poll() is None and not (folder / "training_state" / "step_00000020.pt").exists():
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "metrics.json").exists(), "it was not killed in time"
        process = start(command, *given, {"output-dir": folder, "resume": True})
    finish(process)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, videos):
    """Folders of encoders, by name; all at once where there are cores for it."""
    folder = tmp_path_factory.mktemp("runs")
    chosen = {name: options for name, options in RUNS.items() if CUDA or name != "fp16"}
    with ThreadPoolExecutor(min(len(chosen), joblib.cpu_count())) as pool:
        waiting = {
            name: pool.submit(train, "pretrain_encoder", folder / name, {"videos": videos}, ENCODER, COMMON | options,
                              kill=name == "killed")
            for name, options in chosen.items()
        }  # fmt: skip
    return {name: run.result() if not run.exception() else run.exception() for name, run in waiting.items()}


def finished(runs, name):
    if isinstance(runs[name], Exception):
        raise runs[name]
    return runs[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", pytest.param("fp16", marks=pytest.mark.skipif(not CUDA, reason="CUDA only")),
                                  "compiled"])  # fmt: skip
def test_an_encoder_trained_otherwise_learns_alike(runs, name):
    other, plain = (logged(finished(runs, which)) for which in (name, "fp32"))
    assert other[0]["step"] == plain[0]["step"] == 30
    assert other[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.05)
    assert np.isfinite(other[-1]["loss"])


@pytest.mark.slow
def test_an_encoder_that_was_killed_is_the_same_to_the_bit(runs):
    assert differing(finished(runs, "whole"), finished(runs, "killed")) == []


@pytest.mark.slow
def test_a_predictor_that_was_killed_is_the_same_to_the_bit(runs, videos, tmp_path):
    """On embeddings in bf16 of an encoder in bf16; evaluated and scored by the commands."""
    parts = {"train": sorted(videos.glob("*.mp4"))[:5], "val": sorted(videos.glob("*.mp4"))[5:]}
    for split, paths in parts.items():
        given = {"videos": paths, "encoder": finished(runs, "bf16") / "encoder", "fps": 8.0, "precision": "bf16"}
        finish(start("cache_embeddings", given, {"output-dir": tmp_path / split}))
    caches = {"train-cache": tmp_path / "train", "validation-cache": tmp_path / "val"}
    both = (caches, COMMON, PREDICTOR, {"execution": "deterministic"})
    whole, killed = (
        train("train_predictor", tmp_path / name, *both, kill=name == "killed") for name in ("whole", "killed")
    )
    assert differing(whole, killed) == []
    given = {"cache": tmp_path / "val", "predictor": whole}
    finish(start("evaluate_rollout", given, {"horizon": 4, "samples": 19, "output-dir": tmp_path / "evaluation"}))
    finish(start("score_surprise", given, {"output-dir": tmp_path / "surprise"}))
