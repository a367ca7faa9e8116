"""The schedule, randomness from (seed, step), the run folder and checkpoints."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from pipelines.optimizer import lr_at
from pipelines.stage import RunFolder, UserError, to_json, write_json
from pipelines.training import Progress, step_generator


def test_schedule_warms_up_and_ends_at_zero():
    rates = [lr_at(step, 100, 10, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == max(rates) == 2.0
    assert rates[100] == pytest.approx(0)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_step_randomness_depends_on_seed_step_and_rank_only():
    def draw(seed: int, step: int, rank: int) -> list[float]:
        return torch.rand(4, generator=step_generator(seed, step, rank, torch.device("cpu"))).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*key)) for key in [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3)]}) == 5


@dataclass(frozen=True)
class Options:
    steps: int = 3
    output_dir: Path = Path("somewhere")
    resume: bool = False


def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", ("model",))


def test_finished_run_is_not_touched_unless_told(tmp_path):
    run = folder(tmp_path)
    run.prepare(Options(), overwrite=False)
    (run.path / "model").mkdir()
    (run.path / "notes.txt").write_text("mine")
    run.finish({"loss": 1.0})
    with pytest.raises(UserError, match=r"finished run: add --overwrite"):
        run.prepare(Options(), overwrite=False)
    with pytest.raises(UserError, match=r"finished run"):
        run.prepare(Options(), overwrite=False, resume=True)
    assert (run.path / "model").exists()
    run.prepare(Options(), overwrite=True)
    assert not (run.path / "model").exists()
    assert not run.finished
    assert (run.path / "notes.txt").read_text() == "mine"  # only what a run leaves is replaced


def test_unfinished_run_is_resumed_with_the_same_options_only(tmp_path):
    run = folder(tmp_path)
    run.prepare(Options(steps=3), overwrite=False)
    with pytest.raises(UserError, match=r"unfinished run: add --resume"):
        run.prepare(Options(steps=3), overwrite=False)
    with pytest.raises(UserError, match=r"steps = 3, not 4"):
        run.prepare(Options(steps=4), overwrite=False, resume=True)
    run.prepare(Options(steps=3, resume=True, output_dir=Path("elsewhere")), overwrite=False, resume=True)


def test_config_traces_a_number_back(tmp_path):
    run = folder(tmp_path)
    run.prepare(Options(), overwrite=False, inputs={"videos": [Path("a.mp4")]})
    record = json.loads((run.path / "config.json").read_text())
    assert record["options"]["steps"] == 3
    assert record["inputs"] == {"videos": ["a.mp4"]}
    assert record["versions"]["torch"] == torch.__version__.split("+")[0]
    assert len(record["code"].split()[0]) == 40 or record["code"] == "unknown"


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert to_json({1: (Path("x"), Options())})["1"][1]["steps"] == 3


def test_curves_are_means_over_an_entry_across_an_interruption(tmp_path):
    accelerator, progress = Accelerator(cpu=True), Progress()
    progress.add({"loss": torch.tensor(1.0), "variance": torch.tensor(4.0)})
    resumed = Progress()
    write_json(tmp_path / "progress.json", progress)
    vars(resumed).update(json.loads((tmp_path / "progress.json").read_text()))
    resumed.add({"loss": torch.tensor(2.0), "variance": torch.tensor(6.0)})
    assert resumed.take_means(accelerator) == {"loss": 1.5, "variance": 5.0}
    resumed.add({"loss": torch.tensor(7.0)})
    assert resumed.take_means(accelerator) == {"loss": 7.0}
