"""What a command leaves behind: nobody else's work is harmed, and an artefact is what it says."""

import json
import os
import pickle
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from pipelines.run.artefacts import load_module, save_artefact
from pipelines.run.command import Finished, UserError
from pipelines.run.files import read_json, to_json, write_json
from pipelines.run.folder import WRITTEN, RunFolder, read_mark


@dataclass(frozen=True)
class Options:
    """Of a command that can go on with what it began."""

    output_dir: Path
    steps: int = 3
    learning_rate: float = 1e-3
    width: int = 8
    overwrite: bool = False
    resume: bool = False


@dataclass(frozen=True)
class Once:
    """Of a command that begins anew each time."""

    output_dir: Path
    overwrite: bool = False


def take(path, command="train", **options):
    return RunFolder(Options(path, **options), command, ("model",))


def leave(path, inputs=None, finished=True, **options):
    """The folder of a run that has come to its end, or not."""
    folder = take(path, **options)
    folder.begin(inputs or {})
    save_artefact(path / "model", "linear", {"width": 2}, nn.Linear(2, 2))
    (path / "logs").mkdir(exist_ok=True)
    (path / "logs" / "events.out.tfevents.1.host").write_text("curve")
    if finished:
        folder.finish({"loss": float("nan")})
    else:
        folder.release()
    return path


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture
def run(tmp_path):
    return leave(tmp_path / "runs" / "encoder")


def test_a_run_is_marked_and_traced_back(run):
    mark = json.loads((run / "run.json").read_text())
    assert (mark["command"], mark["finished"], mark["options"]["steps"]) == ("train", True, 3)
    assert mark["versions"]["torch"] == torch.__version__.split("+")[0]
    assert mark["code"] == "unknown" or len(mark["code"].removesuffix("-dirty")) == 40
    assert json.loads((run / "metrics.json").read_text()) == {"loss": None}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["a.mp4", "logs/mine", "encoder/model.safetensors", "metrics.json", "encoder/run.json"]
)
def test_a_folder_that_was_never_a_run_is_left_alone(tmp_path, name, overwrite):
    """Nor is the folder above a run: `--output-dir runs` for `runs/encoder`."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {Path(name).parts[0]}, and no run of train: take another one"):
        take(tmp_path, overwrite=overwrite)
    assert everything(tmp_path) == {name}
    assert not (tmp_path / ".lock").exists()


def test_a_new_folder_an_empty_one_and_one_with_a_log_are_taken(tmp_path):
    (tmp_path / "tee.log").touch()
    (tmp_path / ".hidden").touch()
    take(tmp_path).begin({})
    take(tmp_path / "new" / "one").begin({})
    (tmp_path / "file").touch()
    (tmp_path / "dead").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match="dead is no folder"):
        take(tmp_path / "dead")
    with pytest.raises(UserError, match="is no folder"):
        take(tmp_path / "file")


def test_another_commands_run_is_left_alone(run, tmp_path):
    unfinished = leave(tmp_path / "unfinished", finished=False)
    for path in (run, unfinished):
        for options in (Once(path), Once(path, overwrite=True)):
            with pytest.raises(UserError, match="holds a run of train: take another --output-dir for evaluate"):
                RunFolder(options, "evaluate", ("model",))
    assert (unfinished / "model" / "config.json").exists()


def test_a_run_is_replaced_only_if_told(run, capsys):
    with pytest.raises(UserError, match="a finished run: add --overwrite"):
        take(run)
    with pytest.raises(UserError, match="give one of them"):
        take(run, overwrite=True, resume=True)
    mine = {"notes.txt", "logs/mine.csv", "logs/mine.png", "training_state/backup.pt"}
    (run / "training_state").mkdir()
    for name in mine:
        (run / name).write_text("mine")
    (run / "model" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"model holds notes\.txt, and is no model: move it"):
        take(run, overwrite=True)
    (run / "model" / "notes.txt").unlink()
    folder = take(run, overwrite=True)
    assert (run / "model" / "model.safetensors").exists()  # not before all inputs have been checked
    folder.begin({})
    old = {"metrics.json", "model/config.json", "model/model.safetensors", "logs/events.out.tfevents.1.host"}
    assert everything(run) == {"run.json", *mine, *(f".replaced/{name}" for name in old)}
    assert not json.loads((run / "run.json").read_text())["finished"]
    folder.finish({})
    assert everything(run) == {"run.json", "metrics.json", *mine}
    said = capsys.readouterr().out
    assert f"its 4 files stay in {run}/.replaced until then" in said
    assert f"removed 4 files of the run that this one has replaced in {run}" in said


def test_a_kill_while_the_old_run_is_removed_leaves_no_finished_half(run, monkeypatch):
    folder = take(run, overwrite=True, steps=9)
    monkeypatch.setattr("pipelines.run.folder.written", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.begin({})
    mark = json.loads((run / "run.json").read_text())
    assert (mark["finished"], mark["options"]["steps"]) == (False, 3)  # what is there still is the old one's


def test_an_unfinished_run_is_resumed_with_the_same_options_and_inputs(tmp_path, capsys):
    inputs = {"cache": {"fingerprint": "ab", "clips": 3}}
    run = leave(tmp_path / "run", inputs, finished=False)
    with pytest.raises(UserError, match="an unfinished run: add --resume to go on with it, or --overwrite"):
        take(run)
    with pytest.raises(UserError, match="was started with width = 8, not 9"):
        take(run, resume=True, width=9)
    with pytest.raises(UserError, match=r"steps = 3, not 2: .*--steps may be raised"):
        take(run, resume=True, steps=2)
    with pytest.raises(UserError, match=r"began with cache\.fingerprint = ab, which is now cd: resume with the same"):
        take(run, resume=True).begin({"cache": {"fingerprint": "cd", "clips": 3}})
    moved = run.rename(tmp_path / "moved")
    take(moved, resume=True, steps=5, learning_rate=1e-4).begin(inputs)
    said = capsys.readouterr().out
    assert "resuming with steps = 5 instead of 3" in said
    assert "resuming with learning_rate = 0.0001 instead of 0.001" in said
    assert (moved / "model" / "model.safetensors").exists()
    assert json.loads((moved / "run.json").read_text())["options"]["steps"] == 5


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"1": "/b", "2": "/c"}, "now x; missing: /a"),
        ({"9": "/a", "1": "/b"}, "now x; changed: /a; missing: /c: resume with"),
        ({str(number): f"/{number}" for number in range(9)}, "now x; new: /3, /4, /5, /6, /7 and 1 more: resume with"),
        ({"0": "/moved", "1": "/too", "2": "/b"}, "now x: resume with"),
    ],
)
def test_what_a_refused_run_would_learn_from_is_named(tmp_path, now, said):
    folder = take(tmp_path)
    folder.begin({"videos": "3"}, {"0": "/a", "1": "/b", "2": "/c"})
    folder.release()
    again = take(tmp_path, resume=True)
    with pytest.raises(UserError, match=said):
        again.begin({"videos": "x"}, now)
    (tmp_path / "sources.json").unlink()  # as older runs have none
    with pytest.raises(UserError, match="now x: resume with"):
        again.begin({"videos": "x"}, now)


def test_a_finished_run_that_is_resumed_has_nothing_to_do_unless_it_gets_more_steps(run):
    with pytest.raises(Finished, match="is finished: nothing to do"):
        take(run, resume=True)
    with pytest.raises(UserError, match="steps = 3, not 2"):
        take(run, resume=True, steps=2)
    with pytest.raises(UserError, match="was started with width = 8, not 9: resume with the same"):
        take(run, resume=True, width=9)
    with pytest.raises(Finished, match=r"is finished, with learning_rate = 0\.001, not 0\.1: nothing to do"):
        take(run, resume=True, learning_rate=0.1)
    with pytest.raises(UserError, match="began with videos = None, which is now 9"):
        take(run, resume=True, steps=4).begin({"videos": "9"})
    assert (run / "metrics.json").exists()
    take(run, resume=True, steps=4).begin({})
    assert not (run / "metrics.json").exists()
    assert not json.loads((run / "run.json").read_text())["finished"]


def test_resuming_what_never_began_begins_it(tmp_path):
    take(tmp_path).release()  # its inputs were wrong
    RunFolder(Once(tmp_path), "evaluate", ()).release()
    take(tmp_path, resume=True, width=9).begin({"data": "x"})
    assert json.loads((tmp_path / "run.json").read_text())["options"]["width"] == 9


def test_a_command_that_cannot_resume_begins_anew(tmp_path):
    folder = RunFolder(Once(tmp_path), "evaluate", ("rollout.csv",))
    folder.begin({"data": "x"})
    (tmp_path / "rollout.csv").write_text("half")
    folder.release()
    again = RunFolder(Once(tmp_path), "evaluate", ("rollout.csv",))
    again.begin({"data": "y"})
    assert everything(tmp_path) == {"run.json", ".replaced/rollout.csv"}
    again.finish({})
    assert everything(tmp_path) == {"run.json", "metrics.json"}


@pytest.mark.parametrize(
    "damage",
    [b"", b"[]", b"{", b"[" * 100_000, b"\xff", {"finished": 1}, {"command": None}, {"inputs": []}, {"options": "none"},
     {"format": "video-jepa run 0"}, {"format": "other"}],
    ids=lambda damage: repr(damage)[:40],
)  # fmt: skip
def test_a_damaged_mark_is_one_line(run, damage):
    why = "" if isinstance(damage, bytes) else " is damaged, or of another version"
    (run / "run.json").write_bytes(damage if not why else json.dumps(read_json(run / "run.json") | damage).encode())
    for use in (lambda: take(run, overwrite=True), lambda: take(run, resume=True), lambda: read_mark(run)):
        with pytest.raises(UserError, match=rf"run\.json{why}") as raised:
            use()
        assert "\n" not in str(raised.value)
    assert (run / "model" / "model.safetensors").exists()


def build(config):
    return nn.Linear(config["width"], config["width"])


@pytest.fixture
def artefact(tmp_path):
    save_artefact(tmp_path / "model", "linear", {"width": 2}, nn.Linear(2, 2))
    return tmp_path / "model"


def test_an_artefact_comes_back_as_it_was(tmp_path):
    torch.manual_seed(0)
    module = nn.BatchNorm1d(3)
    module(torch.randn(5, 3))
    save_artefact(tmp_path / "model", "norm", {"width": 3}, module)
    loaded = load_module(tmp_path / "model", "norm", lambda config: nn.BatchNorm1d(config["width"]))
    assert not loaded.training
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_a_newer_artefact_takes_the_place_of_the_older_and_of_half_ones(artefact):
    (artefact.with_name(".tmp.model")).mkdir()
    (artefact.with_name(".tmp.model") / "half").touch()
    save_artefact(artefact, "linear", {"width": 3}, nn.Linear(3, 3))
    assert load_module(artefact, "linear", build).in_features == 3
    assert everything(artefact) == {"config.json", "model.safetensors"}
    (artefact / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt, and is no model"):
        save_artefact(artefact, "linear", {"width": 3}, nn.Linear(3, 3))
    assert (artefact / "notes.txt").read_text() == "mine"


def configured(content):
    return lambda folder: write_json(folder / "config.json", {"fingerprint": "", **content})


def not_finite():
    module = nn.Linear(2, 2)
    module.weight.data[0, 0] = np.nan
    return module


def weighted(module):
    return lambda folder: save_artefact(folder, "linear", {"width": 2}, module)


def filed(content):
    """Other bytes in place of the weights."""
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


LYING = json.dumps({"weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 16]}}).encode()


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (configured({"kind": "expander", "config": {}}), "this is no linear; its config.json says expander"),
        (configured({"width": 2}), "config.json is not of this version"),
        (configured({"kind": "linear", "config": {"width": 3}}), r"of this linear is \(2.*, its configuration wants"),
        (configured({"kind": "linear", "config": {"wide": 3}}), "the linear here cannot be loaded"),
        (configured({"kind": "linear", "config": {"width": 10**7}}), "its configuration wants"),  # would be 400 TB
        (weighted(not_finite()), "weight of this linear is not finite"),
        (weighted(nn.Linear(2, 2, bias=False)), r"bias of this linear is missing, its configuration wants \(2,\)"),
        (weighted(nn.Bilinear(2, 2, 2)), r"weight of this linear is \(2, 2, 2\)"),
        (lambda folder: os.truncate(folder / "model.safetensors", 50), "the linear here cannot be loaded"),
        (filed(struct.pack("<Q", 2**60)), "its header is larger than"),
        (filed(struct.pack("<Q", 10_000_000) + b" " * 10_000_000), "its header is larger than"),
        (filed(struct.pack("<Q", 3) + b"{}"), "the linear here cannot be loaded"),
        (filed(struct.pack("<Q", len(LYING)) + LYING + bytes(16)), "the linear here cannot be loaded"),
        (filed(save({"weight": torch.ones(2, 2, dtype=torch.int8), "bias": torch.ones(2)})), "or torch.int8"),
        (filed(pickle.dumps({"weight": 1})), "its header is larger than"),
        (lambda folder: (path := folder / "model.safetensors").unlink() or path.symlink_to("/dev/zero"), "is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no linear here .model.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "no linear here .config.json is missing"),
    ],
)
def test_an_artefact_is_what_it_says_and_its_weights_are_all_there_or_it_is_one_line(harm, complaint, artefact):
    harm(artefact)
    with pytest.raises(UserError, match=complaint) as raised:
        load_module(artefact, "linear", build)
    assert "\n" not in str(raised.value)
    assert str(artefact) in str(raised.value)


def test_json_is_valid_and_replaced_whole(tmp_path):
    path = tmp_path / "value.json"
    values = {"nan": float("nan"), "infinite": [-np.inf, np.float32(np.inf)], "tensor": torch.tensor([1.0, np.nan])}
    write_json(path, {**values, "array": np.arange(2), "path": tmp_path, "options": Options(tmp_path)})
    read = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert read["nan"] is None
    assert read["infinite"] == [None, None]
    assert read["tensor"] == [1.0, None]
    assert read["array"] == [0, 1]
    assert read["options"]["output_dir"] == read["path"] == str(tmp_path)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == read
    assert to_json({1: (Path("x"),)}) == {"1": ["x"]}


def test_a_start_that_failed_protects_nobodys_work(tmp_path):
    take(tmp_path / "runs").release()  # refused afterwards: a mark, and no run
    leave(tmp_path / "runs" / "model")
    before = everything(tmp_path / "runs")
    with pytest.raises(UserError, match="holds model, and no run of train"):
        take(tmp_path / "runs")
    assert everything(tmp_path / "runs") == before
    take(tmp_path / "own").release()
    take(tmp_path / "own").begin({})  # our own failed start is no obstacle


def test_an_artefact_replaces_an_artefact_alone(tmp_path):
    run = leave(tmp_path / "runs" / "model")
    before = everything(run)
    with pytest.raises(UserError, match="is no model: move it, or take another folder"):
        save_artefact(run, "linear", {}, nn.Linear(2, 2))
    assert everything(run) == before
    save_artefact(run / "model", "linear", {"width": 3}, nn.Linear(3, 3))
    assert not list(run.glob(".old*"))


def test_overwriting_does_not_enter_runs_and_caches_inside(tmp_path):
    run = leave(tmp_path / "run")
    inner = leave(run / "logs" / "mine")
    before = everything(inner)
    take(run, overwrite=True).begin({})
    assert everything(inner) == before
    assert not (run / "metrics.json").exists()


def test_what_commands_leave_is_known_as_theirs():
    """Else it would stay among the files of the run that replaces theirs."""
    sources = [path.read_text() for path in Path(__file__).parents[1].glob("pipelines/*.py")]
    calls = [call for code in sources for call in re.findall(r"RunFolder\(options, [^\n]*", code)]
    names = {name for call in calls for name in re.findall(r"\"(\w+\.(?:json|csv|html))\"", call)}
    assert {"act.json", "episodes.csv", "events.csv", "imagined.json", "rollout.csv", "surprise.csv"} <= names
    assert [name for name in sorted(names) if not WRITTEN.fullmatch(name)] == []
