"""What a stranger sends, and what a file system does not know: one line, nothing executed, nothing of mine written."""

import errno
import json
import os
import re
import resource
import struct
import zipfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import data.files
from data.cache import EmbeddingCache
from data.cache_writer import CacheWriter
from data.errors import DataError
from data.files import hold, read_json, whole_file
from jepa.encoder import Encoder, EncoderConfig, FrameEncoder
from jepa.errors import ConfigurationError
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines.cache_embeddings import warn_of_rounding
from pipelines.run.artefacts import load_module, save_artefact
from pipelines.run.checkpoints import Checkpoints, find_fault
from pipelines.run.command import UserError
from pipelines.run.files import write_json
from pipelines.run.memory import require_memory
from pipelines.run.models import build_predictor
from tests.test_folder import take


def refuse(number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    return fail


# A file system that knows less


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_work_goes_on_and_this_is_said(number, tmp_path, monkeypatch, capsys, write_cache, make_clip):
    monkeypatch.setattr(data.files.fcntl, "flock", refuse(number))
    take(tmp_path / "run").begin({})
    write_cache(tmp_path / "cache", [make_clip("/a.mp4", 4)])
    assert len(EmbeddingCache(tmp_path / "cache").clips) == 1
    said = capsys.readouterr().err.splitlines()
    assert [f"warning: {tmp_path / name} lies on a file system without locks" in line
            for name, line in zip(("run", "cache"), said, strict=True)] == [True, True]  # fmt: skip


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF])
def test_a_folder_that_cannot_be_synchronised_is_no_fault(number, tmp_path, monkeypatch, write_cache, make_clip):
    monkeypatch.setattr(data.files.os, "fsync", refuse(number))
    write_json(tmp_path / "a.json", {"a": 1})
    assert read_json(tmp_path / "a.json") == {"a": 1}
    write_cache(tmp_path / "cache", [make_clip("/a.mp4", 4)])
    monkeypatch.setattr(data.files.os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_json(tmp_path / "a.json", {"a": 2})
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_a_folder_is_held_by_one(tmp_path):
    with hold(tmp_path), pytest.raises(DataError, match="is in use by another process: wait for it, or stop it"):
        hold(tmp_path)
    hold(tmp_path).close()


def test_on_a_full_disk_the_old_file_stays(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), whole_file(tmp_path / "a.json") as file:
            file.write(bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": 1}


# Links in a received folder


@pytest.mark.parametrize("name", [".lock", "run.json", "curve.jsonl", "logs", "model", "training_state", ".replaced"])
def test_nothing_is_written_through_a_link_in_a_run(name, tmp_path):
    mine, run = tmp_path / "mine", tmp_path / "run"
    take(run).begin({})
    mine.write_text("mine")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(mine)
    with pytest.raises((OSError, DataError, UserError)):
        take(run, overwrite=True).begin({})
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", [".lock", "shards", ".tmp." + 32 * "a"])
def test_nothing_is_written_through_a_link_in_a_cache(name, tmp_path, write_cache, make_clip):
    cache, mine = write_cache(tmp_path / "cache", [make_clip("/a.mp4", 4)]), tmp_path / "mine"
    mine.mkdir()
    (mine / "notes").write_text("mine")
    if (cache / name).exists():
        (cache / name).rename(tmp_path / "away")
    (cache / name).symlink_to(mine / "notes" if name != "shards" else mine)
    with nullcontext() if name.startswith(".tmp") else pytest.raises((OSError, DataError), match=re.escape(name)):
        write_cache(cache, [make_clip("/b.mp4", 4)])
    assert [path.read_text() for path in mine.iterdir()] == ["mine"]


# JSON


@pytest.mark.parametrize(
    "content",
    ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', "[1]", "", '{"a": ' + "[" * 40 + "]" * 40 + "}",
     '{"a": ' + "[" * 100_000, '{"a": 1' + "0" * 5000 + "}", '{"a": [' + "1," * 2_000_001 + "1]}", '{"a": "\xff"}'],
    ids=lambda content: content[:12],
)  # fmt: skip
def test_json_that_is_none_or_too_much_is_refused(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"."):
        read_json(tmp_path / "a.json")


def test_a_pipe_is_no_json(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="it is no file"):
        read_json(tmp_path / "a.json")


# Artefacts


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """An encoder and a predictor as they are left."""
    folder = tmp_path_factory.mktemp("models")
    encoder = FrameEncoder(EncoderConfig(image_size=(16, 16), embedding_dimension=4))
    save_artefact(folder / "encoder", "encoder", encoder.config, encoder)
    predictor = Predictor(MLPConfig(context=2, width=8), (4,), fps=4.0, encoder_fingerprint="ab")
    save_artefact(folder / "predictor", "predictor", predictor.description(), predictor)
    return folder


BUILD = {"encoder": Encoder.build, "predictor": build_predictor}


HOSTILE = {
    "encoder": [
        {"embedding_dimension": 10**6}, {"embedding_dimension": "4"}, {"image_size": [10**9, 10**9]},
        {"image_size": 16}, {"image_size": [10**5, 16], "pooling": "average"}, {"head_widths": [4] * 100_000},
        {"backbone": ["resnet18"]}, {"backbone": "vit_giant_patch14_dinov2"}, {"code": "print()"},
        {"kind": "clip", "model": {"num_hidden_layers": 10**9}},
    ],
    "predictor": [
        {"predictor": {"kind": "mlp", "context": 2, "width": 8, "depth": 10**9}},
        {"predictor": {"kind": "mlp", "context": 2, "width": 10**6}},
        {"predictor": {"kind": "transformer", "heads": 10**12}},
        {"shape": []}, {"shape": [4.0]}, {"fps": 0}, {"fps": "4"}, {"actions": [0]}, {"encoder_fingerprint": 3},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change"),
    [(kind, change) for kind, changes in HOSTILE.items() for change in changes],
    ids=lambda value: json.dumps(value)[:50],
)
def test_a_hostile_configuration_is_one_line_and_takes_no_memory(kind, change, models, tmp_path):
    content = read_json(models / kind / "config.json")
    folder = tmp_path / kind
    save_artefact(folder, kind, content["config"] | change, load_module(models / kind, kind, BUILD[kind]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=f"{folder}: ") as raised:
        load_module(folder, kind, BUILD[kind])
    assert "\n" not in str(raised.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


# Training states


def packed(path, content):
    """A state whose parts are packed: a thousandth of what it would take."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, part in parts.items():
            file.writestr(name, part)


def overlapping(path, content):
    """The same bytes under many names in the directory of the zip."""
    torch.save(content, path)
    blob = path.read_bytes()
    end = blob.rindex(b"PK\x05\x06")
    begin = blob.index(b"PK\x01\x02")
    *counts, _, _, note = struct.unpack("<4sHHHHIIH", blob[end : end + 22])
    directory, several = blob[begin:end], 1000
    total = counts[3] * several
    tail = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, total, total, len(directory) * several, begin, note)
    path.write_bytes(blob[:begin] + directory * several + tail)


@pytest.mark.parametrize("harm", [packed, overlapping, lambda path, content: torch.save([content], path)])
def test_a_state_that_would_grow_is_not_whole(harm, tmp_path):
    harm(tmp_path / "state.pt", {"shared": {"weight": torch.zeros(100_000)}, "own": ["{}"]})
    assert find_fault(tmp_path / "state.pt")


def test_a_state_without_end_is_one_line(tmp_path):
    own = [1.0] * 10
    for _ in range(12):
        own = [own] * 10
    saver = Checkpoints(Accelerator(cpu=True), tmp_path)
    saver.save((1, {}, {"curve": own}))
    with pytest.raises(UserError, match=r"is not as its run left it .ValueError: it holds too much.: add --overwrite"):
        saver.load_newest()


# Presets


@pytest.mark.parametrize(
    "text",
    [
        "toy_trainer: {output_dir: /x}",
        "toy_trainer: {output-dir: /x}",
        "toy_trainer: {overwrite: true}",
        "toy_trainer: {resume: true}",
        "toy_trainer: {videos: [a, --overwrite]}",
        "toy_trainer: {videos: [a, --output-dir, /x]}",
        "toy_trainer: {'output_dir=/x': true}",
        "a: &a [x, x]\nb: &b [*a, *a]\ntoy_trainer: {}",
        "toy_trainer: &a {steps: 1}\ntrain_predictor: *a",
        "toy_trainer: {a: " + "[" * 5000,
        "# " + "x" * 40_000 + "\ntoy_trainer: {}",
        "toy_trainer: !!python/name:os.system {}",
    ],
)
def test_a_strangers_preset_decides_neither_where_nor_over_what(text, tmp_path, monkeypatch):
    from pipelines.run.options import parse
    from tests.toy_trainer import Options

    (tmp_path / "preset.yaml").write_text(text)
    monkeypatch.setattr("sys.argv", ["toy_trainer.py", "--preset", str(tmp_path / "preset.yaml")])
    with pytest.raises(ConfigurationError, match=r"preset\.yaml"):
        parse(Options, "toy_trainer")


# Caches


@pytest.mark.parametrize("ticks", [[0, 2, 1, 3], [0, 0, 1, 2], [3, 2, 1, 0]])
def test_a_cache_in_which_time_goes_back_is_one_line(ticks, tmp_path, write_cache, make_clip):
    clip = make_clip("/a.mp4", 4)
    clip.ticks[:] = ticks
    cache = EmbeddingCache(write_cache(tmp_path, [clip]))
    with pytest.raises(DataError, match=r"holds times of /a\.mp4 that cannot be"):
        cache.unbroken_runs(cache.clips[0])


# Sizes and storage


@pytest.mark.parametrize(
    ("mean", "spread", "is_said"), [(100.0, 0.004, True), (1000.0, 0.5, True), (-30.0, 0.01, True), (0.0, 1.0, False)]
)
def test_the_rounding_of_storage_is_said(mean, spread, is_said, tmp_path, make_provenance, make_clip, capsys):
    with CacheWriter(tmp_path, make_provenance(dtype="float16")) as writer:
        for seed in range(3):
            clip = make_clip(f"/{seed}.mp4", 200, seed=seed)
            clip.columns["embeddings"][:] = mean + spread * clip.columns["embeddings"]
            writer.add(clip)
    stored = EmbeddingCache(tmp_path).take(np.arange(600))
    exact = np.concatenate([mean + spread * make_clip("", 200, seed=seed).columns["embeddings"] for seed in range(3)])
    expected = ((stored - exact) ** 2).mean(axis=0) / exact.astype(float).var(axis=0)
    np.testing.assert_allclose(writer.rounding, expected, rtol=0.05)
    warn_of_rounding(writer.rounding)
    assert ("in 5 of 5 features float16 rounds away what varies" in capsys.readouterr().err) == is_said


def test_more_than_memory_is_said_before_it_is_taken():
    with pytest.raises(UserError, match=r"--batch-size 9 takes some 4,000,000 GB of memory, and .* are free: lower it"):
        require_memory(1e15, "--batch-size 9")
    require_memory(1e3, "--batch-size 9")
