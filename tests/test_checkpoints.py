"""Training states on disk: whole or not there, the newest few, and never code."""

import errno
import os
import pickle

import pytest
import torch
from accelerate import Accelerator

from pipelines.run.checkpoints import Checkpoints, find_fault
from pipelines.run.command import UserError


@pytest.fixture
def saver(tmp_path):
    return Checkpoints(Accelerator(cpu=True), tmp_path)


def state(step):
    return step, {"network": {"weight": torch.full((3,), float(step))}, "best": {"step": step}}, {"place": {"at": step}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps(folder):
    return [int(name[5:13]) for name in names(folder) if name.startswith("step_")]


def spoil(checkpoint):
    os.truncate(checkpoint, 10)


def test_a_state_comes_back_to_the_bit(saver, tmp_path):
    assert saver.load_newest() is None
    saver.save(state(5))
    step, shared, own = saver.load_newest()
    assert (step, own, shared["best"]) == (5, {"place": {"at": 5}}, {"step": 5})
    assert torch.equal(shared["network"]["weight"], torch.full((3,), 5.0))
    assert names(tmp_path) == ["step_00000005.pt"]


def test_a_state_of_many_tensors_that_was_cut_short_is_not_whole(saver, tmp_path):
    for step in (1, 2):
        saver.save((step, {str(number): torch.ones(300) for number in range(20)}, {}))
    os.truncate(tmp_path / "step_00000002.pt", 15_000)
    assert find_fault(tmp_path / "step_00000002.pt")
    assert saver.load_newest()[0] == 1


def test_every_cut_is_found_and_every_bit_that_matters(saver, tmp_path):
    saver.save(state(1))
    checkpoint = tmp_path / "step_00000001.pt"
    content = checkpoint.read_bytes()
    assert find_fault(checkpoint) == ""
    expected = torch.load(checkpoint, weights_only=True)
    for place in range(0, len(content), 3):
        checkpoint.write_bytes(content[:place])
        assert find_fault(checkpoint)
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        checkpoint.write_bytes(changed)
        if not find_fault(checkpoint):  # names, dates and padding of the zip file
            assert str(torch.load(checkpoint, weights_only=True)) == str(expected)


def test_a_bit_that_makes_a_part_a_folder_is_found(saver, tmp_path):
    saver.save(state(1))
    checkpoint = tmp_path / "step_00000001.pt"
    content = bytearray(checkpoint.read_bytes())
    content[content.rindex(b"PK\x01\x02") + 38] ^= 1 << 4  # torch would give its tensor whatever memory holds
    checkpoint.write_bytes(content)
    assert find_fault(checkpoint)


def test_the_newest_two_are_kept(saver, tmp_path):
    for step in (0, 5, 100, 20_000):
        saver.save(state(step))
    assert steps(tmp_path) == [100, 20_000]


def test_a_broken_state_costs_one_line_and_the_way_from_an_older_one(saver, tmp_path, capsys):
    for step in (10, 20):
        saver.save(state(step))
    spoil(tmp_path / "step_00000020.pt")
    assert saver.load_newest()[0] == 10
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert f"warning: {tmp_path}/step_00000020.pt is not whole (it cannot be read" in warning
    saver.save(state(15))
    assert steps(tmp_path) == [10, 15]  # a broken one takes no place of a sound one
    for step in (10, 15):
        spoil(tmp_path / f"step_{step:08d}.pt")
    with pytest.raises(UserError, match=r"go on from \(step_00000015\.pt: it .*, step_00000010\.pt: it .*\): restore"):
        saver.load_newest()
    assert steps(tmp_path) == [10, 15]


@pytest.mark.parametrize("where", ["os.listdir", "ZipFile", "torch.load"])
def test_what_cannot_be_read_now_is_not_taken_for_broken(saver, monkeypatch, where):
    def refuse(path, **_):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    for step in (10, 20):
        saver.save(state(step))
    monkeypatch.setattr(f"pipelines.run.checkpoints.{where}", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        saver.load_newest(is_needed=True)
    monkeypatch.undo()
    assert saver.load_newest()[0] == 20


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["pickle", "torch", "text", "empty"])
def test_a_strangers_state_is_one_line_and_never_code(saver, tmp_path, how):
    checkpoint, mark = tmp_path / "step_00000005.pt", tmp_path / "ran"
    if how == "torch":
        torch.save({"shared": Evil(mark), "own": [{}]}, checkpoint)
    else:
        checkpoint.write_bytes({"pickle": pickle.dumps(Evil(mark)), "text": b"no state", "empty": b""}[how])
    with pytest.raises(UserError, match=r"\(step_00000005\.pt: it cannot be read: .*\): restore") as raised:
        saver.load_newest()
    assert "\n" not in str(raised.value)
    assert not mark.exists()
