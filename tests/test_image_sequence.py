import zipfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.reading import read_clips, read_frames
from data.clips import FrameClips
from data.clock import read_on_clock
from data.counting import count_frames
from data.decoder import Damage, VideoError
from data.folders import find_videos
from data.manifest import check_videos, index_videos
from data.video import probe_video
from tests.conftest import draw_number
from tests.test_decoder import SIZE, assert_random_is_sequential


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
    videos, _ = check_videos([sequence], fps=5, image_fps=10, progress=False)
    clips = next(FrameClips(videos, SIZE, fps=5, batch_size=8, progress=False).batches({}))
    assert clips.frames.shape == (8, 2, 3, *SIZE)


def test_only_what_is_wanted_is_opened(sequence, monkeypatch):
    opened = []
    original = Image.open
    monkeypatch.setattr(Image, "open", lambda *arguments: opened.append(1) or original(*arguments))
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


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["frame_10.png", "frame_9.png", "frame_100.png", "frame_11.png"], [(1, 0), (0, 0.1), (3, 0.2), (2, 9.1)]),
        (["0.png", "5.png", "10.png", "20.png"], [(0, 0), (1, 0.1), (2, 0.2), (3, 0.4)]),  # in steps of five
        (["a.png", "b.png", "c.png"], [(0, 0), (1, 0.1), (2, 0.2)]),
        (["1.png", "2.png", "zebra.png"], [(0, 0), (1, 0.1), (2, 0.2)]),
        (["01.png", "1.png", "2.png"], [(0, 0), (1, 0.1), (2, 0.2)]),
    ],
)
def test_numbers_in_names_are_times_and_other_names_are_in_order(tmp_path, numbered, names, shown):
    assert numbered(write_images(tmp_path / "frames", names), image_fps=10) == shown


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
    Image.fromarray(level > 50).save(folder / "10.png")
    frames = np.stack([frame for frame, _ in read_frames(folder, (24, 36))])
    assert np.abs(frames[:9].astype(int) - 100).max() <= 2
    assert (frames[9] >= 254).all()


def test_images_stand_upright(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    upright = Image.fromarray(draw_number(5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    upright.save(folder / "1.jpg", quality=95)
    upright.rotate(90, expand=True).save(folder / "2.jpg", exif=exif, quality=95)
    plain, turned = (frame for frame, _ in read_frames(folder, (32, 80)))
    assert np.abs(plain.astype(int) - turned).mean() < 2
    assert (count_frames(folder).height, count_frames(folder).width) == (32, 80)


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


def test_a_zip_is_refused_and_listed_and_hides_nothing_beside_it(tmp_path):
    folder = write_images(tmp_path / "frames", [f"{index}.png" for index in range(3)])
    archive = folder / "images.ZIP"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "1.png", "1.png")
    videos, account = check_videos([tmp_path], fps=4, progress=False)
    assert [video.path for video in videos] == [folder]
    assert list(account.refused) == [str(archive)]
    with pytest.raises(VideoError, match=r"images\.ZIP: an archive: unpack it"):
        check_videos([archive], fps=4, progress=False)


def test_a_changed_image_changes_the_sequence(tmp_path):
    folder = write_images(tmp_path / "frames", [f"{index:06d}.png" for index in range(40)])

    def index():
        ((record,), _) = index_videos([folder], tmp_path / "manifest.jsonl", look=count_frames, progress=False)
        return record

    before = index()
    assert index() == before
    Image.fromarray(draw_number(3)[:16]).save(folder / "000007.png")
    assert index().state != before.state
    write_images(folder, ["000040.png"])
    assert index().video.frames == 41


def test_another_rate_is_another_index(tmp_path):
    folder = write_images(tmp_path / "frames", ["1.png", "2.png", "4.png"])
    manifest = tmp_path / "manifest.jsonl"
    rates = []

    def look(path, image_fps):
        rates.append(image_fps)
        return count_frames(path, image_fps)

    for image_fps in (10, 10, 30, 30, 29.97, 29.97):
        ((record,), _) = index_videos([folder], manifest, look=look, image_fps=image_fps, progress=False)
        assert record.video.average_fps == image_fps
    assert rates == [10, 30, 29.97]
