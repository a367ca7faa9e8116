"""A phone's, a recorder's, a robot's, a hub's and a stranger's things in one folder: the account adds up."""

import json
import os
from pathlib import Path

import pytest

from benchmarks.odd_folder import add_up, make
from data.cache import EmbeddingCache
from data.manifest import read_manifest
from tests.conftest import save_encoder
from tests.test_commands import call


@pytest.fixture
def folder(tmp_path):
    make(tmp_path / "videos")
    return tmp_path / "videos"


def test_every_file_of_an_odd_folder_is_accounted_for(folder, tmp_path, capsys):
    save_encoder(tmp_path / "encoder", embedding_dimension=8, image_size=(32, 32))
    call("inspect_folder", f"{folder} --count --manifest {tmp_path}/videos.jsonl")
    call("cache_embeddings", f"--videos {folder} --encoder {tmp_path}/encoder --fps 4 --output-dir {tmp_path}/cache")
    add_up(folder, tmp_path / "cache" / "account.json")
    account = json.loads((tmp_path / "cache" / "account.json").read_text())
    assert all(line.isprintable() for line in capsys.readouterr().out.splitlines())
    assert {Path(path).name for path in account["doubles"]} == {"IMG_0004 (1).MP4"}
    assert {Path(path).name for path in account["refused"]} == {
        "stereo", "bombs", "dead", "round.mp4", "not fetched.mp4", "1533151607162404000.png", "frame_000099.jpg",
        "pipe.mkv", "socket.mp4", "empty.avi", "cam.dav", "code.ts", "list.mp4", "script.mp4", "x.MP4",
        "unpack me.zip", "me.tar.gz", "and me.7z",
    }  # fmt: skip
    assert {Path(path).name for path in account["damaged"]} >= {"by time", "drive.01", "cut.mkv"}
    # A pause is none of a video's faults; where a second recording was joined to the first, this is said.
    records = read_manifest(tmp_path / "videos.jsonl")
    frames = {record.state.path: record.video.frames for record in records if record.video}
    cache = EmbeddingCache(tmp_path / "cache")
    ticks = {clip.key.source: cache.take(clip.rows, "ticks").tolist() for clip in cache.clips}
    for name, decoded, expected, seconds in (
        ("pause.mp4", 40, [*range(9), *range(128, 137)], 33.9),
        ("joined.ts", 80, [*range(17), *range(56, 73)], 17.9),
    ):
        path = str(folder / "recorder" / name)
        assert (frames[path], ticks[path]) == (decoded, expected)
        assert account["read_s"][path] == pytest.approx(seconds)
        said = {"corrupt_frames": 0, "breaks": ["times jump back after 3.90 s: another recording, set 10 s later"]}
        assert account["damaged"].get(path) == (said if name == "joined.ts" else None)
    # What is neither read nor refused is counted, and nothing hidden or ours has been read.
    told = [path for kind in ("read_s", "refused", "doubles") for path in account[kind]]
    assert not [path for path in told if "/." in path or "@eaDir" in path or "RECYCLE" in path or "/old " in path]
    assert account["found"]["hidden"] == 9
    assert account["found"]["ours"] == 3
    assert os.fsdecode(b"M\xe4rz.mp4") in {Path(path).name for path in account["read_s"]}
