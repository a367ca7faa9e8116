r"""Act in a world: by plans whose imagined future reaches a goal, or at random, to learn from.

  video-jepa act --output-dir recordings --episodes 500
  video-jepa act --predictor runs/predictor --encoder runs/encoder/encoder --cache cache/train --output-dir runs/act

Without a predictor it strolls. Each episode is left as a video with a table of its actions beside it, which `embed`
and `train --actions 'action_*'` take. With a predictor it plans to a goal, acts, notices where what comes is not what
was imagined, and plans anew; it leaves `act.json`, `episodes.csv` and `films/`: what came, the goal, and the real
frames nearest to what the first plan imagined.
"""

import csv
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from av import VideoFrame
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from data.cache import EmbeddingCache
from data.errors import DataError, printable
from data.frames import read_frames
from data.picture import read_picture
from data.synthetic import write_table, write_video
from data.video import FrameConverter
from data.windows import Windows
from data.worlds import TWO_ROOMS, World, open_world
from jepa.config import Bounded, NotNegativeInt, Positive, PositiveInt
from jepa.encoder import Encoder
from jepa.planning import ActionMetric, ActionSpace, Agent, Cost, Planner, Task, Tree
from jepa.predictor import Predictor
from pipelines.run.command import UserError, require, run_command
from pipelines.run.encoders import load_encoder
from pipelines.run.evaluation import fit_readout
from pipelines.run.files import read_json, write_json
from pipelines.run.folder import RunFolder
from pipelines.run.models import load_predictor, open_cache, owner_of
from pipelines.run.searching import Search

PAIRS = 20_000  # steps of a cache that the action metric is fitted on, at most
APART = 4  # ticks between their embeddings: by the noise in changes of one tick, regression makes all distances smaller
TURN = 0.2  # share of each action of a stroll that is new


@dataclass(frozen=True)
class Options(Bounded):
    """Act in a world, by plans or at random."""

    env: str = TWO_ROOMS
    """`two-rooms`, or the name of an environment of gymnasium, such as `package:name/World-v1`."""
    predictor: tuple[Path, ...] = ()
    """Run folders of train_predictor, trained with actions; of several, with other seeds, the first imagines, and the
    tree goes around what one of them does not believe. None: a stroll."""
    encoder: Path | None = None
    """Folder of the encoder that its embeddings are of."""
    cache: Path | None = None
    """Embeddings with actions that it was trained on: distances are measured in what has to be done, learned here."""
    goal: Path | None = None
    """A picture of the goal. None: the world's own."""
    goal_values: tuple[str, ...] = ()
    """The goal as values of the cache's columns instead, such as `dot_x=40 dot_y=12`."""
    near: Positive = 1.0
    """How near is near enough: in largest actions or, where the goal is values, in their units."""
    episodes: PositiveInt = 10
    """Episodes."""
    ticks: PositiveInt = 200
    """Ticks of each."""
    films: NotNegativeInt = 8
    """Episodes that a film is made of."""
    replan: PositiveInt = 1000
    """Ticks after which a plan is made anew, even where all goes as imagined."""
    output_dir: Path = Path("runs/act")
    """Where episodes and results are left."""
    seed: NotNegativeInt = 0
    """Seed of the first episode; each has one of its own."""
    resume: bool = False
    """Go on after the last episode of an interrupted run or, with more episodes, of a finished one."""
    overwrite: bool = False
    """Replace the results in the output folder."""
    planner: Planner = field(default_factory=Tree)


class Mind(NamedTuple):
    """What an agent is made of."""

    predictors: list[Predictor]
    encoder: Encoder
    metric: ActionMetric
    space: ActionSpace
    value_cost: Cost | None
    """The cost where the goal is values, not a picture."""
    among: Search
    """The cache, for the real frames nearest to what is imagined."""
    convert: FrameConverter
    """Resizes pictures as frames of videos are resized."""
    goal: np.ndarray | None
    """A picture, RGB uint8 (H, W, 3), where one is given; else the world's own is the goal."""

    def goal_in(self, info: dict[str, Any]) -> np.ndarray | None:
        """The picture to reach in an episode of which a world says this."""
        return info.get("goal") if self.goal is None else self.goal

    def embed(self, picture: np.ndarray) -> Tensor:
        """The embedding (*tokens, D) of a picture, RGB uint8 (H, W, 3)."""
        frame = self.convert(VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"))
        return self.encoder.embed(torch.from_numpy(frame)[None, None])[0]


class Episode(NamedTuple):
    """What happened."""

    pictures: np.ndarray
    """uint8 (ticks, H, W, 3)"""
    table: dict[str, np.ndarray]
    """Actions, each taken after its picture, and the state where the world says it; (ticks,) each."""
    result: dict[str, Any]
    goal: np.ndarray | None
    imagined: Tensor
    """By the first plan, (H, *tokens, D)."""


def main(options: Options) -> None:
    """Open the world, act in each episode, write what happened."""
    require(not (options.goal and options.goal_values), "--goal and --goal-values are two goals: give one of them")
    world, folder = open_world(options.env), options.output_dir
    output = RunFolder(options, "act", ("episodes", "films", "act.json", "episodes.csv"))
    plans = options.predictor or options.encoder or options.cache or options.goal or options.goal_values
    mind = load_mind(options, world) if plans else None
    _, info = world.reset(options.seed)  # what cannot be drawn, or shows no goal, begins no run
    if mind:
        make_agent(mind, info, options, seed=options.seed)
    record = folder / "act.json"
    results = read_results(record) if options.resume and record.exists() else []
    inputs: dict[str, Any] = {"env": options.env}
    if mind:  # another one must not go on with what this one began
        inputs |= {"encoder": mind.encoder.fingerprint, "predictors": [*map(owner_of, mind.predictors)]}
    output.begin(inputs)
    for number in tqdm(range(len(results), options.episodes), "acting", unit="episode", leave=False):
        episode = act(world, mind, options, seed=options.seed + number)
        path = folder / "episodes" / f"episode_{number:05}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, episode.pictures, world.fps)
        write_table(path.with_suffix(".csv"), episode.table, world.fps)
        if mind and number < options.films and len(episode.imagined):
            try:
                write_film(folder / "films" / path.name, episode, mind.among)
            except DataError as error:  # such as of videos that are gone: what happened is there, all the same
                tqdm.write(printable(f"no film of episode {number}: {error}"))
        results.append({"episode": number, **episode.result})
        write_json(record, in_short(results) | {"episodes": results})
    with (folder / "episodes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, results[0])
        writer.writeheader()
        writer.writerows(results)
    said = in_short(results)
    output.finish(said)
    print(f"{options.env}: {said['successes']} of {said['of']} reach the goal, {100 * said['success']:.0f} % "
          f"({100 * said['low']:.0f} to {100 * said['high']:.0f}), {said['seconds']:.2f} CPU-seconds an episode\n"
          f"wrote {folder}/episodes, episodes.csv and act.json")  # fmt: skip
    if not mind:
        print(f"Next:\n  video-jepa embed --videos {folder}/episodes --columns 'action_*' --encoder ENCODER "
              f"--fps {world.fps:g} --output-dir cache/train")  # fmt: skip


def read_results(record: Path) -> list[dict[str, Any]]:
    """What is known of the episodes so far. Raises `UserError` where it is damaged."""
    results: Any = read_json(record).get("episodes")
    wanted = {"is_success": bool, "plans": int, "surprises": int, "seconds": float}
    is_whole = isinstance(results, list) and all(
        isinstance(one, dict) and one.keys() == {"episode", *wanted} and one["episode"] == number
        and all(isinstance(one[name], kind) for name, kind in wanted.items())
        for number, one in enumerate(results)
    )  # fmt: skip
    require(is_whole, f"{record} is damaged: restore it, or add --overwrite to start again")
    return results


def in_short(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Share of successes with Wilson's 95 % interval, and what an episode took in the mean."""
    means = {name: float(np.mean([one[name] for one in results])) for name in ("plans", "surprises", "seconds")}
    return share_of(sum(one["is_success"] for one in results), len(results)) | means


def share_of(successes: int, of: int) -> dict[str, Any]:
    """The share of successes with Wilson's 95 % interval."""
    interval = binomtest(successes, of).proportion_ci(method="wilson")
    ends = {"low": float(interval.low), "high": float(interval.high)}
    return {"successes": successes, "of": of, "success": successes / of} | ends


def load_mind(options: Options, world: World) -> Mind:
    """Everything that a plan takes. Raises `UserError` where it is missing or does not belong together."""
    if not options.predictor or options.encoder is None or options.cache is None:
        mend = "give all three, or none, and no goal, to stroll"
        raise UserError(f"--predictor, --encoder and --cache belong together: {mend}")
    predictors, encoder = [load_predictor(folder)[0] for folder in options.predictor], load_encoder(options.encoder)
    for folder, predictor in zip(options.predictor, predictors, strict=True):
        cache, found, wanted = open_cache(options.cache, predictor), encoder.fingerprint, predictor.encoder_fingerprint
        require(found == wanted, f"--encoder {options.encoder} is {found}, and {folder}'s is {wanted}: give that one")
        taken, given = len(predictor.actions), len(world.low)
        mend = "train it with this world's"
        require(taken == given, f"{folder} takes {taken} actions, and {options.env} {given}: {mend}")
    windows = Windows(cache, 1 + APART, predictor.actions)
    chosen = windows.evenly(PAIRS)
    pairs, done = torch.from_numpy(cache.take(windows.rows(chosen)[:, [0, -1]])), windows.actions(chosen)
    assert done is not None
    groups = torch.from_numpy(np.unique(windows.video_of(chosen), return_inverse=True)[1])
    try:
        metric = ActionMetric.fit(pairs[:, 0], pairs[:, -1], done[:, :-1].sum(dim=1), groups)
    except ValueError as error:
        mend = "record more episodes, or train an encoder that sees what moves, such as with --slow-dimension"
        raise UserError(f"{options.cache}: {error}: {mend}") from error
    space = ActionSpace(torch.tensor(world.low).float(), torch.tensor(world.high).float(), world.longest)
    cost = value_cost(options.goal_values, cache, predictors[0]) if options.goal_values else None
    among = Search(cache, mean=predictors[0].mean, std=predictors[0].std)
    return Mind(
        predictors, encoder.eval(), metric=metric, space=space, value_cost=cost, among=among,
        convert=FrameConverter(encoder.image_size), goal=read_picture(options.goal, "--goal") if options.goal else None,
    )  # fmt: skip


def value_cost(goal_values: tuple[str, ...], cache: EmbeddingCache, predictor: Predictor) -> Cost:
    """The distance of what a probe reads off an embedding from wanted values. Raises `UserError`."""
    try:
        wanted = {name: float(value) for name, value in (given.split("=") for given in goal_values)}
    except ValueError as error:
        raise UserError(f"--goal-values {' '.join(goal_values)}: each must be COLUMN=NUMBER") from error
    probe, there = fit_readout(cache, tuple(wanted), predictor).probe, torch.tensor(list(wanted.values()))
    return lambda embeddings: (probe(predictor.standardise(embeddings)) - there).norm(dim=-1).float()


def act(world: World, mind: Mind | None, options: Options, *, seed: int) -> Episode:
    """One episode."""
    picture, info = world.reset(seed)
    draws, began = np.random.default_rng(seed), time.process_time()
    goal = mind.goal_in(info) if mind else None
    agent = make_agent(mind, info, options, seed=seed) if mind else None
    pictures, actions, states, action = [], [], [], (world.low + world.high) / 2
    for _ in range(options.ticks):
        pictures.append(picture)
        states.append(info.get("state", ()))
        if agent and mind:
            action = agent.act(mind.embed(picture)).numpy().astype(float)
        else:
            action = stroll(action, world, draws)
        actions.append(action)
        picture, info = world.step(action)
    names = [f"action_{number}" for number in range(len(world.low))]
    columns = (*names, *world.columns), (*np.array(actions).T, *np.array(states).T)
    table = dict(zip(*columns, strict=True))
    plans, surprises, is_near = (agent.plans, agent.surprises, agent.is_near) if agent else ([], 0, False)
    result = {
        "is_success": bool(info.get("is_success", is_near)), "plans": len(plans), "surprises": surprises,
        "seconds": time.process_time() - began,
    }  # fmt: skip
    imagined = plans[0].embeddings if plans else torch.empty(0)
    return Episode(np.array(pictures), table, result, goal, imagined)


def make_agent(mind: Mind, info: dict[str, Any], options: Options, *, seed: int) -> Agent:
    """An agent for a goal: a picture, or values. Raises `UserError` where there is neither."""
    goal = mind.goal_in(info)
    if mind.value_cost is not None:
        cost, near = mind.value_cost, options.near
    elif goal is not None:
        cost, near = mind.metric.to_goal(mind.embed(goal)), options.near * mind.space.reach
    else:
        raise UserError(f"--env {options.env} shows no goal: give --goal PICTURE or --goal-values")
    task = Task(mind.predictors, mind.space, cost, metric=mind.metric, near=near)
    return Agent(task, options.planner, torch.Generator().manual_seed(seed), replan=options.replan)


def stroll(before: np.ndarray, world: World, draws: np.random.Generator) -> np.ndarray:
    """An action at random, not far from the one before; all of the space is drawn from alike in the long run."""
    middle, half = (world.low + world.high) / 2, (world.high - world.low) / 2
    kick = np.sqrt(1 - (1 - TURN) ** 2) * draws.normal(size=len(half)) * half * 0.7
    return np.clip(middle + (1 - TURN) * (before - middle) + kick, world.low, world.high)


def write_film(path: Path, episode: Episode, among: Search) -> None:
    """What came, the goal where it is a picture, and the real frames nearest to what the first plan imagined."""
    path.parent.mkdir(exist_ok=True)
    height, width = episode.pictures.shape[1:3]
    _, rows = among.near(episode.imagined, 1)
    nearest = read_frames(among.cache, rows[:, 0], (height, width)).transpose(0, 2, 3, 1)
    at = np.minimum(np.arange(len(episode.pictures)), len(nearest) - 1)
    panels = [episode.pictures, nearest[at]]
    if episode.goal is not None and episode.goal.shape == episode.pictures.shape[1:]:
        panels.insert(1, np.broadcast_to(episode.goal, episode.pictures.shape))
    film = np.concatenate(panels, axis=2)
    even = film[:, : film.shape[1] // 2 * 2, : film.shape[2] // 2 * 2]  # which every browser plays
    write_video(path, even, among.cache.provenance.fps)


if __name__ == "__main__":
    run_command(main, Options)
