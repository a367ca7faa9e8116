"""Predictors and baselines: one interface, no look into the future, the same after saving and loading."""

import pytest
import torch

from jepa.encoder import ConfigurationError
from jepa.predictor import (
    NETWORKS,
    CopyLast,
    LinearExtrapolation,
    Mean,
    Predictor,
    PredictorConfig,
    changes,
    fit_ridge,
    last_steps,
)
from jepa.rollout import rollout


def make(kind: str, context: int = 4) -> Predictor:
    """A predictor whose head is no longer zero, so that it says something."""
    torch.manual_seed(0)
    config = PredictorConfig(kind=kind, context=context, width=16, depth=2, heads=2)  # type: ignore[arg-type]
    predictor = Predictor(config, 5, 4.0, "abc").eval()
    torch.nn.init.normal_(predictor.members[0].head.weight)
    torch.nn.init.normal_(predictor.ridge.weight)
    return predictor


def everyone() -> dict[str, torch.nn.Module]:
    predictors: dict[str, torch.nn.Module] = {kind: make(kind) for kind in NETWORKS}
    return predictors | make("mlp").baselines()


@pytest.mark.parametrize("name", list(everyone()))
def test_changing_the_future_leaves_the_past_bit_equal(name):
    predictor = everyone()[name]
    past = torch.randn(3, 12, 5)
    changed = past.clone()
    changed[:, 7:] += 10
    with torch.no_grad():
        before, after = predictor(past, 12), predictor(changed, 12)
    assert before.shape == (3, 12, 5)
    assert torch.equal(before[:, :7], after[:, :7])
    if name != "mean":
        assert not torch.equal(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("name", list(everyone()))
def test_fewer_outputs_are_the_last_of_more(name):
    predictor = everyone()[name]
    past = torch.randn(3, 12, 5)
    with torch.no_grad():
        assert torch.allclose(predictor(past, 12)[:, -3:], predictor(past, 3), atol=1e-6)
        assert predictor(past).shape == (3, 1, 5)


@pytest.mark.parametrize("name", [name for name in everyone() if name != "gru"])
def test_memory_is_all_that_matters(name):
    predictor = everyone()[name]
    past = torch.randn(2, 20, 5)
    with torch.no_grad():
        shortened = predictor(past[:, -predictor.memory - 1 :], 1)
        assert torch.allclose(predictor(past), shortened, atol=1e-5)


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_new_predictor_copies_the_last_embedding(kind):
    predictor = Predictor(PredictorConfig(kind=kind, width=16, heads=2), 5, 4.0, "abc")
    past = torch.randn(2, 9, 5)
    assert torch.equal(predictor(past), past[:, -1:])


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_save_and_load(kind, tmp_path):
    predictor = make(kind)
    predictor.mean.fill_(0.5)
    predictor.save_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path).eval()
    past = torch.randn(2, 6, 5)
    with torch.no_grad():
        assert torch.equal(loaded(past), predictor(past))
        assert torch.equal(loaded.ridge(past), predictor.ridge(past))
    assert (loaded.config, loaded.fps, loaded.encoder_fingerprint) == (predictor.config, 4.0, "abc")
    assert loaded.mean[0] == 0.5


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_half_precision_is_finite(kind):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert make(kind)(torch.randn(2, 30, 5), 30).isfinite().all()


def test_baselines_are_what_they_say():
    line = torch.arange(6.0)[None, :, None].expand(1, 6, 5)
    assert CopyLast()(line)[0, 0, 0] == 5
    assert LinearExtrapolation()(line)[0, 0, 0] == 6
    assert torch.equal(LinearExtrapolation()(line, 6)[:, 0], line[:, 0])  # nothing is known of the first change
    assert Mean()(line).abs().max() == 0
    assert torch.equal(rollout(LinearExtrapolation(), line, 3)[0, :, 0], torch.tensor([6.0, 7.0, 8.0]))


def test_ridge_recovers_a_linear_law():
    torch.manual_seed(0)
    law = torch.randn(3 * 4, 4) * 0.3
    past = torch.randn(400, 3, 4)
    following = past.flatten(1) @ law + 0.7
    windows = torch.cat([past, following[:, None]], dim=1)
    exact, shrunk = fit_ridge(windows, 3, [1e-9, 10.0])
    assert torch.allclose(exact(past)[:, 0], following, atol=1e-4)
    assert shrunk.weight.norm() < 0.5 * exact.weight.norm()


def test_last_steps_are_in_order_and_padded_with_the_first():
    steps = torch.arange(4.0)[None, :, None]
    assert last_steps(steps, 3, 2)[0].tolist() == [[0, 1, 2], [1, 2, 3]]
    assert last_steps(steps, 3, 4)[0, 0].tolist() == [0, 0, 0]
    assert last_steps(steps[:, :1], 3, 1)[0].tolist() == [[0, 0, 0]]


def test_changes():
    assert changes(torch.tensor([[[1.0], [4.0], [9.0]]]))[0, :, 0].tolist() == [0, 3, 5]


@pytest.mark.parametrize("name", list(everyone()))
def test_rollout_feeds_itself(name):
    predictor = everyone()[name]
    past = torch.randn(2, 6, 5)
    with torch.no_grad():
        future = rollout(predictor, past, 4)
        again = rollout(predictor, torch.cat([past, future[:, :2]], dim=1), 2)
    assert future.shape == (2, 4, 5)
    assert torch.allclose(future[:, 2:], again, atol=1e-6)


def test_rollout_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="horizon is 0"):
        rollout(CopyLast(), torch.randn(1, 2, 3), 0)
    with pytest.raises(ValueError, match="at least one embedding"):
        rollout(CopyLast(), torch.randn(1, 0, 3), 1)


def test_impossible_configurations_are_refused():
    with pytest.raises(ConfigurationError, match="unknown predictor 'lstm'"):
        Predictor(PredictorConfig(kind="lstm"), 5, 4.0, "abc")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="heads 3"):
        Predictor(PredictorConfig(kind="transformer", width=16, heads=3), 5, 4.0, "abc")
    with pytest.raises(ConfigurationError, match="context is 1"):
        Predictor(PredictorConfig(context=1), 5, 4.0, "abc")
