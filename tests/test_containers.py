"""What a container's times and matrices mean: the faults of real recordings, three siblings of each."""

import errno
import struct
from io import FileIO
from itertools import pairwise

import av
import numpy as np
import pytest

import data.decoder
from benchmarks.reading import read_frames
from data.clock import read_on_clock
from data.counting import count_frames
from data.decoder import SEAM_S, Damage
from data.errors import VideoError
from data.manifest import check_videos
from data.video import probe_video
from tests.conftest import SIZE
from tests.test_decoder import FRAGMENTS, SILENT, assert_random_is_sequential, edit, numbers_and_times
from tests.test_video import still

GROUPS = {"g": "20", "bf": "2", "sc_threshold": "0"}

# Which of a picture's rows and columns are swapped, then mirrored, by (a, b, c, d) of an mp4's matrix.
UPRIGHT = {
    (1, 0, 0, 1): lambda picture: picture,
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],
    (1, 0, 0, -1): lambda picture: picture[::-1],
    (-1, 0, 0, -1): lambda picture: picture[::-1, ::-1],
    (0, 1, 1, 0): lambda picture: picture.swapaxes(0, 1),
    (0, 1, -1, 0): lambda picture: picture.swapaxes(0, 1)[:, ::-1],
    (0, -1, 1, 0): lambda picture: picture.swapaxes(0, 1)[::-1],
    (0, -1, -1, 0): lambda picture: picture.swapaxes(0, 1)[::-1, ::-1],
}


def set_matrix(video, matrix):
    content = bytearray(video.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (round(65536 * value) for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    video.write_bytes(content)
    return video


@pytest.mark.parametrize("matrix", UPRIGHT)
@pytest.mark.parametrize("skew", [0, 0.01])
def test_all_eight_display_matrices(tmp_path, encode_video, matrix, skew):
    stored = still(96, 144)
    video = encode_video(tmp_path / "phone.mp4", 3, [stored] * 3, options={"crf": "12"})
    a, b, c, d = matrix
    set_matrix(video, (a + skew * b, b - skew * a, c + skew * d, d - skew * c))
    upright = UPRIGHT[matrix](stored)
    info = probe_video(video)
    assert (info.height, info.width) == upright.shape[:2]
    for frame, _ in read_frames(video, upright.shape[:2]):
        assert np.abs(frame.transpose(1, 2, 0).astype(float) - upright).mean() < 4  # a wrong one is > 30


REFRESH = {"g": "50", "bf": "0", "x264-params": "intra-refresh=1"}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_where_a_keyframe_gives_no_frame_decoding_begins_earlier(tmp_path, encode_video, suffix):
    video = encode_video(tmp_path / f"refresh{suffix}", 200, options=REFRESH)
    assert_random_is_sequential(video)


JOINED = {
    "a.ts": ("libx264", {}, 250), "a.mkv": ("libx264", {}, 250), "live.mkv": ("libx264", {"live": "1"}, 250),
    "a.webm": ("libvpx", {}, 250), "a.mpg": ("mpeg2video", {}, 250), "f.mp4": ("libx264", FRAGMENTS, 230),
    "a.mp4": ("libx264", {}, 100), "a.flv": ("libx264", {}, 100), "a.wmv": ("wmv2", {}, 100),
}  # fmt: skip
"""Codec, options of the container, and frames that are found; FFmpeg leaves out the others."""


@pytest.mark.parametrize("name", JOINED)
def test_recordings_joined_by_cat_go_on_after_a_gap_or_it_is_said(tmp_path, encode_video, read_number, name):
    codec, container_options, found = JOINED[name]
    parts = []
    for numbers in (range(100), range(100, 250)):
        part = encode_video(
            tmp_path / name, len(numbers), numbers, codec=codec, container_options=container_options,
            options={"g": "20", "deadline": "realtime"} if codec in ("libvpx", "wmv2") else GROUPS,
        )  # fmt: skip
        parts.append(part.read_bytes())
    video = tmp_path / f"joined_{name}"
    video.write_bytes(b"".join(parts))
    damage = Damage()
    numbers, times_s = numbers_and_times(video, read_number, damage)
    assert len(numbers) == found
    assert numbers[:100] == list(range(100))
    assert numbers[100:] == list(range(350 - found, 250))[: found - 100]
    assert (np.diff(times_s) > 0).all()
    if found > 100:
        assert damage.corrupt_frames == 250 - found
        assert damage.breaks == ["times jump back after 3.96 s: another recording, set 10 s later"]
        first_s = 4 + SEAM_S + damage.corrupt_frames / 25
        np.testing.assert_allclose(times_s[100:], first_s + np.arange(found - 100) / 25, atol=2e-3)
    else:
        assert damage.breaks == [
            f"ends at 4.00 s, another recording begins there: its {len(parts[1]):,} bytes are left out"
        ]
    assert_random_is_sequential(video, damage=Damage())
    whole = [(timed.tick, timed.frame.tobytes()) for timed in read_on_clock(video, SIZE, fps=5, damage=Damage())]
    for begin_s, end_s in pairwise([0, 3.3, 9, 15.1, np.inf]):
        ticks = read_on_clock(video, SIZE, fps=5, start_s=begin_s, end_s=end_s, damage=Damage())
        assert [(timed.tick, timed.frame.tobytes()) for timed in ticks] == [
            one for one in whole if begin_s <= one[0] / 5 < end_s
        ]
    with pytest.raises(VideoError, match="another recording"):
        list(read_frames(video, SIZE))


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".ts", ".flv"])
@pytest.mark.parametrize("look", [probe_video, count_frames])
def test_a_pause_makes_no_video_slow(tmp_path, encode_video, suffix, look):
    times_s = np.concatenate([np.arange(50), 1550 + np.arange(50), 90_000 + np.arange(20)]) / 25
    video = encode_video(tmp_path / f"pause{suffix}", times_s, options=GROUPS, ticks_per_second=25)
    assert look(video).average_fps == pytest.approx(25, rel=0.02)
    assert check_videos([video], fps=25)[0]
    with pytest.raises(VideoError, match="fewer than the clock"):
        check_videos([video], fps=27)


@pytest.mark.parametrize(("skipped_ms", "shown_ms"), [(1010, 2990), (330, 3015), (0, 3999)])
def test_a_cut_between_frames_is_no_damage(tmp_path, encode_video, skipped_ms, shown_ms):
    video = encode_video(tmp_path / "cut.mp4", 100, options=GROUPS)
    edit(video, skipped_ms, shown_ms, 1000)
    info = count_frames(video)
    assert (info.damage, info.gaps_s) == ("", ())
    assert abs(info.frames - shown_ms / 40) <= 1
    assert_random_is_sequential(video)


def boxes(content):
    while content:
        size = int.from_bytes(content[:4], "big")
        yield content[4:8], content[:size]
        content = content[size:]


@pytest.mark.parametrize(("first", "last"), [(0, 5), (2, 5), (3, 4)])
def test_fragments_from_the_middle_are_whole(tmp_path, encode_video, read_number, first, last):
    video = encode_video(tmp_path / "a.mp4", 100, options=GROUPS | {"bf": "0"}, container_options=FRAGMENTS)
    kinds = list(boxes(video.read_bytes()))
    head = [box for kind, box in kinds if kind in (b"ftyp", b"moov")]
    fragments = [box for kind, box in kinds if kind in (b"moof", b"mdat")]
    video.write_bytes(b"".join(head + fragments[2 * first : 2 * last]))
    info = count_frames(video)
    assert (info.frames, info.damage) == (20 * (last - first), "")
    assert probe_video(video).duration_s == pytest.approx(0.8 * (last - first), abs=0.05)
    assert numbers_and_times(video, read_number)[0] == list(range(20 * first, 20 * last))
    assert_random_is_sequential(video)


@pytest.mark.parametrize("rate", [10, 60])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [("a.h264", "libx264", {"bf": "2"}), ("a.hevc", "libx265", {"x265-params": SILENT}), ("a.m4v", "mpeg4", {})],
)
def test_a_stream_without_a_container_has_the_rate_that_it_says(tmp_path, encode_video, name, codec, options, rate):
    video = encode_video(tmp_path / name, 60, codec=codec, options=options, rate=rate)
    for look in (probe_video, count_frames):
        info = look(video, 7.0)
        assert info.average_fps == pytest.approx(rate)
        assert info.assumed == ""
    times_s = [time_s for _, time_s in read_frames(video, SIZE)]
    np.testing.assert_allclose(times_s, np.arange(60) / rate, atol=1e-6)


@pytest.mark.parametrize("image_fps", [7.5, 25, 50])
def test_a_stream_that_says_no_rate_has_that_of_images_and_this_is_said(tmp_path, encode_video, image_fps):
    video = encode_video(tmp_path / "a.mjpeg", 30, codec="mjpeg", pixel_format="yuvj420p")
    info = count_frames(video, image_fps)
    assert info.average_fps == image_fps
    assert f"assumed: {video}: {info.assumed}" in str(check_videos([video], fps=5, image_fps=image_fps)[1])
    assert info.assumed == f"{image_fps:g} frames a second, for it says no rate"
    times_s = [time_s for _, time_s in read_frames(video, SIZE, image_fps=image_fps)]
    np.testing.assert_allclose(times_s, np.arange(30) / image_fps, atol=1e-5)


@pytest.mark.parametrize("pixel_format", ["rgb4", "bgr4"])
def test_a_pixel_format_that_cannot_be_converted_is_refused_by_name(tmp_path, encode_video, pixel_format):
    good = encode_video(tmp_path / "good.mp4", 10)
    video = tmp_path / "strange.nut"
    with av.open(str(video), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, pixel_format
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame(64, 32, pixel_format)))
    with pytest.raises(VideoError, match=f"strange.nut: its pixel format, {pixel_format}, cannot be converted"):
        probe_video(video)
    videos, account = check_videos([video, good], fps=5)
    assert [one.path for one in videos] == [good]
    assert list(account.refused) == [str(video)]


@pytest.mark.parametrize("rate", [240, 500, 1000])
@pytest.mark.parametrize("part", [1, 2, 5])
def test_fast_recordings_give_the_nearest_frame(tmp_path, encode_video, read_number, rate, part):
    video = encode_video(tmp_path / "fast.mp4", 200, rate=rate, options=GROUPS)
    sampled = [(timed.tick, read_number(timed.frame)) for timed in read_on_clock(video, SIZE, fps=rate / part)]
    assert sampled == [(tick, min(part * tick, 199)) for tick in range(len(sampled))]
    assert len(sampled) >= 200 // part


# The machine


@pytest.fixture
def break_disk(monkeypatch):
    """Let reading beyond a place of a file fail from now on, in the number of times that is given."""

    def break_it(path, place, code, times=10**6):
        left = [times]

        class Faulty(FileIO):
            def read(self, size=-1):
                if self.name == path and self.tell() + size > place and left[0] > 0:
                    left[0] -= 1
                    raise OSError(code, "the disk says no")
                return super().read(size)

        class File(data.decoder.CheckedFile, Faulty):
            pass

        monkeypatch.setattr(data.decoder, "CheckedFile", File)

    return break_it


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.ts", "mpeg2video"), ("a.mkv", "mpeg4"), ("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.wmv", "wmv2"),
     ("a.flv", "libx264"), ("a.mpg", "mpeg2video"), ("a.mjpeg", "mjpeg")],
)  # fmt: skip
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_error_is_no_end_of_a_video(tmp_path, encode_video, break_disk, name, codec, code):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 96, 160, 3), dtype=np.uint8)
    video = encode_video(
        tmp_path / name, 60, pictures, codec=codec, pixel_format="yuvj420p" if codec == "mjpeg" else "yuv420p"
    )
    size = video.stat().st_size
    assert size > 100_000
    for read in (
        lambda: count_frames(video),
        lambda: list(read_on_clock(video, SIZE, fps=5)),
        lambda: list(read_on_clock(video, SIZE, fps=1, damage=Damage())),
    ):
        data.decoder._index.cache_clear()
        break_disk(video, size // 2, code, times=1)  # what FFmpeg takes for the end is not tried again
        with pytest.raises(OSError, match="the disk says no") as error:
            read()
        assert (error.value.errno, error.value.filename) == (code, str(video))
    info = count_frames(video)
    assert (info.frames, info.damage) == (60, "")


@pytest.mark.parametrize(("name", "codec"), [("a.mjpeg", "mjpeg"), ("a.gif", "gif"), ("a.mov", "png")])
def test_a_picture_that_says_it_is_enormous_is_not_decoded(tmp_path, encode_video, name, codec):
    pixels = {"mjpeg": "yuvj420p", "gif": "rgb8", "png": "rgb24"}[codec]
    video = encode_video(tmp_path / name, 1, codec=codec, pixel_format=pixels)
    content = bytearray(video.read_bytes())
    at, code = {
        "mjpeg": (content.find(b"\xff\xc0") + 5, ">HH"),
        "gif": (6, "<HH"),
        "png": (content.find(b"IHDR") + 4, ">II"),
    }[codec]
    struct.pack_into(code, content, at, 30_000, 30_000)
    video.write_bytes(content)
    with pytest.raises(VideoError, match=name):
        probe_video(video)


@pytest.mark.parametrize(
    "text", ["#EXTM3U\n#EXTINF:4,\n{}\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile {}\n", "[playlist]\nFile1={}\n"]
)
@pytest.mark.parametrize("name", ["a.m3u8", "a.mp4"])
def test_a_list_of_other_files_opens_none(tmp_path, encode_video, text, name):
    encode_video(tmp_path / "other.ts", 10)
    (tmp_path / name).write_text(text.format("other.ts"))
    with pytest.raises(VideoError, match=f"{name}: "):
        probe_video(tmp_path / name)
