r"""A folder as people have them, and every stage over it: the account adds up to the last file, and nothing is silent.

  python -m benchmarks.odd_folder --output-dir runs/benchmarks/odd_folder

A phone's camera roll, a CCTV recorder's disk, a robot's bag of images, a hub's cache of links, and what a stranger may
have put there: some eighty things. All stages run over it as a person runs them; each exit code must be 0.
"""

import json
import os
import random
import shutil
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from benchmarks.common import run
from data.synthetic import BallWorld, write_ball_videos
from jepa.config import Bounded
from pipelines.run.command import require, run_command

SIZE = (64, 48)
UNIT = 1 << 16
TURNED, MIRRORED, UPSIDE_DOWN = (0, UNIT, -UNIT, 0), (-UNIT, 0, 0, UNIT), (-UNIT, 0, 0, -UNIT)
"""Display matrices of phones."""
JUNK = """
    IMG_0001.HEIC IMG_0002.JPG IMG_0003.AAE Screenshot_1.png Screenshot_2.png .DS_Store ._IMG_0003.MP4 IMG_0009.dng
    .thumbnails/1.mp4 .trashed-17-IMG_0008.MP4 IMG_0007.MP4.part Thumbs.db desktop.ini
"""
KEPT_BY_DEVICES = """
    @eaDir/cam.mp4/SYNOVIDEO.mp4 #recycle/old.mp4 $RECYCLE.BIN/$R1.mp4 index.db log.txt log.1 .lock empty.avi cam.dav
    cam.idx cam.srt lost+found/1 System.ini
"""


@dataclass(frozen=True)
class Options(Bounded):
    """Make an odd folder, and run every stage over it."""

    output_dir: Path = Path("runs/benchmarks/odd_folder")
    """A new folder for it and for the runs."""


def main(options: Options) -> None:
    """Make it, run all stages, add up their accounts."""
    folder, runs = options.output_dir / "videos", options.output_dir / "runs"
    require(not options.output_dir.exists(), f"--output-dir {options.output_dir} is there: name a new folder")
    make(folder)
    write_ball_videos(options.output_dir / "more", 4, BallWorld(size=32, radius=3, frames=40, fps=10), seed=1)
    small = {"encoder.image-size": (32, 32), "encoder.embedding-dimension": 8, "batch-size": 16}
    few = {"tracker": "none", "log-every": 2, "steps": 4}
    clock, predictor = {"fps": 4}, {"predictor.context": 3, "rollout-steps": 2, "validation-horizon": 4}
    encoder, judged = {"encoder": runs / "encoder" / "encoder"}, {"predictor": runs / "predictor"}
    run("inspect_folder", folder, "--count", "--manifest", runs / "videos.jsonl")
    run("pretrain_encoder", "--videos", folder, clock, small, few, "--output-dir", runs / "encoder")
    for videos, cache in ((folder, "odd"), (options.output_dir / "more", "more")):
        run("cache_embeddings", "--videos", videos, encoder, clock, "--output-dir", runs / cache)
    caches = {"train-cache": runs / "odd", "validation-cache": runs / "more"}
    run("train_predictor", caches, predictor, few, "--output-dir", runs / "predictor")
    run("evaluate_rollout", {"cache": runs / "more", "horizon": 4}, judged, "--output-dir", runs / "evaluation")
    run("score_surprise", "--videos", folder, encoder, judged, "--output-dir", runs / "surprise")
    for account in ("encoder", "odd", "surprise/cache"):
        add_up(folder, runs / account / "account.json")


def add_up(folder: Path, account: Path) -> None:
    """Raise `UserError` unless an account says of every file what became of it."""
    said = json.loads(account.read_text())
    files = sum(len(names) for _, _, names in os.walk(folder))
    links = sum((Path(where) / name).is_symlink() for where, folders, _ in os.walk(folder) for name in folders)
    found = sum(said["found"].values())
    require(found == files + links, f"{account} tells of {found} of {files} files and {links} links to folders")
    told = {path for name in ("read_s", "refused", "doubles") for path in said[name]}
    images = sum(len(list(Path(path).iterdir())) - 1 for path in told if Path(path).is_dir())
    looked_at = said["found"]["looked at"]
    require(len(told) <= looked_at <= len(told) + images, f"{account} tells what became of {len(told)} of {looked_at}")


def make(folder: Path) -> None:
    """Fill a new folder."""
    folder.mkdir(parents=True)
    for part in (camera_roll, recorder, bag, hub, stranger):
        part(folder / part.__name__)


def camera_roll(folder: Path) -> None:
    """Videos upright, turned and mirrored, one half of a live photo, a copy, and all that is beside them."""
    for name in JUNK.split():
        put(folder / name)
    for seed, (name, matrix) in enumerate(
        {"IMG_0001.MOV": TURNED, "IMG_0003.MP4": MIRRORED, "IMG_0004.MP4": UPSIDE_DOWN, "VID_0005.3gp": None,
         "clip.webm": None, "anim.gif": None}.items()
    ):  # fmt: skip
        turn(film(folder / name, seed), matrix)
    shutil.copy(folder / "IMG_0004.MP4", folder / "IMG_0004 (1).MP4")


def recorder(folder: Path) -> None:
    """Joined, cut off, raw and paused recordings, and what the device keeps for itself."""
    for name in KEPT_BY_DEVICES.split():
        put(folder / name)
    parts = [film(folder / name, seed) for seed, name in enumerate(("1.ts", "2.ts", "3.mkv", "4.264"), start=10)]
    put(folder / "joined.ts", parts[0].read_bytes() + film(folder / "part.ts", 14).read_bytes())
    whole = film(folder / "whole.mkv", 15).read_bytes()
    put(folder / "cut.mkv", whole[: len(whole) // 2])
    film(folder / "pause.mp4", 16, pause_s=30)
    film(folder / "VTS_01_1.VOB", 17, rate=25)
    film(folder / "fast.avi", 18, rate=50)


def bag(folder: Path) -> None:
    """Images by time, with gaps, in two series, with a pipe and dead links among them, and tables."""
    times_ns = np.cumsum([0, 150, *[50] * 30]) * 1_000_000 + 1_533_151_603_512_404_000
    for names, where in (
        ([f"{time_ns}.png" for time_ns in times_ns], "by time"),
        ([f"frame_{number:06}.jpg" for number in (*range(30), *range(40, 60))], "drive.01"),
        ([f"{number:04}_{side}.png" for number in range(12) for side in ("left", "right")], "stereo"),
        (["lonely.png"], "alone"),
    ):
        for seed, name in enumerate(names):
            put(folder / where / name)
            picture(seed).save(folder / where / name)
    put(folder / "by time" / f"{times_ns[-1] + 10**9}.png", b"\x89PNG cut off")
    (folder / "by time" / f"{times_ns[-1] + 2 * 10**9}.png").symlink_to("nowhere")
    os.mkfifo(folder / "drive.01" / "frame_000099.jpg")
    put(folder / "drive.01.csv", b"frame,speed\n0,1\n1,2\n")
    for name in ("imu.csv", "bag.yaml", "calibration.json", "README"):
        put(folder / name)


def hub(folder: Path) -> None:
    """A hub's cache: blobs without a suffix, links that have one, one that was never fetched, links to folders."""
    for seed, name in enumerate(("train/a.mp4", "train/b.mp4", "test/c.mp4"), start=20):
        blob = film(folder / "blobs" / f"{seed}.mp4", seed).rename(folder / "blobs" / f"{seed:x}e2f6")
        link = folder / "snapshots" / "main" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "snapshots" / "main" / "not fetched.mp4").symlink_to("../../blobs/ffff")
    (folder / "latest").symlink_to("snapshots/main")
    put(folder / "refs" / "main")
    put(folder / "snapshots" / "main" / "README.md")


def stranger(folder: Path) -> None:
    """Archives, pipes, sockets, loops, bombs, playlists, names of all kinds, and somebody's runs."""
    for seed, name in enumerate(
        ("price $5_$10", "new\nline", "\x1b[31mred", os.fsdecode(b"M\xe4rz"), "x" * 250, "ü" * 125, "-rf", " ", "a\\b"),
        start=30,
    ):
        film(folder / f"{seed}.mp4", seed).rename(folder / f"{name}.mp4")
    for name in (
        "unpack me.zip",
        "me.tar.gz",
        "and me.7z",
        "not called a video.dat",
        "code.ts",
        "deep/er/and/er/x.MP4",
    ):
        put(folder / name, b"nothing that it says")
    put(folder / "list.mp4", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    put(folder / "script.mp4", b"ffconcat version 1.0\nfile '/etc/passwd'\n")
    os.mkfifo(folder / "pipe.mkv")
    with socket.socket(socket.AF_UNIX) as one:
        here = Path.cwd()
        os.chdir(folder)  # such names must be short
        one.bind("socket.mp4")
        os.chdir(here)
    (folder / "dead").symlink_to("nowhere")
    (folder / "round.mp4").symlink_to("round.mp4")
    (folder / "up").symlink_to("..")
    for name in ("1.png", "2.png"):
        put(folder / "bombs" / name, png_of_size(60_000, 60_000))
    put(folder / "old run" / "run.json", b'{"format": "video-jepa run 1"}')
    put(folder / "old run" / "pictures" / "a.png")
    put(folder / "old cache" / "cache.json", b'{"encoder": "e", "encoder_fingerprint": "f"}')
    put(folder / "robot" / "run.json", b'{"robot": 1}')
    film(folder / "robot" / "arm.mov", 50)


# What they are made of


def put(path: Path, content: bytes | None = None) -> Path:
    """A file of some bytes, by default its own name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(os.fsencode(path.name) if content is None else content)
    return path


def picture(seed: int, at: int = 0) -> Image.Image:
    """A square on noise."""
    pixels = np.random.default_rng(seed // 1000).integers(0, 60, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    row, column = random.Random(seed).randrange(SIZE[1] - 12), (seed + 2 * at) % (SIZE[0] - 12)
    pixels[row : row + 12, column : column + 12] = 220
    return Image.fromarray(pixels)


def film(path: Path, seed: int, *, rate: int = 10, pause_s: int = 0) -> Path:
    """Four seconds of a moving square, its container by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kinds = {".3gp": "mpeg4", ".webm": "libvpx", ".gif": "gif", ".VOB": "mpeg2video", ".avi": "mpeg4"}
    form = {".264": "h264", ".VOB": "vob", ".MOV": "mov", ".MP4": "mp4"}.get(path.suffix)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(kinds.get(path.suffix, "libx264"), rate=rate)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "rgb8" if path.suffix == ".gif" else "yuv420p"
        for number in range(4 * rate):
            frame = av.VideoFrame.from_image(picture(1000 * seed, number))
            frame.pts = number + (pause_s * rate if number >= 2 * rate else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, matrix: tuple[int, int, int, int] | None) -> Path:
    """Write a display matrix into the header of a track."""
    if matrix is not None:
        content, (a, b, c, d) = bytearray(path.read_bytes()), matrix
        begin = content.index(b"tkhd") + 44
        content[begin : begin + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)
    return path


def png_of_size(width: int, height: int) -> bytes:
    """The header of a picture that would fill the memory."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", 0)


if __name__ == "__main__":
    run_command(main, Options)
