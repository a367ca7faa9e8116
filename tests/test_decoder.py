"""Random access against reading in order, damage, and files out of the ordinary."""

import io
import re
import struct
from itertools import chain, pairwise

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from PIL import Image

from benchmarks.reading import read_clips, read_frames
from data.clock import read_frames_at, read_on_clock
from data.counting import count_frames
from data.decoder import Damage, VideoDecoder
from data.errors import VideoError
from data.video import probe_video
from tests.conftest import add_sound

SIZE = (16, 40)
CLIP = 16
SHORT_GOP = {"g": "30", "bf": "3"}
SILENT = "log-level=none"
CLIPS = [
    "av1.mkv", "bigbuckbunny.mp4", "bikes.mp4", "carphone.mp4", "corrupted.mp4", "h264_10bit.mp4", "h265.mp4",
    "pancake.mkv", "rotated_0.mov", "rotated_180.mov", "rotated_270.mov", "rotated_90.mov",
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """How often a method of the decoder is called from now on, in a list of one number."""

    def count(name):
        times, method = [0], getattr(VideoDecoder, name)

        def counting(self):
            times[0] += 1
            return method(self)

        monkeypatch.setattr(VideoDecoder, name, counting)
        return times

    return count


@pytest.fixture
def begun_again(calls):
    """How often a video had to be decoded from its beginning because a seek failed."""
    return calls("_begin_again")


def uneven_times(count):
    """Times on whole milliseconds, 5 to 100 fps."""
    steps_ms = np.random.default_rng(0).integers(10, 200, size=count - 1)
    return np.concatenate([[0], np.cumsum(steps_ms)]) / 1000


def assert_random_is_sequential(path, clips=8, seeds=(0, 1), damage=None):
    whole = list(read_frames(path, SIZE, damage=damage))
    times_s = np.array([time_s for _, time_s in whole])
    assert (np.diff(times_s) > 0).all()
    for seed in seeds:
        starts_s = np.random.default_rng(seed).uniform(0, times_s[-1] * 1.02, clips if seed else 2)
        found = read_clips(path, SIZE, starts_s, length=CLIP, damage=damage)
        assert len(found) == len(starts_s)
        for start_s, (frames, found_s) in zip(starts_s, found, strict=True):
            first = np.searchsorted(times_s, start_s)
            expected = whole[first : first + CLIP]
            assert found_s.tolist() == [time_s for _, time_s in expected]
            assert frames.shape == (len(expected), 3, *SIZE)
            assert all(np.array_equal(one, other) for one, (other, _) in zip(frames, expected, strict=True))
        frames, found_s = read_frames_at(path, SIZE, times_s=starts_s, damage=damage)
        for wanted_s, frame, time_s in zip(starts_s, frames, found_s, strict=True):
            index = int(np.flatnonzero(times_s == time_s)[0])
            assert abs(time_s - wanted_s) <= np.abs(times_s - wanted_s).min() + 2e-3
            assert np.array_equal(frame, whole[index][0])


@pytest.mark.parametrize("name", CLIPS)
def test_random_clips_of_the_shared_clips(shared, begun_again, name):
    damage = Damage() if name == "corrupted.mp4" else None
    assert_random_is_sequential(shared / "clips" / name, damage=damage)
    assert begun_again == [0]
    info = count_frames(shared / "clips" / name)
    if damage:
        assert info.frames == 28
        assert info.damage.startswith("decoding failed after 2.70 s (")
    else:
        assert (info.damage, info.gaps_s) == ("", ())


NINE = {"g": "30", "deadline": "realtime", "cpu-used": "8"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
ENCODINGS = [
    ("b_frames.avi", "libx264", SHORT_GOP), ("raw.h264", "libx264", SHORT_GOP), ("divx.avi", "mpeg4", SHORT_GOP),
    ("raw.hevc", "libx265", {"x265-params": SILENT}), ("long.mp4", "libx264", {"g": "250", "bf": "3"}),
    *((f"b_frames.{suffix}", "libx264", SHORT_GOP) for suffix in ("mp4", "mkv", "mov", "mts", "flv")),
    ("fragments.mp4", "libx264", SHORT_GOP), ("old.wmv", "wmv2", {"g": "12"}),
    ("programme.mpg", "mpeg2video", {"g": "12", "bf": "2"}),
    *((f"open.{suffix}", "libx264", SHORT_GOP | {"x264-params": "open-gop=1"}) for suffix in ("mp4", "mkv", "ts")),
    *((f"open5.{suffix}", "libx265", {"x265-params": f"open-gop=1:keyint=30:{SILENT}"}) for suffix in ("mp4", "mkv")),
    *((f"open2.{suffix}", "mpeg2video", {"g": "15", "bf": "2"}) for suffix in ("mp4", "ts")),
    ("open4.mp4", "mpeg4", SHORT_GOP), ("nine.webm", "libvpx-vp9", NINE),
    ("eight.webm", "libvpx", {"g": "30", "deadline": "realtime", "auto-alt-ref": "1", "lag-in-frames": "10"}),
    ("one.mkv", "libsvtav1", {"g": "30", "preset": "13"}), ("motion.avi", "mjpeg", {}), ("motion.mov", "mjpeg", {}),
    ("small.GIF", "gif", {}),
]  # fmt: skip
PIXELS = [
    ("alpha.mov", "qtrle", {}, "argb"), ("portable.mov", "png", {}, "rgba"),
    ("alpha.webm", "libvpx-vp9", NINE | {"auto-alt-ref": "0"}, "yuva420p"),
    ("ten_bits.mp4", "libx264", {}, "yuv420p10le"), ("ten_bits.mkv", "libx265", {"x265-params": SILENT}, "yuv420p10le"),
    ("studio.mov", "prores_ks", {}, "yuv422p10le"), ("grey.mkv", "libx264", {}, "gray"),
    ("planes.avi", "huffyuv", {}, "yuv422p"), ("UPPERCASE.MP4", "libx264", {}, "yuv420p"),
]  # fmt: skip
PLAIN = {"mjpeg": "yuvj420p", "gif": "rgb8"}
EVEN = [*((*one, PLAIN.get(one[1], "yuv420p")) for one in ENCODINGS), *PIXELS]
ON_FRAMES_ALONE = (".avi", ".h264", ".hevc", ".GIF", ".mpg", ".flv", ".wmv", ".mts", "2.mp4", "2.ts", "one.mkv")
"""Formats whose times cannot be any, or whose encoder does not take them."""
VARIABLE = [one for one in EVEN if not one[0].endswith(ON_FRAMES_ALONE) and one not in PIXELS]


@pytest.mark.filterwarnings("ignore")  # of encoders
@pytest.mark.parametrize(
    ("name", "codec", "options", "pixel_format", "varies"),
    [*((*one, False) for one in EVEN), *((*one, True) for one in VARIABLE)],
)
def test_clips_and_stretches_of_every_kind_are_those_of_one_pass(
    tmp_path, encode_video, read_number, begun_again, name, codec, options, pixel_format, varies
):
    frames = uneven_times(140) if varies else 140
    video = encode_video(
        tmp_path / name, frames, codec=codec, options=options, pixel_format=pixel_format,
        container_options=FRAGMENTS if name == "fragments.mp4" else None,
    )  # fmt: skip
    assert_random_is_sequential(video)
    info = count_frames(video)
    assert (info.frames, info.damage) == (140, "")
    assert varies or info.gaps_s == ()
    assert begun_again == [0]
    numbers, times_s = numbers_and_times(video, read_number)
    assert codec in ("gif", "libsvtav1") or numbers == list(range(140))  # too coarse, those
    np.testing.assert_allclose(times_s, frames if varies else np.arange(140) / 25, atol=2e-3)
    whole = on_clock(video)
    for edges in ([0, 1, 2, 3, np.inf], [0, *np.sort(np.random.default_rng(0).uniform(0, 9, size=8)), np.inf]):
        parts = [on_clock(video, start_s=start_s, end_s=end_s) for start_s, end_s in pairwise(edges)]
        assert list(chain(*parts)) == whole


def on_clock(video, **where):
    """What is read on a clock: (tick, time, pixels)."""
    timed = read_on_clock(video, SIZE, fps=10, offsets_s=[0.007], **where)
    return [(one.tick, one.time_s, one.frame.tobytes()) for one in timed]


def edit(path, skipped, shown, rate):
    """Make the edit list of an mp4 leave out frames at the beginning, and at the end."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 12
    movie_scale = struct.unpack(">I", content[content.index(b"mvhd") + 16 :][:4])[0]
    media_scale = struct.unpack(">I", content[content.index(b"mdhd") + 16 :][:4])[0]
    media_time = struct.unpack(">i", content[at + 4 : at + 8])[0] + skipped * media_scale // rate
    content[at : at + 8] = struct.pack(">Ii", shown * movie_scale // rate, media_time)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("skipped", "shown"), [(7, 133), (40, 100), (40, 70), (0, 50)])
def test_an_edit_list_is_obeyed(tmp_path, encode_video, read_number, begun_again, skipped, shown):
    video = encode_video(tmp_path / "edited.mp4", 140, options=SHORT_GOP, container_options={"use_editlist": "1"})
    edit(video, skipped, shown, 25)
    assert_random_is_sequential(video)
    frames = list(read_frames(video, SIZE))
    assert [read_number(frame) for frame, _ in frames] == list(range(skipped, skipped + len(frames)))
    assert shown <= len(frames) <= shown + 3  # FFmpeg shows what is decoded on the way
    np.testing.assert_allclose([time_s for _, time_s in frames], np.arange(len(frames)) / 25, atol=1e-4)
    info = count_frames(video)
    assert (info.frames, info.damage) == (len(frames), "")
    assert begun_again == [0]


@pytest.mark.parametrize("cues", [b"\x1c\x53\xbb\x6c", b"\xec\x53\xbb\x6b"])
def test_matroska_without_its_cues(tmp_path, encode_video, cues):
    video = encode_video(tmp_path / "cues.mkv", 140, options=SHORT_GOP)
    content = video.read_bytes()
    assert b"\x1c\x53\xbb\x6b" in content
    video.write_bytes(content.replace(b"\x1c\x53\xbb\x6b", cues))
    assert_random_is_sequential(video, damage=Damage())


def test_matroska_with_wrong_cues(tmp_path, encode_video):
    video = encode_video(tmp_path / "cues.mkv", 140, options=SHORT_GOP)
    content = bytearray(video.read_bytes())
    at = content.rindex(b"\x1c\x53\xbb\x6b")
    cue_times = [index for index in range(at, len(content) - 3) if content[index : index + 2] == b"\xb3\x82"]
    assert len(cue_times) >= 3
    for index in cue_times:  # everything is said to come at half of its time: seeks lead too far
        content[index + 2 : index + 4] = struct.pack(">H", struct.unpack(">H", content[index + 2 : index + 4])[0] // 2)
    video.write_bytes(content)
    assert_random_is_sequential(video)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_frames_at_times_before_and_after_the_video_and_in_any_order(tmp_path, encode_video, read_number, suffix):
    video = encode_video(tmp_path / f"even{suffix}", 100, options=SHORT_GOP)
    frames, times_s = read_frames_at(video, SIZE, times_s=[100, 0.12, -3, 0.12])
    assert [read_number(frame) for frame in frames] == [99, 3, 0, 3]
    np.testing.assert_allclose(times_s, [3.96, 0.12, 0, 0.12], atol=1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_skipping_saves_decoding(tmp_path, encode_video, calls, suffix):
    decoded = calls("__next__")
    video = encode_video(tmp_path / f"even{suffix}", 600, options={"g": "30", "bf": "3", "sc_threshold": "0"})
    for starts_s in ([20.0], [23.0], [1.0, 20.0]):
        decoded[0] = 0
        read_clips(video, SIZE, starts_s, length=16)
        assert 16 <= decoded[0] <= len(starts_s) * (16 + 2 * 30)
    decoded[0] = 0
    read_frames_at(video, SIZE, times_s=[2.0, 12.0, 22.0])
    assert decoded[0] <= 3 * (2 * 30 + 2)


# Damage


def even(encode_video, path, count=100, **options):
    return encode_video(path, count, options={"g": "20", "bf": "2", "sc_threshold": "0"}, **options)


def numbers_and_times(path, read_number, damage=None):
    frames = list(read_frames(path, SIZE, damage=damage))
    return [read_number(frame) for frame, _ in frames], [time_s for _, time_s in frames]


def numbers_before_an_error(path, read_number, complaint):
    numbers = []
    with pytest.raises(VideoError, match=complaint):  # noqa: PT012
        for frame, _ in read_frames(path, SIZE):
            numbers.append(read_number(frame))
    assert numbers == list(range(len(numbers)))
    return numbers


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_after_a_break_reading_goes_on_at_the_next_keyframe(tmp_path, encode_video, damage_video, read_number, suffix):
    video = damage_video(even(encode_video, tmp_path / f"broken{suffix}"), slice(45, 48))
    damage = Damage()
    numbers, times_s = numbers_and_times(video, read_number, damage)
    np.testing.assert_allclose(times_s, np.array(numbers) / 25, atol=1e-3)
    lost = set(range(100)) - set(numbers)
    assert lost
    assert lost <= set(range(40, 60))
    assert len(damage.breaks) == 1
    assert damage.breaks[0].startswith("decoding failed after 1.")
    assert "decoding failed" in count_frames(video).damage
    assert count_frames(video).frames == len(numbers)
    # The same from the middle on, and in clips.
    assert_random_is_sequential(video, damage=Damage())
    good = numbers_before_an_error(video, read_number, rf"broken{suffix}: decoding failed after 1\.")
    assert len(good) >= 40


def test_what_is_decoded_twice_is_told_once(tmp_path, encode_video, damage_video, monkeypatch):
    video = damage_video(even(encode_video, tmp_path / "broken.mp4"), slice(5, 8))
    monkeypatch.setattr(VideoDecoder, "_seek", lambda self, *where: None)  # a file in which no seek leads anywhere
    damage, once = Damage(), Damage()
    read_clips(video, SIZE, [0.0, 3.5], length=12, damage=damage)
    list(read_frames(video, SIZE, damage=once))
    assert damage == once


def test_the_last_frames_before_damage_are_found(tmp_path, encode_video, damage_video, read_number):
    video = damage_video(even(encode_video, tmp_path / "broken.mp4"), slice(80, None))
    damage = Damage()
    frames, times_s = read_frames_at(video, SIZE, times_s=[3.9], damage=damage)
    assert 77 <= read_number(frames[0]) <= 79  # the decoder holds two back for the sake of order
    assert times_s[0] == pytest.approx(read_number(frames[0]) / 25)
    assert damage


def noisy(encode_video, path, codec, options):
    pictures = np.random.default_rng(0).integers(0, 256, (60, 48, 80, 3), dtype=np.uint8)
    return encode_video(
        path, 60, pictures, codec=codec, options=options, pixel_format=PLAIN.get(codec, "yuv420p")
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("h264.mp4", "libx264", {"g": "20", "bf": "0", "sc_threshold": "0"}),
        ("hevc.mp4", "libx265", {"x265-params": f"keyint=20:scenecut=0:bframes=2:{SILENT}"}),
        ("hevc.mkv", "libx265", {"x265-params": f"keyint=20:scenecut=0:bframes=2:{SILENT}"}),
        ("mpeg4.avi", "mpeg4", {"g": "20"}),
        ("mjpeg.mkv", "mjpeg", {}),
        ("nine.webm", "libvpx-vp9", {"g": "20", "deadline": "realtime", "cpu-used": "8"}),
        ("two.ts", "mpeg2video", {"g": "20"}),
    ],
)
@pytest.mark.parametrize("at", [0, 20, 25, 59])
def test_no_frame_is_lost_without_a_word(tmp_path, encode_video, damage_video, name, codec, options, at):
    video = noisy(encode_video, tmp_path / name, codec, options)
    damage_video(video, at, skipped=8, mask=0x55)
    info = count_frames(video)
    assert info.frames < 60
    if name == "two.ts" and at in (0, 59):  # its pictures have no numbers, and its header no duration
        return
    assert info.damage or info.gaps_s
    if info.damage:
        with pytest.raises(VideoError, match=name):
            list(read_frames(video, SIZE))


def test_frames_that_the_decoder_guessed_are_counted_and_left_out(tmp_path, encode_video, damage_video):
    video = noisy(encode_video, tmp_path / "a.mp4", "libx264", {"g": "20", "bf": "0", "sc_threshold": "0"})
    whole = {time_s: frame for frame, time_s in read_frames(video, SIZE)}
    damage_video(video, 20, skipped=1500, mask=0x55)
    damage = Damage()
    times_s = [time_s for _, time_s in read_frames(video, SIZE, damage=damage)]
    with av.open(str(video)) as container:
        guessed = [float(frame.pts * frame.time_base) for frame in container.decode(video=0) if frame.is_corrupt]
    assert guessed
    assert sorted(set(whole) - set(times_s)) == pytest.approx(guessed)
    assert damage.corrupt_frames == len(guessed)
    assert str(damage) == f"{len(guessed)} corrupt frames left out"
    with pytest.raises(VideoError, match=r"a\.mp4: the frame at 0\.80 s is corrupt"):
        list(read_frames(video, SIZE))


@pytest.mark.parametrize(("suffix", "movflags"), [(".mkv", ""), (".mp4", "faststart"), (".webm", ""), (".avi", "")])
@pytest.mark.parametrize("share", [0.3, 0.8, 0.99])
def test_a_truncated_video_is_reported(tmp_path, encode_video, read_number, suffix, movflags, share):
    codec, options = (
        ("libvpx-vp9", {"deadline": "realtime", "g": "20"}) if suffix == ".webm" else ("libx264", {"g": "20"})
    )
    video = encode_video(
        tmp_path / f"whole{suffix}", 100, codec=codec, options=options,
        container_options={"movflags": movflags} if movflags else {},
    )  # fmt: skip
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    begin, end = packets[0][0], sum(packets[-1])
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(video.read_bytes()[: begin + int(share * (end - begin))])
    info = count_frames(cut)
    assert info.frames < 100
    assert "ends at" in info.damage or "decoding failed" in info.damage or "reading failed" in info.damage
    if "its header promises" in info.damage:
        promised = "3.92" if suffix == ".avi" else "4.00"  # two B-frames wait, and an AVI has no time to begin at
        assert f"ends at {info.duration_s:.2f} s, its header promises {promised} s" in info.damage
    numbers = numbers_before_an_error(cut, read_number, r"cut\..*: ")
    assert len(numbers) >= info.frames - 1
    assert_random_is_sequential(cut, damage=Damage())


def test_what_a_flipped_byte_costs_an_asf_at_its_end_is_said(tmp_path, encode_video):
    """FFmpeg passes over the rest of a packet whose payload it does not understand."""
    content = encode_video(tmp_path / "a.wmv", 60, codec="wmv2", options={"g": "12"}).read_bytes()
    (tmp_path / "a.wmv").write_bytes(content)
    assert not count_frames(tmp_path / "a.wmv").damage
    found = []
    for at in range(len(content) - 3200, len(content), 25):
        (tmp_path / "a.wmv").write_bytes(content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :])
        info = count_frames(tmp_path / "a.wmv")
        found += [info] if 40 < info.frames < 59 and not info.gaps_s else []
    assert len(found) > 3
    assert all(f"ends at {info.duration_s:.2f} s, its header promises 2.40 s" in info.damage for info in found)


def test_times_that_run_backwards_are_left_out(tmp_path, encode_video, read_number):
    video = even(encode_video, tmp_path / "even.mkv", 40)
    backwards = tmp_path / "backwards.mkv"
    with av.open(str(video)) as source, av.open(str(backwards), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                if packet.pts == 480:
                    packet.pts = 1900
                packet.stream = stream
                target.mux(packet)
    damage = Damage()
    numbers, times_s = numbers_and_times(backwards, read_number, damage)
    assert times_s == sorted(times_s)
    assert len(numbers) < 40
    assert any(reason.startswith("times run backwards after 1.90 s") for reason in damage.breaks)
    with pytest.raises(VideoError, match="times run backwards"):
        list(read_frames(backwards, SIZE))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".mov"])
def test_sound_that_is_longer_is_no_damage(tmp_path, encode_video, suffix):
    video = even(encode_video, tmp_path / f"sound{suffix}", 50, sound_s=8)
    info = count_frames(video)
    assert (info.frames, info.damage) == (50, "")
    assert info.duration_s == pytest.approx(2, abs=0.01)
    video.write_bytes(video.read_bytes().replace(b"DURATION", b"WHATEVER"))  # Matroska's tag of each stream
    assert count_frames(video).damage == ""


@pytest.mark.parametrize(
    "name", ["late.mp4", "late.mkv", "late.wmv", "late.mov", "late.avi", "late.webm", "late.ts", "late.flv"]
)
def test_a_late_beginning_is_no_damage_and_times_start_with_the_first_frame(tmp_path, encode_video, read_number, name):
    codec = {"webm": "libvpx-vp9", "wmv": "wmv2"}.get(name[5:], "libx264")
    times_s = 5.2 + np.arange(50) / 25
    video = encode_video(tmp_path / name, times_s, codec=codec, ticks_per_second=25, options={"g": "20"})
    info = count_frames(video)
    assert (info.frames, info.damage) == (50, "")
    assert info.duration_s == pytest.approx(2, abs=0.01)
    if not name.endswith("avi"):
        assert probe_video(video).duration_s == pytest.approx(2, abs=0.1)
    frames = list(read_frames(video, SIZE))
    assert read_number(frames[0][0]) == 0
    np.testing.assert_allclose([time_s for _, time_s in frames], np.arange(50) / 25, atol=1.1e-3)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_gaps_in_time_are_counted(tmp_path, encode_video, suffix):
    times_s = np.delete(np.arange(60) / 25, range(30, 40))
    video = encode_video(
        tmp_path / f"gap{suffix}", times_s, rate=25, ticks_per_second=25, options={"g": "10", "bf": "0"}
    )
    info = count_frames(video)
    assert info.frames == 50
    ((begin_s, length_s),) = info.gaps_s
    assert (begin_s, length_s) == pytest.approx((29 / 25, 11 / 25), abs=2e-3)


def test_one_missing_frame_is_a_gap_where_the_rate_is_constant_only(tmp_path, encode_video):
    for times_s, gaps in ((np.delete(np.arange(60) / 25, 30), 1), (uneven_times(60), 0)):
        assert len(count_frames(encode_video(tmp_path / "a.mkv", times_s, options={"bf": "0"})).gaps_s) == gaps


# Out of the ordinary


def with_cover(path, numbers):
    """Sound with a cover picture, and a video of numbers if there are any."""
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(picture, "JPEG")
    with av.open(str(path), "w") as container:
        if numbers:
            video = container.add_stream("libx264", rate=10)
            video.height, video.width, video.pix_fmt = 32, 80, "yuv420p"
        if path.suffix == ".mkv":
            container.add_attachment("cover.jpg", "image/jpeg", picture.getvalue())
        else:
            attached = container.add_stream("mjpeg", rate=1)
            attached.width = attached.height = 256
            attached.pix_fmt, attached.disposition = "yuvj420p", Disposition.attached_pic
        add_sound(container, container.add_stream("aac", rate=8000, layout="mono"), 1)
        if numbers:
            for pixels in numbers:
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(video.encode())
        if path.suffix != ".mkv":
            packet = av.Packet(picture.getvalue())
            packet.stream, packet.pts, packet.dts = attached, 0, 0
            container.mux(packet)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_cover_picture_is_no_video(tmp_path, suffix):
    music = with_cover(tmp_path / f"music{suffix}", [])
    with pytest.raises(VideoError, match=rf"music\{suffix}: there is no video stream in it; a cover picture is none"):
        probe_video(music)
    film = with_cover(tmp_path / f"film{suffix}", [np.full((32, 80, 3), 20 * index, np.uint8) for index in range(10)])
    assert (probe_video(film).codec, probe_video(film).height) == ("h264", 32)
    assert count_frames(film).frames == 10


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".avi"])
def test_of_several_video_streams_it_is_said_which_one_is_read(tmp_path, suffix):
    path = tmp_path / f"front_and_rear{suffix}"
    with av.open(str(path), "w") as container:
        # By the first bytes alone FFmpeg would take the first one of Matroska, by more of it the faster one.
        rates, heights = (12, 25), (32, 64)
        streams = [container.add_stream("libx264", rate=rate) for rate in rates]
        for stream, height in zip(streams, heights, strict=True):
            stream.width, stream.height, stream.options = 96, height, {"bf": "0", "g": "10", "sc_threshold": "0"}
        for index in range(40):
            for stream in streams:
                pixels = np.full((stream.height, 96, 3), 6 * index, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    first, info = probe_video(path), count_frames(path)
    read = heights.index(info.height)
    for one in (first, info):
        assert one.assumed == f"stream {read} is the video: of its 2 video streams one is read"
    assert (info.average_fps, info.frames) == (pytest.approx(rates[read], rel=0.01), 40)
    assert len(info.keyframes_s) == 4 * info.seekable
    assert first.keyframes_s == pytest.approx(info.keyframes_s)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "codec", "pixel_format"),
    [("a.mkv", "libx264", "yuv444p"), ("a.webm", "libvpx-vp9", "yuv420p"), ("b.mkv", "ffv1", "yuv420p"),
     ("a.mjpeg", "mjpeg", "yuvj420p")],
)  # fmt: skip
def test_odd_sizes(tmp_path, encode_video, name, codec, pixel_format):
    pictures = [np.full((33, 47, 3), 12 * index, np.uint8) for index in range(20)]
    video = encode_video(
        tmp_path / name, 20, pictures, codec=codec, pixel_format=pixel_format,
        options={"deadline": "realtime"} if codec == "libvpx-vp9" else {},
    )  # fmt: skip
    info = probe_video(video)
    assert (info.height, info.width) == (33, 47)
    for size in ((33, 47), (17, 23), (64, 64)):
        levels = [frame.mean() for frame, _ in read_frames(video, size)]
        np.testing.assert_allclose(levels, 12 * np.arange(20), atol=3)


def test_tagged_colours_are_read_as_tagged(tmp_path, encode_video):
    pictures = [np.broadcast_to(np.array([200, 60, 30], np.uint8), (32, 80, 3)).copy()] * 3
    read = {}
    for name, tags in {
        "untagged": "",
        "bt601": "colormatrix=smpte170m",
        "bt709": "colormatrix=bt709",
        "full": "fullrange=on",
    }.items():
        path = encode_video(tmp_path / f"{name}.mp4", np.arange(3) / 10, pictures, options={"x264-params": tags})
        read[name] = next(read_frames(path, SIZE))[0].mean(axis=(1, 2))
    np.testing.assert_allclose(read["untagged"], [200, 60, 30], atol=3)
    np.testing.assert_array_equal(read["untagged"], read["bt601"])
    with av.open(str(tmp_path / "untagged.mp4")) as container:
        raw = next(container.decode(video=0))
    as_bt709 = VideoReformatter().reformat(
        raw, SIZE[1], SIZE[0], "gbrp", src_colorspace=Colorspace.ITU709, interpolation=Interpolation.BILINEAR
    )
    expected = [np.frombuffer(memoryview(as_bt709.planes[plane]), np.uint8)[0] for plane in (2, 0, 1)]
    np.testing.assert_allclose(read["bt709"], expected, atol=2)
    assert np.abs(read["bt709"] - read["untagged"]).max() > 5
    # The same numbers, meant as 0 to 255: less contrast.
    assert 16 + read["untagged"].max() * 219 / 255 == pytest.approx(read["full"].max(), abs=4)


def test_an_unknown_codec_is_refused_by_name(tmp_path, encode_video):
    video = encode_video(tmp_path / "strange.mp4", np.arange(10) / 10)
    content = video.read_bytes()
    video.write_bytes(content.replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(VideoError, match=r"strange\.mp4: the codec of its video stream is unknown"):
        probe_video(video)


@pytest.mark.parametrize("fill", [b"\0", b"\xff"])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.ts", "a.gif", "a.h264", "a.mjpeg", "a.zip"])
def test_a_file_of_nothing(tmp_path, name, fill):
    path = tmp_path / name
    path.write_bytes(fill * 100_000)
    with pytest.raises(VideoError, match=name):
        probe_video(path)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.gif", {"codec": "gif", "ticks_per_second": 100, "pixel_format": "rgb8"}), ("a.asf", {}), ("a.wmv", {}),
        ("a.mjpeg", {"codec": "mjpeg", "pixel_format": "yuvj420p"}),
    ],
)  # fmt: skip
def test_a_file_that_is_cut_off_where_only_its_size_tells_is_reported(tmp_path, encode_video, name, options):
    pictures = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
    video = encode_video(tmp_path / name, np.arange(30) / 25, pictures, rate=25, **options)
    assert count_frames(video).damage == ""
    content = video.read_bytes()
    video.write_bytes(content[: -20 if name == "a.mjpeg" else len(content) // 2])
    info = count_frames(video)
    assert 1 < info.frames < 30 or name == "a.mjpeg"  # what there is of the last picture is shown
    assert info.damage.endswith(" s, the file is cut off there")


@pytest.mark.parametrize(
    ("name", "codec"), [("a.wmv", "wmv2"), ("a.asf", "wmv2"), ("a.mkv", "libx264"), ("a.flv", "flv")]
)
def test_a_variable_rate_is_no_damage(tmp_path, encode_video, name, codec):
    times_s = np.cumsum([0.0, *[0.033, 0.1, 0.05, 0.2] * 10])
    video = encode_video(tmp_path / name, times_s, codec=codec, rate=10, options={"bf": "0", "g": "12"})
    info = count_frames(video)
    assert (info.frames, info.damage) == (41, "")


@pytest.mark.parametrize("cut_off", [10, 200, 900])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.ivf", "libvpx-vp9"), ("a.avi", "mjpeg"), ("a.avi", "ffvhuff"), ("a.mov", "mjpeg")]
)
def test_a_picture_that_is_cut_off_is_left_out(tmp_path, encode_video, read_number, name, codec, cut_off):
    options = {"pixel_format": "yuvj420p" if codec == "mjpeg" else "yuv420p"}
    options |= {"container_options": {"movflags": "faststart"}} if name == "a.mov" else {}
    video = encode_video(tmp_path / name, np.arange(30) / 25, codec=codec, rate=25, **options)
    with av.open(str(video)) as container:
        *_, (begin, size) = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    header = 12 if name == "a.ivf" else 0
    video.write_bytes(video.read_bytes()[: begin + header + size - min(cut_off, size // 2)])
    damage = Damage()
    numbers, _ = numbers_and_times(video, read_number, damage)
    assert numbers == list(range(29))
    assert "decoding failed after 1.12 s (a picture is cut off)" in str(damage)


def test_what_the_decoder_holds_back_is_kept_where_a_picture_is_cut_off(tmp_path, encode_video, read_number):
    options = {"bf": "3", "g": "100", "x264-params": "b-adapt=0"}
    video = encode_video(
        tmp_path / "a.mp4", np.arange(40) / 25, options=options, container_options={"movflags": "faststart"}
    )
    with av.open(str(video)) as container:
        packets = [(packet.pos, packet.size, packet.pts) for packet in container.demux(video=0) if packet.size]
    begin, size, _ = packets[20]
    video.write_bytes(video.read_bytes()[: begin + size // 2])
    shown = sorted(pts for _, _, pts in packets[:20])
    damage = Damage()
    assert len(numbers_and_times(video, read_number, damage)[0]) == len(shown)
    assert "a picture is cut off" in str(damage)


def test_a_gap_of_years_takes_no_time(tmp_path, encode_video, read_number):
    year_s = 365 * 24 * 3600.0
    times_s = [0, 0.1, 0.2, 3 * year_s, 3 * year_s + 0.1]
    video = encode_video(tmp_path / "a.mkv", times_s, options={"bf": "0"})
    with av.open(str(video)) as container:
        assert [packet.pts for packet in container.demux(video=0) if packet.size][-1] > 9e10
    timed = list(read_on_clock(video, SIZE, fps=10, offsets_s=[0.0, 0.05], damage=Damage()))
    assert [read_number(one.frame) for one in timed if one.clock == 0] == [0, 1, 2, 3, 4]
    assert [one.tick for one in timed if one.clock == 0][3:] == [round(30 * year_s), round(30 * year_s) + 1]
    assert probe_video(video).duration_s == 0


def test_frames_that_share_their_times_are_counted(tmp_path, encode_video):
    video = encode_video(tmp_path / "pairs.mkv", np.arange(20) // 2 / 25, options={"bf": "0"})
    assert count_frames(video).frames == 20
    uneven = np.concatenate([np.arange(25) / 25, 1 + np.arange(25) / 24])
    video = encode_video(tmp_path / "a.mp4", uneven, options={"bf": "0"})
    content = bytearray(video.read_bytes())
    first = content.index(b"stts") + 12  # its entries: so many pictures, so many ticks each
    for at in range(first, first + 8 * int.from_bytes(content[first - 4 : first]), 8):
        if int.from_bytes(content[at : at + 4]) > 10:
            content[at + 4 : at + 8] = bytes(4)
    video.write_bytes(content)
    assert probe_video(video).height
    assert count_frames(video).frames


@pytest.mark.parametrize("rate", [1, 2])
def test_a_slow_video_is_whole(tmp_path, encode_video, rate):
    video = encode_video(tmp_path / "slow.mkv", 30, rate=rate, options={"bf": "0", "g": "5"})
    info = count_frames(video)
    assert (info.frames, info.damage) == (30, "")


def test_a_hole_in_a_transport_stream_costs_what_lies_in_it(tmp_path, encode_video):
    pictures = np.random.default_rng(0).integers(0, 256, (100, 96, 160, 3), dtype=np.uint8)
    video = encode_video(tmp_path / "a.ts", 100, pictures, options={"g": "10", "crf": "5", "bf": "0"})
    content = bytearray(video.read_bytes())
    assert len(content) > 1_000_000
    middle = len(content) // 2
    content[middle : middle + 150_000] = bytes(150_000)
    video.write_bytes(content)
    info = count_frames(video)
    assert 70 < info.frames < 100
    assert "reading failed after 1." in info.damage
    assert info.duration_s == pytest.approx(4.0, abs=0.05)
    assert_random_is_sequential(video, damage=Damage())


@pytest.mark.parametrize("flags", ["frag_every_frame+empty_moov", "frag_keyframe+empty_moov"])
def test_fragments_behind_one_that_cannot_be_read_are_counted(tmp_path, encode_video, flags):
    options, container_options = {"g": "10", "bf": "0"}, {"movflags": flags}
    video = encode_video(tmp_path / "a.mp4", 100, options=options, container_options=container_options)
    assert (count_frames(video).frames, count_frames(video).damage) == (100, "")
    begins = [match.start() for match in re.finditer(b"moof", video.read_bytes())]
    content, damaged = bytearray(video.read_bytes()), begins[len(begins) // 3]
    content[damaged - 4 : damaged + 4] = bytes(8)
    video.write_bytes(content)
    info = count_frames(video)
    assert info.frames < 50
    assert f"{len(begins) - len(begins) // 3} fragments after it cannot be read" in info.damage


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video"])
@pytest.mark.parametrize("name", ["a.avi", "a.mxf"])
def test_containers_without_times_of_presentation_are_read_in_order(tmp_path, encode_video, read_number, name, codec):
    video = encode_video(tmp_path / name, 60, codec=codec, options={"bf": "2", "g": "20", "b_strategy": "0"})
    read = [(read_number(frame), round(time_s, 6)) for frame, time_s in read_frames(video, SIZE)]
    assert read == [(number, number / 25) for number in range(60)]
