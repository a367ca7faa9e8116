"""Fixtures that several test files share. Videos here carry the number of each frame in its pixels."""

import csv
import multiprocessing
import multiprocessing.forkserver
import os
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
import torch

from data.cache import ClipKey, Column, Provenance
from data.cache_writer import CacheWriter, EmbeddedClip
from jepa.baselines import Ridge
from jepa.encoder import EncoderConfig, create_encoder
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines.run.artefacts import save_artefact
from pipelines.run.caches import clips_in_short
from pipelines.run.judging import calibrate, measure_embeddings
from pipelines.run.models import calibration_artefact

ROOT = Path(__file__).resolve().parents[1]
SIZE = (16, 40)
"""(height, width) at which numbered frames are read back: four columns for each of ten bits."""


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """The last bits of a sum depend on the number of threads, which commands set; and tests share cores."""
    yield
    torch.set_num_threads(1)


def assert_near(found, expected, tolerance=1e-4):
    """Numbers in nested dictionaries and lists, relative or absolute."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(found[name], value, tolerance)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            assert_near(one, other, tolerance)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True)
    else:
        assert found == expected


def read_rows(path):
    """The rows of a table, dictionaries of text."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save_encoder(folder, **config):
    """An encoder that never trained, saved as a run of `pretrain` leaves it."""
    encoder = create_encoder(EncoderConfig(**config))
    save_artefact(folder, "encoder", encoder.config, encoder)
    return encoder


@pytest.fixture(scope="session")
def shared():
    """Folder of the material beside the project; the test is skipped where it is absent."""
    folder = Path(os.environ.get("JEPA_SHARED", ROOT.parent / "shared"))
    folder = folder if folder.is_absolute() else ROOT / folder
    if not folder.is_dir():
        pytest.skip(f"no shared material at {folder}: set JEPA_SHARED")
    return folder


def draw_number(number):
    """A picture of a number below 1024: ten columns, black or white, the lowest bit on the left."""
    bits = number >> np.arange(10) & 1
    row = np.repeat(np.where(bits, 235, 20), 8).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (32, 80, 3)).copy()


@pytest.fixture(scope="session")
def read_number():
    """The number in a frame, (3, height, width) uint8."""

    def read(frame):
        columns = np.asarray(frame, dtype=float).mean(axis=(0, 1)).reshape(10, -1)[:, 1:-1].mean(axis=1)
        return int(((columns > 128) << np.arange(10)).sum())

    return read


def add_sound(container, stream, seconds):
    for index in range(int(seconds * 8000 / 1024)):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 8000, 1024 * index, Fraction(1, 8000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


@pytest.fixture(scope="session")
def encode_video():
    """Encode pictures (height, width, 3), or numbers drawn as pictures.

    They are shown at known times in seconds; or there are only so many of them, `rate` in a second.
    """

    def encode(
        path, times_s, pictures=None, codec="libx264", options=None, rate=25, ticks_per_second=1000,
        pixel_format="yuv420p", container_options=None, sound_s=0,
    ):  # fmt: skip
        if isinstance(times_s, int):
            times_s, ticks_per_second = np.arange(times_s) / rate, rate
        pictures = range(len(times_s)) if pictures is None else pictures
        with av.open(str(path), "w", options=container_options or {}) as container:
            # x264's macroblock tree reads memory that it never wrote in pictures this small, and crashed once.
            usual = {"mbtree": "0"} if codec == "libx264" else {}
            stream = container.add_stream(codec, rate=rate, options=usual | (options or {}))
            stream.codec_context.thread_count = 1
            stream.codec_context.time_base = Fraction(1, ticks_per_second)
            stream.pix_fmt = pixel_format
            sound = container.add_stream("aac", rate=8000, layout="mono") if sound_s else None
            opened = False
            for time_s, picture in zip(times_s, pictures, strict=True):
                pixels = picture if isinstance(picture, np.ndarray) else draw_number(picture)
                if not opened:
                    stream.height, stream.width = pixels.shape[:2]
                    opened = True
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = round(time_s * ticks_per_second), Fraction(1, ticks_per_second)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
            if sound:
                add_sound(container, sound, sound_s)
        if codec == "libsvtav1" and hasattr(os, "sched_setscheduler"):
            # Run by root, it gives the thread that calls it real-time priority: all that is tested after it, and the
            # processes that this starts, would push aside whatever else runs on the machine.
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        return path

    return encode


@pytest.fixture(scope="session")
def damage_video():
    """Flip bits in one coded picture of a video, or in a slice of them, in the order of the file."""

    def damage(path, which, skipped=0, mask=0xFF):
        content = bytearray(path.read_bytes())
        with av.open(str(path)) as container:
            pictures = [packet for packet in container.demux(video=0) if packet.size]
        for picture in pictures[which] if isinstance(which, slice) else [pictures[which]]:
            begin = content.find(bytes(picture), picture.pos)
            begin = picture.pos if begin < 0 else begin  # transport streams cut them up
            for index in range(begin + skipped, begin + picture.size):
                content[index] ^= mask
        path.write_bytes(content)
        return path

    return damage


@pytest.fixture(scope="session")
def make_provenance():
    """What a small cache holds: embeddings of 5 numbers at 4 fps, and `columns` beside them."""

    def make(shape=(5,), dtype="float32", columns=None, **changes):
        fields = {
            "encoder": "runs/encoder", "encoder_fingerprint": "0123abcd", "fps": 4.0, "image_fps": 25.0,
            "image_size": (16, 40), "window": 1, "transform": "stretched", "precision": "fp32",
            "columns": {"embeddings": Column(dtype, tuple(shape)), **(columns or {})}, "versions": {"av": "18.1.0"},
        }  # fmt: skip
        return Provenance(**fields | changes)

    return make


@pytest.fixture(scope="session")
def make_clip():
    """A clip of random embeddings; `gaps` are positions before which ticks are missing."""

    def make(source, frames, gaps=(), seed=0, content=None, offset_s=0.0, shape=(5,), **columns):
        embeddings = np.random.default_rng([seed, frames]).normal(size=(frames, *shape)).astype(np.float32)
        steps = np.ones(frames, dtype=np.int64)
        steps[list(gaps)] = 3
        ticks = np.cumsum(steps) - 1
        key = ClipKey(str(source), content or f"content of {source}", offset_s)
        return EmbeddedClip(key, {"embeddings": embeddings, **columns}, ticks / 4 + offset_s, ticks)

    return make


@pytest.fixture(scope="session")
def write_cache(make_provenance):
    """Write clips to a cache and return its folder."""

    def write(folder, clips, clips_per_shard=2, **changes):
        with CacheWriter(folder, make_provenance(**changes), clips_per_shard=clips_per_shard) as writer:
            for clip in clips:
                writer.add(clip)
        return folder

    return write


@pytest.fixture(scope="session")
def save_model():
    """Save a predictor that never trained, calibrated on a cache, as a run of the trainer leaves it."""

    def save(folder, cache, horizon):
        space = {"fps": cache.provenance.fps, "encoder_fingerprint": cache.provenance.encoder_fingerprint}
        predictor = Predictor(MLPConfig(context=4, width=8), cache.shape, **space).eval()
        measure_embeddings(predictor, cache)
        ridge = Ridge(predictor.fps, 2, mean=predictor.mean, std=predictor.std, on_grid=False)
        calibration, _ = calibrate(predictor, ridge, cache, horizon=horizon)
        folder.mkdir(parents=True)
        save_artefact(folder / "predictor", "predictor", predictor.description(), predictor)
        save_artefact(folder / "calibration", *calibration_artefact(calibration, predictor, clips_in_short(cache)))

    return save


@pytest.fixture(scope="session")
def damage_cache():
    """Let the disk turn one number in a cache to NaN; the writer would refuse it."""

    def damage(folder):
        with h5py.File(next((folder / "shards").glob("*.h5")), "r+") as file:
            file["embeddings"][5, 1] = np.nan
        return folder

    return damage


@pytest.fixture(scope="module")
def forks():
    """Import the stages once; each process of the context `forkserver` is a fork of that one."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed is gone: glibc would keep up to half of what training needs
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["pipelines.pretrain_encoder", "pipelines.train_predictor", "timm.optim.lars"])
        multiprocessing.forkserver.ensure_running()
        yield
