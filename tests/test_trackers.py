"""Trackers: one curve, bit for bit, however often the run was killed; and clear words for a wrong name."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines import trackers
from pipelines.stage import UserError
from pipelines.trackers import CurveFile, find_trackers, flatten, start_trackers

OPTIONS = {"steps": 20, "videos": (Path("a"), Path("b")), "resume": False, "encoder": {"backbone": "resnet18"}}


def live(folder, names, steps, resumed_at=0, values=lambda step: {"loss": 1 / step}, options=None, killed=False):
    """Log steps as a run does, from its start or resumed, and end it unless it is killed."""
    accelerator = Accelerator(log_with=find_trackers(names, folder) or None, project_dir=folder)
    start_trackers(accelerator, "stage", options or OPTIONS, resumed_at)
    for step in steps:
        accelerator.log(values(step), step=step)
    if killed:
        for tracker in accelerator.trackers:
            if isinstance(tracker, CurveFile):
                tracker._file.close()  # silent where the system would be: all rows are in the file already
    else:
        accelerator.end_training()
    return accelerator


def read_curve(folder):
    with (folder / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_names_become_trackers(tmp_path):
    found = find_trackers(["tensorboard", "csv", "csv"], tmp_path / "logs")
    assert found[0] == "tensorboard"
    assert isinstance(found[1], CurveFile)
    assert len(found) == 2
    assert find_trackers(["none"], tmp_path) == find_trackers([], tmp_path) == []
    assert not list(tmp_path.iterdir())  # it is asked before the folder of an older run is cleared


def test_unknown_names_are_refused_with_a_suggestion(tmp_path):
    with pytest.raises(UserError, match=r"^there is no tracker tensorbord: perhaps you meant tensorboard$"):
        find_trackers(["csv", "tensorbord"], tmp_path)
    with pytest.raises(UserError, match=r"no tracker xyz: choose from tensorboard, wandb, mlflow, csv, none"):
        find_trackers(["xyz"], tmp_path)
    with pytest.raises(UserError, match=r"trackers are csv and none: give none alone"):
        find_trackers(["csv", "none"], tmp_path)


def test_missing_library_is_named_with_the_mend(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=r"tracker wandb needs a library that is not installed: pip install wandb"):
        find_trackers(["tensorboard", "wandb"], tmp_path)


def test_no_tracker_leaves_nothing(tmp_path):
    live(tmp_path / "logs", ["none"], [1, 2])
    assert not list(tmp_path.iterdir())


def test_options_become_plain_values_with_dotted_names():
    options = {**OPTIONS, "rate": 0.1, "nothing": None, "many": ["x" * 100] * 10}
    assert flatten(options) == {
        "steps": 20,
        "videos": "a, b",
        "resume": False,
        "encoder.backbone": "resnet18",
        "rate": 0.1,
        "nothing": "None",
        "many": ", ".join(["x" * 100] * 10)[:497] + "...",
    }


def test_curve_file_keeps_every_bit(tmp_path):
    numbers = [0.1 + 0.2, 1e-310, -0.0, 1 / 3, float("inf"), float("nan"), 2**53 + 1]
    live(tmp_path, ["csv"], range(1, 8), values=lambda step: {"loss": numbers[step - 1]})
    read = [float(row["loss"]) for row in read_curve(tmp_path)]
    assert [value.hex() for value in read] == [float(number).hex() for number in numbers]


def test_curve_file_grows_a_column_for_a_new_name(tmp_path):
    logged = {1: {"loss": 1.0}, 2: {"loss": 0.5, "rank": 3}, 3: {"note": 'a, "b"\nc'}, 4: {"rank": 4}}
    live(tmp_path, ["csv"], logged, values=logged.get)
    assert (tmp_path / "curve.csv").read_text() == (
        'step,loss,rank,note\n1,1.0,,\n2,0.5,3.0,\n3,,,"a, ""b""\nc"\n4,,4.0,\n'
    )


def growing(step):
    return {"loss": 1 / step} | ({"rank": step / 7} if step % 5 == 0 else {}) | ({"late": 0.1} if step > 16 else {})


@pytest.mark.parametrize("resumed_at", [0, 1, 10, 17, 18])
@pytest.mark.parametrize("torn", ["", "19", "19,0.05263157894", '19,"0.0'])
def test_two_lives_leave_the_curve_file_of_one(tmp_path, resumed_at, torn):
    live(tmp_path / "one", ["csv"], range(1, 31), values=growing)
    live(tmp_path / "two", ["csv"], range(1, 19), values=growing, killed=True)
    with (tmp_path / "two" / "curve.csv").open("a") as file:
        file.write(torn)
    (tmp_path / "two" / ".tmp.curve.csv").write_text("step,lo")  # killed while a column was added
    live(tmp_path / "two", ["csv"], range(resumed_at + 1, 31), resumed_at, values=growing)
    one, two = ((tmp_path / life / "curve.csv").read_bytes() for life in ("one", "two"))
    assert one == two
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["curve.csv", "trackers.json"]


def test_rows_are_in_the_file_when_log_returns(tmp_path):
    accelerator = Accelerator(log_with=find_trackers(["csv"], tmp_path), project_dir=tmp_path)
    start_trackers(accelerator, "stage", OPTIONS, 0)
    for step in (1, 2, 3):
        accelerator.log({"loss": 0.5}, step=step)
        assert len(read_curve(tmp_path)) == step
    accelerator.end_training()


def read_events(folder):
    events = EventAccumulator(str(folder / "stage"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


@pytest.mark.parametrize("torn", [False, True])
def test_tensorboard_shows_no_point_of_a_life_that_was_lost(tmp_path, torn):
    first = live(tmp_path, ["tensorboard"], range(1, 21), values=lambda step: {"loss": -step}, killed=True)
    if torn:
        (path,) = (tmp_path / "stage").glob("events.*")
        os.truncate(path, path.stat().st_size - 5)
    live(tmp_path, ["tensorboard"], range(11, 16), 10, values=lambda step: {"loss": step})
    assert read_events(tmp_path) == [(step, -step if step <= 10 else step) for step in range(1, 16)]
    first.end_training()


def test_tensorboard_stores_the_options_once(tmp_path):
    for resumed_at in (0, 1):
        live(tmp_path, ["tensorboard", "csv"], [resumed_at + 1], resumed_at)
    stored = list(tmp_path.rglob("hparams.yml"))
    assert len(stored) == 1
    assert "encoder.backbone: resnet18" in stored[0].read_text()
    assert [row["step"] for row in read_curve(tmp_path)] == ["1", "2"]
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"tensorboard": None, "csv": None}


def test_only_the_main_process_writes(tmp_path):
    tracker = CurveFile(tmp_path)
    start_trackers(SimpleNamespace(is_main_process=False, log_with=[tracker]), "stage", OPTIONS, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["wandb", "mlflow", "numpy"])
def test_refusal_of_a_tracker_is_one_line_and_a_bug_is_not(tmp_path, library):
    refusal = type("UsageError", (Exception,), {"__module__": f"{library}.errors"})("log in first\nand so on")

    def refuse(*_, **__):
        raise refusal

    accelerator = SimpleNamespace(
        is_main_process=True, log_with=["tensorboard"], logging_dir=tmp_path, init_trackers=refuse
    )
    expected = UserError if library in ("wandb", "mlflow") else type(refusal)
    with pytest.raises(expected) as raised:
        start_trackers(accelerator, "stage", OPTIONS, 0)
    if expected is UserError:
        assert str(raised.value) == f"the tracker {library} could not start: log in first"


@pytest.mark.filterwarnings("ignore")  # theirs
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "logs"
    first = live(folder, ["wandb"], range(1, 4))
    second = live(folder, ["wandb"], range(3, 6), 2)
    assert first.trackers[0].run.id == second.trackers[0].run.id
    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": first.trackers[0].run.id}
    assert len(list((folder / "wandb").glob("offline-run-*"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]


@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow_holds_one_curve(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a run's folder, 100%" / "logs"
    many = {f"option_{index}": index for index in range(150)} | {"long": "x" * 10_000}
    live(folder, ["mlflow"], range(1, 21), values=lambda step: {"loss": -step}, options=many, killed=True)
    mlflow.end_run("FAILED")
    resumed = {**many, "resume": True}  # MLflow refuses another value for an option that it has
    for start, end in ((11, 15), (16, 18)):  # killed after step 20 and back to 10, then stopped after step 15
        live(folder, ["mlflow"], range(start, end + 1), start - 1, values=lambda step: {"loss": step}, options=resumed)
    experiment = mlflow.get_experiment_by_name("stage")
    (run,) = mlflow.search_runs([experiment.experiment_id], output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert sorted((entry.step, entry.value) for entry in history) == [
        (step, -step if step <= 10 else step) for step in range(1, 19)
    ]
    assert len(run.data.params) == 151
    live(tmp_path / "other", ["mlflow"], [1])  # the next stage in this process has a store of its own
    assert len(mlflow.search_runs(experiment_names=["stage"])) == 1
    assert json.loads((folder / "trackers.json").read_text()) == {"mlflow": run.info.run_id}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a run's folder, 100%", "other"]
