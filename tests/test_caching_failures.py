"""Caching when things go wrong: a full disk, a folder that may not be written, a rival, a kill, damaged videos.

Real processes and real file systems; what was complete before must survive, and the same command must finish the work.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from data.embedding_cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_clip
from jepa.encoder import EncoderConfig, create_encoder

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
CLIPS = 24


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Videos, an encoder, and the cache of an undisturbed run."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "videos").mkdir()
    world = BallWorld(size=32, radius=3, frames=200, fps=10)
    for index in range(CLIPS):
        write_ball_clip(folder / "videos", index, world, seed=0)
    config = EncoderConfig(embedding_dimension=64, image_size=(32, 32))
    create_encoder(config).eval().save_pretrained(folder / "encoder")
    result = cache(folder, folder / "undisturbed")
    assert result.returncode == 0, result.stderr
    return folder


def start(material, output, *more, processes=1):
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, ROOT / "pipelines" / "cache_embeddings.py", "--videos", material / "videos", "--encoder",
               material / "encoder", "--fps", 10, "--clips-per-shard", 3, "--output-dir", output, *more]  # fmt: skip
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    )


def cache(material, output, *more, processes=1):
    process = start(material, output, *more, processes=processes)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def only_line(result):
    """The one line that a failure ends in."""
    assert result.returncode not in (0, -11, -7), result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def assert_same(one, other):
    one, other = EmbeddingCache(one), EmbeddingCache(other)
    assert [clip.key for clip in one.clips] == [clip.key for clip in other.clips]
    assert [clip.crc32 for clip in one.clips] == [clip.crc32 for clip in other.clips]
    assert all(one.is_intact(clip) for clip in one.clips)
    assert len(one.times_s) == one.frames  # no clip is there twice


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk can be mounted by root alone")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", ["100k", "300k"])
def test_a_full_disk_loses_nothing(tmp_path, material, size):
    disk = tmp_path / "disk"
    with small_disk(disk, size):
        line = only_line(cache(material, disk / "cache"))
        assert "No space left on device" in line
        assert "what was complete before is kept" in line
        manifests = list((disk / "cache" / "shards").glob("[!.]*.json"))
        kept = EmbeddingCache(disk / "cache").clips if manifests else []
        assert len(kept) == 3 * len(manifests) < CLIPS
        assert kept or size == "100k"
        # A full disk that is made larger: the same command goes on.
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        result = cache(material, disk / "cache")
        assert result.returncode == 0, result.stderr
        assert f"{len(kept)} of {CLIPS} clips are in the cache already" in result.stdout
        assert_same(disk / "cache", material / "undisturbed")


def test_a_folder_that_may_not_be_written(tmp_path, material):
    disk = tmp_path / "disk"
    with small_disk(disk, "50m"):
        shutil.copytree(material / "undisturbed", disk / "cache")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for output in (disk / "cache", disk / "new"):
            line = only_line(cache(material, output))
            assert "Read-only file system" in line
            assert str(output) in line
        assert_same(disk / "cache", material / "undisturbed")


def test_a_second_process_is_refused_and_the_first_ends_well(tmp_path, material):
    first = start(material, tmp_path / "cache", "--clips-per-shard", 1)
    deadline = time.monotonic() + 60
    while not (tmp_path / "cache" / "cache.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(first.pid, 19)  # SIGSTOP: however slow the second one starts, the first is in the middle
    try:
        line = only_line(cache(material, tmp_path / "cache"))
    finally:
        os.kill(first.pid, 18)  # SIGCONT
    assert "is being written by another process" in line
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, out + err
    assert_same(tmp_path / "cache", material / "undisturbed")


def test_two_processes_write_what_one_writes(tmp_path, material):
    result = cache(material, tmp_path / "cache", processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "cache", material / "undisturbed")


def test_other_batches_give_the_same_clips(tmp_path, material):
    """Of another size: the last bits may differ, the order and the clocks may not."""
    result = cache(material, tmp_path / "cache", "--batch-size", 7, "--dtype", "float32")
    assert result.returncode == 0, result.stderr
    one, other = EmbeddingCache(tmp_path / "cache"), EmbeddingCache(material / "undisturbed")
    assert [clip.key for clip in one.clips] == [clip.key for clip in other.clips]
    for clip, its_like in zip(one.clips, other.clips, strict=True):
        np.testing.assert_allclose(one.clip_embeddings(clip), other.clip_embeddings(its_like), atol=2e-3, rtol=2e-3)


def test_several_clocks_in_one_pass_give_what_each_gives_alone(tmp_path, material):
    both = cache(material, tmp_path / "both", "--fps", 4, "--phases", 2)
    assert both.returncode == 0, both.stderr
    alone = cache(material, tmp_path / "alone", "--fps", 4)
    assert alone.returncode == 0, alone.stderr
    added = cache(material, tmp_path / "alone", "--fps", 4, "--phases", 2)
    assert f"{CLIPS} of {2 * CLIPS} clips are in the cache already" in added.stdout
    assert_same(tmp_path / "both", tmp_path / "alone")


def test_kills_cost_no_more_than_a_buffer(tmp_path):
    """The short form of benchmarks/kill_caching.py, which kills 50 times."""
    script = [sys.executable, ROOT / "benchmarks" / "kill_caching.py"]
    options = ["--kills", "2", "--videos", "30", "--frames", "60", "--output-dir", tmp_path]
    result = subprocess.run([*script, *options], capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-1000:]
    assert json.loads((tmp_path / "results.json").read_text())["kills"] == 2


def test_damaged_videos_are_kept_as_far_as_they_go_and_accounted_for(tmp_path, material, damage_video):
    videos = tmp_path / "videos"
    shutil.copytree(material / "videos", videos)
    broken = damage_video(videos / "clip_00000.mp4", first=150)
    (videos / "clip_00001.mp4").write_bytes(b"no video")
    (tmp_path / "encoder").symlink_to(material / "encoder")
    result = cache(tmp_path, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    account = json.loads((tmp_path / "cache" / "account.json").read_text())
    assert list(account["refused"]) == [str(videos / "clip_00001.mp4")]
    assert list(account["damaged"]) == [str(broken)]
    assert f"read {CLIPS - 1} videos" in result.stdout
    assert "clip_00000.mp4: decoding failed after" in result.stdout
    frames = {Path(clip.key.source).name: clip.frames for clip in EmbeddingCache(tmp_path / "cache").clips}
    assert 140 <= frames["clip_00000.mp4"] <= 150
    assert "clip_00001.mp4" not in frames
    # Nothing is left to do, and the account still tells of both.
    again = cache(tmp_path, tmp_path / "cache")
    assert f"{CLIPS - 1} of {CLIPS - 1} clips are in the cache already" in again.stdout
    assert json.loads((tmp_path / "cache" / "account.json").read_text()) == account


def test_strict_stops_at_a_bad_video(tmp_path, material, damage_video):
    videos = tmp_path / "videos"
    shutil.copytree(material / "videos", videos)
    (tmp_path / "encoder").symlink_to(material / "encoder")
    damage_video(videos / "clip_00007.mp4", first=100)
    assert "clip_00007.mp4: decoding failed" in only_line(cache(tmp_path, tmp_path / "cache", "--strict"))
    (videos / "clip_00007.mp4").write_bytes(b"no video")
    assert "clip_00007.mp4: not a readable video" in only_line(cache(tmp_path, tmp_path / "cache", "--strict"))
