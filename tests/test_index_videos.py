"""The pipeline as a person runs it: interrupted, killed, run again."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data.decoder import VideoError
from data.manifest import Record, read_manifest
from pipelines import index_videos
from pipelines.index_videos import Options, describe
from pipelines.stage import UserError

ROOT = Path(__file__).resolve().parents[1]
VIDEOS = 12
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
import data.manifest as manifest
from pipelines import index_videos
from pipelines.stage import run_stage
count = manifest.count_frames
def slowly(*arguments):
    time.sleep(0.25)
    sys.stderr.write(f"counted {arguments[0]}\\n")  # in one piece: threads print at the same time
    return count(*arguments)
manifest.count_frames = slowly
run_stage(index_videos.main, index_videos.Options)
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
    """Start the pipeline as a process; none outlives the test."""
    started = []

    def start(folder, manifest, script=SLOW):
        command = [sys.executable, *(["-c", script] if script else [ROOT / "pipelines" / "index_videos.py"])]
        started.append(
            subprocess.Popen(
                [*map(str, command), "--videos", str(folder), "--manifest", str(manifest)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
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


def test_the_command_writes_a_manifest_and_says_what_is_next(folder, tmp_path, start):
    (folder / "text.mp4").write_text("no video\n" * 50)
    manifest = tmp_path / "out" / "videos.jsonl"
    status, output, errors = finish(start(folder, manifest, ""))
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[0].startswith("12 videos, 0.00 h, 126 frames; refused 1; damaged 0; with gaps in time 0")
    assert lines[1] == f"  refused: {folder}/text.mp4: not a readable video (Invalid data found when processing input)"
    assert lines[-3] == f"wrote {manifest}"
    assert f"--videos {manifest} " in lines[-1]
    records = read_manifest(manifest)
    assert [record.video.frames for record in records if record.video] == [5 + index for index in range(VIDEOS)]
    assert not list(manifest.parent.glob(".tmp*"))


def test_a_killed_run_keeps_what_was_done_and_the_next_finishes_it(folder, tmp_path, start):
    manifest = tmp_path / "videos.jsonl"
    process = start(folder, manifest)
    wait_for_lines(manifest, 3)
    process.send_signal(signal.SIGKILL)
    finish(process)
    done = read_manifest(manifest)
    assert 3 <= len(done) < VIDEOS
    status, output, errors = finish(start(folder, manifest))
    assert status == 0, errors
    counted = re.findall(r"counted \S+/(\d\d\.mp4)", errors)
    assert sorted(counted) == sorted(
        {f"{index:02d}.mp4" for index in range(VIDEOS)} - {Path(record.state.path).name for record in done}
    )
    assert output.startswith("12 videos")
    assert len(read_manifest(manifest)) == VIDEOS


def test_an_interrupted_run_says_so_in_a_line(folder, tmp_path, start):
    manifest = tmp_path / "videos.jsonl"
    process = start(folder, manifest)
    wait_for_lines(manifest, 1)
    process.send_signal(signal.SIGINT)
    status, _, errors = finish(process)
    assert status == 130
    assert "Traceback" not in errors
    assert "interrupted: run the same command again to continue" in errors
    assert 1 <= len(read_manifest(manifest)) < VIDEOS


def test_a_second_process_on_the_same_manifest_is_refused(folder, tmp_path, start):
    manifest = tmp_path / "videos.jsonl"
    first = start(folder, manifest)
    wait_for_lines(manifest, 1)
    with pytest.raises(VideoError, match=r"videos\.jsonl is being written by another process: wait for it, or stop it"):
        index_videos.main(Options((folder,), manifest))
    status, output, _ = finish(first)
    assert status == 0
    assert output.startswith("12 videos")
    assert len(read_manifest(manifest)) == VIDEOS


def test_mistakes_are_named(folder, tmp_path, start):
    manifest = tmp_path / "videos.jsonl"
    for options, message in {
        Options((folder,), tmp_path / "videos.json"): r"--manifest is .*videos\.json: its name must end in \.jsonl",
        Options((folder,), manifest, image_fps=0): r"--image-fps is 0: it must be positive",
    }.items():
        with pytest.raises(UserError, match=message):
            index_videos.main(options)
    assert not manifest.exists()
    status, _, errors = finish(start(tmp_path / "nowhere", manifest, ""))
    assert (status, errors.strip()) == (1, f"error: {tmp_path}/nowhere: no such file or folder")


def test_gone_and_damaged_and_new_videos_are_told(folder, tmp_path, capsys, damage_video, encode_video):
    manifest = tmp_path / "videos.jsonl"
    options = Options((folder,), manifest)
    index_videos.main(options)
    capsys.readouterr()
    (folder / "03.mp4").unlink()
    damage_video(folder / "05.mp4", first=8)
    encode_video(folder / "gap.mp4", [*np.arange(20) / 10, *(5 + np.arange(20) / 10)])
    index_videos.main(options)
    output = capsys.readouterr().out
    assert output.startswith("12 videos, ")
    assert "refused 0; damaged 1; with gaps in time 1\n" in output
    assert f"  damaged: {folder}/05.mp4: decoding failed after 0." in output
    assert f"  gap: {folder}/gap.mp4: 1 gap, the first of 3.10 s at 1.90 s\n" in output
    assert f"  no longer there, or not under --videos any more: {folder}/03.mp4\n" in output
    assert [record for record in read_manifest(manifest) if record.state.path.endswith("03.mp4")] == []
    index_videos.main(options)
    assert "03.mp4" not in capsys.readouterr().out


def test_strict_makes_damage_an_error_but_keeps_the_index(folder, tmp_path, damage_video):
    manifest = tmp_path / "videos.jsonl"
    damage_video(folder / "05.mp4", first=8)
    with pytest.raises(VideoError, match=r"05\.mp4: refused or damaged"):
        index_videos.main(Options((folder,), manifest, strict=True))
    assert len(read_manifest(manifest)) == VIDEOS


def test_many_of_a_kind_are_counted_not_listed(folder):
    records = [Record((f"/{index}.mp4", 0, 0), None, f"/{index}.mp4: no video") for index in range(25)]
    lines = describe(records).splitlines()
    assert len(lines) == 12
    assert lines[-1] == "  refused: 15 more"
