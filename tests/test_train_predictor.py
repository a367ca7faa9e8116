"""What a predictor learns from: windows at the times that were drawn, over a horizon that grows. Any network does."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from data.embedding_cache import EmbeddingCache
from data.windows import Windows
from jepa.encoder import ConfigurationError
from jepa.networks import NETWORKS, Network
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from jepa.sampling import sample
from jepa.skill import imagine
from pipelines import evaluate_rollout, train_predictor
from pipelines.artefacts import load_predictor
from pipelines.optimizer import OptimizerConfig
from pipelines.stage import UserError
from pipelines.train_predictor import (
    HeldOut,
    Losses,
    Options,
    Split,
    draw_batches,
    draw_gaps,
    error_unit,
    growing_horizon,
    main,
    measure_embeddings,
    validate,
)

OPTIONS = Options(
    batch_size=64, rollout_steps=4, longest_gap=3, steps=10, predictor=PredictorConfig(context=3, width=16, depth=1)
)


@pytest.fixture
def cache(tmp_path, make_clip, write_cache):
    """Two videos, each on two phases of the clock."""
    clips = [make_clip(f"/{name}.mp4", 40, seed=seed) for seed, name in enumerate("ab")]
    return EmbeddingCache(write_cache(tmp_path, clips))


def test_no_video_is_both_learned_from_and_validated_on(tmp_path, cache):
    options = replace(OPTIONS, train_cache=cache.folder, validation_cache=cache.folder, tracker=("none",))
    with pytest.raises(UserError, match=r"/a\.mp4 is in both --train-cache and --validation-cache: keep videos apart"):
        main(replace(options, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("still", "folds"), [("train", 0), ("validation", 0), ("train", 2)])
def test_embeddings_that_never_change_are_refused(tmp_path, make_clip, write_cache, still, folds):
    folders = {}
    for name, sources in {"train": "abcd", "validation": "ef"}.items():
        clips = [make_clip(f"/{source}.mp4", 40, seed=ord(source)) for source in sources]
        if name == still:  # each video has an embedding of its own
            clips = [replace(clip, embeddings=clip.embeddings[:1].repeat(40, axis=0)) for clip in clips]
        folders[f"{name}_cache"] = write_cache(tmp_path / name, clips)
    options = replace(OPTIONS, folds=folds, tracker=("none",), output_dir=tmp_path / "out", **folders)
    with pytest.raises(UserError, match=f"{tmp_path}/{still}: no embedding ever changes, so nothing can beat copying"):
        main(options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def train(tmp_path, make_clip, write_cache):
    """The stage in this process, on oscillations: trains for a few steps, and says where the predictor is."""
    for seed, split in enumerate(("train", "val", "test")):
        clips = [make_clip(f"/{split}_{name}.mp4", 30, seed=2 * seed + name) for name in (0, 1)]
        for clip in clips:  # each begins somewhere else
            clip.embeddings[:] = np.sin(0.8 * np.arange(30)[:, None] + clip.embeddings[0, 0] + np.arange(5))
        write_cache(tmp_path / split, clips)
    small = PredictorConfig(context=3, width=16, depth=1, heads=2, horizon=2)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    AcceleratorState._reset_state(reset_partial_state=True)

    def run(network=None, **changes):
        options = Options(
            tmp_path / "train", tmp_path / "val", output_dir=tmp_path / "run", steps=4, batch_size=8, rollout_steps=2,
            validation_horizon=4, log_every=2, tracker=(), predictor=replace(small, **(network or {})),
            optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=1),
        )  # fmt: skip
        train_predictor.main(replace(options, **changes))
        return tmp_path / "run" / "predictor"

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_windows_hold_the_embeddings_of_the_times_that_they_name(cache):
    windows = Windows(cache, 3 + 3 * 4)
    (batch,) = list(draw_batches([windows], replace(OPTIONS, steps=1), rank=0, step=0))
    rows = np.concatenate(cache.unbroken_runs())
    all_embeddings = torch.from_numpy(cache.take(rows)).float()
    assert batch.windows.shape == (1, 64, 7, 5)
    seen = set()
    for window, times_s in zip(batch.windows[0], batch.times_s[0], strict=True):
        found = torch.cdist(window, all_embeddings).argmin(dim=1)
        assert torch.equal(all_embeddings[found], window)
        ticks = times_s * cache.provenance.fps
        expected = found[2] + torch.cat([torch.tensor([-2.0, -1.0, 0.0]), ticks])
        assert torch.allclose(found.float(), expected)
        seen |= set(torch.diff(ticks, prepend=torch.zeros(1)).round().int().tolist())
    assert seen == {1, 2, 3}
    assert {path.name for path in batch.videos} == {"a.mp4", "b.mp4"}


def test_a_feature_that_hardly_varied_in_training_swamps_nothing(tmp_path, make_clip, write_cache):
    clips = [make_clip(f"/{name}.mp4", 200, seed=seed) for seed, name in enumerate("ab")]
    for clip in clips:
        clip.embeddings[:, 1], clip.embeddings[:, 3] = 0.1, 7 + 1e-5 * clip.embeddings[:, 3]
    predictor = Predictor(OPTIONS.predictor, 5, 4.0, "0123abcd")
    measure_embeddings(predictor, EmbeddingCache(write_cache(tmp_path / "still", clips)))
    moved = predictor.standardise(torch.tensor([0.0, 0.11, 0.0, 7.01, 0.0]))
    assert moved.abs().max() < 2
    assert torch.allclose(predictor.std[[0, 2, 4]], torch.ones(3), atol=0.1)
    velocity = (moved - predictor.standardise(predictor.mean)) / predictor.change_std
    assert velocity.abs().max() < 200


def test_half_of_the_rollouts_stay_on_the_clock():
    gaps = draw_gaps((2, 500, 6), 4, torch.Generator().manual_seed(0))
    on_clock = (gaps == 1).all(dim=2).float().mean()
    assert 0.45 < on_clock < 0.55
    assert set(gaps.unique().tolist()) == {1, 2, 3, 4}
    assert (draw_gaps((1, 3, 2), 1, torch.Generator()) == 1).all()


def test_the_horizon_grows_to_its_full_length_by_half_of_the_training():
    options = replace(OPTIONS, steps=100)
    horizons = [growing_horizon(step, options) for step in range(100)]
    assert horizons[0] == 1
    assert horizons == sorted(horizons)
    assert set(horizons) == {1, 2, 3, 4}
    assert set(horizons[50:]) == {4}
    assert growing_horizon(0, replace(OPTIONS, rollout_steps=1)) == 1
    assert growing_horizon(0, replace(options, rollout_error="squared")) == 4


def test_errors_are_relative_to_copying_over_the_same_time():
    predictor = Predictor(PredictorConfig(context=2, width=8, depth=1), 3, 4.0, "abc")  # new, it copies
    past = torch.randn(1, 50, 2, 3)
    times_s = torch.tensor([0.25, 0.75]).expand(1, 50, 2)
    future = past[:, :, -1:] + torch.tensor([1.0, 3.0])[:, None] * torch.ones(3)
    losses = Losses(predictor, torch.tensor([1.0, 5.0, 3.0]))
    terms = losses(past, torch.cat([past, future], dim=2), times_s, torch.Generator())
    assert terms["one_step_loss"].item() == pytest.approx(1)
    assert terms["rollout_loss"].item() == pytest.approx((1 + 9 / 3) / 2)


def test_copying_is_measured_where_embeddings_are_learned_from(cache):
    predictor = Predictor(OPTIONS.predictor, 5, 4.0, "0123abcd")
    copied = error_unit([Split(cache, cache)], predictor, OPTIONS)
    assert copied.shape == (12,)
    assert torch.allclose(copied, torch.full((12,), 2.0), rtol=0.25)  # of independent normal numbers
    squared = error_unit([Split(cache, cache)], predictor, replace(OPTIONS, rollout_error="squared"))
    assert torch.equal(squared, torch.ones(12))


def test_every_step_of_a_direct_forecast_is_trained():
    """Points that go round a circle: what comes is known exactly, and is far from a copy."""
    torch.manual_seed(0)
    config = PredictorConfig("direct", context=2, width=32, depth=2, horizon=3)
    losses = Losses(Predictor(config, 2, 4.0, "abc"), torch.ones(5))
    optimizer = torch.optim.Adam(losses.parameters(), 3e-3)
    times_s = (torch.arange(5.0) + 1).expand(1, 64, 5) / 4
    for _ in range(500):
        angle = 6.3 * torch.rand(64, 1) + 0.5 * torch.arange(7)
        window = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
        losses(window[:, :, :2], window, times_s, torch.Generator())["rollout_loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        missed = (rollout(losses.predictor.eval(), window[0, :, :2], 5) - window[0, :, 2:]).square().mean(dim=(0, 2))
    assert missed.max() < 0.01


def test_samples_are_trained_to_be_as_far_apart_as_from_what_came():
    """On a coin toss the mean is the worst place for every sample to be; a trained latent goes both ways."""
    torch.manual_seed(0)
    predictor = Predictor(PredictorConfig(context=2, width=32, depth=1, latent_dimension=1), 3, 4.0, "abc")
    losses, chance = Losses(predictor, torch.ones(1)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(losses.parameters(), 3e-3)
    past, times_s = torch.zeros(1, 64, 2, 3), torch.full((1, 64, 1), 0.25)
    for _ in range(300):
        side = torch.randint(0, 2, (1, 64, 1, 1), generator=chance) * 2.0 - 1
        loss = losses(past, torch.cat([past, side.expand(-1, -1, 1, 3)], dim=2), times_s, chance)["rollout_loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = sample(predictor.eval(), torch.zeros(1, 2, 3), 1, 200, chance)[:, 0, 0].mean(dim=1)
    assert 0.35 < (drawn > 0).float().mean() < 0.65
    assert drawn.abs().mean() > 0.7


def test_the_past_is_noisy_and_what_is_to_be_foretold_is_not(train, tmp_path, monkeypatch):
    seen = []

    class Watched(Losses):
        def forward(self, past, window, times_s, generator):
            if past.shape[1] == 8:  # a batch, not the example that memory is measured with
                seen.append((past.cpu(), window.cpu()))
            return super().forward(past, window, times_s, generator)

    monkeypatch.setattr(train_predictor, "Losses", Watched)
    predictor = load_predictor(train(input_noise=0.5, steps=20))
    assert len(seen) == 20
    added = torch.cat([past - window[:, :, :3] for past, window in seen], dim=1) / predictor.change_std
    assert torch.allclose(added.std(dim=(0, 1, 2)), torch.tensor(0.5), rtol=0.15)  # 480 numbers for each feature
    assert added.mean(dim=(0, 1, 2)).abs().max() < 0.1
    cache = EmbeddingCache(tmp_path / "train")
    clean = predictor.standardise(torch.from_numpy(cache.take(np.concatenate(cache.unbroken_runs()))))
    for _, window in seen:
        assert torch.cdist(window.flatten(0, 2), clean).amin(dim=1).max() < 0.01


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_every_network_goes_through_the_stages(train, tmp_path, kind):
    folder = train({"kind": kind})
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["best_step"] > 0  # it has learned something
    assert np.isfinite([value for value in metrics.values() if isinstance(value, float)]).all()
    evaluate_rollout.main(
        evaluate_rollout.Options(tmp_path / "test", folder, tmp_path / "out", horizon=4, resamples=20)
    )
    records = json.loads((tmp_path / "out" / "rollout.json").read_text())["predictors"]
    assert {"model", "ridge", "copy_last"} < set(records)
    for of_one in records.values():
        assert [record["horizon"] for record in of_one] == [1, 2, 3, 4]
        assert np.isfinite([record["mse"] for record in of_one]).all()
    assert records["model"] != records["copy_last"]


class NewestStep(Network):
    """A user's network, all of it: what it needs of the past is in the newest step."""

    def __init__(self, inputs, config):
        super().__init__()
        self.layer = nn.Linear(inputs, config.width)

    def forward(self, steps, outputs, state=None):
        return self.layer(steps.features[:, -outputs:]).relu(), None


class TwoAtOnce(Network):
    """A user's network with a head of its own: velocities for two steps, the second of which waits in the state."""

    gives_velocities = True
    steps_at_once = 2

    def __init__(self, inputs, config):
        super().__init__()
        self.heads = nn.Linear(inputs, 2 * (inputs // 2 - 1))

    def forward(self, steps, outputs, state=None):
        if state is not None:
            return state, None
        first, second = self.heads(steps.features[:, -outputs:]).chunk(2, dim=-1)
        return first, second[:, -1:]


@pytest.mark.parametrize("network", [NewestStep, TwoAtOnce])
def test_a_network_of_ones_own_is_one_class(train, monkeypatch, network):
    monkeypatch.setitem(NETWORKS, "mine", network)
    torch.manual_seed(0)
    loaded = load_predictor(train({"kind": "mine"}))
    assert isinstance(loaded.members[0].network, network)
    assert isinstance(loaded.members[0].head, nn.Identity) == (network is TwoAtOnce)
    past = torch.randn(2, 6, 5)
    with torch.no_grad():
        assert not torch.equal(rollout(loaded, past, 5), past[:, -1:].expand(-1, 5, -1))
        assert rollout(loaded, past, times_s=torch.tensor([0.25, 0.5, 0.75])).isfinite().all()


def test_a_network_of_ones_own_is_refused_what_it_cannot_do(train, monkeypatch):
    monkeypatch.setitem(NETWORKS, "mine", TwoAtOnce)
    with pytest.raises(UserError, match=r"--rollout-steps is 1, but the predictor forecasts 2 steps at once"):
        train({"kind": "mine"}, rollout_steps=1)
    with pytest.raises(ConfigurationError, match=r"3 with --predictor\.kind mine: it has a head of its own"):
        train({"kind": "mine", "latent_dimension": 3})
    monkeypatch.setitem(NETWORKS, "mine", NewestStep)
    train({"kind": "mine", "latent_dimension": 3}, rollout_steps=1)


def test_no_horizon_is_worse_than_copying_on_validation_clips():
    """Slow walks that come back: what is near is best copied, what is far is near the mean; the model knows nothing."""
    generator = torch.Generator().manual_seed(0)
    walk = [torch.randn(200, 5, generator=generator)]
    for _ in range(22):
        walk.append(0.9 * walk[-1] + 0.19**0.5 * torch.randn(200, 5, generator=generator))
    predictor = Predictor(PredictorConfig(context=3, width=16, depth=1), 5, 4.0, "abc")
    torch.manual_seed(0)
    nn.init.normal_(predictor.members[0].head.weight, std=0.1)
    held_out = [HeldOut(torch.stack(walk, dim=1), torch.zeros(5))]
    metrics, _ = validate(predictor, held_out, members=1)
    shares = [metrics[f"validation_relative_to_copy_last_{horizon}"] for horizon in (1, 5, 20)]
    past, future = held_out[0].windows[:, :3], held_out[0].windows[:, 3:]
    error, copied = (
        (guess - future).square().mean(dim=(0, 2)) for guess in (imagine(predictor.eval(), past, 20), past[:, -1:])
    )
    assert (error <= copied * (1 + 1e-5)).all()
    assert torch.allclose((error / copied)[[0, 4, 19]], torch.tensor(shares), rtol=1e-4)
    assert error[19] < 0.7 * copied[19]  # not by copying
