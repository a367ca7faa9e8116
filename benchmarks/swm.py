r"""Worlds that nobody here wrote, of stable-worldmodel, judged by its own `World.evaluate`: two rooms, or PushT.

  pip install 'stable-worldmodel[env]'
  python -m benchmarks.swm --output-dir runs/benchmarks/swm
  python -m benchmarks.swm --env swm/PushT-v1 --output-dir runs/benchmarks/swm_pusht

For each seed: strolls recorded by `video-jepa act`, an encoder, a cache, a predictor, by the commands; then the package
plays episodes with our agent as its policy, and with chance. `World.evaluate` ends an episode at the target or after as
many steps as may be taken, and only the former is a success.

Two rooms: 100 steps, the goal is the picture that the world draws of its target; beside the package's expert and LeWM,
its own model, loss and planner, trained on the same recordings for as many CPU-seconds as ours took altogether. PushT,
as published with the package: what its own policy for recordings has come to after 25 steps has to be reached in 50.
`results.json` has success with Wilson's 95 % interval by planner and seed, and CPU-seconds.
"""

import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import av
import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import SeedOptions, at_horizons, cpu_seconds_of, curves, markdown, run, train, write_results
from benchmarks.two_rooms import success
from data.worlds import open_world
from jepa.config import PositiveInt
from jepa.planning import CEM
from pipelines.act import Mind, load_mind, make_agent, share_of
from pipelines.act import Options as ActOptions
from pipelines.run.command import UserError, run_command

FPS, TWO_ROOM, PUSH_T = 10, "swm/TwoRoom-v1", "swm/PushT-v1"
STEPS, BUDGET, AHEAD = {TWO_ROOM: 40, PUSH_T: 20}, {TWO_ROOM: 100, PUSH_T: 50}, 25
"""Of a stroll, short in PushT as nothing keeps it in the picture; that may be taken; after which PushT has its goal."""
PLACES = [{"method": f"_set_{name}", "args": {name: {"value": name}}} for name in ("state", "goal_state")]
"""How PushT is told where a recording begins, and what it comes to."""
EPISODES = {
    TWO_ROOM: {"train": 600, "val": 60, "test": 60}, PUSH_T: {"train": 1200, "val": 100, "test": 100},
}  # fmt: skip
ENCODER = {"encoder.pooling": "softmax", "encoder.levels": (-3, -2, -1)}
ENCODERS = {
    TWO_ROOM: {"steps": 600, "slow-dimension": 8, "encoder.embedding-dimension": 16},
    PUSH_T: {"steps": 500, "slow-dimension": 16, "encoder.embedding-dimension": 48},
}
PREDICTOR = {
    "actions": "action_*", "batch-size": 384, "rollout-steps": 8, "predictor.width": 256, "predictor.depth": 2,
    "optimizer.learning-rate": 1e-3,
}  # fmt: skip
PREDICTORS = {
    TWO_ROOM: {"steps": 2000, "input-noise": 0.5, "predictor.context": 1},
    PUSH_T: {"steps": 1500, "input-noise": 0.3, "predictor.context": 2, "validation-horizon": 15},
}
LEWM_SIZE, LEWM_BLOCK, LEWM_PAST, LEWM_BATCH, LEWM_WEIGHT = 64, 5, 3, 64, 0.09
"""Sides of its pictures, actions in one of its steps, steps it sees, clips in a batch, weight of SIGReg: as published,
but for pictures of 224 and batches of 128."""


@dataclass(frozen=True)
class Options(SeedOptions):
    """Worlds of stable-worldmodel."""

    env: Literal["swm/TwoRoom-v1", "swm/PushT-v1"] = "swm/TwoRoom-v1"
    """The world."""
    episodes: PositiveInt = 200
    """Episodes of the agent, for each seed."""
    fewer: PositiveInt = 40
    """Episodes of each planner that it is compared with."""
    strolls: PositiveInt = EPISODES[PUSH_T]["train"]
    """Episodes to train on, at most."""
    output_dir: Path = Path("runs/benchmarks/swm")
    """Where all runs and the results are left."""


def main(options: Options) -> None:
    """The story: strolls, training, episodes, a table."""
    try:
        swm = import_module("stable_worldmodel")
    except ImportError as error:
        raise UserError("this takes stable-worldmodel: pip install 'stable-worldmodel[env]'") from error
    found = [measure(swm, options.output_dir / f"seed_{seed}", options, seed=seed) for seed in options.seeds]
    write_results(options.output_dir, found)
    print(table(found, options.seeds))


def measure(swm: Any, folder: Path, options: Options, *, seed: int) -> dict[str, Any]:
    """All figures of one seed."""
    env = options.env
    for number, (split, some) in enumerate(EPISODES[env].items()):
        if not (folder / split / "act.json").exists():
            strolls = {"episodes": min(some, options.strolls), "seed": 10_000 * (3 * seed + number)}
            where = {"env": f"stable_worldmodel.envs:{env}", "ticks": STEPS[env], "output-dir": folder / split}
            run("act", where, strolls, {"overwrite": True})
    trained = cpu_seconds_of(folder, lambda: train_all(folder, env, seed=seed))
    judged = {"cache": folder / "cache/test", "predictor": folder / "predictor"}
    ahead = {"horizon": PREDICTORS[env].get("validation-horizon", 20)}
    run("evaluate_rollout", judged, ahead, {"output-dir": folder / "evaluation", "overwrite": True})
    given = ActOptions(
        predictor=(folder / "predictor",), encoder=folder / "encoder/encoder", cache=folder / "cache/train"
    )
    planners, lewm_seconds = {}, 0.0
    mind = load_mind(given, open_world(f"stable_worldmodel.envs:{env}"))
    tree, chance = agent_policy(swm, mind, given, seed=seed), swm.policy.RandomPolicy(seed=seed)
    if env == TWO_ROOM:
        began = time.process_time()
        model = train_lewm(swm, folder / "train/episodes", seconds=trained, seed=seed)
        lewm_seconds = time.process_time() - began
        expert = import_module("stable_worldmodel.envs.two_room").ExpertPolicy(seed=seed)
        contestants = {"agent": tree, "LeWM, CEM": lewm_policy(swm, model, seed=seed), "expert": expert}
    else:
        always = replace(given, planner=CEM(horizon=5, rounds=5), replan=1, near=0.1)
        contestants = {"agent": agent_policy(swm, mind, always, seed=seed), "tree": tree}
    for name, policy in (contestants | {"chance": chance}).items():
        episodes = options.episodes if name == "agent" else options.fewer
        planners[name] = evaluate(swm, env, policy, episodes, seed=1_000_000 + 1000 * seed)
    errors = curves(folder / "evaluation", "relative_to_copy_last")
    return {
        "training_cpu_seconds": trained, "lewm_training_cpu_seconds": lewm_seconds, "planners": planners,
        "errors": {n: at_horizons(e) for n, e in errors.items()},
    }  # fmt: skip


def train_all(folder: Path, env: str, *, seed: int) -> None:
    """An encoder, caches and a predictor."""
    given = {"videos": folder / "train/episodes", "fps": FPS, "seed": seed}
    train("pretrain_encoder", folder / "encoder", given, ENCODER, ENCODERS[env])
    for split in EPISODES[env]:
        given = {"videos": folder / split / "episodes", "encoder": folder / "encoder/encoder", "fps": FPS}
        run("cache_embeddings", given, {"columns": "action_*", "output-dir": folder / "cache" / split})
    caches = {"train-cache": folder / "cache/train", "validation-cache": folder / "cache/val"}
    train("train_predictor", folder / "predictor", caches, PREDICTOR, PREDICTORS[env], {"seed": seed})


def evaluate(swm: Any, env: str, policy: Any, episodes: int, *, seed: int) -> dict[str, Any]:
    """What the package says of a policy."""
    world = swm.World(env, num_envs=1, image_shape=(224, 224), max_episode_steps=BUDGET[env], goal_conditioned=False)
    asked: list[dict[str, Any]] = [{"episodes": episodes, "seed": seed}]
    with TemporaryDirectory() as folder:
        if env == PUSH_T:
            world.set_policy(import_module("stable_worldmodel.envs.pusht").WeakPolicy(seed=seed))
            world.collect(f"{folder}/ends.lance", episodes=episodes, seed=seed, progress=False)
            given = {"dataset": swm.data.load_dataset(f"{folder}/ends.lance"), "start_steps": [0], "goal_offset": AHEAD}
            given |= {"eval_budget": BUDGET[env], "callables": PLACES}
            asked = [given | {"episodes_idx": [number]} for number in range(episodes)]
        world.set_policy(policy)
        began, successes = time.process_time(), 0
        for given in asked:
            policy.set_env(world.envs)  # with which our agent begins anew
            successes += int(world.evaluate(**given)["episode_successes"].sum())
        return share_of(successes, episodes) | {"seconds": (time.process_time() - began) / episodes}


def goal_of(environments: Any, info: dict[str, Any]) -> np.ndarray:
    """The picture of the target of the one environment of a pool, RGB uint8 (H, W, 3)."""
    target = getattr(environments.envs[0].unwrapped, "_target_img", None)
    return info["goal"][0, -1] if target is None else target.permute(1, 2, 0).numpy()


def agent_policy(swm: Any, mind: Mind, options: ActOptions, *, seed: int) -> Any:
    """Our agent as a policy of the package."""

    class Policy(swm.policy.BasePolicy):
        agent = None

        def set_env(self, env: Any) -> None:
            super().set_env(env)
            self.agent = None

        def get_action(self, info: dict[str, Any], **_: Any) -> np.ndarray:
            # Taken out: the package leaves it there, and an agent begun anew in each step remembers nothing.
            if self.agent is None or np.any(info.pop("_needs_flush", False)):
                self.agent = make_agent(mind, {"goal": goal_of(self.env, info)}, options, seed=seed)
            return self.agent.act(mind.embed(info["pixels"][0, -1])).numpy()[None]

    return Policy()


# LeWM


def train_lewm(swm: Any, videos: Path, *, seconds: float, seed: int) -> Any:
    """The package's LeWM after so many CPU-seconds of training on recordings, reading them included."""
    torch.manual_seed(seed)
    ends = time.process_time() + seconds
    pixels, actions = recordings(videos)
    model = make_lewm(swm)
    regulariser = import_module("stable_worldmodel.wm.loss").SIGReg()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=1e-3)
    starts = STEPS[TWO_ROOM] - LEWM_BLOCK * (LEWM_PAST + 1) + 1
    while time.process_time() < ends:
        clips, first = torch.randint(len(pixels), (LEWM_BATCH, 1)), torch.randint(starts, (LEWM_BATCH, 1))
        at = first + LEWM_BLOCK * torch.arange(LEWM_PAST + 1)
        taken = actions[clips[..., None], at[:, :LEWM_PAST, None] + torch.arange(LEWM_BLOCK)]  # (B, T, block, 2)
        seen = model.encode({"pixels": prepared(pixels[clips, at]), "action": rearrange(taken, "b t k a -> b t (k a)")})
        forecast = model.predict(seen["emb"][:, :-1], seen["act_emb"])
        loss = F.mse_loss(forecast, seen["emb"][:, 1:])
        loss = loss + LEWM_WEIGHT * regulariser(rearrange(seen["emb"], "b t d -> t b d"))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


def make_lewm(swm: Any) -> Any:
    """LeWM with a transformer of a tenth of the published one's work: two cores have minutes, not GPU-hours."""
    transformers = import_module("transformers")
    modules, width = import_module("stable_worldmodel.wm.lewm.module"), 96
    vit = transformers.ViTConfig(
        hidden_size=width, num_hidden_layers=6, num_attention_heads=3, intermediate_size=4 * width,
        image_size=LEWM_SIZE, patch_size=8,
    )  # fmt: skip
    heads = [modules.MLP(width, 4 * width, width, norm_fn=torch.nn.BatchNorm1d) for _ in range(2)]
    predictor = modules.Predictor(
        num_frames=LEWM_PAST, depth=3, heads=4, mlp_dim=4 * width, input_dim=width, hidden_dim=width, dropout=0.1
    )
    acting = modules.Embedder(input_dim=2 * LEWM_BLOCK, emb_dim=width)
    encoder = transformers.ViTModel(vit, add_pooling_layer=False)
    return import_module("stable_worldmodel.wm.lewm").LeWM(
        encoder, predictor, acting, projector=heads[0], pred_proj=heads[1]
    )


def lewm_policy(swm: Any, model: Any, *, seed: int) -> Any:
    """LeWM with the package's planner, a third of its rounds."""
    solver = import_module("stable_worldmodel.solver").CEMSolver(
        model=model, num_samples=300, n_steps=10, topk=30, seed=seed
    )
    config = swm.policy.PlanConfig(horizon=5, receding_horizon=5, action_block=LEWM_BLOCK)

    class Policy(swm.policy.WorldModelPolicy):
        def get_action(self, info: dict[str, Any], **given: Any) -> np.ndarray:
            pictures = {"pixels": info["pixels"], "goal": goal_of(self.env, info)[None, None]}
            shown = {name: prepared(rearrange(torch.as_tensor(picture), "b t h w c -> b t c h w"))
                     for name, picture in pictures.items()}  # fmt: skip
            blank = torch.zeros(1, 1, 2 * LEWM_BLOCK)
            kept = {name: info[name] for name in ("_needs_flush", "terminated") if name in info}
            info.pop("_needs_flush", None)
            return np.clip(super().get_action(kept | shown | {"action": blank}, **given), -1, 1)

    return Policy(solver=solver, config=config)


def prepared(pixels: Tensor) -> Tensor:
    """Pictures uint8 (B, T, 3, H, W) as LeWM takes them: float, of its size, about 0."""
    flat = rearrange(pixels.float() / 255, "b t c h w -> (b t) c h w")
    flat = F.interpolate(flat, size=(LEWM_SIZE, LEWM_SIZE), mode="bilinear", antialias=True, align_corners=False)
    return rearrange((flat - 0.5) / 0.5, "(b t) c h w -> b t c h w", b=len(pixels))


def recordings(videos: Path) -> tuple[Tensor, Tensor]:
    """Pictures uint8 (N, STEPS, 3, size, size) and actions (N, STEPS, 2) of recorded episodes."""
    pixels, actions = [], []
    for path in sorted(videos.glob("*.mp4")):
        with av.open(path) as container:
            frames = [
                frame.to_ndarray(width=LEWM_SIZE, height=LEWM_SIZE, format="rgb24")
                for frame in container.decode(video=0)
            ]
        pixels.append(torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2))
        table = np.genfromtxt(path.with_suffix(".csv"), delimiter=",", names=True)
        actions.append(torch.from_numpy(np.stack([table["action_0"], table["action_1"]], axis=-1)).float())
    return torch.stack(pixels), torch.stack(actions)


def table(found: list[dict[str, Any]], seeds: tuple[int, ...]) -> str:
    """In Markdown: success by planner and seed, and CPU-seconds."""
    rows: list[list[object]] = [["planner", *(f"seed {seed}" for seed in seeds), "CPU s an episode"]]
    for name in found[0]["planners"]:
        runs = [one["planners"][name] for one in found]
        rows.append([name, *map(success, runs), float(np.mean([one["seconds"] for one in runs]))])
    spent = ", ".join(f"{one['training_cpu_seconds']:.0f}" for one in found)
    return f"{markdown(rows)}\n\nCPU-seconds of training and caching: {spent}"


if __name__ == "__main__":
    run_command(main, Options)
