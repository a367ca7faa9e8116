"""Search for actions whose imagined future comes near a goal, and an agent that carries them out.

A planner asks `rollout` what would happen if, and a cost how far from the goal that is. To add one: a dataclass with a
`kind` and a method `search`, and its name in `Planner`.
"""

from collections.abc import Callable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from einops import repeat
from torch import Tensor

from jepa.config import Bounded, NotNegative, Positive, PositiveInt
from jepa.predictor import Predictor
from jepa.probe import Probe, fit_probe
from jepa.rollout import rollout
from jepa.sequence import Future, Sequence

Cost = Callable[[Tensor], Tensor]
"""Embeddings (..., *tokens, D) to how far they are from the goal, (...); 0 is there."""
REFITS, BLOCKED_SHARE = 3, 0.5
"""Times that an action metric is fitted without moves that were blocked: that miss by more than this share of them."""
AT_ONCE = 32  # nodes of a tree that are gone on from at once
JUDGED_BY = 3
"""Ticks by which the agent judges a move: of one alone, noise in both positions may be a third (in Two Rooms it is)."""
LEAST_MOVE = 0.25
"""Of the largest action: whether less is blocked cannot be told."""
SPREAD_OF = 1024  # actions among which the most different moves are found


@dataclass(frozen=True, eq=False)
class ActionSpace:
    """What may be done in a tick: numbers between bounds (A,), of a length, where one is given, at most."""

    low: Tensor
    high: Tensor
    longest: float | None = None

    @property
    def reach(self) -> float:
        """Length of the largest action."""
        return self.longest or float(torch.maximum(self.low.abs(), self.high.abs()).norm())

    def cut(self, actions: Tensor) -> Tensor:
        """The nearest actions (..., A) that are allowed."""
        if self.longest is not None:
            actions = actions * (self.longest / actions.norm(dim=-1, keepdim=True).clamp_min(1e-9)).clamp(max=1)
        return actions.clamp(self.low, self.high)

    @cache  # noqa: B019 - a space lives as long as the program
    def moves(self, number: int) -> Tensor:
        """So many large actions (number, A) that differ as much as possible, the same each time."""
        ways = torch.randn(SPREAD_OF, len(self.low), generator=torch.Generator().manual_seed(0))
        ways = ways / (ways.norm(dim=1, keepdim=True) if self.longest else ways.abs().amax(dim=1, keepdim=True))
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2
        ways = self.cut(middle + half * ways if self.longest is None else self.longest * ways)
        chosen = [0]
        while len(chosen) < number:  # the one farthest from those before
            chosen.append(int(torch.cdist(ways, ways[chosen]).amin(dim=1).argmax()))
        return ways[chosen]


@dataclass(frozen=True)
class ActionMetric:
    """Positions in units of actions: what is added to them by acting is the action, wherever nothing is in the way.

    So the distance of two positions is how much has to be done, learned without labels.
    """

    probe: Probe

    @classmethod
    def fit(cls, before: Tensor, after: Tensor, actions: Tensor, groups: Tensor) -> "ActionMetric":
        """Ridge regression from changes to actions; of embeddings (N, *tokens, D), actions (N, A) and clips (N,).

        Of several ticks, actions are sums. Blocked moves, which change less than was done, are left out: those that
        miss by far, several times. Raises `ValueError` where there are fewer than two clips, or what is done cannot be
        read off the changes.
        """
        changes, kept = after - before, torch.ones(len(actions), dtype=torch.bool)
        for _ in range(REFITS):
            if not kept.any():
                raise ValueError("what is done cannot be read off them: hardly any move changes them as the others do")
            probe = fit_probe([(changes[kept], actions[kept], groups[kept])], tuple(before.shape[1:]))
            missed = (probe(changes) - actions).norm(dim=1)
            kept = missed < BLOCKED_SHARE * actions.norm(dim=1).clamp_min(1e-9)
        return cls(probe)

    def position(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., *tokens, D) to positions float32 (..., A), up to a constant."""
        return self.probe(embeddings).float()

    def to_goal(self, goal: Tensor) -> Cost:
        """The distance from the embedding of a goal, (*tokens, D)."""
        there = self.position(goal)
        return lambda embeddings: (self.position(embeddings) - there).norm(dim=-1)


class Blocked(NamedTuple):
    """Where moves were surprisingly blocked."""

    positions: Tensor  # (N, A), of an action metric
    directions: Tensor  # (N, A), of length 1: where it was expected to go
    radius: float

    def meets(self, way: Tensor) -> Tensor:
        """Whether ways (B, T, A) do one of these moves again, bool (B,)."""
        begun, steps = way[:, :-1, None], way.diff(dim=1)[:, :, None]  # (B, T - 1, 1, A)
        lengths = steps.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        along = steps / lengths
        ahead = ((self.positions - begun) * along).sum(dim=-1, keepdim=True)  # (B, T - 1, N, 1)
        nearest = begun + torch.minimum(ahead.clamp_min(0), lengths) * along
        is_near = (nearest - self.positions).norm(dim=-1) < self.radius
        return (is_near & ((along * self.directions).sum(dim=-1) > 0.5)).flatten(1).any(dim=1)


@dataclass(frozen=True)
class Task:
    """What a planner is given: predictors, what may be done, and where that should lead."""

    predictors: Several[Predictor]
    """The first imagines; to a tree a move is as long as it is to the one that makes the least of it."""
    space: ActionSpace
    cost: Cost
    metric: ActionMetric
    near: float  # cost that is good enough
    blocked: Blocked | None = None

    def imagine(self, past: Sequence, actions: Tensor, *, by: int = 0) -> Tensor:
        """The embeddings (B, H, *tokens, D) that come of actions (B, H, A) after pasts of B clips, or of one."""
        past = _chosen(past, [0] * len(actions)) if len(past.embeddings) == 1 else past
        predictor = self.predictors[by]
        return rollout(predictor, past, Future.ticks(actions.shape[1], predictor.fps, actions))


class Plan(NamedTuple):
    """Actions and what is imagined to come of them."""

    actions: Tensor  # (H, A); none where nothing is better than to stay
    embeddings: Tensor  # (H, *tokens, D)
    cost: float  # of the last embedding


class Node(NamedTuple):
    """A node of a tree: what was done on the way from its parent, (H, A), and what came of it, (H, *tokens, D)."""

    parent: int
    actions: Tensor
    came: Tensor
    cell: tuple[int, ...]
    length: float  # of the whole way to it
    cost: float


@dataclass(frozen=True)
class Tree(Bounded):
    """A* through all that can be reached: a tree of rollouts, one for each cell of the action metric."""

    kind: ClassVar[str] = "tree"
    moves: PositiveInt = 4
    """Actions that are tried from each node, for each of their numbers; as different as possible."""
    hold: PositiveInt = 3
    """Ticks for which each is held."""
    cell: Positive = 0.5
    """Sides of cells, as a share of what is reached by one move."""
    caution: NotNegative = 10.0
    """Detour, in moves, that one is worth of which in some tick nothing is made: what is half blocked is the edge of
    what is known, and a search finds every place where an imagined wall leaks."""
    nodes: PositiveInt = 4000
    """Nodes of the tree at most."""

    @torch.no_grad()
    def search(self, task: Task, past: Sequence, generator: torch.Generator) -> Plan:
        """The shortest way to where it is near enough; else to the nearest place or, from there, to any other."""
        nodes = self._grow(task, past)
        end = min(nodes, key=lambda one: (0, one.length + one.cost) if one.cost <= task.near else (1, one.cost))
        if end is nodes[0] and len(nodes) > 1 and end.cost > task.near:
            end = nodes[int(torch.randint(1, len(nodes), (), generator=generator))]
        way = [end]
        while way[0].parent >= 0:
            way.insert(0, nodes[way[0].parent])
        return Plan(torch.cat([one.actions for one in way]), torch.cat([one.came for one in way]), way[-1].cost)

    def _grow(self, task: Task, past: Sequence) -> list[Node]:
        """Nodes, the first of them where it stands, until the one whose turn it is is near enough, or none is left.

        It is the turn of those by which the whole way seems the shortest (Hart, Nilsson and Raphael 1968), as long as
        costs are lengths in the action metric; by other costs all is reached, too, but maybe not on the shortest way.
        """
        moves, start = task.space.moves(self.moves * len(task.space.low)), past.embeddings[0, -1]
        held = repeat(moves, "m a -> m hold a", hold=self.hold)
        (cell,) = self._cells(task, start[None])
        nodes = [Node(-1, held[0, :0], start[None][:0], cell=cell, length=0.0, cost=float(task.cost(start)))]
        shortest, waiting, pasts = {cell: 0.0}, [0], past
        while waiting and len(nodes) < self.nodes and nodes[waiting[0]].cost > task.near:
            frontier, waiting = waiting[:AT_ONCE], waiting[AT_ONCE:]
            parents = [one for one in frontier for _ in moves]
            past, actions = _chosen(pasts, parents), repeat(held, "m h a -> (n m) h a", n=len(frontier))
            came = task.imagine(past, actions)  # (nodes x moves, hold, *tokens, D)
            cells, costs = self._cells(task, came[:, -1]), task.cost(came)
            known = torch.tensor([shortest.get(cell, torch.inf) for cell in cells])
            known[is_there := (costs <= task.near).any(dim=1)] = torch.inf  # even in a cell that is known
            until = torch.where(is_there, costs.argmin(dim=1) + 1, self.hold)  # ticks of each that are done
            begun = torch.tensor([nodes[one].length for one in parents])
            lengths = begun + self._lengths(task, past, came, actions=actions, until=until)
            for other in range(1, len(task.predictors)):
                if left := (lengths < known).nonzero()[:, 0].tolist():  # few
                    some, its = _chosen(past, left), actions[left]
                    came_too = task.imagine(some, its, by=other)
                    others = begun[left] + self._lengths(task, some, came_too, actions=its, until=until[left])
                    lengths[left] = torch.maximum(lengths[left], others)
            taken = (lengths < known).nonzero()[:, 0].tolist()
            taken.sort(key=lambda one: (bool(is_there[one]), -float(lengths[one])))  # the last of a cell stays
            chosen = list({cells[one]: one for one in taken}.values())[: self.nodes - len(nodes)]
            for one in chosen:
                ticks, length = int(until[one]), float(lengths[one])
                waiting.append(len(nodes))
                way = actions[one, :ticks], came[one, :ticks].clone()  # or all that was tried would be kept
                nodes.append(
                    Node(parents[one], *way, cell=cells[one], length=length, cost=float(costs[one, ticks - 1]))
                )
                shortest[cells[one]] = length
            waiting = [one for one in waiting if nodes[one].length <= shortest[nodes[one].cell]]
            waiting.sort(key=lambda one: nodes[one].length + nodes[one].cost)
            pasts = _grown(pasts, _chosen(past, chosen), actions[chosen], came=came[chosen])
        return nodes

    def _lengths(self, task: Task, past: Sequence, came: Tensor, *, actions: Tensor, until: Tensor) -> Tensor:
        """How long moves (B, H, A), until some ticks (B,), are by what came of them, (B,); blocked ones are endless."""
        way = task.metric.position(torch.cat([past.embeddings[:, -1:], came], dim=1))  # (B, H + 1, A)
        way = way.gather(1, torch.minimum(torch.arange(self.hold + 1), until[:, None])[..., None].expand_as(way))
        made = (way.diff(dim=1) * actions).sum(dim=-1) / actions.square().sum(dim=-1).clamp_min(1e-9)
        made = made.masked_fill(torch.arange(self.hold) >= until[:, None], 1).amin(dim=1)
        lengths = until * task.space.reach * (1 + self.caution * (1 - made).clamp_min(0))
        return lengths if task.blocked is None else lengths.masked_fill(task.blocked.meets(way), torch.inf)

    def _cells(self, task: Task, embeddings: Tensor) -> list[tuple[int, ...]]:
        """The cell in which each of embeddings (N, *tokens, D) lies."""
        cells = task.metric.position(embeddings) / (self.cell * self.hold * task.space.reach)
        return [tuple(cell) for cell in cells.floor().int().tolist()]


def _chosen(past: Sequence, clips: list[int]) -> Sequence:
    """Some clips of a past, (B, T, *tokens, D), in any number."""
    assert past.actions is not None
    return replace(past, embeddings=past.embeddings[clips], actions=past.actions[clips], times=past.times[:1])


def _grown(pasts: Sequence, past: Sequence, actions: Tensor, *, came: Tensor) -> Sequence:
    """Pasts and, as long, those after what came, (B, H, *tokens, D), of actions (B, H, A)."""
    assert past.actions is not None
    assert pasts.actions is not None
    length = past.embeddings.shape[1]
    embeddings = torch.cat([past.embeddings, came], dim=1)[:, -length:]
    # The last embedding's own action is still to come, and is replaced by what is tried.
    done = torch.cat([past.actions[:, :-1], actions, actions[:, -1:]], dim=1)[:, -length:]
    return replace(
        pasts, embeddings=torch.cat([pasts.embeddings, embeddings]), actions=torch.cat([pasts.actions, done])
    )


@dataclass(frozen=True)
class _Sampler(Bounded):
    """Sequences of actions that are drawn around a mean, in rounds; each says where the next round is drawn."""

    horizon: PositiveInt = 30
    """Ticks ahead."""
    samples: PositiveInt = 200
    """Sequences that are drawn in each round."""
    rounds: PositiveInt = 10
    """Rounds."""

    @torch.no_grad()
    def search(self, task: Task, past: Sequence, generator: torch.Generator) -> Plan:
        """The mean after the last round, by the cost summed over all ticks."""
        mean, std = _beginning(task.space, self.horizon)
        for _ in range(self.rounds):
            actions = _draw(task.space, mean, std, self.samples, generator)
            total = task.cost(task.imagine(past, actions)).sum(dim=1)
            mean, std = self.narrow(actions, total, std)
        return _plan_of(task, past, mean)

    def narrow(self, actions: Tensor, total: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation (H, A) of the next round, after actions (N, H, A) of costs (N,) drawn with this one."""
        raise NotImplementedError


@dataclass(frozen=True)
class CEM(_Sampler):
    """The cross-entropy method: sequences of actions are drawn around the mean of the best of those before."""

    kind: ClassVar[str] = "cem"
    elites: PositiveInt = 20
    """Best sequences that the next round is drawn around."""

    def narrow(self, actions: Tensor, total: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        best = actions[total.argsort()[: self.elites]]
        return best.mean(dim=0), best.std(dim=0)


@dataclass(frozen=True)
class MPPI(_Sampler):
    """Model predictive path integral control (Williams et al. 2017): a mean weighted by exp(-cost / temperature)."""

    kind: ClassVar[str] = "mppi"
    temperature: Positive = 0.1
    """In units of the spread of the costs."""

    def narrow(self, actions: Tensor, total: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        weights = (-(total - total.min()) / (self.temperature * total.std().clamp_min(1e-9))).softmax(dim=0)
        return torch.einsum("n,nha->ha", weights, actions), std


@dataclass(frozen=True)
class Gradient(Bounded):
    """Descent on the actions themselves, through the predictor."""

    kind: ClassVar[str] = "gradient"
    horizon: PositiveInt = 30
    """Ticks ahead."""
    starts: PositiveInt = 8
    """Sequences that are begun with; the best ends."""
    rounds: PositiveInt = 30
    """Steps of Adam."""
    rate: Positive = 0.1
    """Size of these steps, in units of what may be done."""

    def search(self, task: Task, past: Sequence, generator: torch.Generator) -> Plan:
        """The best sequence, by the cost summed over all ticks."""
        mean, std = _beginning(task.space, self.horizon)
        scale = ((task.space.high - task.space.low) / 2).clamp_min(1e-9)
        free = (_draw(task.space, mean, 0.3 * std, self.starts, generator) / scale).requires_grad_()
        optimiser = torch.optim.Adam([free], lr=self.rate)
        with torch.enable_grad():
            for _ in range(self.rounds):
                total = task.cost(task.imagine(past, task.space.cut(free * scale))).sum(dim=1)
                optimiser.zero_grad()
                total.sum().backward()
                optimiser.step()
        return _plan_of(task, past, task.space.cut(free.detach()[int(total.argmin())] * scale))


Planner = Tree | CEM | MPPI | Gradient


def _beginning(space: ActionSpace, horizon: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the first round, (H, A) each."""
    middle, half = (space.low + space.high) / 2, (space.high - space.low) / 2
    return repeat(middle, "a -> h a", h=horizon), repeat(half, "a -> h a", h=horizon)


def _draw(space: ActionSpace, mean: Tensor, std: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Sequences of actions (number, H, A) around a mean."""
    return space.cut(mean + std * torch.randn(number, *mean.shape, generator=generator))


@torch.no_grad()
def _plan_of(task: Task, past: Sequence, actions: Tensor) -> Plan:
    """The plan of a sequence of actions (H, A)."""
    came = task.imagine(past, actions[None])[0]
    return Plan(actions, came, float(task.cost(came[-1:])))


@dataclass
class Agent:
    """Acts by plans, notices where what comes is not what was imagined, and plans anew.

    A move by which less than half of the expected way is made, in some ticks, was blocked by something that the
    predictor does not know: it is remembered, and no later plan repeats it.
    """

    task: Task
    planner: Planner
    generator: torch.Generator
    replan: int = 1_000_000  # ticks after which a plan is made anew, even if all goes well
    plans: list[Plan] = field(default_factory=list)  # all so far
    surprises: int = 0

    def __post_init__(self) -> None:
        self._past: Any = None
        self._queue: list[tuple[Tensor, Tensor]] = []
        self._expected: Tensor | None = None
        self._blocked: list[tuple[Tensor, Tensor]] = []
        self._steps: list[tuple[Tensor, Tensor]] = []  # where it was, and by the plan should have been

    @property
    def is_near(self) -> bool:
        """Whether what was seen last is near enough to the goal."""
        return self._past is not None and float(self.task.cost(self._past.embeddings[0, -1])) <= self.task.near

    @torch.no_grad()
    def act(self, embedding: Tensor) -> Tensor:
        """The action (A,) to take now, at an embedding (*tokens, D)."""
        self._look(embedding[None, None])
        if not self._queue and not self.is_near:
            plan = self.planner.search(self.task, self._past, self.generator)
            self.plans.append(plan)
            self._queue = list(zip(plan.actions, plan.embeddings, strict=True))[: self.replan]
            self._steps = [(self.task.metric.position(embedding),) * 2]
        action, self._expected = self._queue.pop(0) if self._queue else self._stay()
        self._past = self._past.followed_by(action[None, None])
        return action

    def _look(self, seen: Tensor) -> None:
        """Take in an embedding (1, 1, *tokens, D); forget the plan where it is not what was expected."""
        task, fps, context = self.task, self.task.predictors[0].fps, self.task.predictors[0].config.context
        if self._past is None:
            self._past = Sequence.on_clock(seen, fps, torch.zeros(1, 1, len(task.space.low)))
            return
        if self._expected is not None:
            now, expected = task.metric.position(torch.stack([seen[0, 0], self._expected]))
            self._steps = [*self._steps[-JUDGED_BY:], (now, expected)]
            (begun, aimed), (before, _) = self._steps[0], self._steps[-2]
            way, least = expected - aimed, LEAST_MOVE * JUDGED_BY * task.space.reach
            made = float((now - begun) @ way / way.square().sum().clamp_min(1e-9))
            if len(self._steps) > JUDGED_BY and float(way.norm()) > least and made < BLOCKED_SHARE:
                self.surprises += 1
                self._queue = []
                self._blocked.append((before, way / way.norm()))
                positions, directions = (torch.stack(part) for part in zip(*self._blocked, strict=True))
                self.task = replace(task, blocked=Blocked(positions, directions, task.space.reach))
        embeddings = torch.cat([self._past.embeddings, seen], dim=1)[:, -context:]
        actions = torch.cat([self._past.actions, self._past.actions[:, -1:]], dim=1)[:, -context:]
        self._past = Sequence.on_clock(embeddings, fps, actions)

    def _stay(self) -> tuple[Tensor, Tensor | None]:
        """The one action that leads nearest, and nothing that is expected of it."""
        moves = self.task.space.moves(16)
        tried = torch.cat([share * moves for share in (0.0, 0.25, 0.5, 1.0)])
        costs = self.task.cost(self.task.imagine(self._past, tried[:, None])[:, 0])
        return tried[int(costs.argmin())], None
