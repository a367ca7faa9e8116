"""Caching when things go wrong: a full disk, a folder that may not be written, a rival, a kill.

Real processes and real file systems; what was complete before must survive, and the same command must finish the work.
"""

import os
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from data.cache import EmbeddingCache
from data.synthetic import BallWorld, write_ball_clip
from tests.conftest import save_encoder

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
    save_encoder(folder / "encoder", embedding_dimension=64, image_size=(32, 32))
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
    assert len({clip.key for clip in one.clips}) == len(one.clips)


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
    assert "is in use by another process" in line
    out, err = first.communicate(timeout=120)
    assert first.returncode == 0, out + err
    assert_same(tmp_path / "cache", material / "undisturbed")


def test_two_processes_write_what_one_writes(tmp_path, material):
    result = cache(material, tmp_path / "cache", processes=2)
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "cache", material / "undisturbed")


def test_killed_and_resumed_is_bit_equal(tmp_path, material):
    process = start(material, tmp_path / "cache", "--clips-per-shard", 1)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("shards/[!.]*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert 0 < len(EmbeddingCache(tmp_path / "cache").clips) < CLIPS
    result = cache(material, tmp_path / "cache")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "cache", material / "undisturbed")
