"""Predictors and baselines: one interface, no look into the future, the same after saving and loading."""

import pytest
import torch

from jepa.baselines import CopyLast, LinearExtrapolation, Mean, Ridge, changes, fit_ridge
from jepa.encoder import ConfigurationError
from jepa.networks import NETWORKS, last_steps
from jepa.predictor import Predictor, PredictorConfig
from jepa.rollout import rollout
from jepa.sampling import EXPECTED_OF, GaussianFutures, calibrate_samples, draw, expected_future, sample


def make(kind: str, context: int = 4, latent_dimension: int = 0, members: int = 1) -> Predictor:
    """A predictor whose heads are no longer zero, so that it says something."""
    torch.manual_seed(0)
    config = PredictorConfig(kind, context, width=16, depth=2, heads=2, latent_dimension=latent_dimension)
    predictor = Predictor(config, 5, 4.0, "abc", members, longest_gap=3).eval()
    for member in predictor.members:
        head = member.network.heads if member.network.gives_velocities else member.head
        torch.nn.init.normal_(head.weight)
    torch.nn.init.normal_(predictor.ridge.weight)
    return predictor


def models() -> dict[str, Predictor]:
    """Every network by itself and twice, and with a latent where it can have one."""
    found = {kind: make(kind) for kind in NETWORKS}
    found |= {f"two_of_{kind}": make(kind, members=2) for kind in NETWORKS}
    return found | {f"latent_{kind}": make(kind, latent_dimension=3) for kind in NETWORKS if kind != "direct"}


def everyone() -> dict[str, torch.nn.Module]:
    return {**models(), **make("mlp").baselines()}


def latents(predictor: Predictor, steps: int) -> torch.Tensor | None:
    """Drawn ones for two sequences, where the predictor has a latent."""
    size = predictor.config.latent_dimension
    return torch.randn(2, steps, size) if size else None


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


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (name, what)
        for name in models()
        for what in ("embeddings", "gaps", "latents")
        if what != "latents" or name.startswith("latent")
    ],
)
def test_off_the_clock_too_what_is_later_leaves_the_past_bit_equal(name, what):
    """A prediction knows the gap up to itself, not the ones beyond; and what was drawn for it, not for others."""
    predictor = models()[name]
    given = {"embeddings": torch.randn(2, 12, 5), "gaps": torch.rand(2, 12) + 0.5, "latents": latents(predictor, 12)}
    changed = given[what].clone()
    changed[:, 7:] += 1
    with torch.no_grad():
        before, after = (predictor(one["embeddings"], 12, one["gaps"], one["latents"])
                         for one in (given, {**given, what: changed}))  # fmt: skip
    assert torch.equal(before[:, :7], after[:, :7])
    assert (before[:, 7:] != after[:, 7:]).any(dim=-1).all()


@pytest.mark.parametrize("name", list(everyone()))
def test_fewer_outputs_are_the_last_of_more(name):
    predictor = everyone()[name]
    past = torch.randn(3, 12, 5)
    with torch.no_grad():
        assert torch.allclose(predictor(past, 12)[:, -3:], predictor(past, 3), atol=1e-6)
        assert predictor(past).shape == (3, 1, 5)


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


def rereads(name: str) -> bool:
    """Whether it looks at what was imagined at each step: a direct forecast does not."""
    return not name.endswith("direct")


@pytest.mark.parametrize("name", [*filter(rereads, everyone())])
def test_a_rollout_that_remembers_is_one_that_reads_everything_again(name):
    predictor = everyone()[name]
    past = torch.randn(2, 6, 5)
    with torch.no_grad():
        future = rollout(predictor, past, 9)
        sequence = past
        for _ in range(9):
            sequence = torch.cat([sequence, predictor(sequence)], dim=1)
    assert future.shape == (2, 9, 5)
    assert torch.allclose(future, sequence[:, 6:], rtol=1e-4, atol=1e-5)
    assert (future[:, 1:] != future[:, :-1]).any() or name in ("copy_last", "mean")


@pytest.mark.parametrize("name", [*filter(rereads, models())])
def test_so_it_is_at_irregular_times_and_with_what_is_drawn(name):
    predictor = models()[name]  # at 4 fps
    past, times_s = torch.randn(2, 6, 5), torch.tensor([[0.3, 0.6, 1.0, 1.5, 2.0, 2.25], [0.25, 0.5, 1.2, 1.6, 2, 2.7]])
    drawn = latents(predictor, 6)
    gaps = torch.cat([torch.ones(2, 5), 4 * torch.diff(times_s, dim=1, prepend=torch.zeros(2, 1))], dim=1)  # in ticks
    with torch.no_grad():
        future = rollout(predictor, past, times_s=times_s, latents=drawn)
        sequence = past
        for step in range(6):
            latent = None if drawn is None else drawn[:, step : step + 1]
            following = predictor(sequence, 1, gaps[:, : 6 + step], latent)
            sequence = torch.cat([sequence, following], dim=1)
        if drawn is not None:
            assert not torch.allclose(future, rollout(predictor, past, times_s=times_s), atol=1e-3)
    assert torch.allclose(future, sequence[:, 6:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(models()))
def test_at_the_ticks_of_the_clock_times_say_the_same_as_a_horizon(name):
    predictor = everyone()[name]  # at 4 fps
    past = torch.randn(2, 6, 5)
    with torch.no_grad():
        on_clock = rollout(predictor, past, 3)
        assert torch.equal(rollout(predictor, past, times_s=torch.tensor([0.25, 0.5, 0.75])), on_clock)
        elsewhere = rollout(predictor, past, times_s=torch.tensor([[0.25, 0.6, 1.0], [0.6, 1.0, 1.5]]))
    assert torch.equal(elsewhere[0, 0], on_clock[0, 0])
    assert not torch.allclose(elsewhere[:, 1:], on_clock[:, 1:])
    assert not torch.allclose(elsewhere[1, 0], on_clock[1, 0])


def test_the_network_is_told_of_time():
    """Twice the gap is twice the velocity's way, and embeddings that came more slowly moved more slowly."""
    predictor = make("mlp")
    torch.nn.init.zeros_(predictor.members[0].head.weight)
    torch.nn.init.ones_(predictor.members[0].head.bias)
    past = torch.randn(1, 3, 5)
    gaps = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.allclose(predictor(past, 3, gaps) - past, gaps[..., None].expand(1, 3, 5), atol=1e-6)
    seen = []
    predictor.members[0].network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predictor(past, 1, gaps)
    features, ticks, _ = seen[0]
    assert ticks.tolist() == [[0, 1, 3]]
    assert torch.allclose(features[0, 2, 5:10], (past[0, 2] - past[0, 1]) / 2)
    assert torch.allclose(features[0, :, 10:], torch.tensor([[1.0, 1.0], [1.0, 2.0], [2.0, 3.0]]).log2())


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_an_untrained_predictor_copies_the_last_embedding(kind):
    predictor, past = Predictor(PredictorConfig(kind, width=16, depth=2, heads=2), 5, 4.0, "abc"), torch.randn(2, 6, 5)
    with torch.no_grad():
        assert torch.equal(rollout(predictor, past, 3), past[:, -1:].expand(-1, 3, -1))


def test_a_direct_forecast_does_not_look_at_what_it_imagined():
    predictor, past = make("direct"), torch.randn(2, 6, 5)
    with torch.no_grad():
        first, state = predictor.advance(past, None, None)
        second, state = predictor.advance(first, None, state)
        other, _ = predictor.advance(first + 1, None, predictor.advance(past, None, None)[1])
        assert torch.allclose(other - 1, second, atol=1e-5)
        # After `horizon` steps, the next forecast is made from what was imagined.
        future = rollout(predictor, past, 2 * predictor.config.horizon + 1)
        whole = predictor.config.horizon
        again = rollout(predictor, torch.cat([past, future[:, :whole]], dim=1), whole + 1)
    assert torch.allclose(future[:, whole:], again, atol=1e-4)
    assert not torch.allclose(future[:, 1:2], rollout(predictor, torch.cat([past, first], dim=1), 1))


def test_a_direct_forecast_has_no_latent():
    with pytest.raises(ConfigurationError, match=r"3 with --predictor\.kind direct"):
        make("direct", latent_dimension=3)


def test_a_direct_forecast_moves_evenly_between_the_ticks_of_the_clock():
    """However a way is divided into as many steps or fewer, it is the same way; beyond the horizon it is straight."""
    predictor, past = make("direct"), torch.randn(2, 6, 5)  # at 4 fps
    quarter, horizon = 1 / 4, predictor.config.horizon
    with torch.no_grad():
        on_clock = rollout(predictor, past, horizon)
        leaping = rollout(predictor, past, times_s=quarter * torch.tensor([0.5, 3.0, horizon + 2.0]))
    assert torch.allclose(leaping[:, 0], past[:, -1].lerp(on_clock[:, 0], 0.5), atol=1e-5)
    assert torch.allclose(leaping[:, 1], on_clock[:, 2], atol=1e-5)
    straight = on_clock[:, -1] + 2 * (on_clock[:, -1] - on_clock[:, -2])
    assert torch.allclose(leaping[:, 2], straight, atol=1e-4)


def test_rotary_attention_knows_time_but_not_when_the_clock_was_started():
    block = make("transformer").members[0].network.blocks[0]
    hidden, ticks = torch.randn(1, 4, 16), torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    with torch.no_grad():
        here = block(hidden, ticks, None)[0]
        assert torch.allclose(block(hidden, ticks + 50, None)[0], here, atol=1e-5)
        assert not torch.allclose(block(hidden, 2 * ticks, None)[0], here, atol=1e-3)
        for shift in (25, 101):  # angles are large there, and half precision is coarse
            channels = torch.randn(1, 2, 4, 8)
            turned = [block.turn(channels.bfloat16(), ticks + at).float() for at in (0, shift)]
            products = [one @ one.mT for one in turned]
            assert (products[0] - products[1]).abs().max() < 0.02 * products[0].abs().max()


def test_samples_differ_by_their_latent_alone():
    predictor, past = make("mlp", latent_dimension=3), torch.randn(2, 6, 5)
    drawn = sample(predictor, past, 4, 7, torch.Generator().manual_seed(0))
    assert drawn.shape == (7, 2, 4, 5)
    assert torch.equal(sample(predictor, past, 4, 7, torch.Generator().manual_seed(0)), drawn)
    assert drawn[:, :, 0].std(dim=0).min() > 0
    expected = expected_future(predictor, past, 4)
    assert torch.equal(expected_future(predictor, past, 4), expected)
    many = sample(predictor, past, 4, 2000, torch.Generator().manual_seed(1)).mean(dim=0)
    assert (expected - many).square().mean() < drawn.var(dim=0).mean() / 8  # 16 samples: a sixteenth is expected
    with pytest.raises(ValueError, match="one future only"):
        sample(make("mlp"), past, 4, 7, torch.Generator())


def test_samples_are_stretched_to_be_as_uncertain_as_they_should():
    """What came is drawn from the predictor itself, only further apart: the stretch has to be found."""
    predictor, past = make("mlp", latent_dimension=3), torch.randn(400, 6, 5)
    drawn = draw(predictor, past, 3, 33, torch.Generator().manual_seed(1))
    centre = drawn[1:].mean(dim=0)
    stretch = torch.tensor([0.7, 1.0, 1.5])
    future = centre + stretch[:, None] * (drawn[0] - centre)
    calibrate_samples(predictor, past, future)
    assert 0.9 < predictor.sample_spread[1] < 1.2  # their own mean is uncertain, which asks for a little more
    assert torch.allclose(predictor.sample_spread[:3] / predictor.sample_spread[1], stretch, atol=0.11)
    assert (predictor.sample_spread[3:] == predictor.sample_spread[2]).all()
    before = draw(predictor, past, 3, EXPECTED_OF, torch.Generator().manual_seed(2))
    after = sample(predictor, past, 3, EXPECTED_OF, torch.Generator().manual_seed(2))
    ratio = (after - after.mean(dim=0)) / (before - before.mean(dim=0))
    assert torch.allclose(
        ratio.median(dim=0).values.median(dim=0).values.median(dim=1).values, predictor.sample_spread[:3]
    )


def test_a_gaussian_is_as_wide_as_the_errors_were():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 5, 5, generator=generator)
    imagined = torch.randn(4000, 3, 5, generator=generator)
    errors = torch.einsum("h d k, n h k -> n h d", mixing, torch.randn(4000, 3, 5, generator=generator))
    drawn = GaussianFutures(imagined, imagined + errors).sample(imagined[:2], 20000, generator)
    assert drawn.shape == (20000, 2, 3, 5)
    for step in range(3):
        around = drawn[:, 0, step] - imagined[0, step]
        assert torch.allclose(around.T.cov(), mixing[step] @ mixing[step].T, atol=0.6)


def test_rollout_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="horizon is 0"):
        rollout(CopyLast(), torch.randn(1, 2, 3), 0)
    with pytest.raises(ValueError, match="at least one embedding"):
        rollout(CopyLast(), torch.randn(1, 0, 3), 1)
    past = torch.randn(2, 4, 5)
    with pytest.raises(ValueError, match="one of them"):
        rollout(make("mlp"), past)
    with pytest.raises(ValueError, match="must increase"):
        rollout(make("mlp"), past, times_s=torch.tensor([0.5, 0.5]))
    for times_s, leap in (([0.25, 1.25], "leaps by 4 ticks of 0.25 s"), ([0.1, 0.5], "leaps by 0.4 ticks")):
        with pytest.raises(ValueError, match=leap):
            rollout(make("mlp"), past, times_s=torch.tensor(times_s))
        assert rollout(make("direct"), past, times_s=torch.tensor(times_s)).shape == (2, 2, 5)
    late = Predictor(PredictorConfig(context=2, width=8, depth=1), 5, 30.0, "abc", longest_gap=20_000)
    ticks = torch.arange(17_970, 17_990) / 30  # after ten minutes, off whole ticks by more than a thousandth
    assert (torch.diff(ticks) * 30 - 1).abs().max() > 1e-3
    assert rollout(late, past, times_s=ticks).shape == (2, 20, 5)
    with pytest.raises(ValueError, match="CopyLast has no clock"):
        rollout(CopyLast(), past, times_s=torch.tensor([0.5]))
    with pytest.raises(ValueError, match="Ridge knows the clock only"):
        Ridge(5, 3).advance(past, torch.tensor([[1.0, 1.0, 1.0, 2.0]]), None)


def test_impossible_configurations_are_refused():
    with pytest.raises(ConfigurationError, match="unknown predictor 'lstm'"):
        Predictor(PredictorConfig(kind="lstm"), 5, 4.0, "abc")
    with pytest.raises(ConfigurationError, match="heads 3"):
        Predictor(PredictorConfig(kind="transformer", width=16, heads=3), 5, 4.0, "abc")
    with pytest.raises(ConfigurationError, match="context is 1"):
        Predictor(PredictorConfig(context=1), 5, 4.0, "abc")
    with pytest.raises(ConfigurationError, match="latent-dimension is -1"):
        Predictor(PredictorConfig(latent_dimension=-1), 5, 4.0, "abc")
    with pytest.raises(ConfigurationError, match="no sample"):
        Predictor(PredictorConfig(latent_dimension=2), 5, 4.0, "abc", members=2)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width is 0: it must be positive"),
        ({"width": -8}, "width is -8"),
        ({"depth": 0}, "depth is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"dropout": 1.0}, "dropout is 1: it must be at least 0, below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_sizes_that_no_network_has_are_refused(kind, options, message):
    with pytest.raises(ConfigurationError, match=rf"--predictor\.{message}"):
        Predictor(PredictorConfig(kind=kind, **options), 5, 4.0, "abc")
