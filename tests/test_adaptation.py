"""Learning while watching: only from what has been seen, and not to the worse."""

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import Matern

from data.embedding_cache import EmbeddingCache
from jepa import adaptation
from jepa.adaptation import adapt, count_known
from jepa.predictor import Predictor, PredictorConfig
from jepa.shrinkage import LONGEST, shrink
from jepa.skill import imagine, imagine_unshrunk
from pipelines.evaluate_rollout import imagine_all, lay_out_trials

CONTEXT, HORIZON, D = 2, 4, 3
ADVISED = torch.tensor([0.6, 0.1]).repeat(LONGEST, 1)


def laps(count: int, length: int = 40, noise: float = 0.05) -> torch.Tensor:
    """Embeddings (count x length, D) of a road driven round and round."""
    generator = torch.Generator().manual_seed(0)
    lap = torch.randn(length, D, generator=generator)
    return lap.repeat(count, 1) + noise * torch.randn(count * length, D, generator=generator)


def split(embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All windows as past (N, CONTEXT, D) and future (N, HORIZON, D)."""
    windows = embeddings.unfold(0, CONTEXT + HORIZON, 1).mT
    return windows[:, :CONTEXT], windows[:, CONTEXT:]


def error(found: torch.Tensor, future: torch.Tensor) -> float:
    return float((found - future).square().mean())


@pytest.fixture
def drive():
    """What forecasts that know nothing but noise start from, say, and what came: imagined, past, future, begun."""
    past, future = split(laps(8))
    imagined = torch.randn(future.shape, generator=torch.Generator().manual_seed(1))
    return imagined, past, future, torch.arange(len(past))


@pytest.mark.parametrize("seen", [1, 30, 120])
def test_what_had_not_been_seen_changes_nothing(drive, seen):
    imagined, past, future, begun = drive
    begun = begun + 7 * (begun > 100)  # a gap in time: more is seen than has been forecast
    found = adapt(imagined, past, future, begun, ADVISED)
    unknown = torch.cat([future[:seen], torch.full_like(future[seen:], torch.nan)])
    without = adapt(imagined, past, unknown, begun, ADVISED)
    untouched = int((begun < begun[seen] + HORIZON).sum())  # begun before the first unknown future had been seen
    assert torch.equal(without[:untouched], found[:untouched])
    assert without[untouched:].isnan().any(dim=2).all()  # all later ones learn from it


def test_forecasts_begun_later_change_nothing(drive):
    """Neither what they started from nor what they imagined, as whole statistics over a clip would."""
    *parts, begun = drive
    generator = torch.Generator().manual_seed(2)
    first_unknown = (150, 150, 150 - HORIZON)  # imagined, past, future
    changed = [
        torch.cat([part[:known], 100 * torch.randn(part[known:].shape, generator=generator)])
        for part, known in zip(parts, first_unknown, strict=True)
    ]
    found, other = adapt(*parts, begun, ADVISED), adapt(*changed, begun, ADVISED)
    assert torch.equal(other[:150], found[:150])
    assert (other[150:] != found[150:]).all()


def test_advice_weighs_as_much_as_fifty_forecasts():
    generator = torch.Generator().manual_seed(0)
    rollouts, last = torch.randn(200, HORIZON, D, generator=generator), torch.randn(200, 1, D, generator=generator)
    known = torch.arange(200)
    # All would best have been copies.
    found = adaptation._trust(rollouts, last, last.expand_as(rollouts), known, ADVISED[:HORIZON])
    weight = (50 / (50 + known.double()))[:, None, None]
    expected = (last + weight * (0.6 * (rollouts - last) - 0.1 * last)).float()
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(("useful", "at_first", "at_last"), [(1, 1, 1), (3, 1, 1), (0.5, 1, 0.6), (-1, 1, 0)])
def test_corrections_earn_their_share(useful, at_first, at_last):
    correction = torch.randn(201, HORIZON, D, generator=torch.Generator().manual_seed(0))
    share = adaptation._earned(correction, useful * correction, torch.arange(201))
    assert share.shape == (201, HORIZON, 1)
    assert torch.allclose(share[1], torch.tensor(float(at_first)), atol=0.05)
    assert torch.allclose(share[-1], torch.tensor(float(at_last)), atol=1e-6)


def test_moments_are_alike_by_all_that_was_seen():
    """What comes is told by the embedding before the last."""
    sign = torch.randn(300, 1, generator=torch.Generator().manual_seed(0)).sign()
    past = torch.stack([sign * torch.ones(300, D), torch.zeros(300, D)], dim=1)
    future = (sign * torch.tensor([1.0, -1.0, 2.0]))[:, None].expand(300, HORIZON, D)
    found = adapt(torch.zeros_like(future), past, future, torch.arange(300), ADVISED)
    assert error(found[150:], future[150:]) < 0.05 * float(future.square().mean())


def test_moments_far_from_zero_are_as_alike(drive):
    """As where a feature never varied in training, and is standardised by next to nothing."""
    moments = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    near, far = adaptation._similarity(moments, moments), adaptation._similarity(moments + 1000, moments + 1000)
    assert torch.allclose(near, far, atol=1e-3)
    imagined, past, future, begun = drive
    dead = [torch.cat([part, torch.full_like(part[..., :1], 1e4)], dim=2) for part in (imagined, past, future)]
    found = adapt(*dead, begun, ADVISED)
    assert found.isfinite().all()
    assert error(found[160:, :, :D], future[160:]) < error(shrink(imagined, past[:, -1], ADVISED)[160:], future[160:])


def test_before_anything_is_known_it_is_as_advised(drive):
    imagined, past, future, begun = drive
    advised = shrink(imagined, past[:, -1], ADVISED)
    assert torch.equal(count_known(begun, HORIZON)[: HORIZON + 2], torch.tensor([0, 0, 0, 0, 1, 2]))
    found = adapt(imagined, past, future, begun, ADVISED)
    assert torch.allclose(found[:HORIZON], advised[:HORIZON], atol=1e-6)
    few = [part[:HORIZON] for part in (imagined, past, future, begun)]
    assert torch.allclose(adapt(*few, ADVISED), advised[:HORIZON], atol=1e-6)
    assert error(found[HORIZON:], advised[HORIZON:]) > 1e-3


def test_it_learns_how_far_to_trust():
    generator = torch.Generator().manual_seed(0)
    walk = torch.randn(400, D, generator=generator).cumsum(dim=0)
    past, future = split(walk)
    imagined = past[:, -1:] + 2 * (future - past[:, -1:])  # the right way, twice too far
    found = adapt(imagined, past, future, torch.arange(len(past)), torch.tensor([1.0, 0.0]).repeat(LONGEST, 1))
    assert error(found[200:], future[200:]) < 0.1 * error(imagined[200:], future[200:])


def test_it_learns_a_road_that_comes_again(drive):
    imagined, past, future, begun = drive
    found = adapt(imagined, past, future, begun, ADVISED)
    advised = shrink(imagined, past[:, -1], ADVISED)
    assert error(found[160:], future[160:]) < 0.2 * error(advised[160:], future[160:])


def test_where_nothing_is_to_be_learned_little_is_lost():
    """Errors that are pure chance, and trust that is already right."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        past = torch.randn(600, CONTEXT, D, generator=generator)
        future = past[:, -1:] + torch.randn(600, HORIZON, D, generator=generator)
        imagined = future + torch.randn(future.shape, generator=generator)
        weights = torch.tensor([0.5, 0.0]).repeat(LONGEST, 1)
        found = adapt(imagined, past, future, torch.arange(600), weights)
        assert error(found, future) < 1.02 * error(shrink(imagined, past[:, -1], weights), future)


def test_errors_are_expected_as_by_a_gaussian_process():
    generator = torch.Generator().manual_seed(0)
    moments, errors = torch.randn(30, 6, generator=generator), torch.randn(30, 2, 3, generator=generator)
    known = torch.cat([torch.zeros(20, dtype=torch.long), torch.full((10,), 15)])
    kernel = Matern(adaptation.REACH * 6**0.5, "fixed", nu=0.5)
    process = GaussianProcessRegressor(kernel, alpha=adaptation.NOISE, optimizer=None)
    process.fit(moments[:15], errors[:15].flatten(1))
    found = adaptation._similar_errors(errors, moments, known)
    assert (found[:20] == 0).all()
    assert np.allclose(found[20:].flatten(1), process.predict(moments[20:]), atol=1e-5)


def test_only_the_newest_errors_are_remembered(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    moments, errors = torch.randn(90, 6, generator=generator), torch.randn(90, 2, 3, generator=generator)
    known = torch.arange(90)
    monkeypatch.setattr(adaptation, "MEMORY", 20)
    found = adaptation._similar_errors(errors, moments, known)
    changed = adaptation._similar_errors(torch.cat([errors[:20] + 5, errors[20:]]), moments, known)
    assert not torch.equal(found[20:40], changed[20:40])
    assert torch.equal(found[61:], changed[61:])


def test_each_clip_is_a_story_of_its_own(tmp_path, make_clip, write_cache):
    """Rows for long clips alone, each as if there were no other."""
    config = PredictorConfig(context=CONTEXT, width=8)
    predictor = Predictor(config, 5, 4.0, "0123abcd").eval()
    for weights in predictor.parameters():
        torch.nn.init.normal_(weights, std=0.3)
    predictor.shrinkage.copy_(ADVISED)
    predictor.ridge.weight.normal_(std=0.2)
    predictor.ridge_shrinkage.copy_(torch.tensor([0.4, 0.2]))
    clips = [make_clip("/a.mp4", 90), make_clip("/b.mp4", 200, gaps=(120,), seed=1), make_clip("/c.mp4", 4, seed=2)]
    trials = lay_out_trials(EmbeddingCache(write_cache(tmp_path / "long", clips)), predictor, HORIZON)
    found = imagine_all(predictor, trials)
    assert list(found)[-2:] == ["adapting_model", "adapting_ridge"]
    assert torch.equal(found["model"], imagine(predictor, trials.past, HORIZON))
    for name, one, weights in (
        ("adapting_model", predictor, ADVISED),
        ("adapting_ridge", predictor.ridge, predictor.ridge_shrinkage),
    ):
        for index in range(2):
            own = torch.from_numpy(trials.windows.clips == index)
            past, future = trials.past[own], trials.future[own]
            begun = torch.from_numpy(trials.windows.starts)[own]
            expected = adapt(imagine_unshrunk(one, past, HORIZON), past, future, begun, weights)
            assert torch.allclose(found[name][own], expected, atol=1e-5)
    short = lay_out_trials(EmbeddingCache(write_cache(tmp_path / "short", clips[:1])), predictor, HORIZON)
    assert not {"adapting_model", "adapting_ridge"} & set(imagine_all(predictor, short))
