"""The encoder's training, alone and with a prediction term: what it leaves, resuming, collapse, ranks, mistakes."""

import json
import os
import shutil
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
import torch.multiprocessing as multiprocessing
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.errors import DataError
from data.synthetic import BallWorld, write_ball_clip
from jepa.batch_norm import synchronise_batch_norm
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.errors import ConfigurationError
from jepa.expander import ExpanderConfig
from jepa.objectives import SIGReg, VICReg
from pipelines.pretrain_encoder import CONTEXT, Dynamics, Options, Pretraining, diagnose, loss_of, main, make_encoder
from pipelines.run.artefacts import load_module
from pipelines.run.command import UserError
from pipelines.run.run import Run
from tests.test_run import differing

VECTOR = EncoderConfig(image_size=(16, 16), embedding_dimension=6)
GRID = EncoderConfig(image_size=(16, 16), embedding_dimension=6, grid=(2, 2))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for index in range(6):
        write_ball_clip(folder, index, BallWorld(size=32, radius=3, frames=24, fps=8), seed=0)
    return folder


@pytest.fixture
def options(videos, tmp_path):
    return Options(
        videos=(videos,), output_dir=tmp_path / "run", fps=8, steps=6, log_every=3, batch_size=4, encoder=VECTOR,
        expander=ExpanderConfig((16, 16)), tracker=("none",),
    )  # fmt: skip


def load(folder):
    return load_module(folder, "encoder", lambda config: FrameEncoder(EncoderConfig(**config)))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("encoder", [VECTOR, GRID])
@pytest.mark.parametrize("objective", [VICReg(), SIGReg(slices=8)])
@pytest.mark.parametrize("prediction_weight", [0.0, 2.0])
def test_an_encoder_is_left_with_all_terms_of_its_loss(options, encoder, objective, prediction_weight):
    options = replace(options, encoder=encoder, objective=objective, prediction_weight=prediction_weight)
    main(options)
    metrics = metrics_of(options.output_dir)
    trained = load(options.output_dir / "encoder")
    assert trained.fingerprint == metrics["encoder_fingerprint"]
    assert trained.embed(torch.zeros(2, 1, 3, 16, 16, dtype=torch.uint8)).shape == (2, *trained.shape)
    terms = [value for name, value in metrics.items() if name.startswith("weighted_")]
    assert ("weighted_prediction" in metrics) == (prediction_weight > 0)
    assert metrics["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert metrics["steps"] == 6
    assert len((options.output_dir / "curve.jsonl").read_text().splitlines()) == 2
    assert len(json.loads((options.output_dir / "account.json").read_text())["read_s"]) == 6


def test_tensorboard_shows_the_views(options):
    main(replace(options, tracker=("tensorboard",)))
    events = EventAccumulator(str(options.output_dir / "logs" / "pretrain_encoder"), {"images": 0}).Reload()
    assert events.Tags()["images"] == ["views"]
    assert [one.step for one in events.Images("views")] == [3, 6]


@pytest.mark.parametrize("prediction_weight", [0.0, 2.0])
def test_what_is_slow_has_terms_of_its_own(options, prediction_weight):
    options = replace(options, slow_dimension=2, prediction_weight=prediction_weight)
    main(options)
    metrics = metrics_of(options.output_dir)
    terms = [value for name, value in metrics.items() if name.startswith("weighted_")]
    assert metrics["weighted_slow_invariance"] > 0
    assert metrics["loss"] == pytest.approx(sum(terms), rel=1e-5)


def test_what_differs_between_clips_alone_is_nothing_to_the_fast_part(options):
    """A number for each clip that stands still is no way to tell frames apart: what is compared is what has changed."""
    pretraining = Pretraining(make_encoder(options), replace(options, slow_dimension=2))
    still = torch.rand(4, 1, 3, 16, 16).expand(4, 4, 3, 16, 16)
    _, (fast, slow), _ = pretraining(still)
    assert fast.std(dim=0).max() < 1e-3 < slow.std(dim=0).min()


def test_without_the_variance_term_the_collapse_is_announced(options, capsys):
    options = replace(options, steps=80, log_every=20, objective=VICReg(variance_weight=0))
    main(options)
    metrics = metrics_of(options.output_dir)
    assert metrics["collapsed"]
    assert metrics["first_collapse_step"] == 60
    assert capsys.readouterr().out.count("COLLAPSE at step") == 1


def test_a_run_in_two_parts_equals_one_in_one(options, monkeypatch, tmp_path):
    options = replace(options, prediction_weight=1.0, checkpoint_every=2)
    main(replace(options, output_dir=tmp_path / "whole"))

    def die(run, *_, **__):  # after step 3, one after the checkpoint
        run.folder.release()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", die)
        with pytest.raises(KeyboardInterrupt):
            main(options)
    assert not (options.output_dir / "metrics.json").exists()
    main(replace(options, resume=True))
    assert differing(tmp_path / "whole", options.output_dir) == []


def test_an_encoder_goes_on_from_an_earlier_one(options, tmp_path):
    main(options)
    first = options.output_dir / "encoder"
    going_on = replace(options, output_dir=tmp_path / "more", initial_encoder=first, encoder=EncoderConfig(), steps=1)
    main(going_on)
    before, after = (load(folder).head[0].weight for folder in (first, tmp_path / "more" / "encoder"))
    # One step of AdamW moves each weight by the learning rate at most.
    assert 0 < (after - before).abs().max() < 1.1 * options.optimizer.learning_rate
    with pytest.raises(UserError, match=r"drop the options --encoder\.\*"):
        main(replace(going_on, output_dir=tmp_path / "x", encoder=VECTOR))
    shutil.copytree(tmp_path / "more" / "encoder", first, dirs_exist_ok=True)  # another one in its place
    with pytest.raises(UserError, match="began with initial_encoder"):
        main(replace(going_on, resume=True, steps=2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"encoder": replace(VECTOR, backbone="resnet17")}, ConfigurationError, "backbone is resnet17"),
        ({"batch_size": 500}, DataError, "fewer than a batch of 500"),
        ({"slow_dimension": 6}, UserError, "--slow-dimension 6 leaves nothing of an embedding of 6"),
        ({"fps": 30}, DataError, "its 8 fps are fewer than the clock's 30"),
        ({"videos": (Path("nowhere"),)}, DataError, "nowhere"),
    ],
)
def test_a_mistake_is_one_line(options, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        main(replace(options, **changes))
    assert "\n" not in str(raised.value)


def network(encoder=VECTOR, prediction_weight=1.0):
    torch.manual_seed(0)
    options = Options(videos=(), encoder=encoder, expander=ExpanderConfig((8, 8)), prediction_weight=prediction_weight)
    built = Pretraining(make_encoder(options), options)
    if built.dynamics is not None:
        nn.init.normal_(built.dynamics.change[-1].weight, std=0.1)  # it would copy
    return built


def some_clips(count, length=CONTEXT + 3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, length, 3, 16, 16), dtype=torch.uint8, generator=generator)


def test_rollouts_start_by_copying_and_their_error_has_no_unit():
    dynamics = Dynamics(5)
    embeddings = torch.randn(3, CONTEXT + 2, 4, 5, generator=torch.Generator().manual_seed(0))
    errors = dynamics(embeddings)
    assert errors.shape == (3 * 4, 2, 5)
    unit = (embeddings - embeddings.mean(dim=(0, 1, 2))) / embeddings.std(dim=(0, 1, 2), correction=0)
    copied = (unit[:, CONTEXT:] - unit[:, CONTEXT - 1, None]).square()
    torch.testing.assert_close(errors.unflatten(0, (3, 4)).transpose(1, 2), copied, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dynamics(7 + 30 * embeddings), errors, rtol=1e-4, atol=1e-4)


def test_rollouts_go_on_from_their_own_predictions():
    dynamics = Dynamics(5).eval()
    nn.init.normal_(dynamics.change[-1].weight)
    embeddings = torch.randn(2, CONTEXT + 2, 5, generator=torch.Generator().manual_seed(0))
    errors = dynamics(embeddings)
    changed = embeddings.clone()
    changed[:, CONTEXT] += 1
    assert torch.equal(dynamics(changed)[:, 1], errors[:, 1])
    assert not torch.equal(dynamics(changed)[:, 0], errors[:, 0])


def test_the_encoder_learns_through_past_and_future():
    built = network().eval()
    frames = (some_clips(2, CONTEXT + 2).float() / 255).requires_grad_()
    _, _, error = built(frames)
    error[:, 0].mean().backward()
    reached = frames.grad.abs().sum(dim=(0, 2, 3, 4)) > 0
    assert reached.tolist() == [True] * CONTEXT + [True, False]


def test_clips_are_watched_in_evaluation_mode():
    built = network(GRID)
    before = {name: value.clone() for name, value in built.state_dict().items()}
    metrics, alarms = diagnose(built, some_clips(20))
    assert built.training
    assert all(torch.equal(value, before[name]) for name, value in built.state_dict().items())
    assert metrics["prediction_on_watched_clips"] > 0
    assert any("expander output" in alarm for alarm in alarms)  # untrained
    assert diagnose(built, some_clips(0)) == ({}, [])
    assert "prediction_on_watched_clips" not in diagnose(network(prediction_weight=0.0), some_clips(2))[0]


ON_RANKS = [(VECTOR, 1.0), (GRID, 1.0), (GRID, 0.0)]


def gradients_of(clips, built, wrapped):
    _, outputs, error = wrapped(clips)
    terms = loss_of(outputs, error, Options(videos=(), prediction_weight=3.0), torch.Generator())
    terms.loss.backward()
    return terms.loss.detach(), {name: weight.grad for name, weight in built.named_parameters()}


def work(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(minutes=5), rank=rank, world_size=2)
    found = []
    for encoder, prediction_weight in ON_RANKS:
        built = network(encoder, prediction_weight)
        synchronise_batch_norm(built)
        wrapped = DistributedDataParallel(built, find_unused_parameters=True)
        found.append(gradients_of(some_clips(8).chunk(2)[rank], built, wrapped))
    torch.save(found, folder / f"{rank}.pt")
    distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that shuts down


def test_two_ranks_equal_one_process(tmp_path):
    multiprocessing.start_processes(work, (tmp_path,), 2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for index, (encoder, prediction_weight) in enumerate(ON_RANKS):
        built = network(encoder, prediction_weight)
        loss, gradients = gradients_of(some_clips(8), built, built)
        for found in ranks:
            assert found[index][0].item() == pytest.approx(loss.item(), rel=1e-6)
            largest = max(gradient.abs().max() for gradient in gradients.values())
            for name, gradient in gradients.items():
                assert (found[index][1][name] - gradient).abs().max() <= 1e-5 * largest, name
