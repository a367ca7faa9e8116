"""The predictor's training and its calibration: every network, resumed bit-equal, judged on other clips, refusals."""

import json

import numpy as np
import pytest
import torch

from data.cache import CacheError, Column, EmbeddingCache
from data.windows import Windows
from jepa.networks import MLPConfig, TransformerConfig
from jepa.predictor import Predictor
from jepa.sequence import Sequence, line_across
from pipelines import calibrate, evaluate_rollout, score_surprise, train_predictor
from pipelines.run.command import UserError
from pipelines.run.judging import copying_error, measure_embeddings
from pipelines.run.models import load_predictor

NETWORKS = {
    "mlp": MLPConfig(context=4, width=32, depth=1),
    "transformer": TransformerConfig(context=4, width=32, depth=1, heads=2),
    "latent": MLPConfig(context=4, width=32, depth=1, latent_dimension=2),
    "infill": TransformerConfig(context=8, width=32, depth=2, heads=2, infill=True),
}


def turning(frames, shape=(5,), seed=0):
    """Embeddings that turn at a steady pace, with a little noise: there is something to foresee."""
    generator = np.random.default_rng(seed)
    angles = generator.uniform(0, 6) + 0.4 * np.arange(frames)[:, None] * np.linspace(0.5, 1.5, shape[-1])
    turned = np.sin(angles).reshape(frames, *[1] * (len(shape) - 1), shape[-1])
    return (3 + turned + 0.02 * generator.normal(size=(frames, *shape))).astype(np.float32)


def pushed(frames, seed=0):
    """Embeddings that go where they are pushed, and the pushes, which nobody could foresee; the last of them unsaid."""
    generator = np.random.default_rng(seed)
    push = generator.normal(size=(frames, 2))
    mix = np.random.default_rng(0).normal(size=(2, 5))
    moved = np.cumsum(np.concatenate([np.zeros((1, 2)), push[:-1]]), axis=0) @ mix
    push[-1] = np.nan
    return (moved + 0.02 * generator.normal(size=(frames, 5))).astype(np.float32), push


@pytest.fixture(scope="module")
def acted(tmp_path_factory, make_clip, write_cache):
    """Folders of caches of what is acted in, to train on, to validate on and to test on."""
    folders = {}
    for part, (split, clips) in enumerate((("train", 12), ("val", 5), ("test", 6))):
        made = []
        for clip in range(clips):
            embeddings, push = pushed(40, 100 * part + clip)
            columns = {f"push_{axis}": 100 + 3 * push[:, axis] for axis in range(2)}
            made.append(make_clip(f"/videos/{split}_{clip}.mp4", 40, embeddings=embeddings, **columns))
        columns = {f"push_{axis}": Column("float64") for axis in range(2)}
        folders["vector", split] = write_cache(tmp_path_factory.mktemp(split), made, columns=columns)
    return folders


@pytest.fixture(scope="module")
def caches(tmp_path_factory, make_clip, write_cache):
    """Folders of caches to train on, to validate on, and of more clips: of vectors and of grids."""
    folders = {}
    for name, shape in (("vector", (5,)), ("grid", (2, 2, 5))):
        for part, (split, clips) in enumerate((("train", 12), ("val", 5), ("more", 9))):
            folder = tmp_path_factory.mktemp(f"{name}_{split}")
            made = [
                make_clip(f"/videos/{split}_{clip}.mp4", 40, embeddings=turning(40, shape, 100 * part + clip))
                for clip in range(clips)
            ]
            folders[name, split] = write_cache(folder, made, shape=shape)
    return folders


def options(caches, folder, *, shape="vector", **changes):
    values = {
        "train_cache": caches[shape, "train"], "validation_cache": caches[shape, "val"], "output_dir": folder,
        "steps": 12, "batch_size": 8, "rollout_steps": 3, "validation_horizon": 6, "log_every": 6, "tracker": ("none",),
        "predictor": NETWORKS["mlp"],
    }  # fmt: skip
    return train_predictor.Options(**values | changes)


def measured(caches, shape):
    """A training cache, and a new predictor that knows its statistics."""
    cache = EmbeddingCache(caches[shape, "train"])
    predictor = Predictor(NETWORKS["mlp"], cache.shape, fps=4.0, encoder_fingerprint="a")
    measure_embeddings(predictor, cache)
    return cache, predictor


def test_the_memory_of_a_batch_counts_each_place_once(caches, tmp_path, monkeypatch):
    """A batch of a grid has fewer windows, not more places."""
    needed = []
    monkeypatch.setattr(train_predictor, "require_memory", lambda size, _: needed.append(size))
    for shape, batch_size in (("vector", 8), ("grid", 8), ("grid", 2)):
        train_predictor.main(options(caches, tmp_path / str(len(needed)), shape=shape, batch_size=batch_size, steps=1))
    assert needed[0] == needed[1] == 2 * needed[2]  # at least one window of 2x2 places


@pytest.mark.parametrize("shape", ["vector", "grid"])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_trained_calibrated_and_loaded(caches, tmp_path, name, shape):
    train_predictor.main(options(caches, tmp_path / "run", shape=shape, predictor=NETWORKS[name]))
    predictor, calibration = load_predictor(tmp_path / "run")
    assert predictor.config == NETWORKS[name]
    assert calibration.horizon == 6
    torch.testing.assert_close(calibration.blend.sum(dim=1), torch.ones(6))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["validation_relative_to_copy_last"] < 1
    assert metrics["steps"] == 12


def test_training_learns_and_the_best_weights_are_kept(caches, tmp_path):
    train_predictor.main(options(caches, tmp_path / "run", steps=150, batch_size=32, log_every=50))
    rows = [json.loads(row) for row in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert rows[-1]["validation_rollout_relative_to_copy_last"] < 0.5
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    values = {row["step"]: row["validation_relative_to_copy_last"] for row in rows}
    assert metrics["validation_relative_to_copy_last"] == min(values.values()) == values[metrics["best_step"]]


def test_actions_are_learned_judged_and_asked_for(acted, caches, tmp_path, capsys):
    """What nobody could foresee is foreseen by what is done; another clip's actions are worse than none."""
    chosen = {"steps": 120, "batch_size": 32, "log_every": 60}
    train_predictor.main(options(acted, tmp_path / "run", actions=("push_*",), **chosen))
    assert "12 embeddings of 480 without actions" in capsys.readouterr().err
    train_predictor.main(options(acted, tmp_path / "none", **chosen))
    predictor, _ = load_predictor(tmp_path / "run")
    assert predictor.actions == ("push_0", "push_1")
    torch.testing.assert_close(predictor.action_mean, torch.full((2,), 100.0), atol=0.5, rtol=0)
    torch.testing.assert_close(predictor.action_std, torch.full((2,), 3.0), atol=0.3, rtol=0)
    found = {}
    for name in ("run", "none"):
        folder = tmp_path / f"evaluation_{name}"
        evaluate_rollout.main(
            evaluate_rollout.Options(
                cache=acted["vector", "test"], predictor=tmp_path / name, output_dir=folder, horizon=3
            )
        )
        found[name] = json.loads((folder / "rollout.json").read_text())
    read = found["run"]["inverse_dynamics"]
    assert 0.3 < read["imagined"] < read["true"]
    assert 0.95 < read["true"] < 1
    assert "read off two embeddings: true 0." in capsys.readouterr().out
    assert found["none"]["inverse_dynamics"] == {}
    found = {name: results["predictors"] for name, results in found.items()}
    with_actions, without = (found[name]["model"][2]["relative_to_copy_last"] for name in ("run", "none"))
    assert with_actions < 0.2 < 0.8 < without < 1.2 < found["run"]["shuffled_actions"][2]["relative_to_copy_last"]
    assert found["run"]["model"][2]["relative_to_shuffled_actions_high"] < 0.2
    assert "shuffled_actions" not in found["none"]
    surprise = score_surprise.Options(
        cache=acted["vector", "test"], predictor=tmp_path / "run", output_dir=tmp_path / "s"
    )
    score_surprise.main(surprise)
    calibrate.main(calibrate.Options(predictor=tmp_path / "run", cache=acted["vector", "test"], horizon=2))
    with pytest.raises(
        UserError, match=r"has no numbers push_0, it has none: cache .* again with --columns push_0 push_1"
    ):
        calibrate.main(calibrate.Options(predictor=tmp_path / "run", cache=caches["vector", "more"]))
    with pytest.raises(UserError, match=r"has no numbers pull_\*, it has push_0, push_1"):
        train_predictor.main(options(acted, tmp_path / "never", actions=("push_0", "pull_*")))


def test_the_same_seed_gives_the_same_weights_and_another_others(caches, tmp_path):
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        train_predictor.main(options(caches, tmp_path / str(number), seed=seed))
        weights.append((tmp_path / str(number) / "predictor" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_calibration_is_fitted_anew_by_one_command(caches, tmp_path):
    train_predictor.main(options(caches, tmp_path / "run"))
    _, before = load_predictor(tmp_path / "run")
    calibrate.main(calibrate.Options(predictor=tmp_path / "run", cache=caches["vector", "more"], horizon=4))
    _, after = load_predictor(tmp_path / "run")
    assert (before.horizon, after.horizon) == (6, 4)
    assert len(after.clips.unique()) == 9
    assert torch.equal(before.ridge.weight, after.ridge.weight)
    with pytest.raises(UserError, match=r"was trained on .*, whose errors are not usual ones"):
        calibrate.main(calibrate.Options(predictor=tmp_path / "run", cache=caches["vector", "train"]))


def test_a_calibration_of_another_predictor_is_refused(caches, tmp_path):
    for seed in (0, 1):
        train_predictor.main(options(caches, tmp_path / str(seed), seed=seed, steps=2))
    (tmp_path / "0" / "calibration").rename(tmp_path / "aside")
    (tmp_path / "1" / "calibration").rename(tmp_path / "0" / "calibration")
    with pytest.raises(UserError, match="is that of another predictor, or of another version"):
        load_predictor(tmp_path / "0")


def test_statistics_are_those_of_all_embeddings(caches):
    cache, predictor = measured(caches, "grid")
    everything = np.concatenate([cache.take(clip.rows) for clip in cache.clips]).astype(np.float64)
    np.testing.assert_allclose(predictor.mean, everything.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(predictor.std, everything.std(axis=(0, 1, 2)), rtol=1e-4)
    changes = np.concatenate([np.diff(cache.take(clip.rows).astype(np.float64), axis=0) for clip in cache.clips])
    expected = np.sqrt((changes**2).mean(axis=(0, 1, 2))) / everything.std(axis=(0, 1, 2))
    np.testing.assert_allclose(predictor.change_std, expected, rtol=1e-4)


def test_losses_are_relative_to_copying_over_the_same_time(caches):
    cache, predictor = measured(caches, "vector")
    windows = Windows(cache, 4 + 3)
    losses = train_predictor.Losses(predictor, copying_error(windows, predictor))
    taken = windows.take(np.arange(len(windows)))
    terms = losses(taken[:, :4], taken[:, 4:], torch.Generator())  # an untrained predictor copies
    assert terms["one_step_loss"].item() == pytest.approx(1, rel=1e-4)
    assert terms["rollout_loss"].item() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("shape", ["vector", "grid"])
def test_training_learns_to_fill_in_better_than_the_line(caches, tmp_path, shape):
    chosen = options(caches, tmp_path / "run", shape=shape, steps=150, batch_size=32, predictor=NETWORKS["infill"])
    train_predictor.main(chosen)
    predictor, _ = load_predictor(tmp_path / "run")
    cache = EmbeddingCache(caches[shape, "more"])
    came = Windows(cache, 8).take(np.arange(100))
    hidden = torch.zeros(came.shape[:-1], dtype=torch.bool)
    hidden[:, 3:6] = True
    with torch.no_grad():
        filled = predictor.fill(Sequence.on_clock(came, 4.0, hidden=hidden)).embeddings
    line, _ = line_across(came, hidden)
    assert (filled - came).square().mean() < 0.8 * (line - came).square().mean()


@pytest.mark.parametrize("tokens", [(), (2, 3)])
def test_half_of_the_pasts_have_a_gap_and_half_are_hidden_here_and_there(tokens):
    hidden = train_predictor.draw_hidden(torch.Size((3000, 8, *tokens)), torch.Generator().manual_seed(0))
    each = hidden.view(3000, 8, -1)
    frames = each.all(dim=2)
    gap = (frames.int().diff(dim=1).abs().sum(dim=1) == 2) & ~each[:, 0].any(dim=1) & ~each[:, -1].any(dim=1)
    gap &= each.flatten(1).sum(dim=1) == frames.sum(dim=1) * each.shape[2]
    assert gap.float().mean() == pytest.approx(0.5, abs=0.15 if tokens == () else 0.03)  # few others look like gaps
    assert frames[gap].sum(dim=1).bincount(minlength=5)[1:5].min() > 300  # of all lengths, half of the past at most
    others = each[~gap]
    assert others.float().mean() == pytest.approx(0.75 / 2, abs=0.05)
    if tokens:
        same = (others == others[:, :1]).flatten(1).all(dim=1)
        assert same.float().mean() == pytest.approx(0.5, abs=0.1)


def test_the_horizon_grows_to_its_full_length_by_half_of_the_training(caches, tmp_path):
    chosen = options(caches, tmp_path, steps=100, rollout_steps=8)
    assert [train_predictor.growing_horizon(step, chosen) for step in (0, 24, 49, 50, 99)] == [1, 4, 7, 8, 8]


def test_what_cannot_be_learned_from_is_refused_in_a_line(caches, tmp_path, make_clip, write_cache, damage_cache):
    with pytest.raises(UserError, match="keep videos apart"):
        train_predictor.main(options(caches, tmp_path / "a", validation_cache=caches["vector", "train"]))
    clip = make_clip("/videos/x.mp4", 30)
    frozen = make_clip("/videos/x.mp4", 30, embeddings=np.ones((30, 5), np.float32))
    still = write_cache(tmp_path / "still", [frozen])
    broken = damage_cache(write_cache(tmp_path / "broken", [clip]))
    for part in ("train_cache", "validation_cache"):
        with pytest.raises(UserError, match="no embedding ever changes"):
            train_predictor.main(options(caches, tmp_path / "b", **{part: still}))
        with pytest.raises(UserError, match="not finite"):
            train_predictor.main(options(caches, tmp_path / "b", **{part: broken}, overwrite=True))
    with pytest.raises(CacheError, match=r"no clip in .* is long enough"):
        train_predictor.main(options(caches, tmp_path / "d", validation_horizon=100))
    other = write_cache(tmp_path / "other", [clip], encoder_fingerprint="another")
    with pytest.raises(CacheError, match="made by encoder"):
        train_predictor.main(options(caches, tmp_path / "e", validation_cache=other))
