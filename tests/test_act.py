"""Acting: a stroll is recorded as it was, a small model finds its way, and mistakes are said in one line."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from data.clock import read_on_clock
from data.errors import DataError
from data.sidecar import read_sidecar
from data.worlds import TWO_ROOMS, WorldError, open_world
from jepa.encoder import EncoderConfig
from jepa.expander import ExpanderConfig
from jepa.networks import MLPConfig
from jepa.planning import CEM, Tree
from pipelines import act, cache_embeddings, pretrain_encoder, train_predictor, write_report
from pipelines.run.command import UserError

WORLD = """
import gymnasium, numpy as np

class Line(gymnasium.Env):
    '''A bright square on a line; it is pushed.'''
    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)
    observation_space = gymnasium.spaces.Box(0, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.at = self.np_random.uniform(4, 28)
        return np.zeros(1, np.float32), self.said()

    def said(self):  # words that a world of ours uses for something else
        return {"state": np.array([self.at, 1.0]), "goal": np.zeros(2)}

    def step(self, action):
        self.at = float(np.clip(self.at + action[0], 4, 28))
        return np.zeros(1, np.float32), 0.0, False, False, self.said()

    def render(self):
        picture = np.zeros((32, 32, 3), np.uint8)
        picture[12:20, int(self.at) - 3 : int(self.at) + 4] = 220
        return picture

class Switch(Line):
    action_space = gymnasium.spaces.Discrete(3)

class Dark(Line):
    def render(self):
        raise RuntimeError("pygame is not installed")

class Numb(Line):
    action_space = gymnasium.spaces.Box(-1, 1, (0,), np.float32)

class Still(Line):
    metadata = {"render_modes": ["rgb_array"], "render_fps": -3}

class Stuck(Line):
    def reset(self, **more):
        raise KeyError("no map")

class Jammed(Line):
    def step(self, action):
        assert self.at < 0
        return super().step(action)

class Growing(Line):
    def render(self):
        self.drawn = getattr(self, "drawn", 30) + 2
        return np.zeros((self.drawn, 32, 3), np.uint8)

class Pale(Line):
    def render(self):
        return super().render() / 255

class Silent(Line):
    def said(self):
        return None

class Torn(Line):
    def said(self):
        return {"is_success": np.array([True, False])}

for world in (Dark, Growing, Jammed, Line, Numb, Pale, Silent, Still, Stuck, Switch, Torn):
    gymnasium.register(f"{world.__name__}-v0", world, disable_env_checker=True)
"""
LINE = "small_line_world:Line-v0"


@pytest.fixture(scope="module", autouse=True)
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "small_line_world.py").write_text(WORLD)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Recordings, an encoder, caches and a predictor of the line, each by its command."""
    folder = tmp_path_factory.mktemp("runs")
    for split, seed in (("train", 0), ("val", 100)):
        act.main(act.Options(env=LINE, episodes=12, ticks=40, seed=seed, output_dir=folder / split))
    pretrain_encoder.main(
        pretrain_encoder.Options(
            videos=(folder / "train/episodes",), output_dir=folder / "encoder", fps=5, steps=60, batch_size=32,
            encoder=EncoderConfig(image_size=(32, 32), embedding_dimension=8, pooling="softmax"), log_every=60,
            expander=ExpanderConfig((64, 64)), tracker=("none",),
        )
    )  # fmt: skip
    for split in ("train", "val"):
        cache_embeddings.main(
            cache_embeddings.Options(
                videos=(folder / split / "episodes",), encoder=str(folder / "encoder/encoder"), fps=5,
                columns=("action_*",), output_dir=folder / "cache" / split,
            )
        )  # fmt: skip
    train_predictor.main(
        train_predictor.Options(
            train_cache=folder / "cache/train", validation_cache=folder / "cache/val", actions=("action_*",),
            output_dir=folder / "predictor", steps=300, log_every=300, rollout_steps=3, tracker=("none",),
            predictor=MLPConfig(context=1, width=64, depth=1), validation_horizon=5,
        )
    )  # fmt: skip
    return folder


def options(runs: Path, tmp_path: Path, **more):
    mind = {"predictor": (runs / "predictor",), "encoder": runs / "encoder/encoder", "cache": runs / "cache/train"}
    return act.Options(**{"env": LINE, "episodes": 3, "ticks": 25, "output_dir": tmp_path / "act"} | mind | more)


def test_a_stroll_is_recorded_as_it_was(tmp_path):
    act.main(act.Options(episodes=2, ticks=15, output_dir=tmp_path / "act", seed=5))
    path = tmp_path / "act/episodes/episode_00001.mp4"
    frames = list(read_on_clock(path, (65, 65), fps=10))
    table = read_sidecar(
        path, np.array([one.time_s for one in frames]), tolerance_s=0.01,
        columns=("action_0", "action_1", "dot_x", "dot_y", "wall_x", "door_y"),
    )  # fmt: skip
    assert len(frames) == 15
    # The same world, acted in by what the table says, shows the same.
    world = open_world(TWO_ROOMS)
    picture, info = world.reset(6)
    for frame, row in zip(frames, table, strict=True):
        np.testing.assert_allclose(row[2:], info["state"], atol=1e-2)
        assert np.abs(frame.frame.transpose(1, 2, 0).astype(int) - picture).mean() < 4
        picture, info = world.step(row[:2])


def test_nothing_of_the_run_before_stays_among_the_new_one(tmp_path):
    for episodes in (3, 1):
        act.main(act.Options(episodes=episodes, ticks=5, output_dir=tmp_path / "act", overwrite=True))
    assert sorted(path.name for path in (tmp_path / "act/episodes").iterdir()) == [
        "episode_00000.csv", "episode_00000.mp4",
    ]  # fmt: skip


def test_interrupted_it_goes_on_after_the_last_whole_episode(tmp_path, monkeypatch):
    given = act.Options(env=LINE, episodes=3, ticks=5, output_dir=tmp_path / "whole")
    act.main(given)
    given = replace(given, output_dir=tmp_path / "act")
    write = act.write_video

    def interrupt(path, *rest):
        if "00001" in path.name:
            raise KeyboardInterrupt
        write(path, *rest)

    monkeypatch.setattr(act, "write_video", interrupt)
    with pytest.raises(KeyboardInterrupt):
        act.main(given)
    monkeypatch.setattr(act, "write_video", write)
    with pytest.raises(UserError, match="an unfinished run: add --resume to go on with it"):
        act.main(given)
    (first,) = (tmp_path / "act/episodes").glob("*.mp4")
    before = first.stat()
    act.main(replace(given, resume=True))
    assert first.stat() == before
    for table in ("episode_00000", "episode_00001", "episode_00002"):
        whole, resumed = (tmp_path / name / f"episodes/{table}.csv" for name in ("whole", "act"))
        assert whole.read_text() == resumed.read_text()
    assert len(json.loads((tmp_path / "act/act.json").read_text())["episodes"]) == 3


def test_another_predictor_does_not_go_on_with_the_episodes_of_one(runs, tmp_path):
    given = options(runs, tmp_path, episodes=2, ticks=3, goal_values=("action_0=0",))
    act.main(replace(given, episodes=1, films=0))
    mark = tmp_path / "act/run.json"
    record = json.loads(mark.read_text())
    record |= {"finished": False, "options": record["options"] | {"episodes": 2, "films": given.films}}
    (before,) = record["inputs"]["predictors"]
    mark.write_text(json.dumps(record | {"inputs": record["inputs"] | {"predictors": ["0123"]}}))
    with pytest.raises(UserError, match=f"began with .*0123.*, which is now .*{before}"):
        act.main(replace(given, resume=True))
    assert len(json.loads((tmp_path / "act/act.json").read_text())["episodes"]) == 1
    mark.write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"ticks = 3, not 4: .*--episodes may be raised"):
        act.main(replace(given, resume=True, ticks=4))
    act.main(replace(given, resume=True))
    assert len(json.loads((tmp_path / "act/act.json").read_text())["episodes"]) == 2


def test_more_episodes_are_added_to_those_of_a_finished_run(tmp_path):
    given = act.Options(env=LINE, episodes=1, ticks=5, output_dir=tmp_path / "act")
    act.main(given)
    first = (tmp_path / "act/episodes/episode_00000.mp4").stat()
    act.main(replace(given, episodes=3, resume=True))
    assert (tmp_path / "act/episodes/episode_00000.mp4").stat() == first
    assert [one["episode"] for one in json.loads((tmp_path / "act/act.json").read_text())["episodes"]] == [0, 1, 2]
    with pytest.raises(UserError, match="seed = 0, not 1"):
        act.main(replace(given, episodes=4, seed=1, resume=True))


@pytest.mark.parametrize(
    "left",
    ["", "[]", "{}", '{"episodes": 3}', '{"episodes": [1]}', '{"episodes": [{"episode": 0}]}',
     '{"episodes": [{"episode": 1, "is_success": true, "plans": 0, "surprises": 0, "seconds": 0.1}]}',
     '{"episodes": [{"episode": 0, "is_success": "no", "plans": 0, "surprises": 0, "seconds": 0.1}]}'],
)  # fmt: skip
def test_damaged_results_are_said_and_left_as_they_are(tmp_path, left):
    given = act.Options(env=LINE, episodes=1, ticks=5, output_dir=tmp_path / "act")
    act.main(given)
    (tmp_path / "act/act.json").write_text(left)
    with pytest.raises(UserError, match=r"act/act.json .*: restore it, or"):
        act.main(replace(given, episodes=2, resume=True))
    assert (tmp_path / "act/act.json").read_text() == left
    act.main(replace(given, overwrite=True))


def test_an_agent_reaches_a_picture_and_says_how_often(runs, tmp_path, capsys):
    goal = np.zeros((32, 32, 3), np.uint8)
    goal[12:20, 22:29] = 220
    Image.fromarray(goal).save(tmp_path / "goal.png")
    act.main(options(runs, tmp_path, goal=tmp_path / "goal.png", planner=Tree(hold=2)))
    results = json.loads((tmp_path / "act/act.json").read_text())
    assert results["successes"] == 3, results
    assert results["low"] < results["success"] == 1.0 == results["high"]
    rows = list(csv.DictReader((tmp_path / "act/episodes.csv").read_text().splitlines()))
    assert [row["episode"] for row in rows] == ["0", "1", "2"]
    assert "3 of 3 reach the goal, 100 %" in capsys.readouterr().out
    films = list((tmp_path / "act/films").iterdir())
    assert films
    for film in films:
        shown = next(iter(read_on_clock(film, (32, 96), fps=5))).frame
        assert np.abs(shown[:, :, 32:64].transpose(1, 2, 0).astype(int) - goal).mean() < 6  # the goal is in the middle
        assert shown[:, :, 64:].max() > 100  # and what is imagined beside it
    write_report.main(write_report.Options(runs=(tmp_path / "act",), output_dir=tmp_path / "report"))
    assert f"with {len(films)} films: open it" in capsys.readouterr().out
    page = (tmp_path / "report/report.html").read_text()
    assert f"3 of 3 episodes reach the goal: 100 %, and of very many {100 * results['low']:.0f} to 100 %" in page
    assert page.count("data:video/mp4;base64,") == len(films)
    assert page.count("reached, ") == len(films)
    for row in rows:
        assert f"<td>{float(row['seconds']):.4g}</td>" in page


def test_without_the_videos_of_the_cache_there_are_no_films_but_all_else(runs, tmp_path, capsys):
    goal = np.zeros((32, 32, 3), np.uint8)
    goal[12:20, 22:29] = 220
    Image.fromarray(goal).save(tmp_path / "goal.png")
    planner = Tree(hold=2)
    (runs / "train/episodes").rename(runs / "train/elsewhere")
    try:
        act.main(options(runs, tmp_path, goal=tmp_path / "goal.png", planner=planner, episodes=2, ticks=4))
    finally:
        (runs / "train/elsewhere").rename(runs / "train/episodes")
    assert capsys.readouterr().out.count("no film of episode ") == 2
    assert len(json.loads((tmp_path / "act/act.json").read_text())["episodes"]) == 2
    assert not list((tmp_path / "act").rglob("films/*"))


def test_cem_does_so_too(runs, tmp_path):
    goal = np.zeros((32, 32, 3), np.uint8)
    goal[12:20, 4:11] = 220
    Image.fromarray(goal).save(tmp_path / "goal.png")
    planner = CEM(horizon=10, samples=40, rounds=4, elites=8)
    act.main(options(runs, tmp_path, goal=tmp_path / "goal.png", planner=planner, replan=5, episodes=2, films=0))
    assert json.loads((tmp_path / "act/act.json").read_text())["successes"] == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"predictor": ()}, "--predictor, --encoder and --cache belong together"),
        ({"predictor": (), "encoder": None, "cache": None, "goal": Path("a.png")}, "or none, and no goal, to stroll"),
        ({}, "shows no goal: give --goal PICTURE or --goal-values"),
        ({"goal": Path("nowhere.png")}, "--goal nowhere.png"),
        ({"goal": Path("a.png"), "goal_values": ("x=3",)}, "are two goals: give one"),
        ({"env": "small_line_world:Dark-v0"}, "cannot be drawn .pygame is not installed"),
        ({"goal_values": ("x:3",)}, "each must be COLUMN=NUMBER"),
        ({"goal_values": ("speed=3",)}, "has no numbers speed"),
        ({"env": TWO_ROOMS}, "takes 1 actions, and two-rooms 2"),
    ],
    ids=[
        "incomplete",
        "a stroll to a goal",
        "no goal",
        "no picture",
        "two goals",
        "dark",
        "no number",
        "no column",
        "another world",
    ],
)
def test_mistakes_are_said(runs, tmp_path, more, said):
    with pytest.raises((UserError, DataError), match=said):
        act.main(options(runs, tmp_path, **more))
    assert not [*(tmp_path / "act").glob("[!.]*")]  # so that the command, mended, may begin


def test_embeddings_that_do_not_tell_what_was_done_are_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(act.Windows, "actions", lambda self, chosen: torch.ones(len(chosen), self.length, 1))
    monkeypatch.setattr("jepa.planning.BLOCKED_SHARE", -1.0)
    with pytest.raises(UserError, match=r"cache.*: what is done cannot be read off them.*record more episodes, or"):
        act.main(options(runs, tmp_path))


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ("Nowhere-v7", "cannot make it"),
        ("small_line_world:Switch-v0", "takes actions of Discrete"),
        ("small_line_world:Numb-v0", "must be bounded numbers in a row"),
        ("small_line_world:Still-v0", "has render_fps = -3: it must be pictures per second"),
    ],
)
def test_worlds_that_cannot_be_acted_in_are_said(env, said):
    with pytest.raises(WorldError, match=said):
        open_world(env)


@pytest.mark.parametrize(
    ("world", "said"),
    [
        ("Stuck", "cannot begin anew .'no map'.: mend it, or take another"),
        ("Jammed", r"cannot take a step .AssertionError\(\).: mend it, or take another"),
        ("Growing", r"draws pictures .34, 32, 3. and then .36, 32, 3. in one episode: they must be of one size"),
        ("Pale", r"draws no picture, but float64 .32, 32, 3.: it must be uint8"),
    ],
)
def test_errors_of_a_world_are_said_with_its_name(tmp_path, world, said):
    with pytest.raises(WorldError, match=f"world small_line_world:{world}-v0 {said}"):
        act.main(act.Options(env=f"small_line_world:{world}-v0", ticks=5, output_dir=tmp_path / "act"))


@pytest.mark.parametrize("world", ["Silent", "Torn"])
def test_what_a_world_says_besides_need_not_be_understood(tmp_path, world):
    act.main(act.Options(env=f"small_line_world:{world}-v0", episodes=1, ticks=3, output_dir=tmp_path / "act"))
    assert json.loads((tmp_path / "act/act.json").read_text())["successes"] == 0


def test_a_stroll_draws_from_all_of_the_space_alike():
    world = SimpleNamespace(low=np.array([2.0, -3.0]), high=np.array([4.0, -1.0]))
    draws, taken = np.random.default_rng(0), [np.array([3.0, -2.0])]
    for _ in range(4000):
        taken.append(act.stroll(taken[-1], world, draws))
    np.testing.assert_allclose(np.mean(taken, axis=0), [3, -2], atol=0.15)
    np.testing.assert_allclose([np.min(taken, axis=0), np.max(taken, axis=0)], [world.low, world.high])


def test_without_gymnasium_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(WorldError, match="pip install gymnasium"):
        open_world("Pendulum-v1")
