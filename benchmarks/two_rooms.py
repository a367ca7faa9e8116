r"""Two rooms and a door: does the agent get from the one into the other? Beside it chance, and planners that know more.

  python -m benchmarks.two_rooms --output-dir runs/benchmarks/two_rooms

For each seed: clips of strolls, an encoder, caches, a predictor, by the commands; then episodes that nothing was chosen
by. `truth` plans with the rules themselves. `through`: first plans whose path, read off imagined embeddings by a probe
for this purpose, leads through the door. `results.json` has success with Wilson's 95 % interval by planner and seed,
errors of rollouts relative to copying, and CPU-seconds of training and of an episode.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import (
    HORIZONS,
    SeedOptions,
    at_horizons,
    cpu_seconds_of,
    curves,
    markdown,
    run,
    train,
    write_results,
)
from data.cache import EmbeddingCache
from data.synthetic import on_all_cores, write_table, write_video
from data.two_rooms import (
    ACTION_COLUMNS,
    DOOR,
    FPS,
    STATE_COLUMNS,
    Layout,
    TwoRooms,
    move,
    render_rooms,
    stroll,
)  # fmt: skip
from data.windows import Windows
from jepa.config import PositiveInt
from jepa.planning import CEM, ActionMetric, Plan, Task, Tree
from jepa.sequence import Sequence
from pipelines.act import Mind, act, in_short, load_mind, share_of
from pipelines.act import Options as ActOptions
from pipelines.run.command import UserError, require, run_command
from pipelines.run.evaluation import Readout, fit_readout

CLIPS, FRAMES = {"train": 1500, "val": 150, "test": 150}, 40
ENCODER = {
    "steps": 600, "slow-dimension": 16, "encoder.image-size": (65, 65), "encoder.embedding-dimension": 32,
    "encoder.pooling": "softmax", "encoder.levels": (-3, -2, -1),
}  # fmt: skip
PREDICTOR = {
    "actions": "action_*", "slow-dimension": 16, "steps": 2500, "batch-size": 384, "rollout-steps": 8,
    "input-noise": 0.5, "predictor.context": 1, "predictor.width": 256, "predictor.depth": 2,
    "optimizer.learning-rate": 1e-3,
}  # fmt: skip
MEMBERS = 2
"""Predictors, with seeds of their own: a move is as long as it is to the one that makes the least of it."""
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no slow part": ({"slow-dimension": 0}, {"slow-dimension": 0}),
    "flattened head": ({"encoder.pooling": "flatten", "encoder.levels": -1}, {}),
    "one step at a time": ({}, {"rollout-steps": 1}),
    "no noise": ({}, {"input-noise": 0.0}),
}
"""What is trained otherwise to see what it is worth: options of the encoder, and of the predictor."""
FIRST_EPISODE = 1_000_000


@dataclass(frozen=True)
class Options(SeedOptions):
    """The two rooms."""

    episodes: PositiveInt = 200
    """Episodes of the agent, for each seed."""
    fewer: PositiveInt = 40
    """Episodes of each planner that it is compared with."""
    clips: PositiveInt = CLIPS["train"]
    """Clips to train on."""
    variants: tuple[Literal["no slow part", "flattened head", "one step at a time", "no noise"], ...] = ()
    """Parts that are left out in models of their own, of the first seed and with one predictor, by the names in
    `VARIANTS`: these are then measured beside the agent alone, by two predictors and by one, into `variants/`."""
    output_dir: Path = Path("runs/benchmarks/two_rooms")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: clips, training, episodes, a table."""
    clips, videos = CLIPS | {"train": options.clips}, options.output_dir / "videos"
    for number, (split, some) in enumerate(clips.items()):
        (videos / split).mkdir(parents=True, exist_ok=True)
        write = partial(write_room_clip, videos / split, frames=FRAMES, seed=number)
        on_all_cores(write, min(some, options.clips), name=split)
    found = [measure(videos, options.output_dir / f"seed_{seed}", options, seed=seed) for seed in options.seeds]
    write_results(options.output_dir / "variants" if options.variants else options.output_dir, found)
    print(table(found, options.seeds))


def measure(videos: Path, folder: Path, options: Options, *, seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    predictors = members_in(folder)
    trained = cpu_seconds_of(folder, lambda: train_members(embed_rooms(videos, folder, seed=seed), folder, seed=seed))
    judged = {"cache": folder / "cache/test", "predictor": predictors[0]}
    run("evaluate_rollout", judged, {"output-dir": folder / "evaluation", "overwrite": True})
    errors = curves(folder / "evaluation", "relative_to_copy_last")
    given = options_of(folder, predictors)
    world, fewer = TwoRooms(), options.fewer
    mind = load_mind(given, world)
    truth = true_mind(mind, EmbeddingCache(folder / "cache/train"))
    readout = fit_readout(EmbeddingCache(folder / "cache/train"), STATE_COLUMNS, mind.predictors[0])
    often = replace(given, planner=CEM(rounds=5), replan=10)
    contestants = {
        "agent": (mind, given, options.episodes), "without memory": (mind, replace(given, planner=Forgetful()), fewer),
        "one predictor": (mind._replace(predictors=mind.predictors[:1]), given, fewer),
        "no caution": (mind, replace(given, planner=Tree(caution=0.0)), fewer),
        "CEM in embeddings": (mind, often, fewer), "tree, truth": (truth, given, fewer),
        "CEM, truth": (truth, often, fewer),
        "chance": (None, given, fewer),
    }  # fmt: skip
    planners = {}
    for name, (who, how, episodes) in contestants.items():
        if options.variants and name not in ("agent", "one predictor"):
            continue
        there = TrueRooms() if who is truth else world
        done = [act(there, who, how, seed=FIRST_EPISODE + number) for number in range(episodes)]
        planners[name] = in_short([episode.result for episode in done])
        if who and who is not truth:
            through = [goes_through(mind, readout, episode.imagined, FIRST_EPISODE + number)
                       for number, episode in enumerate(done)]  # fmt: skip
            planners[name]["through"] = float(np.mean(through))
    for name in options.variants if seed == options.seeds[0] else ():
        (encoder, predictor), where = VARIANTS[name], folder / name.replace(" ", "_")
        embedded = embed_rooms(videos, where, encoder, seed=seed) if encoder else folder
        others = options_of(embedded, train_members(embedded, where, predictor, seed=seed, members=1))
        try:
            its = load_mind(others, world)
        except UserError as error:  # changes say nothing of actions, so there is no distance to plan by
            require(isinstance(error.__cause__, ValueError), str(error))  # else it is no failure of the agent
            planners[name] = share_of(0, fewer) | {"seconds": 0.0}
            continue
        done = [act(world, its, others, seed=FIRST_EPISODE + number) for number in range(fewer)]
        planners[name] = in_short([episode.result for episode in done])
    return {
        "training_cpu_seconds": trained,
        "errors": {n: at_horizons(e) for n, e in errors.items()},
        "planners": planners,
    }


def embed_rooms(videos: Path, folder: Path, others: dict[str, Any] | None = None, *, seed: int) -> Path:
    """An encoder, trained with these options in place of the usual ones, and its caches; the folder."""
    given = {"videos": videos / "train", "fps": FPS, "seed": seed}
    train("pretrain_encoder", folder / "encoder", given, ENCODER | (others or {}))
    for split in CLIPS:
        columns = {"columns": (*STATE_COLUMNS, *ACTION_COLUMNS), "output-dir": folder / "cache" / split}
        run("cache_embeddings", {"videos": videos / split, "encoder": folder / "encoder/encoder", "fps": FPS}, columns)
    return folder


def train_members(
    embedded: Path, folder: Path, others: dict[str, Any] | None = None, *, seed: int, members: int = MEMBERS
) -> tuple[Path, ...]:
    """Predictors on the caches in a folder, with these options in place of the usual ones; their folders."""
    caches = {"train-cache": embedded / "cache/train", "validation-cache": embedded / "cache/val"}
    folders = members_in(folder)[:members]
    for member, where in enumerate(folders):
        train("train_predictor", where, caches, PREDICTOR | (others or {}), {"seed": MEMBERS * seed + member})
    return folders


def members_in(folder: Path) -> tuple[Path, ...]:
    """Where the predictors are."""
    return tuple(folder / f"predictor_{member}" for member in range(MEMBERS))


def options_of(embedded: Path, predictors: tuple[Path, ...]) -> ActOptions:
    """How to act with these predictors, and the encoder and the caches in a folder."""
    encoder, cache = embedded / "encoder/encoder", embedded / "cache/train"
    return ActOptions(predictor=predictors, encoder=encoder, cache=cache, films=0)


def goes_through(mind: Mind, readout: Readout, imagined: Tensor, seed: int) -> bool:
    """Whether a path that is read off imagined embeddings (H, D) changes rooms, and only where the door is."""
    world = TwoRooms()
    picture, _ = world.reset(seed)
    if not len(imagined):
        return False
    way = readout.probe(mind.predictors[0].standardise(torch.cat([mind.embed(picture)[None], imagined])))[:, :2].numpy()
    (crossed,) = np.diff(way[:, 0] > world.layout.wall_x).nonzero()
    heights = (way[crossed, 1] + way[crossed + 1, 1]) / 2
    return bool(len(crossed) % 2 == 1 and (np.abs(heights - world.layout.door_y) <= DOOR + 1).all())


class TrueDynamics:
    """The rules themselves, as a predictor whose embeddings are states (x, y, wall, door)."""

    fps, latent_dimension, config = FPS, 0, SimpleNamespace(context=1)

    def __init__(self) -> None:
        self.generator = np.random.default_rng(0)

    def fill(self, seen: Sequence) -> Sequence:
        """Nothing is hidden here."""
        return seen

    def step(self, newest: Sequence, state: Any, latent: None = None) -> tuple[Tensor, None]:
        """The state (B, 1, 4) after the newest one."""
        assert newest.actions is not None
        states, actions = newest.embeddings[:, -1].double().numpy(), newest.actions[:, -1].double().numpy()
        moved = move(states[:, :2], actions, Layout(states[:, 2], states[:, 3]), self.generator)
        return torch.from_numpy(np.concatenate([moved, states[:, 2:]], axis=1)).float()[:, None], None


@dataclass(frozen=True)
class Forgetful(Tree):
    """The tree, without what the agent remembers."""

    def search(self, task: Task, past: Sequence, generator: torch.Generator) -> Plan:
        """The way, as if nothing had ever been blocked."""
        return super().search(replace(task, blocked=None), past, generator)


class TrueMind(Mind):
    """A mind that is shown states in place of pictures."""

    def embed(self, picture: np.ndarray) -> Tensor:
        """The state."""
        return torch.from_numpy(picture).float()


class TrueRooms(TwoRooms):
    """The rooms, with states in place of pictures."""

    def _moment(self) -> tuple[np.ndarray, dict[str, Any]]:
        _, info = super()._moment()
        return info["state"], info | {"goal": np.array([*self.goal, *self.layout])}


def true_mind(mind: Mind, cache: EmbeddingCache) -> Mind:
    """The rules, and distances of positions, as a mind."""
    windows = Windows(cache, 2, ACTION_COLUMNS)
    chosen = windows.evenly(5000)
    states = torch.from_numpy(np.stack([windows.column(chosen, name) for name in STATE_COLUMNS], axis=-1)).float()
    actions, videos = windows.actions(chosen), windows.video_of(chosen)
    groups = torch.from_numpy(np.unique(videos, return_inverse=True)[1])
    assert actions is not None
    metric = ActionMetric.fit(states[:, 0], states[:, 1], actions[:, 0], groups)
    predictor: Any = TrueDynamics()
    return TrueMind(*mind._replace(predictors=[predictor], metric=metric))


def success(planner: dict[str, Any]) -> str:
    """A cell of a table: the share of successes and Wilson's interval, per cent."""
    low, high = (f"{100 * planner[end]:.0f}" for end in ("low", "high"))
    return f"{100 * planner['success']:.1f} % of {planner['of']} ({low} to {high})"


def table(found: list[dict[str, Any]], seeds: tuple[int, ...]) -> str:
    """In Markdown: success by planner and seed, CPU-seconds, first plans through the door; then errors."""
    rows: list[list[object]] = [["planner", *(f"seed {seed}" for seed in seeds), "CPU s", "through"]]
    for name in found[0]["planners"]:
        runs = [one["planners"][name] for one in found if name in one["planners"]]
        cells = [*map(success, runs)]
        cells += [""] * (len(found) - len(runs))
        through = [one["through"] for one in runs if "through" in one]
        rows.append(
            [name, *cells, float(np.mean([one["seconds"] for one in runs])), np.mean(through) if through else ""]
        )
    errors: list[list[object]] = [["error relative to copying", *HORIZONS]]
    for name in ("rollout", "shuffled_actions", "ridge"):
        errors.append([name, *np.mean([one["errors"][name] for one in found], axis=0).tolist()])
    spent = ", ".join(f"{one['training_cpu_seconds']:.0f}" for one in found)
    return f"{markdown(rows)}\n\n{markdown(errors)}\n\nCPU-seconds of training and caching: {spent}"


def write_room_clip(folder: Path, index: int, frames: int, *, seed: int) -> Path:
    """Write `clip_<index>.mp4`, and beside it, last, states and actions: so who has a table is whole."""
    path = folder / f"clip_{index:05d}.mp4"
    if not path.with_suffix(".csv").exists():
        generator = np.random.default_rng([seed, index])
        layout = Layout.draw(generator)
        positions, actions = stroll(layout, frames, generator)
        write_video(path, render_rooms(positions, layout), FPS)
        columns = np.column_stack([positions, np.tile(layout, (frames, 1)), actions])
        write_table(path.with_suffix(".csv"), dict(zip((*STATE_COLUMNS, *ACTION_COLUMNS), columns.T, strict=True)), FPS)
    return path


if __name__ == "__main__":
    run_command(main, Options)
