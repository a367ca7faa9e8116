"""What `video-jepa inspect` says of videos, caches, runs and models."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from data.manifest import read_manifest
from pipelines import inspect_folder
from pipelines.inspect_folder import Options
from pipelines.run.artefacts import save_artefact
from pipelines.run.command import UserError
from pipelines.run.files import write_json

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = 12
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
from pipelines import inspect_folder
from pipelines.run.command import run_command
count = inspect_folder.count_frames
def slowly(*arguments):
    time.sleep(0.25)
    sys.stderr.write(f"counted {arguments[0]}\\n")  # in one piece: threads print at the same time
    return count(*arguments)
inspect_folder.count_frames = slowly
run_command(inspect_folder.main, inspect_folder.Options)
"""
"""The real process, with videos that take long."""


@pytest.fixture
def folder(tmp_path, encode_video):
    (tmp_path / "videos").mkdir()
    for index in range(VIDEOS):
        encode_video(tmp_path / "videos" / f"{index:02d}.mp4", np.arange(5 + index) / 10, rate=10, ticks_per_second=10)
    return tmp_path / "videos"


@pytest.fixture
def start():
    """Start the command as a process; none outlives the test."""
    started = []

    def start(folder, manifest, *script):
        command = [sys.executable, *(script or ["-c", SLOW]), folder, "--count", "--manifest", manifest]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def wait_for_lines(manifest, lines):
    until = time.monotonic() + 60
    while not manifest.exists() or len(manifest.read_text().splitlines()) <= lines:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_videos_are_counted_and_listed_in_a_manifest(folder, tmp_path, start):
    (folder / "text.mp4").write_text("no video\n" * 50)
    manifest = tmp_path / "out" / "videos.jsonl"
    status, output, errors = finish(start(folder, manifest, ROOT / "pipelines" / "inspect_folder.py"))
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[:2] == [
        "found 13 files: 13 looked at",
        "12 videos, 0.00 h, 126 frames; refused 1; doubles 0; damaged 0; with gaps 0",
    ]
    assert lines[2] == f"  refused: {folder}/text.mp4: not a readable video (Invalid data found when processing input)"
    assert lines[-1].startswith(f"wrote {manifest}: ")
    records = read_manifest(manifest)
    assert [record.video.frames for record in records if record.video] == [5 + index for index in range(VIDEOS)]
    assert not list(manifest.parent.glob(".tmp*"))


def test_without_counting_only_headers_are_read(folder, capsys):
    inspect_folder.main(Options((folder,)))
    assert capsys.readouterr().out == "found 12 files: 12 looked at\n12 videos, 0.00 h; refused 0; doubles 0\n"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_count_that_was_stopped_keeps_what_was_done_and_the_next_finishes_it(number, folder, tmp_path, start):
    manifest = tmp_path / "videos.jsonl"
    process = start(folder, manifest)
    wait_for_lines(manifest, 3)
    process.send_signal(number)
    status, _, errors = finish(process)
    if number == signal.SIGINT:
        assert status == 130
        assert "Traceback" not in errors
        assert "interrupted: run the same command again to continue" in errors
    done = read_manifest(manifest)
    assert 3 <= len(done) < VIDEOS
    status, output, errors = finish(start(folder, manifest))
    assert status == 0, errors
    counted = re.findall(r"counted \S+/(\d\d\.mp4)", errors)
    assert sorted(counted) == sorted(
        {f"{index:02d}.mp4" for index in range(VIDEOS)} - {Path(record.state.path).name for record in done}
    )
    assert output.splitlines()[1].startswith("12 videos")
    assert len(read_manifest(manifest)) == VIDEOS


def test_damaged_videos_and_gaps_are_told(folder, tmp_path, capsys, damage_video, encode_video):
    damage_video(folder / "05.mp4", slice(8, None))
    encode_video(folder / "gap.mp4", [*np.arange(20) / 10, *(5 + np.arange(20) / 10)])
    inspect_folder.main(Options((folder,), count=True))
    output = capsys.readouterr().out
    assert re.search(r"\n13 videos, 0.01 h, 16\d frames; refused 0; doubles 0; damaged 1; with gaps 1\n", output)
    assert f"  damaged: {folder}/05.mp4: decoding failed after 0." in output
    assert f"  with gaps: {folder}/gap.mp4: 1 gap, the first of 3.10 s at 1.90 s\n" in output


@pytest.fixture
def cache(tmp_path, encode_video, make_clip, write_cache):
    """A cache of two videos, one of which is gone and one of which has changed, and one that never was."""
    encode_video(tmp_path / "changed.mp4", np.arange(3) / 10)
    clips = [make_clip(str(tmp_path / name), 6, gaps=gaps) for name, gaps in (("changed.mp4", [3]), ("gone.mp4", []))]
    return write_cache(tmp_path / "cache", clips)


def test_a_cache_says_what_it_holds_and_what_became_of_its_videos(cache, capsys):
    inspect_folder.main(Options((cache,), verify=True))
    output = capsys.readouterr().out
    assert output.startswith(f"{cache}: a cache, 2 clips of 2 videos, 12 embeddings, 0.00 h, 1 gap in time\n")
    assert "  encoder_fingerprint: 0123abcd\n" in output
    assert "  columns.embeddings.dtype: float32\n" in output
    assert f"  video has changed: {cache.parent}/changed.mp4\n" in output
    assert f"  video is gone or was moved: {cache.parent}/gone.mp4\n" in output
    assert output.endswith("  verified: 2 clips as written\n")


def test_a_flipped_bit_in_a_cache_is_found_and_its_shard_named(cache, capsys, damage_cache):
    damage_cache(cache)
    shard = next((cache / "shards").glob("*.h5"))
    with pytest.raises(UserError, match=rf"^1 of 2 clips in .* not what was written: delete {shard} .*json and embed"):
        inspect_folder.main(Options((cache,), verify=True))
    assert "  damaged: " in capsys.readouterr().out


def test_a_run_and_a_model_say_what_they_are(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    options, inputs = {"steps": 4, "encoder": {"backbone": "small_conv"}}, {"videos": 3}
    record = {"command": "pretrain_encoder", "finished": True, "options": options, "inputs": inputs, "code": "abc"}
    write_json(run / "run.json", record)
    save_artefact(run / "encoder", "encoder", {"backbone": "small_conv"}, torch.nn.Linear(2, 3))
    inspect_folder.main(Options((run, run / "encoder")))
    output = capsys.readouterr().out
    assert f"{run}: a run, with models: encoder\n  command: pretrain_encoder\n  finished: True\n" in output
    assert "  options.encoder.backbone: small_conv\n  inputs.videos: 3\n" in output
    assert f"{run}/encoder: a model\n  kind: encoder\n  config.backbone: small_conv\n" in output


def test_mistakes_are_named(folder, tmp_path, start):
    with pytest.raises(UserError, match=r"--manifest is .*videos\.json: its name must end in \.jsonl"):
        inspect_folder.main(Options((folder,), manifest=tmp_path / "videos.json"))
    with pytest.raises(UserError, match="no PATHS are given"):
        inspect_folder.main(Options(()))
    (tmp_path / "empty").mkdir()
    status, _, errors = finish(start(tmp_path / "nowhere", tmp_path / "videos.jsonl"))
    assert (status, errors.strip()) == (1, f"error: {tmp_path}/nowhere: no such file or folder")
