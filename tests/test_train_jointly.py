"""Encoder and predictor trained together: what is left, resume, collapse, ranks, and going on from trained ones."""

import json
import os
import signal
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from benchmarks.kill_training import TIMES, Life
from data.synthetic import BallWorld, write_ball_clip
from data.views import ViewsConfig
from jepa.batch_norm import synchronise_batch_norm
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.objectives import ObjectiveConfig
from jepa.predictor import Predictor, PredictorConfig
from pipelines.artefacts import load_encoder, load_predictor
from pipelines.optimizer import OptimizerConfig
from pipelines.stage import UserError
from pipelines.train_jointly import (
    Options,
    build,
    diagnose,
    follow,
    joint_objective,
    make_joint_optimizer,
    relight,
    set_learning_rates,
    take_apart,
)

SMALL = "--encoder.image-size 32 32 --encoder.embedding-dimension 8 --predictor.width 16 --predictor.context 3"
SHORT = "--fps 8 --batch-size 4 --clip-length 8 --rollout-steps 2 --tracker csv"
ENCODER = EncoderConfig(embedding_dimension=6, image_size=(16, 16))
PREDICTOR = PredictorConfig(context=3, width=16, depth=1)
OPTIONS = Options(
    videos=(), fps=8, clip_length=6, rollout_steps=2, encoder=ENCODER, predictor=PREDICTOR,
    objective=ObjectiveConfig(), encoder_learning_rate_factor=0.25,
)  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(6):
        write_ball_clip(folder, index, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
    return folder


def start(stage, arguments, output, processes=1):
    return Life(stage, arguments.split(), processes, output.with_suffix(".txt"), preload=True)


def succeed(stage, arguments, output, processes=1):
    life = start(stage, f"{arguments} --output-dir {output}", output, processes)
    assert life.exit_code() == 0, life.said()
    return output


@pytest.fixture(scope="module")
def trained(videos, tmp_path_factory, forks):
    """An undisturbed run; others are compared with it."""
    output = tmp_path_factory.mktemp("joint") / "undisturbed"
    return succeed("train_jointly", f"--videos {videos} --steps 60 {SHORT} {SMALL}", output)


def left_behind(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = {name: load_file(folder / name / "model.safetensors") for name in ("encoder", "predictor")}
    return {name: value for name, value in metrics.items() if name not in TIMES}, weights


def assert_same_runs(one, other):
    (metrics, weights), (other_metrics, other_weights) = left_behind(one), left_behind(other)
    assert metrics == other_metrics
    for name, tensors in weights.items():
        assert tensors.keys() == other_weights[name].keys()
        assert all(torch.equal(tensor, other_weights[name][key]) for key, tensor in tensors.items())


def test_both_artefacts_go_through_the_other_stages(videos, trained, tmp_path):
    encoder, predictor = load_encoder(trained / "encoder"), load_predictor(trained / "predictor")
    assert predictor.encoder_fingerprint == encoder.fingerprint()
    assert (predictor.fps, predictor.mean.shape) == (8, (8,))
    metrics, _ = left_behind(trained)
    assert metrics["encoder_fingerprint"] == encoder.fingerprint()
    assert metrics["loss"] == pytest.approx(
        sum(metrics[f"weighted_{name}"] for name in ("prediction", "variance", "invariance", "covariance")), rel=1e-5
    )
    assert not metrics["collapsed"], metrics["collapse_alarms"]
    cache = succeed("cache_embeddings", f"--videos {videos} --encoder {trained}/encoder --fps 8", tmp_path / "cache")
    options = f"--cache {cache} --predictor {trained}/predictor --horizon 4 --output-dir {tmp_path}/evaluation"
    life = start("evaluate_rollout", options, tmp_path / "evaluation")
    assert life.exit_code() == 1
    assert "is not calibrated: run train_predictor --initial-predictor" in life.said()


def test_what_was_trained_jointly_is_calibrated_without_a_step_or_goes_on(videos, trained, tmp_path):
    caches = {}
    for name, some in {"train": range(4), "validation": range(4, 6)}.items():
        paths = " ".join(f"{videos}/clip_{index:05d}.mp4" for index in some)
        cached = f"--videos {paths} --fps 8 --encoder {trained}/encoder"
        caches[name] = succeed("cache_embeddings", cached, tmp_path / name)
    cache = caches["validation"]
    options = f"--train-cache {caches['train']} --validation-cache {cache} --initial-predictor {trained}/predictor "
    options += "--rollout-steps 2 --validation-horizon 4 --batch-size 8 --tracker none"
    calibrated = succeed("train_predictor", f"{options} --steps 0", tmp_path / "calibrated")
    before, after = (load_file(folder / "predictor" / "model.safetensors") for folder in (trained, calibrated))
    names = [name for name in before if name.startswith("members")]
    assert names
    assert all(torch.equal(before[name], after[name]) for name in names)
    assert after["energy_quantiles"].max() > 0
    options_of_judge = f"--cache {cache} --predictor {calibrated}/predictor --horizon 4"
    judged = succeed("evaluate_rollout", options_of_judge, tmp_path / "evaluation")
    assert len(json.loads((judged / "rollout.json").read_text())["predictors"]["model"]) == 4
    further = succeed("train_predictor", f"{options} --steps 3", tmp_path / "further")
    metrics = json.loads((further / "metrics.json").read_text())
    assert metrics["steps"] == 3
    for mistake, message in {
        "--steps -1": "--steps is -1: it must be at least 0",
        "--steps 0 --predictor.context 2": "was built with other --predictor options",
        "--steps 0 --members 2": "has 1 members, not 2",
    }.items():
        life = start("train_predictor", f"{options} {mistake} --output-dir {tmp_path}/x", tmp_path / "x")
        assert life.exit_code() == 1
        assert message in life.said()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_resumed_run_equals_an_undisturbed_one(videos, trained, tmp_path, number):
    options = f"--videos {videos} --steps 60 {SHORT} {SMALL} --checkpoints.every-steps 7 --resume"
    life = start("train_jointly", f"{options} --output-dir {tmp_path}/run", tmp_path / "run")
    assert life.wait(60, lambda: bool(list((tmp_path / "run" / "training_state").glob("step_*[1-9]"))))
    life.strike(number)
    assert life.exit_code() == (-number if number == signal.SIGKILL else 128 + number), life.said()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert_same_runs(trained, succeed("train_jointly", options, tmp_path / "run"))


def test_without_the_variance_term_the_collapse_is_announced(videos, tmp_path, forks):
    options = f"--videos {videos} --steps 120 --log-every 20 {SHORT} {SMALL} --objective.variance-weight 0"
    output = succeed("train_jointly", options, tmp_path / "run")
    metrics, _ = left_behind(output)
    assert metrics["collapsed"]
    assert metrics["first_collapse_step"] >= 50
    assert output.with_suffix(".txt").read_text().count("COLLAPSE at step") == 1


def test_going_on_from_trained_ones_with_the_encoder_held(videos, trained, tmp_path):
    options = f"--videos {videos} --steps 3 {SHORT} --encoder-weights {trained}/encoder"
    options += f" --predictor-weights {trained}/predictor --encoder-learning-rate-factor 0"
    tuned = succeed("train_jointly", options, tmp_path / "tuned")
    encoder, before = load_encoder(tuned / "encoder"), load_encoder(trained / "encoder")
    predictor = load_predictor(trained / "predictor")
    convolution = encoder.backbone[0].weight
    assert torch.equal(convolution, before.backbone[0].weight)
    torch.testing.assert_close(encoder.head.weight, before.head.weight / predictor.std[:, None])
    weights = [one.members[0].head.weight for one in (predictor, load_predictor(tuned / "predictor"))]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--clip-length 4", "--clip-length is 4: a context of 3 and a rollout of 2 take 5 frames"),
        ("--views.kind vicreg", "--views.kind is vicreg"),
        ("--encoder-weights nowhere", "--encoder-weights and --predictor-weights belong together"),
        ("--predictor.latent-dimension 2", "the predictor's latent dimension is 2: joint training knows one future"),
        ("--predictor.kind direct", "--rollout-steps is 2, but the predictor forecasts 8 steps at once"),
        ("--prediction-weight -1", "--prediction-weight is -1: it must not be negative"),
        ("--batch-size 0", "--batch-size is 0: it must be positive"),
    ],
)
def test_a_mistake_ends_in_one_line(videos, tmp_path, forks, arguments, message):
    options = f"--videos {videos} {SHORT} {SMALL} {arguments} --output-dir {tmp_path}/run"
    life = start("train_jointly", options, tmp_path / "run")
    assert life.exit_code() == 1
    assert "Traceback" not in life.said()
    assert life.said().count("error:") == 1
    assert message in life.said()
    assert not (tmp_path / "run").exists()


def new_world():
    torch.manual_seed(0)
    return build(OPTIONS)


def some_clips(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, OPTIONS.clip_length, 3, 16, 16), dtype=torch.uint8, generator=generator)


@pytest.fixture
def saved(tmp_path):
    """An encoder and a predictor of its embeddings whose statistics are far from 0 and 1."""
    torch.manual_seed(1)
    encoder = FrameEncoder(ENCODER).eval()
    predictor = Predictor(PREDICTOR, 6, 8, encoder.fingerprint(), energy_horizon=8)
    for name, low, high in (("mean", -3, 3), ("std", 0.2, 4), ("change_std", 0.1, 0.5)):
        getattr(predictor, name).uniform_(low, high)
    torch.nn.init.normal_(predictor.members[0].head.weight)
    encoder.save_pretrained(tmp_path / "encoder")
    predictor.save_pretrained(tmp_path / "predictor")
    return replace(
        OPTIONS, encoder=EncoderConfig(), predictor=PredictorConfig(), encoder_weights=tmp_path / "encoder",
        predictor_weights=tmp_path / "predictor",
    ), encoder, predictor.eval()  # fmt: skip


@torch.no_grad()
def test_trained_ones_predict_the_same_in_new_units(saved):
    options, encoder, predictor = saved
    world = build(options).eval()
    clips = some_clips(3)
    old = predictor.standardise(torch.stack([encoder(clip) for clip in clips]))
    embeddings = world.embed(clips)
    torch.testing.assert_close(embeddings, old, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(world.predictor(world.predictor.standardise(embeddings)), predictor(old), rtol=1e-3,
                               atol=1e-3)  # fmt: skip


def test_trained_ones_must_belong_together(saved):
    options, _, _ = saved
    with pytest.raises(UserError, match="--encoder-weights bring their own configuration"):
        build(replace(options, encoder=ENCODER))
    with pytest.raises(UserError, match=r"--fps is 4, and .* lives on 8 fps"):
        build(replace(options, fps=4))
    FrameEncoder(ENCODER).save_pretrained(options.encoder_weights)
    with pytest.raises(UserError, match=r"predicts embeddings of encoder .*: give those that belong together"):
        build(options)


def test_the_encoder_learns_through_past_and_future():
    """Without one of the two, the gradient with respect to the frames of that side would be 0."""
    world = new_world()
    torch.nn.init.normal_(world.predictor.members[0].head.weight)
    frames = (some_clips(2).float() / 255)[:, :5].requires_grad_()  # one window
    _, error = world.eval()(frames)
    assert error.shape == (2, 2, 6)
    error[:, 0].mean().backward()
    reached = frames.grad.abs().sum(dim=(0, 2, 3, 4)) > 0
    assert reached.tolist() == [True, True, True, True, False]


def test_rollouts_start_wherever_they_fit():
    world = new_world().eval()
    embeddings, error = world(some_clips(2))
    assert (embeddings.shape, error.shape) == ((2, 6, 6), (2 * 2, 2, 6))
    # A new predictor copies: the error of a copy, in the embeddings' own units.
    world.predictor.std.fill_(3)
    _, again = world(some_clips(2))
    copied = (embeddings[:, [2, 3]][:, :, None] - torch.stack([embeddings[:, 3:5], embeddings[:, 4:6]], dim=1)).square()
    torch.testing.assert_close(error.unflatten(0, (2, 2)), copied)
    torch.testing.assert_close(again, error)


def test_running_statistics_become_those_of_the_embeddings():
    predictor = Predictor(PREDICTOR, 6, 8, "")
    embeddings = 2 + 3 * torch.randn(50, 8, 6, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        follow(predictor, embeddings)
    standardised = predictor.standardise(embeddings)
    torch.testing.assert_close(standardised.mean(dim=(0, 1)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardised.std(dim=(0, 1)), torch.ones(6), atol=1e-2, rtol=0)
    torch.testing.assert_close(predictor.change_std, standardised.diff(dim=1).square().mean(dim=(0, 1)).sqrt())


def test_every_frame_has_light_of_its_own():
    grey = torch.full((3, 5, 3, 16, 16), 128, dtype=torch.uint8)
    lit = relight(grey, ViewsConfig(pixel_noise=0.0), torch.Generator().manual_seed(0))
    assert lit.shape == grey.shape
    flat = lit.flatten(0, 1).flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(15) > 0.1).all()
    unlit = relight(some_clips(3), ViewsConfig(light_amplitude=0.0, pixel_noise=0.0), torch.Generator())
    assert torch.equal(unlit, some_clips(3).float() / 255)  # in the order that they came in


def test_the_encoder_has_a_learning_rate_of_its_own():
    world = new_world()
    optimizer = make_joint_optimizer(world, replace(OPTIONS, optimizer=OptimizerConfig(learning_rate=1.0)))
    optimizer.load_state_dict(optimizer.state_dict())  # as after a resume
    for _ in range(2):
        set_learning_rates(optimizer, 0.5, OPTIONS.encoder_learning_rate_factor)
    rates = {id(weight): group["lr"] for group in optimizer.param_groups for weight in group["params"]}
    assert {rates[id(weight)] for weight in world.encoder.parameters()} == {0.125}
    assert {rates[id(weight)] for weight in world.predictor.parameters()} == {0.5}
    assert len(rates) == len(list(world.parameters()))


def test_taken_apart_they_are_what_was_trained():
    world = new_world().eval()
    follow(world.predictor, torch.randn(4, 5, 6))
    world.predictor.longest_gap = 3
    encoder, predictor = take_apart(world)
    assert predictor.leaps == (1, 3)
    assert predictor.encoder_fingerprint == encoder.fingerprint() == world.encoder.fingerprint()
    assert all(torch.equal(value, world.predictor.state_dict()[name]) for name, value in predictor.state_dict().items())


def test_collapse_of_embeddings_and_of_predictions_is_seen():
    world = new_world()
    clips = some_clips(4)
    with torch.no_grad():
        world.encoder.head.weight.mul_(10)
    for _ in range(100):
        follow(world.predictor, world.embed(clips).detach())
    metrics, alarms = diagnose(world, clips)
    assert alarms == []
    assert world.training
    assert metrics["one_step_relative_to_copy_last"] == pytest.approx(1, abs=1e-4)
    for name in ("embedding", "predicted", "true"):
        assert min(metrics[f"{name}_{over}_std"] for over in ("batch", "time")) > 0
    with torch.no_grad():
        world.encoder.head.weight.mul_(1e-3)
    assert any("embedding's standard deviation is 0.0" in alarm for alarm in diagnose(world, clips)[1])
    assert diagnose(world, clips[:0]) == ({}, [])
    world.predictor = Zero(world.predictor)
    assert any("predictions vary over time by 0.000" in alarm for alarm in diagnose(world, clips)[1])


class Zero(torch.nn.Module):
    """A predictor whose predictions have collapsed."""

    def __init__(self, predictor):
        super().__init__()
        self.config, self.standardise = predictor.config, predictor.standardise

    def forward(self, past, outputs):
        return torch.zeros_like(past[:, -outputs:])


def gradients_of(clips, world, wrapped):
    embeddings, error = wrapped(clips)
    terms = joint_objective(embeddings, error, OPTIONS, torch.Generator().manual_seed(0))
    terms.loss.backward()
    follow(world.predictor, embeddings.detach())
    gradients = {name: parameter.grad for name, parameter in world.named_parameters()}
    return terms.loss.detach(), gradients, dict(world.named_buffers())


def ready_world():
    world = new_world()
    torch.nn.init.normal_(world.predictor.members[0].head.weight, std=0.1)
    return world


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(minutes=5), rank=rank, world_size=2)
    world = ready_world()
    synchronise_batch_norm(world)
    torch.save(gradients_of(some_clips(8).chunk(2)[rank], world, DistributedDataParallel(world)), folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # as `run_stage` does: gloo's threads may abort an interpreter that shuts down


def test_two_ranks_equal_one_process(tmp_path):
    multiprocessing.start_processes(work, (tmp_path,), 2, start_method="spawn")
    world = ready_world()
    loss, gradients, buffers = gradients_of(some_clips(8), world, world)
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for rank in range(2):
        ours, our_gradients, our_buffers = torch.load(tmp_path / f"{rank}.pt")
        assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5 * largest, msg=name)
        for name, buffer in buffers.items():
            torch.testing.assert_close(our_buffers[name], buffer, rtol=1e-4, atol=1e-5, msg=name)
    assert np.isfinite(largest)
