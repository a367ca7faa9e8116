"""A calibration: never worse than a simple guess, energies of 1, percentiles that mean what they say."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from jepa.baselines import Ridge
from jepa.calibration import Calibration, Ordinary, most_surprising
from jepa.fitting import Forecasts, best_blend, cross_fit_blend, cross_fit_energy, fit_calibration, fit_spread, hold_out
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence

FPS = 4.0


def clips(number, moments=40, seed=0, unlike=0.3):
    """Forecasts of clips that differ in their ordinary error, standardised: (N, 3 horizons, 4 numbers)."""
    generator = torch.Generator().manual_seed(seed)
    came = torch.randn(number * moments, 3, 4, generator=generator)
    scale = torch.exp(unlike * torch.randn(number, 1, 1, 1, generator=generator)).expand(-1, moments, 3, 4)
    noise = torch.randn(came.shape, generator=generator) * scale.flatten(0, 1) * torch.tensor([0.1, 0.5, 1.0, 2.0])
    return Forecasts(
        came + 0.3 * noise, came + 0.5 * torch.randn(came.shape, generator=generator),
        torch.randn(len(came), 1, 4, generator=generator), came, np.repeat(np.arange(number), moments),
    )  # fmt: skip


def ridge():
    return Ridge(
        FPS, 2, mean=torch.tensor([1.0, -2.0, 0.0, 3.0]), std=torch.tensor([2.0, 1.0, 0.5, 1.0]), on_grid=False
    )


def test_a_blend_is_the_least_squares_one_on_the_simplex():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(20, 4, 4, generator=generator, dtype=torch.float64)
    grams = roots @ roots.mT
    for gram, blend in zip(grams, best_blend(grams), strict=True):
        reference = minimize(
            lambda weights, gram=gram: weights @ gram.numpy() @ weights, np.full(4, 0.25), bounds=[(0, 1)] * 4,
            constraints={"type": "eq", "fun": lambda weights: weights.sum() - 1}, tol=1e-12,
        )  # fmt: skip
        assert blend.sum().item() == pytest.approx(1)
        assert (blend >= 0).all()
        assert float(blend @ gram @ blend) == pytest.approx(reference.fun, rel=1e-3, abs=1e-6)


def test_a_blend_is_judged_on_clips_that_it_was_not_fitted_on():
    forecasts = clips(6)
    parts = hold_out(forecasts.groups)
    errors, mine = forecasts.errors(0), parts[2]
    _, left = cross_fit_blend(errors, parts)
    changed = errors.clone()
    changed[:, mine] *= torch.tensor([9.0, 1, 1, 1], dtype=torch.float64)[:, None, None, None]
    _, other = cross_fit_blend(changed, parts)
    others = best_blend(torch.einsum("gnpd,knpd->gk", errors[:, ~mine], errors[:, ~mine]))
    torch.testing.assert_close(left[mine], torch.einsum("g,gnpd->npd", others, errors[:, mine]))
    assert not torch.allclose(other[~mine], left[~mine])


def test_what_is_believed_is_no_worse_than_any_guess_on_other_clips():
    calibration = fit_calibration(ridge(), clips(30))
    test = clips(30, seed=1)
    model = ridge()
    raw = [value * model.std + model.mean for value in (test.rolled, test.ridged, test.last)]
    past = Sequence.on_clock(raw[2].expand(-1, 2, -1), FPS)
    believed = (calibration.believe(raw[0], raw[1], past, torch.arange(1, 4)) - model.mean) / model.std
    for step in range(3):
        best = min(float(error.square().mean()) for error in test.errors(step))
        assert float((believed[:, step] - test.came[:, step]).square().mean()) < 1.01 * best


def test_energy_is_one_in_the_mean_and_counts_errors_in_usual_units():
    forecasts = clips(40)
    calibration = fit_calibration(ridge(), forecasts)
    model, ticks = ridge(), torch.arange(1, 4)
    test = clips(40, seed=2)
    believed, came = (value * model.std + model.mean for value in (test.rolled, test.came))
    energies = calibration.energy(believed, came, ticks)
    assert energies.shape == (len(came), 3)
    assert energies.mean().item() == pytest.approx(1, abs=0.3)
    # The last number usually errs more than the first: the same error means less there.
    wrong_first, wrong_last = came.clone(), came.clone()
    wrong_first[..., 0] += model.std[0]
    wrong_last[..., 3] += model.std[3]
    assert (calibration.energy(wrong_first, came, ticks) > 3 * calibration.energy(wrong_last, came, ticks)).all()


def test_energies_of_a_clip_owe_nothing_to_the_clip():
    errors = torch.randn(120, 1, 3, dtype=torch.float64)
    parts = hold_out(np.repeat(np.arange(4), 30))
    _, energies = cross_fit_energy(errors, parts)
    assert energies.shape == (120, 1)
    errors[:30] *= 10
    _, louder = cross_fit_energy(errors, parts)
    ratio = louder[:30].mean() / louder[30:].mean() / (energies[:30].mean() / energies[30:].mean())
    assert ratio > 100 / 1.01  # had it served as its own unit, less


@pytest.mark.parametrize(
    ("number", "horizons", "above_90", "above_99"),
    [(3, [1], (0.02, 0.18), 0.03), (30, [1], (0.06, 0.14), 0.025), (30, [0, 1, 2], (0.06, 0.14), 0.025)],
)
def test_percentiles_mean_what_they_say_on_new_clips(number, horizons, above_90, above_99):
    found = []
    for seed in range(12):
        calibration = fit_calibration(ridge(), clips(number, seed=seed, unlike=0.5))
        test, model = clips(12, seed=100 + seed, unlike=0.5), ridge()
        believed, came = (value * model.std + model.mean for value in (test.rolled, test.came))
        raw_last = (test.last * model.std + model.mean).expand(-1, 2, -1)
        ridged = test.ridged * model.std + model.mean
        believed = calibration.believe(believed, ridged, Sequence.on_clock(raw_last, FPS), torch.arange(1, 4))
        energies = calibration.energy(believed, came, torch.arange(1, 4))[:, horizons].mean(dim=1)
        found.append(calibration.ordinary([step + 1 for step in horizons]).percentile(energies))
    percentiles = torch.stack(found)
    assert above_90[0] < float((percentiles > 90).float().mean()) < above_90[1]
    assert float((percentiles > 99).float().mean()) < above_99


def test_of_four_clips_a_tenth_of_new_ones_is_above_the_90th():
    generator, above = np.random.default_rng(0), []
    for _ in range(400):
        seen, new = generator.normal(scale=0.35, size=4), generator.normal(scale=0.35, size=50)
        others = np.array([np.exp(np.delete(seen, one)).mean() for one in range(4)])  # the units of a calibration
        levels = np.exp(seen) / others
        energies = np.repeat(levels, 20) * np.exp(0.01 * generator.normal(size=80))
        ordinary = Ordinary.of(energies, np.repeat(np.arange(4), 20))
        above.append((np.exp(new) * (1 / others).mean() > ordinary.quantiles[900].item()).mean())
    assert np.mean(above) == pytest.approx(0.1, abs=0.025)  # 6 % where units of others were taken for those of all


def test_of_few_clips_percentiles_are_cautious():
    generator = np.random.default_rng(0)
    level = generator.normal(size=60)
    energies, groups = np.exp(np.repeat(level, 50) + generator.normal(size=3000)), np.repeat(np.arange(60), 50)

    def width(chosen):
        quantiles = Ordinary.of(energies[chosen], groups[chosen]).quantiles
        return float((quantiles[990] / quantiles[500]).log())

    assert width(slice(None)) == pytest.approx(np.sqrt(2) * 2.326, rel=0.15)  # of a sum of two standard normal numbers
    few = [width(slice(start, start + 150)) for start in range(0, 3000, 150)]
    assert np.mean(few) > 1.3 * width(slice(None))


def test_a_video_that_is_unlike_the_clips_is_noticed():
    ordinary = fit_calibration(ridge(), clips(30)).ordinary([1])
    energies = np.exp(ordinary.mean) * torch.ones(50)
    assert ordinary.level(energies) == pytest.approx(50, abs=1)
    assert ordinary.level(20 * energies) > 99


def test_clips_are_held_out_whole_and_in_few_parts():
    parts = torch.stack(hold_out(np.repeat(np.arange(37), 3)))
    assert len(parts) == 10
    assert (parts.sum(dim=0) == 1).all()
    assert torch.equal(parts[:, ::3], parts[:, 1::3])
    assert torch.equal(parts[:, ::3], parts[:, 2::3])


def test_samples_are_widened_until_intervals_hold_what_they_should():
    generator = torch.Generator().manual_seed(0)
    came = torch.randn(2000, 2, 3, generator=generator)
    drawn = 0.5 * torch.randn(16, 2000, 2, 3, generator=generator)
    assert fit_spread(drawn, came).tolist() == pytest.approx([2.0, 2.0], abs=0.15)
    calibration = Calibration(ridge(), 2)
    calibration.sample_spread[:] = 2.0
    wide = calibration.widen(drawn, torch.tensor([1, 2]))
    torch.testing.assert_close(wide.mean(dim=0), drawn.mean(dim=0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(wide.std(dim=0), 2 * drawn.std(dim=0))


@pytest.mark.parametrize("tokens", [(), (2, 2)])
def test_a_calibrated_rollout_is_the_blend_of_its_guesses(tokens):
    torch.manual_seed(0)
    predictor = Predictor(MLPConfig(context=2, width=8, depth=1), (*tokens, 4), fps=FPS, encoder_fingerprint="a").eval()
    torch.nn.init.normal_(predictor.head.weight)
    calibration = Calibration(ridge(), 2)
    calibration.ridge.weight.normal_()
    calibration.blend[0], calibration.blend[1] = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    past, future = Sequence.on_clock(torch.randn(3, 4, *tokens, 4), FPS), Future.ticks(3, FPS)
    believed = rollout(predictor, past, future, calibration=calibration)
    rolled, ridged = (rollout(guess, past, future) for guess in (predictor, calibration.ridge))
    guesses = [rolled, ridged, past.embeddings[:, -1:].expand_as(rolled), calibration.ridge.mean.expand_as(rolled)]
    for step, weights in enumerate(([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])):
        expected = sum(weight * guess[:, step] for weight, guess in zip(weights, guesses, strict=True))
        torch.testing.assert_close(believed[:, step], expected, rtol=1e-4, atol=1e-4)


def test_a_calibration_can_be_built_again_and_knows_its_percentiles():
    calibration = fit_calibration(ridge(), clips(5))
    again = Calibration.build(**calibration.description())
    again.load_state_dict(calibration.state_dict())
    energies = torch.tensor([0.0, 0.5, 1.0, 1e9])
    percentiles = calibration.ordinary([1, 3]).percentile(energies)
    assert torch.equal(again.ordinary([1, 3]).percentile(energies.double()), percentiles)
    assert percentiles.tolist() == sorted(percentiles.tolist())
    assert percentiles[[0, 3]].tolist() == [0, 100]


def test_of_a_grid_the_most_surprising_place_counts():
    """In units of what that usually is: ordinary moments have an energy of 1, whatever the number of places."""
    generator = torch.Generator().manual_seed(0)
    came = torch.randn(120, 2, 6, 8, 4, generator=generator)
    guess, last = torch.randn(came.shape, generator=generator), torch.randn(120, 1, 6, 8, 4, generator=generator)
    rolled = came + 0.3 * torch.randn(came.shape, generator=generator)
    model, ticks = ridge(), torch.tensor([1, 2])
    forecasts = Forecasts(rolled, guess, last, came, np.repeat(np.arange(6), 20))
    calibration = fit_calibration(model, forecasts)
    believed = calibration.blend[:, 0].view(2, 1, 1, 1) * rolled * model.std + model.mean
    came = came * model.std + model.mean
    assert calibration.energy(believed, came, ticks).mean(dim=0).tolist() == pytest.approx([1, 1], abs=0.15)
    wrong = came.clone()
    wrong[7, 1, 4, 2] += 9 * model.std  # a place is enough
    energies = calibration.energy(believed, wrong, ticks)
    assert energies[7, 1] == energies.max() > 5
    assert int(calibration.energy_map(believed, wrong, ticks)[7, 1].argmax()) == 4 * 8 + 2
    ignored = torch.zeros(6, 8, dtype=torch.bool)
    ignored[4, 2] = True
    assert (calibration.energy_map(believed, wrong, ticks, ignored)[..., 4, 2] == 0).all()


def test_a_moment_is_told_by_its_most_surprising_places():
    energies = torch.arange(200.0).view(1, 2, 10, 10)
    assert most_surprising(energies).tolist() == [[98, 198]]  # three of a hundred
    assert most_surprising(energies[..., 0, 0]).tolist() == [[0, 100]]  # vectors have one place
