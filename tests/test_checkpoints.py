"""Training states on disk: whole or not there, the newest few, and never code."""

import errno
import json
import os
import pickle
import shutil
import zlib

import pytest
import torch
from accelerate import Accelerator

from pipelines.run import checkpoints
from pipelines.run.checkpoints import SEAL, Checkpoints, State, find_fault
from pipelines.run.command import UserError
from pipelines.run.files import write_json


@pytest.fixture
def saver(tmp_path):
    return Checkpoints(Accelerator(cpu=True), tmp_path)


def state(step):
    return State(
        step, {"network": {"weight": torch.full((3,), float(step))}, "best": {"step": step}}, {"place": {"at": step}}
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def spoil(checkpoint):
    os.truncate(checkpoint / "state.pt", 10)


def reseal(checkpoint, **changes):
    """Hide a change, as somebody would who wants it to be taken for ours."""
    seal, content = json.loads((checkpoint / SEAL).read_text()), (checkpoint / "state.pt").read_bytes()
    seal["files"]["state.pt"] = [len(content), zlib.crc32(content)]
    write_json(checkpoint / SEAL, seal | changes)


def test_a_state_comes_back_to_the_bit(saver, tmp_path):
    assert saver.load_newest() is None
    saver.save(state(5))
    step, shared, own = saver.load_newest()
    assert (step, own, shared["best"]) == (5, {"place": {"at": 5}}, {"step": 5})
    assert torch.equal(shared["network"]["weight"], torch.full((3,), 5.0))
    assert names(tmp_path / "step_00000005") == [SEAL, "state.pt"]


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: os.truncate(folder / "state.pt", 99), "state.pt has changed"),
        (lambda folder: (folder / "state.pt").unlink(), "state.pt is missing"),
        (lambda folder: flip_bit(folder / "state.pt"), "state.pt has changed"),
        (lambda folder: (folder / SEAL).unlink(), "complete.json is missing"),
        (lambda folder: os.truncate(folder / SEAL, 40), "complete.json cannot be read"),
        (lambda folder: (folder / SEAL).write_text("[]"), "complete.json cannot be read"),
        (lambda folder: (folder / SEAL).write_text("{}"), "complete.json cannot be read"),
        (lambda folder: (folder / SEAL).write_bytes(b"\xff\xfe"), "complete.json cannot be read"),
        (shutil.rmtree, "complete.json is missing"),
    ],
)
def test_every_fault_is_found_and_named(saver, tmp_path, harm, fault):
    saver.save(state(1))
    checkpoint = tmp_path / "step_00000001"
    assert find_fault(checkpoint) == ""
    (checkpoint / "notes.txt").write_text("mine")  # what was not there when it was sealed is nobody's business
    assert find_fault(checkpoint) == ""
    harm(checkpoint)
    assert fault in find_fault(checkpoint)
    assert "\n" not in find_fault(checkpoint)


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_newest_two_are_kept(saver, tmp_path):
    for step in (0, 5, 100, 20_000):
        saver.save(state(step))
    assert names(tmp_path) == ["step_00000100", "step_00020000"]


def test_a_broken_state_costs_one_line_and_the_way_from_an_older_one(saver, tmp_path, capsys):
    for step in (10, 20):
        saver.save(state(step))
    spoil(tmp_path / "step_00000020")
    assert saver.load_newest().step == 10
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"warning: {tmp_path}/step_00000020 is not complete (state.pt has changed" in warning
    saver.save(state(15))
    assert names(tmp_path) == ["step_00000010", "step_00000015"]  # a broken one takes no place of a sound one
    for step in (10, 15):
        spoil(tmp_path / f"step_{step:08d}")
    fault = r"state\.pt has changed since it was written"
    with pytest.raises(UserError, match=rf"go on from \(step_00000015: {fault}, step_00000010: {fault}\): restore it"):
        saver.load_newest()
    assert names(tmp_path) == ["step_00000010", "step_00000015"]


def test_broken_states_stay_until_a_new_one_is_whole(saver, tmp_path, monkeypatch):
    for step in (10, 20):
        saver.save(state(step))
    spoil(tmp_path / "step_00000020")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.torch, "save", lambda content, file: disk_is_full(file))
        with pytest.raises(OSError, match=r"No space left on device: '.*state\.pt'"):
            saver.save(state(15))
    assert names(tmp_path)[1:] == ["step_00000010", "step_00000020"]


save = torch.save


def disk_is_full(file):
    """As `torch.save` of much does it on a full disk, which cannot be had without a mount."""

    class Full:
        def write(self, content):
            if file.write(bytes(content)) + file.tell() > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(content)

    save({"weights": torch.zeros(10_000)}, Full())


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("where", ["os.listdir", "_size_and_checksum", "torch.load"])
def test_what_cannot_be_read_now_is_not_taken_for_broken(saver, tmp_path, monkeypatch, where, number):
    def refuse(path, **_):
        raise OSError(number, os.strerror(number), str(path))

    for step in (10, 20):
        saver.save(state(step))
    monkeypatch.setattr(f"pipelines.run.checkpoints.{where}", refuse)
    with pytest.raises(OSError, match=os.strerror(number)):
        saver.load_newest(is_needed=True)
    monkeypatch.undo()
    assert saver.load_newest().step == 20


def test_a_state_that_is_needed_must_be_there(saver, tmp_path):
    for folder in (tmp_path, tmp_path / "gone"):
        saver.folder = folder
        with pytest.raises(UserError, match=r"holds no whole training state to go on from \(there is none\): restore"):
            saver.load_newest(is_needed=True)


def test_half_a_state_of_a_killed_run_is_no_obstacle_and_goes(saver, tmp_path):
    for step in (7, 14):
        (tmp_path / f".tmp.step_{step:08d}").mkdir()
        (tmp_path / f".tmp.step_{step:08d}" / "state.pt").write_bytes(b"half")
    assert saver.load_newest() is None
    saver.save(state(7))
    assert names(tmp_path) == ["step_00000007"]
    assert find_fault(tmp_path / "step_00000007") == ""


def test_another_number_of_processes_is_refused(saver, tmp_path):
    saver.save(state(5))
    reseal(tmp_path / "step_00000005", processes=2)
    with pytest.raises(UserError, match=r"step_00000005 was saved by 2 processes, and 1 are running: resume with 2"):
        saver.load_newest()


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["pickle", "torch", "text", "empty"])
def test_a_strangers_state_is_one_line_and_never_code(saver, tmp_path, how):
    saver.save(state(5))
    checkpoint, mark = tmp_path / "step_00000005", tmp_path / "ran"
    if how == "torch":
        torch.save({"network": Evil(mark)}, checkpoint / "state.pt")
    else:
        content = {"pickle": pickle.dumps(Evil(mark)), "text": b"no state", "empty": b""}[how]
        (checkpoint / "state.pt").write_bytes(content)
    reseal(checkpoint)
    with pytest.raises(UserError, match=r"state\.pt cannot be read \(.*delete .*step_00000005 to go on") as raised:
        saver.load_newest()
    assert "\n" not in str(raised.value)
    assert "weights_only" not in str(raised.value)
    assert not mark.exists()
