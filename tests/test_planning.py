"""Plans reach goals in worlds that are known, and an agent learns where its model is wrong."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from jepa.planning import CEM, MPPI, ActionMetric, ActionSpace, Agent, Blocked, Gradient, Planner, Task, Tree
from jepa.sequence import Sequence

FPS = 10.0
SPACE = ActionSpace(-torch.ones(2), torch.ones(2), 1.0)


class Plane:
    """A plane without walls; an embedding is three times the place, turned, and a number that says nothing."""

    fps, latent_dimension, config = FPS, 0, SimpleNamespace(context=2)

    def fill(self, seen: Sequence) -> Sequence:
        return seen

    def step(self, newest: Sequence, state: Any, latent: None = None) -> tuple[Tensor, None]:
        assert newest.actions is not None
        return embed(place(newest.embeddings[:, -1]) + newest.actions[:, -1])[:, None], None


def embed(places: Tensor) -> Tensor:
    """(..., 2) -> (..., 3)"""
    return torch.cat([3 * places.flip(-1), torch.zeros_like(places[..., :1])], dim=-1)


def place(embeddings: Tensor) -> Tensor:
    return embeddings[..., :2].flip(-1) / 3


def walled(start: Tensor, action: Tensor) -> Tensor:
    """A wall at x = 0 with a door at y from 3 to 5."""
    end = start + action
    is_blocked = (start[..., 0] < 0) != (end[..., 0] < 0)
    return torch.where((is_blocked & ((end[..., 1] < 3) | (end[..., 1] > 5)))[..., None], start, end)


@pytest.fixture(scope="module")
def metric() -> ActionMetric:
    draws = torch.Generator().manual_seed(0)
    starts, actions = 4 * torch.randn(600, 2, generator=draws), torch.randn(600, 2, generator=draws)
    ends = torch.where(torch.rand(600, 1, generator=draws) < 0.3, starts, starts + actions)  # three in ten are blocked
    return ActionMetric.fit(embed(starts), embed(ends), actions, torch.arange(600) % 10)


def task(metric: ActionMetric, goal: tuple[float, float], **more: Any) -> Task:
    predictor: Any = Plane()
    return Task([predictor], SPACE, metric.to_goal(embed(torch.tensor(goal))), metric=metric, near=0.3, **more)


PAST = Sequence.on_clock(embed(torch.zeros(1, 1, 2)), FPS, torch.zeros(1, 1, 2))


def test_the_metric_measures_what_has_to_be_done_although_moves_were_blocked(metric: ActionMetric) -> None:
    ends = embed(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    positions = metric.position(ends)
    torch.testing.assert_close(positions[1] - positions[0], torch.tensor([3.0, 4.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(metric.to_goal(ends[1])(ends[0]), torch.tensor(5.0), atol=0.02, rtol=0)


def test_embeddings_that_do_not_tell_what_was_done_are_refused() -> None:
    draws = torch.Generator().manual_seed(0)
    before, after, actions = (torch.randn(600, size, generator=draws) for size in (3, 3, 2))
    with pytest.raises(ValueError, match="what is done cannot be read off"):
        ActionMetric.fit(before, after, actions, torch.arange(600) % 10)


@pytest.mark.parametrize(
    "planner", [Tree(), CEM(horizon=12), MPPI(horizon=12), Gradient(horizon=12)], ids=lambda planner: planner.kind
)
def test_planners_reach_a_goal_in_the_open(planner: Planner, metric: ActionMetric) -> None:
    plan = planner.search(task(metric, (4.0, -3.0)), PAST, torch.Generator().manual_seed(0))
    assert plan.cost < 1.0
    assert (plan.actions.norm(dim=1) <= 1 + 1e-5).all()
    torch.testing.assert_close(plan.actions.sum(dim=0), place(plan.embeddings[-1]), atol=1e-3, rtol=0)


def test_a_tree_does_not_go_where_it_was_blocked(metric: ActionMetric) -> None:
    origin = metric.position(embed(torch.zeros(2)))
    blocked = Blocked(origin[None] + torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]), 1.0)
    for known in (None, blocked):
        plan = Tree().search(task(metric, (5.0, 0.0), blocked=known), PAST, torch.Generator())
        way = torch.cat([torch.zeros(1, 2), place(plan.embeddings)])
        passes = blocked.meets(metric.position(embed(way))[None])
        assert bool(passes) == (known is None)
        assert plan.cost <= 0.3


def test_a_tree_leads_straight_to_a_goal_and_ends_there(metric: ActionMetric) -> None:
    asked = []

    class Counting(Plane):
        def step(self, newest: Sequence, state: Any, latent: None = None) -> tuple[Tensor, None]:
            asked.append(len(newest.embeddings))
            return super().step(newest, state, latent)

    counting: Any = Counting()
    there = replace(task(metric, (5.0, -4.0)), predictors=[counting])
    plan = Tree(moves=8).search(there, PAST, torch.Generator())
    assert plan.cost <= 0.3  # near, although no side of a cell is as short
    assert len(plan.actions) <= 1.25 * 41**0.5
    assert sum(asked) < 3 * 16 * 60  # of three ticks for each of 16 moves from a few nodes, not from all around


def test_a_cautious_tree_goes_around_what_is_half_blocked(metric: ActionMetric) -> None:
    class Leaking(Plane):
        def step(self, newest: Sequence, state: Any, latent: None = None) -> tuple[Tensor, None]:
            """Mud from x = -1 to 1, in which three fifths are made of a move, but for y from 3 to 5."""
            assert newest.actions is not None
            at, moved = place(newest.embeddings[:, -1]), newest.actions[:, -1]
            is_mud = (at[:, 0].abs() < 1) & ((at[:, 1] < 3) | (at[:, 1] > 5))
            return embed(at + torch.where(is_mud[:, None], 0.6, 1.0) * moved)[:, None], None

    leaking: Any = Leaking()
    there = replace(task(metric, (4.0, 0.0)), predictors=[leaking])
    past = Sequence.on_clock(embed(torch.tensor([[[-4.0, 0.0]]])), FPS, torch.zeros(1, 1, 2))
    highest = {}
    for caution in (0.0, 10.0):
        plan = Tree(moves=8, hold=1, caution=caution).search(there, past, torch.Generator())
        assert plan.cost <= 0.3
        highest[caution] = float(place(plan.embeddings)[:, 1].amax())
    assert highest[0.0] < 2 < 3 < highest[10.0]


def test_an_agent_on_its_way_is_not_surprised_by_what_it_is_unsure_of(metric: ActionMetric) -> None:
    draws, at = torch.Generator().manual_seed(0), torch.tensor([-20.0, 0.0])
    agent = Agent(task(metric, (20.0, 0.0)), Tree(), torch.Generator())
    for _ in range(36):
        at = at + agent.act(embed(at + 0.25 * torch.randn(2, generator=draws)))
    assert float(at[0]) > 12
    assert agent.surprises == 0


def test_a_tree_that_is_there_stays(metric: ActionMetric) -> None:
    assert len(Tree().search(task(metric, (0.0, 0.1)), PAST, torch.Generator()).actions) == 0


def test_an_agent_finds_the_door_that_its_model_does_not_know(metric: ActionMetric) -> None:
    at, goal = torch.tensor([-4.0, 0.0]), torch.tensor([4.0, 0.0])
    agent = Agent(task(metric, (4.0, 0.0)), Tree(hold=1), torch.Generator())
    for _ in range(150):
        at = walled(at, agent.act(embed(at)))
    assert agent.surprises > 0  # it met the wall
    assert float((at - goal).norm()) < 1.0
    assert agent.is_near


def test_moves_differ_as_much_as_they_can() -> None:
    moves = SPACE.moves(8)
    torch.testing.assert_close(moves.norm(dim=1), torch.ones(8))
    assert float((torch.cdist(moves, moves) + 9 * torch.eye(8)).amin()) > 0.4
    corners = ActionSpace(torch.tensor([0.0, -2.0]), torch.tensor([1.0, 2.0])).moves(4)
    assert ((corners >= torch.tensor([0.0, -2.0])) & (corners <= torch.tensor([1.0, 2.0]))).all()


@pytest.mark.parametrize("goal", [(4.0, 0.0), (1.2, 0.0), (1.5, -2.0)])
def test_a_tree_goes_around_what_one_of_its_predictors_does_not_believe(
    metric: ActionMetric, goal: tuple[float, float]
) -> None:
    class Walled(Plane):
        def step(self, newest: Sequence, state: Any, latent: None = None) -> tuple[Tensor, None]:
            assert newest.actions is not None
            return embed(walled(place(newest.embeddings[:, -1]), newest.actions[:, -1]))[:, None], None

    predictors: list[Any] = [Plane(), Walled()]
    there = replace(task(metric, goal), predictors=predictors, near=1.0)
    past = Sequence.on_clock(embed(torch.tensor([[[-4.0, 0.0]]])), FPS, torch.zeros(1, 1, 2))
    plan = Tree(hold=1).search(there, past, torch.Generator())
    assert plan.cost < 1.0
    way = torch.cat([torch.tensor([[-4.0, 0.0]]), place(plan.embeddings)])
    (crossed,) = ((way[:-1, 0] < 0) & (way[1:, 0] >= 0)).nonzero(as_tuple=True)
    assert len(crossed) == 1
    assert 3 <= float(way[crossed + 1, 1]) <= 5  # by the door, which the other one alone knows


def test_a_move_that_ends_at_the_goal_does_not_meet_what_lies_behind(metric: ActionMetric) -> None:
    origin = metric.position(embed(torch.zeros(2)))
    behind = Blocked(origin[None] + torch.tensor([[2.5, 0.0]]), torch.tensor([[1.0, 0.0]]), 1.0)
    plan = Tree(moves=8).search(task(metric, (1.0, 0.0), blocked=behind), PAST, torch.Generator())
    assert plan.cost <= 0.3
    assert len(plan.actions) == 1


@pytest.mark.parametrize(("share", "lost"), [(1.0, {7}), (0.95, set()), (0.85, set())])
def test_an_agent_that_lags_is_not_blocked(metric: ActionMetric, share: float, lost: set[int]) -> None:
    at = torch.tensor([-20.0, 0.0])
    agent = Agent(task(metric, (20.0, 0.0)), Tree(), torch.Generator())
    for tick in range(30):
        action = agent.act(embed(at))
        at = at if tick in lost else at + share * action
    assert agent.surprises == 0
