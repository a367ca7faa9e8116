"""Predictors, ridge regression and rollouts: causal, with a state, over tokens and actions, on the clock and off it."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as functional

from jepa.baselines import Ridge
from jepa.errors import ConfigurationError
from jepa.fitting import fit_ridge
from jepa.networks import MLPConfig, PredictorConfig, TransformerConfig, apply_rotary, last_windows
from jepa.predictor import Predictor
from jepa.rollout import EXPECTED_OF, expected_rollout, rollout
from jepa.sequence import Future, Sequence, line_across

FPS = 4.0
CONFIGS = {
    "mlp": MLPConfig(context=4, width=16, depth=2),
    "transformer": TransformerConfig(context=4, width=16, depth=2, heads=2),
    "latent": MLPConfig(context=4, width=16, depth=1, latent_dimension=3),
    "infill": TransformerConfig(context=4, width=16, depth=2, heads=2, infill=True),
}
assert {type(config) for config in CONFIGS.values()} == set(get_args(PredictorConfig))  # a new kind is tested, too
TOKENS = {"vector": (), "grid": (2, 3)}


def make(name="mlp", tokens=(), actions=0, dimension=5):
    """A predictor that does something: its head is not zero, its standardisation not the identity."""
    torch.manual_seed(0)
    predictor = Predictor(
        CONFIGS[name], (*tokens, dimension), fps=FPS, encoder_fingerprint="abc",
        actions=tuple(f"action_{number}" for number in range(actions)),
    )  # fmt: skip
    torch.nn.init.normal_(predictor.head.weight, std=0.3)
    if actions:
        torch.nn.init.normal_(predictor.network.get_submodule("embed").action_weight, std=0.3)
    predictor.mean.normal_()
    predictor.std.uniform_(0.5, 2)
    predictor.change_std.uniform_(0.2, 0.5)
    return predictor.eval()


def sequence(length=10, tokens=(), actions=0, batch=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(batch, length, *tokens, 5, generator=generator)
    return Sequence.on_clock(
        embeddings, FPS, torch.randn(batch, length, actions, generator=generator) if actions else None
    )


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("name", CONFIGS)
def test_changing_the_future_leaves_the_past_bit_equal(name, tokens):
    predictor, past = make(name, tokens, actions=2), sequence(tokens=tokens, actions=2)
    later = Sequence(past.embeddings.clone(), past.times, past.actions.clone())
    later.embeddings[:, 6:] += 1
    later.actions[:, 6:] += 1
    before, after = predictor(past, last=10), predictor(later, last=10)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("name", CONFIGS)
def test_step_by_step_is_the_whole_sequence(name, tokens):
    predictor, past = make(name, tokens, actions=2), sequence(tokens=tokens, actions=2)
    state, steps = None, []
    for step in range(past.embeddings.shape[1]):
        newest = Sequence(*(part[:, step : step + 1] for part in (past.embeddings, past.times, past.actions)))
        predicted, state = predictor.step(newest, state)
        steps.append(predicted)
    torch.testing.assert_close(torch.cat(steps, dim=1), predictor(past, last=10), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_rollout_that_remembers_is_one_that_reads_everything_again(name):
    predictor, past = make(name), sequence(6)
    again = past.embeddings
    for _ in range(4):
        again = torch.cat([again, predictor(Sequence.on_clock(again, FPS))], dim=1)
    rolled = rollout(predictor, past, Future.ticks(4, FPS))
    torch.testing.assert_close(rolled, again[:, 6:], rtol=1e-4, atol=1e-4)


def test_a_transformer_sees_the_neighbours_of_a_place_and_not_beyond():
    """Each layer goes a cell farther, and rollouts carry on what came from there."""
    predictor, past = make("transformer", (5, 8)), sequence(tokens=(5, 8))
    other = past.embeddings.clone()
    other[:, -1, 2, 0] += 1
    one, two = (
        rollout(predictor, Sequence.on_clock(given, FPS), Future.ticks(1, FPS)) for given in (past.embeddings, other)
    )
    reached = (one != two).any(dim=4).any(dim=0)[0]  # (5, 8)
    assert reached[2, 2]
    assert not reached[:, 3:].any()
    crop = predictor(Sequence(past.embeddings[:, :, :4, :5], past.times))
    torch.testing.assert_close(crop[:, :, :2, :3], one[:, :, :2, :3], rtol=1e-4, atol=1e-5)


def test_to_an_mlp_a_grid_is_each_of_its_tokens_alone():
    predictor, past = make(tokens=(2, 3)), sequence(6, tokens=(2, 3))
    rolled = rollout(predictor, past, Future.ticks(3, FPS))
    one = rollout(predictor, Sequence(past.embeddings[:, :, 1, 2], past.times), Future.ticks(3, FPS))
    torch.testing.assert_close(rolled[:, :, 1, 2], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("name", CONFIGS)
def test_actions_weigh_nothing_at_first(name, tokens):
    """By the same seed a predictor with actions begins as that without, and it takes what that has learned."""
    made = []
    for actions in (0, 2):
        torch.manual_seed(0)
        names = ("push", "pull")[:actions]
        made.append(Predictor(CONFIGS[name], (*tokens, 5), fps=FPS, encoder_fingerprint="abc", actions=names))
    without, with_actions = made
    torch.nn.init.normal_(without.head.weight, std=0.3)
    learned = without.state_dict() | {key: with_actions.state_dict()[key] for key in ("action_mean", "action_std")}
    for key, value in without.network.state_dict().items():
        assert torch.equal(value, with_actions.network.state_dict()[key])
    loaded = with_actions.load_state_dict(learned, strict=False)
    assert loaded == (["network.embed.action_weight"], [])
    past, done = sequence(tokens=tokens, actions=2), torch.randn(3, 3, 2)
    one = rollout(without, Sequence(past.embeddings, past.times), Future.ticks(3, FPS))
    two = rollout(with_actions, past, Future.ticks(3, FPS, done))
    assert torch.equal(one, two)
    assert not torch.equal(two[:, 0], past.embeddings[:, -1])
    two.square().mean().backward()
    assert with_actions.network.get_submodule("embed").action_weight.grad.abs().min() > 0


def test_a_window_is_cut_into_what_is_known_and_what_is_done():
    whole = sequence(length=7, actions=2)
    past, future, came = whole.cut(4, FPS)
    assert torch.equal(torch.cat([past.embeddings, came], dim=1), whole.embeddings)
    assert torch.equal(past.times, whole.times[:, :4])
    assert torch.equal(past.times[0, -1] + future.times, whole.times[0, 4:])
    # The action at the last known embedding is the first of the future; that at the window's end leads out of it.
    assert torch.equal(future.actions, whole.actions[:, 3:6])
    assert torch.equal(torch.cat([past.actions[:, :-1], future.actions], dim=1), whole.actions[:, :-1])
    bare = Sequence(whole.embeddings, whole.times).cut(4, FPS)
    assert (bare[0].actions, bare[1].actions) == (None, None)


def test_an_action_matters_from_the_next_embedding_on():
    predictor, past = make(actions=2), sequence(6, actions=2)
    actions = torch.zeros(3, 5, 2)
    other = actions.clone()
    other[:, 2] = 1.0
    one, two = (rollout(predictor, past, Future.ticks(5, FPS, given)) for given in (actions, other))
    assert torch.equal(one[:, :2], two[:, :2])
    assert not torch.allclose(one[:, 2], two[:, 2])
    # What stands beside the last embedding of the past is replaced by what is done now.
    changed = Sequence(past.embeddings, past.times, past.actions.clone())
    changed.actions[:, -1] += 1
    assert torch.equal(one, rollout(predictor, changed, Future.ticks(5, FPS, actions)))


@pytest.mark.parametrize("name", CONFIGS)
def test_an_untrained_predictor_copies(name):
    predictor = Predictor(CONFIGS[name], (5,), fps=FPS, encoder_fingerprint="abc")
    past = sequence()
    rolled = rollout(predictor, past, Future.ticks(3, FPS))
    torch.testing.assert_close(rolled, past.embeddings[:, -1:].expand(-1, 3, -1))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_slow_stays_and_is_looked_at(name):
    torch.manual_seed(0)
    predictor = Predictor(CONFIGS[name], (5,), fps=FPS, encoder_fingerprint="abc", slow=2).eval()
    torch.nn.init.normal_(predictor.head.weight)
    past = sequence()
    rolled = rollout(predictor, past, Future.ticks(3, FPS))
    torch.testing.assert_close(rolled[..., 3:], past.embeddings[:, -1:, 3:].expand(-1, 3, -1))
    assert (rolled[..., :3] - past.embeddings[:, -1:, :3]).abs().amin() > 0
    past.embeddings[..., 3:] += 1
    assert not torch.allclose(rollout(predictor, past, Future.ticks(3, FPS))[..., :3], rolled[..., :3])


def test_of_one_embedding_the_way_is_that_of_each_of_many():
    predictor = Predictor(MLPConfig(context=1, width=16, depth=1), (5,), fps=FPS, encoder_fingerprint="abc").eval()
    torch.nn.init.normal_(predictor.head.weight)
    past = sequence()
    alone = rollout(
        predictor, replace(past, embeddings=past.embeddings[:, -1:], times=past.times[:, -1:]), Future.ticks(3, FPS)
    )
    torch.testing.assert_close(alone, rollout(predictor, past, Future.ticks(3, FPS)))


def test_between_ticks_the_way_is_straight():
    predictor, past = make(), sequence(6)
    ticks = rollout(predictor, past, Future.ticks(3, FPS))
    times = torch.tensor([0.1, 0.25, 0.3, 0.75], dtype=torch.float64)
    found = rollout(predictor, past, Future(times))
    torch.testing.assert_close(found[:, 1], ticks[:, 0])
    torch.testing.assert_close(found[:, 3], ticks[:, 2])
    torch.testing.assert_close(found[:, 0], torch.lerp(past.embeddings[:, -1], ticks[:, 0], 0.4))
    torch.testing.assert_close(found[:, 2], torch.lerp(ticks[:, 0], ticks[:, 1], 0.2))
    far = rollout(predictor, past, Future(torch.tensor([0.5, 0.75], dtype=torch.float64)))
    torch.testing.assert_close(far, ticks[:, 1:])


def test_samples_differ_by_their_latent_alone():
    predictor, past = make("latent"), sequence(6)
    drawn = rollout(predictor, past, Future.ticks(3, FPS), 4, generator=torch.Generator().manual_seed(3))
    again = rollout(predictor, past, Future.ticks(3, FPS), 4, generator=torch.Generator().manual_seed(3))
    assert drawn.shape == (4, 3, 3, 5)
    assert torch.equal(drawn, again)
    assert (drawn.std(dim=0) > 1e-4).all()
    expected = expected_rollout(predictor, past, Future.ticks(3, FPS))
    drawn = rollout(predictor, past, Future.ticks(3, FPS), EXPECTED_OF, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(expected, drawn.mean(dim=0))


def test_a_rollout_is_differentiable_and_finite_in_half_precision():
    predictor, past = make("transformer"), sequence(6)
    rollout(predictor, past, Future.ticks(3, FPS)).square().mean().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in predictor.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert rollout(predictor, past, Future.ticks(3, FPS)).isfinite().all()


# Hidden parts


def with_hidden(*hidden, length=10, tokens=()):
    """A sequence with some hidden places, each an index behind that of the batch."""
    given, mask = sequence(length, tokens), torch.zeros(3, length, *tokens, dtype=torch.bool)
    for place in hidden:
        mask[(slice(None), *place)] = True
    return Sequence(given.embeddings, given.times, hidden=mask)


@pytest.mark.parametrize("value", [10.0, float("nan")])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_what_is_hidden_has_no_influence_and_what_is_visible_on_both_sides_has(tokens, value):
    predictor = make("infill", tokens)
    seen = with_hidden((slice(4, 6), *[0] * len(tokens)), tokens=tokens)
    other = Sequence(seen.embeddings.masked_fill(seen.hidden[..., None], value), seen.times, hidden=seen.hidden)
    filled = predictor.fill(seen)
    assert filled.hidden is None
    assert torch.equal(filled.embeddings[~seen.hidden], seen.embeddings[~seen.hidden])
    assert torch.equal(filled.embeddings, predictor.fill(other).embeddings)
    for place in ((2,), (7,), (4, 0, 1)) if tokens else ((2,), (7,)):  # farther than the ends of the line; beside
        changed = seen.embeddings.clone()
        changed[(slice(None), *place)] += 1
        again = predictor.fill(Sequence(changed, seen.times, hidden=seen.hidden))
        assert (again.embeddings != filled.embeddings)[seen.hidden].any(dim=-1).all()


def test_an_untrained_predictor_fills_in_the_line():
    predictor = Predictor(CONFIGS["infill"], (2, 3, 5), fps=FPS, encoder_fingerprint="abc")
    predictor.mean.fill_(7.0)
    seen = with_hidden(
        (slice(4, 7), 0, 0), (slice(8, 10), 0, 0), (slice(0, 2), 0, 0), (slice(None), 1, 1), tokens=(2, 3)
    )
    filled, given = predictor.fill(seen).embeddings, seen.embeddings[:, :, 0, 0]
    torch.testing.assert_close(filled[:, 4, 0, 0], torch.lerp(given[:, 3], given[:, 7], 0.25))
    torch.testing.assert_close(filled[:, 6, 0, 0], torch.lerp(given[:, 3], given[:, 7], 0.75))
    torch.testing.assert_close(filled[:, 8:, 0, 0], given[:, 7:8].expand(-1, 2, -1))
    torch.testing.assert_close(filled[:, :2, 0, 0], given[:, 2:3].expand(-1, 2, -1))
    torch.testing.assert_close(filled[:, :, 1, 1], torch.full((3, 10, 5), 7.0))
    _, away = line_across(seen.embeddings, seen.hidden)
    assert away[0, :, 0, 0].tolist() == [2, 1, 0, 0, 1, 2, 1, 0, 1, 2]
    assert away[0, :, 1, 1].tolist() == [10] * 10
    assert not away[0, :, 0, 1].any()


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_a_past_with_hidden_parts_is_filled_in_and_rolled_out(tokens):
    predictor, seen, future = make("infill", tokens), with_hidden((slice(3, 5),), tokens=tokens), Future.ticks(3, FPS)
    assert torch.equal(rollout(predictor, seen, future), rollout(predictor, predictor.fill(seen), future))
    assert torch.equal(predictor(seen), predictor(predictor.fill(seen)))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_a_predictor_that_fills_in_predicts_as_one_that_does_not(tokens):
    """Where nothing is hidden, it is the same network, and attention is causal."""
    past = sequence(tokens=tokens)
    assert torch.equal(make("infill", tokens)(past, last=10), make("transformer", tokens)(past, last=10))


@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
def test_ridge_recovers_a_linear_law(tokens):
    generator = torch.Generator().manual_seed(0)
    law = 0.3 * torch.randn(2, 5, 5, generator=generator)
    windows = 3 + torch.randn(500, 3, *tokens, 5, generator=generator)
    windows[:, 2] = windows[:, 0] @ law[0] + windows[:, 1] @ law[1] + 1.0
    mean, std = windows.flatten(0, -2).mean(dim=0), windows.flatten(0, -2).std(dim=0)
    loose, tight = fit_ridge(windows.split(128), Ridge(FPS, 2, mean=mean, std=std, on_grid=False), (1e-9, 1e3))
    torch.testing.assert_close(loose(windows[:, :2]), windows[:, 2:], rtol=1e-3, atol=1e-3)
    usual = windows[:, 2:].flatten(0, -2).mean(dim=0)
    assert (tight(windows[:, :2]) - usual).abs().mean() < 0.01 * (windows[:, 2:] - usual).abs().mean()


def test_ridge_on_a_grid_recovers_what_comes_from_the_neighbours():
    generator = torch.Generator().manual_seed(0)
    law = 0.3 * torch.randn(2, 5, 5, generator=generator)
    windows = torch.randn(100, 3, 4, 5, 5, generator=generator)
    padded = functional.pad(windows[:, 1], (0, 0, 1, 1, 1, 1))
    counts = functional.pad(torch.ones(1, 4, 5, 1), (0, 0, 1, 1, 1, 1))
    around = [(padded[:, r : r + 4, c : c + 5], counts[:, r : r + 4, c : c + 5]) for r in range(3) for c in range(3)]
    means = sum(cells for cells, _ in around) / sum(there for _, there in around)
    windows[:, 2] = windows[:, 0] @ law[0] + means @ law[1] + 1.0
    mean, std = windows.flatten(0, -2).mean(dim=0), windows.flatten(0, -2).std(dim=0)
    (ridge,) = fit_ridge(windows.split(32), Ridge(FPS, 2, mean=mean, std=std, on_grid=True), (1e-9,))
    torch.testing.assert_close(ridge(windows[:, :2]), windows[:, 2:], rtol=1e-3, atol=1e-3)
    past = Sequence.on_clock(windows[:, :2], FPS)
    again = torch.cat([windows[:, 1:2], windows[:, 2:]], dim=1)
    torch.testing.assert_close(rollout(ridge, past, Future.ticks(2, FPS))[:, 1:], ridge(again), rtol=1e-3, atol=1e-3)


def test_windows_are_in_order_and_begin_with_the_first_repeated():
    steps = torch.arange(4.0).view(1, 4, 1)
    assert last_windows(steps, 3, 4).tolist() == [[[0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 2, 3]]]
    assert last_windows(steps, 3, 1).tolist() == [[[1, 2, 3]]]


def test_attention_knows_how_long_ago():
    queries, keys = torch.randn(2, 1, 1, 6, 8)

    def scores(shift):
        positions = torch.arange(6) + shift
        return apply_rotary(queries, positions, 4) @ apply_rotary(keys, positions, 4).mT

    torch.testing.assert_close(scores(0), scores(100), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(scores(0), queries @ keys.mT)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: MLPConfig(context=0), "context is 0: it must be at least 1"),
        (lambda: Predictor(MLPConfig(), (5,), fps=FPS, encoder_fingerprint="abc", slow=5), "slow_dimension is 5"),
        (lambda: MLPConfig(dropout=1.0), "dropout is 1: it must be at least 0 and below 1"),
        (lambda: TransformerConfig(width=20, heads=3), "heads is 3: twice that must divide the width, 20"),
    ],
)
def test_impossible_networks_are_refused(build, words):
    with pytest.raises(ConfigurationError, match=words):
        build()


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda: rollout(make(), Sequence(torch.zeros(1, 3, 5), torch.tensor([[0, 0.25, 0.75]])), Future.ticks(1, FPS)),
         "the past jumps by 2.00 ticks"),
        (lambda: rollout(make(actions=2), sequence(), Future.ticks(1, FPS)), "takes 2 actions"),
        (lambda: rollout(make(actions=2), sequence(actions=2), Future.ticks(3, FPS, torch.zeros(3, 2, 2))),
         "actions for 2 ticks, and 3"),
        (lambda: rollout(make(), sequence(), Future.ticks(1, FPS), 3), "a predictor with a latent"),
        (lambda: rollout(make(), with_hidden((3,)), Future.ticks(1, FPS)), "was not trained to fill them in"),
        (lambda: rollout(Ridge(FPS, 2, mean=torch.zeros(5), std=torch.ones(5), on_grid=False), with_hidden((3,)),
                         Future.ticks(1, FPS)), "parts are hidden"),
        (lambda: Sequence(torch.zeros(2, 3, 4, 5), torch.zeros(1, 3), hidden=torch.zeros(2, 3)), "hidden has shape"),
        (lambda: Future(torch.tensor([0.5, 0.5])), "times must increase"),
        (lambda: Future.ticks(0, FPS), "at least one time"),
        (lambda: Sequence(torch.zeros(2, 3), torch.zeros(1, 3)), "embeddings have shape"),
        (lambda: Sequence(torch.zeros(2, 3, 5), torch.zeros(1, 3), torch.zeros(2, 2, 1)), "actions have shape"),
    ],
)  # fmt: skip
def test_what_cannot_be_rolled_out_is_refused(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()
