import contextlib
import errno
import io
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.reading import read_clips, read_frames
from data.cache import ClipKey
from data.clips import FrameClips
from data.clock import read_on_clock
from data.content import content_of
from data.counting import count_frames
from data.decoder import Damage
from data.errors import VideoError
from data.folders import find_videos
from data.manifest import check_videos, index_videos
from data.video import probe_video
from jepa.encoder import EncoderConfig, create_encoder
from pipelines.run.embed import Task, decode
from tests.conftest import draw_number
from tests.test_decoder import SIZE, assert_random_is_sequential

PHOTOMETRIC = b"\x06\1\3\0\1\0\0\0"  # a tag of TIFF


def write_images(folder, names, numbers=None):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in zip(range(len(names)) if numbers is None else numbers, names, strict=True):
        Image.fromarray(draw_number(number)).save(folder / name)
    return folder


@pytest.fixture
def numbered(read_number):
    """(number in the pixels, time) of every image."""

    def read(path, **options):
        return [(read_number(frame), round(time_s, 9)) for frame, time_s in read_frames(path, SIZE, **options)]

    return read


@pytest.fixture
def sequence(tmp_path):
    """Forty images, 000000.png to 000039.png."""
    return write_images(tmp_path / "frames", [f"{index:06d}.png" for index in range(40)])


def test_images_are_frames(sequence, numbered):
    assert numbered(sequence, image_fps=10) == [(index, index / 10) for index in range(40)]
    assert numbered(sequence) == [(index, round(index / 25, 9)) for index in range(40)]
    probed, info = probe_video(sequence, 10), count_frames(sequence, 10)
    assert (info.codec, info.height, info.width, info.frames) == ("images", 32, 80, 40)
    assert (info.average_fps, info.duration_s, info.gaps_s, info.damage) == (10, pytest.approx(4), (), "")
    assert (probed.average_fps, probed.duration_s, probed.seekable) == (10, pytest.approx(4), True)
    assert np.allclose(info.keyframes_s, np.arange(40) / 10)


def test_random_access_is_sequential(sequence):
    assert_random_is_sequential(sequence)


def test_images_lie_on_the_clock(sequence, read_number):
    timed = list(read_on_clock(sequence, SIZE, fps=5, offsets_s=[0.0, 0.1], image_fps=10))
    assert [(one.clock, one.tick, read_number(one.frame)) for one in timed] == [
        (index % 2, index // 2, index) for index in range(40)
    ]


def test_images_train(sequence, tmp_path):
    videos, _ = check_videos([sequence], fps=5, image_fps=10)
    clips = next(FrameClips(videos, SIZE, fps=5, batch_size=8, progress=False).batches({}))
    assert clips.frames.shape == (8, 2, 3, *SIZE)


def test_only_what_is_wanted_is_opened(sequence, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **named: opened.append(1) or original(*given, **named))
    read_clips(sequence, SIZE, [3.0, 1.0], length=3, image_fps=10)
    assert len(opened) <= 8


def test_a_missing_number_is_a_gap(tmp_path, numbered):
    numbers = [*range(1, 11), *range(31, 41)]
    folder = write_images(tmp_path / "frames", [f"{number:06d}.jpg" for number in numbers], numbers)
    assert numbered(folder, image_fps=10) == [(number, round((number - 1) / 10, 9)) for number in numbers]
    info = count_frames(folder, 10)
    ((begin_s, length_s),) = info.gaps_s
    assert (begin_s, length_s) == pytest.approx((0.9, 2.1))
    # The rate is what was given: the times that a stage reads with it are the same.
    assert info.average_fps == 10
    ticks = [timed.tick for timed in read_on_clock(folder, SIZE, fps=10, image_fps=info.average_fps)]
    assert ticks == [number - 1 for number in numbers]


def test_times_in_names_are_those_of_the_images_and_need_no_rate(tmp_path, numbered):
    start_ns, times_s = 1_403_636_579_763_555_584, [0, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45]
    names = [f"{start_ns + round(time_s * 1e9)}.png" for time_s in times_s]
    folder = write_images(tmp_path / "frames", names)
    assert numbered(folder, image_fps=3) == list(enumerate(times_s))
    info = count_frames(folder, 3)
    assert (info.average_fps, info.duration_s) == (pytest.approx(20), pytest.approx(0.5))
    assert info.assumed == "its images are shown at the times that are their names, over 0.45 s"
    ((begin_s, length_s),) = info.gaps_s
    assert (begin_s, length_s) == pytest.approx((0, 0.15))
    ticks = [timed.tick for timed in read_on_clock(folder, SIZE, fps=20, image_fps=info.average_fps)]
    assert ticks == [0, 3, 4, 5, 6, 7, 8, 9]


def test_several_series_are_refused_and_cost_nobody_else(tmp_path, sequence):
    stereo = write_images(tmp_path / "stereo", [f"{index}_{side}.png" for index in (8, 9) for side in ("l", "r")])
    videos, account = check_videos([tmp_path], fps=4)
    assert [video.path for video in videos] == [sequence]
    assert account.refused == {
        str(stereo): f"{stereo}: the names of its 4 images do not tell one order (8_l.png (2), 8_r.png (2)): "
        "give each series a folder of its own, and each image a number or a time"
    }


def test_what_is_no_image_does_not_count(tmp_path, numbered):
    folder = write_images(tmp_path / "frames", ["1.png", "2.png", ".3.png"])
    (folder / "labels.csv").write_text("1,2\n")
    assert len(numbered(folder)) == 2


def test_images_of_all_kinds(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    level = np.full((24, 36), 100, np.uint8)
    colours = np.stack([level, level, level], axis=-1)
    Image.fromarray(level).save(folder / "1.png")
    Image.fromarray(np.dstack([colours, level // 2])).save(folder / "2.png")
    Image.fromarray(colours).quantize(4).save(folder / "3.png")
    Image.fromarray(level.astype(np.uint16) * 257).save(folder / "4.png")
    Image.fromarray(colours).save(folder / "5.jpeg", quality=95)
    Image.fromarray(colours).convert("CMYK").save(folder / "6.JPG", quality=95)
    Image.fromarray(colours).save(folder / "7.bmp")
    Image.fromarray(colours).save(folder / "8.webp", lossless=True)
    Image.fromarray(colours).resize((50, 70)).save(folder / "9.tif")
    (folder / "10.pgm").write_bytes(b"P5 36 24 65535\n" + (level.astype(">u2") * 257).tobytes())
    Image.fromarray(colours).quantize(4).save(folder / "11.png", transparency=bytes([128] * 4))
    Image.fromarray(np.dstack([level, level // 2]), "LA").save(folder / "12.png")
    Image.fromarray(colours).save(folder / "13.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    Image.fromarray(colours).save(folder / "14.avif", quality=95)
    Image.fromarray(level > 50).save(folder / "15.png")
    Image.fromarray(65535 - level.astype(np.uint16) * 257).save(folder / "16.tif")
    negative = (folder / "16.tif").read_bytes().replace(PHOTOMETRIC + b"\1", PHOTOMETRIC + b"\0")  # 0 is white
    (folder / "16.tif").write_bytes(negative)
    frames = np.stack([frame for frame, _ in read_frames(folder, (24, 36))])
    assert np.abs(frames[15].astype(int) - 100).max() <= 2
    assert np.abs(frames[:14].astype(int) - 100).max() <= 2
    assert (frames[14] >= 254).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "avif"])
def test_images_stand_upright(tmp_path, suffix):
    upright, exif = Image.fromarray(draw_number(5)), Image.Exif()
    undoing = [None, 0, 3, 1, 5, 2, 6, 4]
    (tmp_path / "frames").mkdir()
    for orientation, undo in enumerate(undoing, start=1):
        exif[0x0112] = orientation
        picture = upright if undo is None else upright.transpose(Image.Transpose(undo))
        picture.save(tmp_path / "frames" / f"{orientation}.{suffix}", exif=exif, quality=95)
    frames = np.stack([frame for frame, _ in read_frames(tmp_path / "frames", (32, 80))]).astype(int)
    assert np.abs(frames - frames[0]).mean(axis=(1, 2, 3)).max() < 3
    assert (probe_video(tmp_path / "frames").height, len(frames)) == (32, 8)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", "cut", "flipped"])
def test_a_damaged_image_is_left_out_and_noted(tmp_path, numbered, content):
    folder = write_images(tmp_path / "frames", [f"{index:03d}.png" for index in range(10)])
    victim = folder / "004.png"
    whole = victim.read_bytes()
    middle = len(whole) // 2
    content = {"cut": whole[:middle], "flipped": whole[:middle] + b"\xff" * 10 + whole[middle + 10 :]}.get(
        content, content
    )
    victim.write_bytes(content)
    damage = Damage()
    assert numbered(folder, image_fps=10, damage=damage) == [(index, index / 10) for index in range(10) if index != 4]
    assert len(damage.breaks) == 1
    assert damage.breaks[0].startswith("image 004.png cannot be decoded (")
    info = count_frames(folder, 10)
    assert "004.png" in info.damage
    assert len(info.gaps_s) == 0 or info.gaps_s[0][0] == pytest.approx(0.3)
    with pytest.raises(VideoError, match=r"frames.*: image 004\.png cannot be decoded"):
        numbered(folder, image_fps=10)


def png_of(width, height):
    """A sound picture of 8 x 8 pixels that says it is larger."""
    whole, header = several("PNG", 1), b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:]


def several(kind, count=3):
    file = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), (level, 0, 0)) for level in (0, 100, 200)[:count]]
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:])
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png_of(8200, 8200), "8200 x 8200 pixels are more than 67,108,864: make it smaller"),
        (png_of(12_000, 12_000), "Image size"),
        (png_of(2**31 - 1, 2**31 - 1), "Image size"),
        (several("GIF")[:6] + b"\xff\xff\xff\xff" + several("GIF")[10:], "Image size"),
        (b"BM" + bytes(12) + struct.pack("<IiiHHII", 40, 30_000, 30_000, 1, 24, 0, 9) + bytes(99), "Image size"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "of no known format"),
        (several("PNG"), "it holds 3 pictures: unpack them"),
        (several("TIFF"), "it holds 3 pictures: unpack them"),
        (several("WEBP"), "it holds 3 pictures: unpack them"),
    ],
)
def test_hostile_pictures_are_left_out(tmp_path, numbered, content, reason):
    folder = write_images(tmp_path / "frames", [f"{index}.png" for index in range(4)])
    (folder / "2.png").write_bytes(content)
    damage = Damage()
    assert [number for number, _ in numbered(folder, damage=damage)] == [0, 1, 3]
    assert str(damage).startswith(f"image 2.png cannot be decoded ({reason}")


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server, contextlib.chdir(path.parent):
        server.bind(path.name)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "it is no file"),
        (make_socket, "it is no file"),
        (lambda path: path.symlink_to(path.name), os.strerror(errno.ELOOP)),
        (lambda path: path.symlink_to("nowhere"), os.strerror(errno.ENOENT)),
    ],
)
def test_what_is_no_file_is_never_waited_for(tmp_path, numbered, make, reason):
    folder = write_images(tmp_path / "frames", [f"{index}.png" for index in (0, 1, 2, 4)], [0, 1, 2, 4])
    make(folder / "3.png")
    (folder / "folder.png").mkdir()
    damage = Damage()
    assert numbered(folder, image_fps=10, damage=damage) == [(index, index / 10) for index in (0, 1, 2, 4)]
    assert str(damage).startswith(f"image 3.png cannot be decoded ({reason}")


@pytest.mark.parametrize("name", ["ENOENT", "ELOOP", "EACCES", "EIO", "ESTALE", "EMFILE", "ENOMEM"])
def test_a_fault_of_the_machine_is_no_damage_of_a_picture(sequence, numbered, monkeypatch, name):
    number, read = getattr(errno, name), Path.read_bytes

    def failing(path):
        if path.name == "000004.png":
            raise MemoryError if name == "ENOMEM" else OSError(number, os.strerror(number))  # without a name
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    damage = Damage()
    if name in ("ENOENT", "ELOOP"):  # the picture's own
        assert len(numbered(sequence, damage=damage)) == 39
        assert str(damage) == f"image 000004.png cannot be decoded ({os.strerror(number)})"
    else:
        with pytest.raises(OSError, match=f"{os.strerror(number)}.*000004.png"):
            numbered(sequence, damage=damage)


def test_an_image_that_may_not_be_read_is_never_committed_as_damage(sequence, tmp_path, monkeypatch):
    """The tests may run as root, who may read anything: so the system says no by itself."""
    read = Path.read_bytes

    def failing(path):
        if path == sequence / "000000.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    apart = write_images(tmp_path / "apart", ["1.png", "2.png"])
    _, account = check_videos([sequence, apart], fps=5, image_fps=10)
    assert account.refused == {str(sequence): f"{sequence}/000000.png: permission denied"}
    task = Task(sequence, [ClipKey(str(sequence), content_of(sequence), 0.0)])
    encoder = create_encoder(EncoderConfig(image_size=(16, 16)))
    list(decode(task, encoder=encoder, fps=5, image_fps=10, chunk_size=8, strict=False))
    assert "Permission denied" in task.refused
    assert not task.damage


@pytest.mark.parametrize("prefix", [b"\xff\xfe", b"a\nb\x1b[2J", b"$", b"n" * 250])
def test_names_of_any_bytes(tmp_path, numbered, prefix):
    names = [os.fsdecode(prefix + b"%d" % index) for index in range(3)]
    write_images(tmp_path / "frames", [f"{index}.png" for index in range(3)])
    for index, name in enumerate(names):
        (tmp_path / "frames" / f"{index}.png").rename(tmp_path / "frames" / f"{name[-250:]}.png")
    assert [number for number, _ in numbered(tmp_path / "frames")] == [0, 1, 2]


@pytest.mark.parametrize("names", [[], ["1.jpg"]])
def test_fewer_than_two_images_are_no_sequence(tmp_path, names):
    folder = write_images(tmp_path / "frames", names)
    with pytest.raises(VideoError, match="no videos in this folder"):
        find_videos([folder])
    with pytest.raises(VideoError, match=rf"frames: not a readable video, but a folder with {len(names)} images"):
        probe_video(folder)


def test_images_beside_a_video_are_no_sequence(tmp_path, encode_video):
    write_images(tmp_path, ["1.png", "2.png"])
    video = encode_video(tmp_path / "a.mp4", np.arange(5) / 10)
    assert find_videos([tmp_path])[0] == [video]


def test_nested_folders_are_sequences_of_their_own(tmp_path, numbered):
    root = tmp_path / "root"
    for name in ("b", "a/deep"):
        write_images(root / name, ["1.png", "2.png", "3.png"])
    write_images(root / "poor", ["1.png"])
    assert find_videos([root])[0] == [root / "a" / "deep", root / "b"]
    assert numbered(root / "a" / "deep", image_fps=10) == [(0, 0), (1, 0.1), (2, 0.2)]


def test_a_changed_image_changes_the_sequence(tmp_path):
    folder = write_images(tmp_path / "frames", [f"{index:06d}.png" for index in range(40)])

    def index():
        ((record,), _) = index_videos([folder], tmp_path / "manifest.jsonl", look=count_frames)
        return record

    before = index()
    assert index() == before
    Image.fromarray(draw_number(3)[:16]).save(folder / "000007.png")
    assert index().state != before.state
    write_images(folder, ["000040.png"])
    assert index().video.frames == 41


@pytest.mark.parametrize(
    ("names", "known", "looks"),
    [
        (["1.png", "2.png", "4.png"], [10, 30, 29.97], [10, 30, 29.97]),
        ([f"{0.4 * second:.3f}.png" for second in range(5)], [2.5, 2.5, 2.5], [10]),
    ],
)
def test_another_rate_is_another_look_only_where_names_are_no_times(names, known, looks, tmp_path):
    folder, rates = write_images(tmp_path / "frames", names), []

    def look(path, image_fps):
        rates.append(image_fps)
        return count_frames(path, image_fps)

    for at, image_fps in enumerate((10, 10, 30, 30, 29.97, 29.97)):
        ((record,), _) = index_videos([folder], tmp_path / "m.jsonl", look=look, image_fps=image_fps)
        assert record.video.average_fps == pytest.approx(known[at // 2])
    assert rates == looks
