import os
from itertools import chain, pairwise

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import Interpolation, VideoReformatter
from torch.nn.functional import interpolate

from benchmarks.reading import read_frames
from data.clock import read_on_clock
from data.errors import VideoError
from data.video import probe_video
from tests.conftest import add_sound
from tests.test_decoder import SIZE, uneven_times

RATES = [(30, 4), (25, 7), (24, 10), (10, 10), (30, 29)]
LONG_GOP = {"g": "250", "bf": "3", "b_strategy": "0", "sc_threshold": "0"}


@pytest.fixture
def on_clock(read_number):
    """(tick, number in the pixels) of every frame on a clock."""

    def sample(path, fps, offset_s=0.0, **where):
        sampled = read_on_clock(path, SIZE, fps=fps, offsets_s=[offset_s], **where)
        return [(timed.tick, read_number(timed.frame)) for timed in sampled]

    return sample


def assert_nearest(sampled, times_s, fps, offset_s=0.0):
    """Each tick has the frame nearest to it, and a tick without a frame within half a tick is left out.

    Where two frames are equally near, to the 2 ms that containers may round by, either is right.
    """
    assert [tick for tick, _ in sampled] == sorted({tick for tick, _ in sampled})
    assert len({number for _, number in sampled}) == len(sampled)
    chosen = dict(sampled)
    for tick in range(int(times_s[-1] * fps) + 3):
        distance_s = np.abs(np.asarray(times_s) - (offset_s + tick / fps))
        if tick in chosen:
            assert distance_s[chosen.pop(tick)] <= min(distance_s.min(), 0.5 / fps) + 2e-3, tick
        else:
            assert distance_s.min() > 0.5 / fps - 2e-3, tick
    assert chosen == {}


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize(
    ("rate", "fps", "offset_s"),
    [*((rate, fps, 0.007) for rate, fps in RATES), (10, 10, 1 / 20), (30, 30, 1 / 60)],
)
def test_constant_rate_gives_each_tick_its_nearest_frame(tmp_path, encode_video, on_clock, suffix, rate, fps, offset_s):
    """Half way between frames too: rounding, to milliseconds in mkv, must not send two ticks to one."""
    video = encode_video(tmp_path / f"even{suffix}", 120, rate=rate, options=LONG_GOP)
    sampled = on_clock(video, fps, offset_s=offset_s)
    assert [tick for tick, _ in sampled] == list(range(len(sampled)))
    assert len(sampled) >= 120 * fps // rate - 1
    assert_nearest(sampled, np.arange(120) / rate, fps, offset_s)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_variable_rate_gives_the_nearest_frame_to_each_tick(tmp_path, encode_video, on_clock, suffix):
    times_s = uneven_times(90)
    video = encode_video(tmp_path / f"uneven{suffix}", times_s, options=LONG_GOP)
    assert_nearest(on_clock(video, 4), times_s, 4)
    assert_nearest(on_clock(video, 7, offset_s=0.0613), times_s, 7, 0.0613)


def test_exact_times_and_whole_frames(tmp_path, encode_video, read_number):
    times_s = uneven_times(40)
    video = encode_video(tmp_path / "uneven.mp4", times_s, options=LONG_GOP)
    frames = list(read_frames(video, SIZE))
    assert [read_number(frame) for frame, _ in frames] == list(range(40))
    np.testing.assert_allclose([time_s for _, time_s in frames], times_s, atol=1e-4)
    assert all(frame.shape == (3, *SIZE) and frame.dtype == np.uint8 for frame, _ in frames)
    on_clock = list(read_on_clock(video, SIZE, fps=5))
    assert all(timed.time_s == pytest.approx(times_s[read_number(timed.frame)], abs=1e-4) for timed in on_clock)
    assert all(abs(timed.time_s - timed.tick / 5) <= 0.1 + 1e-6 for timed in on_clock)


def test_two_recordings_of_one_motion_land_on_one_clock(tmp_path, encode_video, on_clock):
    slow_s, fast_s = np.arange(61) / 20, np.arange(151) / 50
    slow = encode_video(tmp_path / "slow.mp4", slow_s, [round(100 * time_s) for time_s in slow_s], rate=20)
    fast = encode_video(tmp_path / "fast.mkv", fast_s, [round(100 * time_s) for time_s in fast_s], rate=50)
    assert on_clock(slow, 10) == on_clock(fast, 10) == [(tick, 10 * tick) for tick in range(31)]


def test_a_gap_in_the_recording_is_a_gap_in_ticks(tmp_path, encode_video, on_clock):
    times_s = np.concatenate([np.arange(19) / 20, 3.01 + np.arange(20) / 20])
    video = encode_video(tmp_path / "gap.mp4", times_s, options=LONG_GOP)
    sampled = on_clock(video, 10)
    assert_nearest(sampled, times_s, 10)
    steps = [after - before for (before, _), (after, _) in pairwise(sampled)]
    assert sorted(set(steps)) == [1, 21]


def test_no_frame_stands_for_two_ticks(tmp_path, encode_video, on_clock):
    video = encode_video(tmp_path / "slow.mp4", np.arange(8) / 2, rate=2)
    assert on_clock(video, 10) == [(5 * index, index) for index in range(8)]


def test_a_tick_on_an_edge_belongs_to_one_stretch(tmp_path, encode_video, on_clock):
    # 3 x 0.1 is more than 3 / 10 by a rounding error: tick 3 must not come twice.
    video = encode_video(tmp_path / "even.mp4", np.arange(60) / 20, rate=20)
    whole = on_clock(video, 10)
    edges = [0, 3 * 0.1, 0.7, 11 * 0.1, np.inf]
    parts = [on_clock(video, 10, start_s=start_s, end_s=end_s) for start_s, end_s in pairwise(edges)]
    assert list(chain(*parts)) == whole


def test_times_start_at_the_first_frame_that_decodes(tmp_path, encode_video, read_number):
    # A transport stream recorded from the middle of a group of pictures: what comes before a keyframe is lost.
    video = encode_video(tmp_path / "cut.ts", 100, options={"g": "20", "bf": "2"})
    packets = video.read_bytes()
    video.write_bytes(packets[: 3 * 188] + packets[len(packets) // 188 // 3 * 188 :])
    frames = [(read_number(frame), time_s) for frame, time_s in read_frames(video, SIZE)]
    first = frames[0][0]
    assert first > 0
    assert frames == [(number, pytest.approx((number - first) / 25, abs=1e-4)) for number in range(first, 100)]


def still(height, width, seed=0):
    """A smooth picture (height, width, 3) without symmetry, as colourful as the world is."""
    generator = torch.Generator().manual_seed(seed)
    light, colour = (torch.rand(1, n, height // 12, width // 12, generator=generator) for n in (1, 3))
    coarse = 200 * light + 55 * colour
    picture = interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)[0]
    return picture.permute(1, 2, 0).to(torch.uint8).numpy()


def exact_rgb(frame):
    """A decoded frame as full-size RGB, float (3, height, width), with swscale's exact arithmetic."""
    exact = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
    rgb = VideoReformatter().reformat(frame, format="rgb24", interpolation=exact).to_ndarray()
    return torch.from_numpy(rgb).permute(2, 0, 1).float()


def antialiased(picture, size):
    """Torch's antialiased bilinear resize of (3, height, width)."""
    return interpolate(picture[None], size=size, mode="bilinear", antialias=True)[0]


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (32, 100)])
def test_resize_is_antialiased_bilinear(tmp_path, encode_video, size):
    pictures = [still(180, 320, seed) for seed in range(3)]
    video = encode_video(tmp_path / "still.mp4", np.arange(3) / 10, pictures, options={"crf": "12"})
    with av.open(str(video)) as container:
        decoded = list(container.decode(video=0))
    for (frame, _), raw in zip(read_frames(video, size), decoded, strict=True):
        reference = antialiased(exact_rgb(raw), size)
        assert (torch.from_numpy(frame).float() - reference).abs().mean() <= 0.5


def test_unusable_files_say_why(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        add_sound(container, container.add_stream("aac", rate=8000, layout="mono"), 1)
    os.mkfifo(tmp_path / "pipe.mp4")  # must not hang
    for name, reason in {
        "missing.mp4": "no such file",
        "empty.mp4": "not a readable video",
        "text.mp4": "not a readable video",
        "folder.mp4": "not a readable video",
        "pipe.mp4": "not a readable video",
        "sound.mp4": "no video stream",
    }.items():
        for use in (probe_video, lambda path: list(read_on_clock(path, SIZE, fps=4))):
            with pytest.raises(VideoError, match=rf"{name}: .*{reason}|{name}: {reason}") as caught:
                use(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_a_tag_that_is_not_utf8_does_no_harm(tmp_path, encode_video):
    path = encode_video(tmp_path / "tag.mkv", 3)
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", b"L\xe4vf"))
    assert probe_video(path).codec == "h264"
    assert len(list(read_frames(path, SIZE))) == 3
