from contextlib import closing
from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch

import data.clips
from data.clips import FrameClips, read_sequences
from data.counting import count_frames
from data.errors import VideoError
from data.video import probe_video

SIZE = (16, 40)
FRAME_BYTES = 3 * 16 * 40
LENGTHS = (25, 30, 17, 21)


@pytest.fixture(scope="session")
def videos(tmp_path_factory, encode_video):
    """Four videos of 10 fps; frame i of video v carries the number 100 v + i."""
    folder = tmp_path_factory.mktemp("videos")
    videos = []
    for video, length in enumerate(LENGTHS):
        numbers = range(100 * video, 100 * video + length)
        path = encode_video(folder / f"{video}.mp4", length, numbers, rate=10, options={"g": "10", "bf": "2"})
        videos.append(probe_video(path))
    return videos


@pytest.fixture
def numbers_in(read_number):
    """The numbers in each clip of a batch, a tuple each."""

    def read(batch):
        assert batch.frames.shape[2:] == (3, *SIZE)
        assert batch.frames.dtype == torch.uint8
        return [tuple(read_number(frame) for frame in clip) for clip in batch.frames]

    return read


def loader_of(videos, batch_size=1, fps=10, **options):
    return FrameClips(videos, SIZE, fps=fps, batch_size=batch_size, **{"seed": 0, "progress": False} | options)


def first_batches(loader, count, numbers_in, place=None):
    with closing(loader.batches(place or {})) as batches:
        return [numbers_in(batch) for batch in islice(batches, count)]


def epoch_of(loader, numbers_in):
    """All clips of the first epoch, and how many blocks it had."""
    clips, blocks = [], 0
    with closing(loader.batches({})) as batches:
        for batch in batches:
            if batch.place["epoch"] > 0:
                break
            clips += numbers_in(batch)
            blocks = max(blocks, batch.place["block"] + 1)
    return clips, blocks


def every_clip(length=2, lengths=LENGTHS):
    starts = [100 * video + at for video, frames in enumerate(lengths) for at in range(frames - length + 1)]
    return {tuple(range(start, start + length)) for start in starts}


def test_only_the_last_partial_batch_is_dropped(videos, numbers_in):
    loader = loader_of(videos, batch_size=20)
    pairs, _ = epoch_of(loader, numbers_in)
    assert len(every_clip()) == 89
    assert len(pairs) == len(set(pairs)) == 80
    assert set(pairs) < every_clip()


def test_neighbours_are_one_tick_of_the_clock_apart(videos, numbers_in):
    pairs, _ = epoch_of(loader_of(videos, fps=5), numbers_in)
    assert {after - before for before, after in pairs} == {2}
    assert len(pairs) == sum((length - 1) // 2 for length in LENGTHS)


@pytest.mark.parametrize("length", [2, 4])
def test_no_clip_across_a_gap_in_the_recording(tmp_path, encode_video, numbers_in, length):
    times_s = np.concatenate([np.arange(12), 30 + np.arange(9)]) / 10
    video = probe_video(encode_video(tmp_path / "gap.mp4", times_s, rate=10))
    clips, _ = epoch_of(loader_of([video], length=length), numbers_in)
    starts = [*range(13 - length), *range(12, 22 - length)]
    assert sorted(clips) == [tuple(range(at, at + length)) for at in starts]


def test_batches_are_shuffled_across_videos_and_anew_each_epoch(videos, numbers_in):
    first, second, third = first_batches(loader_of(videos, batch_size=40), 3, numbers_in)
    assert len({number // 100 for number, _ in first}) == 4
    assert first != sorted(first)
    assert set(first).isdisjoint(second)
    assert third != first


def test_the_bound_on_memory_is_kept(videos, monkeypatch):
    monkeypatch.setattr(data.clips, "SEGMENT_S", 1.0)
    held = []
    plain = FrameClips._decoded

    def decoded(self, unwanted, plan):
        for *where, parts in plain(self, unwanted, plan):
            held.append(len({id(frame) for part in parts for clip in part.clips for frame in clip}))
            yield *where, parts

    monkeypatch.setattr(FrameClips, "_decoded", decoded)
    with closing(loader_of(videos, memory_bytes=60 * FRAME_BYTES).batches({})) as batches:
        assert len(list(islice(batches, 200))) == 200
    assert len(held) > 4
    # One block is trained on while the next is decoded.
    assert max(map(sum, pairwise(held))) <= 60


def test_a_small_block_among_larger_ones_is_no_error(tmp_path, videos, encode_video, numbers_in):
    # Where the cut falls by chance, a short video is left in a block of its own, with fewer pairs than a batch.
    short = encode_video(tmp_path / "short.mp4", 3, [900, 901, 902], rate=10)
    mixed = [*videos, probe_video(short)]
    for seed in range(6):
        batches = first_batches(
            loader_of(mixed, batch_size=8, seed=seed, memory_bytes=66 * FRAME_BYTES), 25, numbers_in
        )
        assert len(batches) == 25
        assert all(len(batch) == 8 for batch in batches)


@pytest.mark.parametrize("memory_bytes", [2e9, 66 * FRAME_BYTES])
def test_the_order_is_a_pure_function_of_the_seed(videos, numbers_in, memory_bytes):
    once, again, other = (
        first_batches(loader_of(videos, 4, seed=seed, memory_bytes=memory_bytes), 30, numbers_in) for seed in (0, 0, 1)
    )
    assert once == again
    assert once != other


@pytest.mark.parametrize("memory_bytes", [2e9, 66 * FRAME_BYTES])
def test_a_resumed_run_replays_exactly_the_remaining_batches(videos, numbers_in, memory_bytes):
    total = 50  # 22 batches an epoch
    batches, places = [], [{}]
    with closing(loader_of(videos, 4, memory_bytes=memory_bytes).batches({})) as endless:
        for batch in islice(endless, total):
            batches.append(numbers_in(batch))
            places.append(batch.place)
    assert places[-1]["epoch"] == 2
    blocks = [(place["epoch"], place["block"]) for place in places[1:]]
    crossings = [at for at in range(1, total) if blocks[at - 1] != blocks[at]]
    assert len(crossings) == 2 if memory_bytes == 2e9 else len(crossings) > 4
    # In the middle of a block, and before and after the first two boundaries between blocks or epochs.
    for at in {0, 3, crossings[0] - 1, crossings[0], crossings[0] + 1, crossings[-1], crossings[-1] + 1}:
        resumed = loader_of(videos, 4, memory_bytes=memory_bytes)
        assert first_batches(resumed, min(6, total - at), numbers_in, places[at]) == batches[at : at + 6], places[at]


def test_ranks_share_all_stretches_without_overlap_or_read_the_same_in_different_order(videos, numbers_in, monkeypatch):
    shares = [epoch_of(loader_of(videos[:2], rank=rank, ranks=3), numbers_in)[0] for rank in range(3)]
    assert set(shares[0]) == set(shares[1]) == set(shares[2]) == every_clip(lengths=LENGTHS[:2])  # too few to share
    assert shares[0] != shares[1] != shares[2]
    monkeypatch.setattr(data.clips, "SEGMENT_S", 1.0)
    together, _ = epoch_of(loader_of(videos), numbers_in)
    shares = [epoch_of(loader_of(videos, rank=rank, ranks=3), numbers_in)[0] for rank in range(3)]
    assert sum(len(share) for share in shares) == len(set().union(*shares))
    assert set().union(*shares) == set(together)


@pytest.mark.parametrize("memory_bytes", [2e9, 40 * FRAME_BYTES])
@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_every_clip_of_an_epoch_comes_once_those_across_stretches_too(
    videos, numbers_in, monkeypatch, memory_bytes, length
):
    monkeypatch.setattr(data.clips, "SEGMENT_S", 0.75)
    clips, blocks = epoch_of(loader_of(videos, memory_bytes=memory_bytes, length=length), numbers_in)
    assert blocks > 3 if memory_bytes < 2e9 else blocks == 1
    assert len(clips) == len(set(clips))
    assert set(clips) == every_clip(length)


def test_videos_that_are_shorter_than_a_clip_are_passed_over(videos, numbers_in):
    clips, _ = epoch_of(loader_of(videos, length=22), numbers_in)
    assert set(clips) == every_clip(22)
    with pytest.raises(VideoError, match=r"hold 0 clips of 31 neighbouring frames at 10 fps, fewer than"):
        next(loader_of(videos, length=31).batches({}))


def test_a_video_that_breaks_off_is_listed_and_its_good_frames_are_used(
    tmp_path, videos, encode_video, damage_video, numbers_in
):
    broken = encode_video(tmp_path / "broken.mp4", 30, range(200, 230), rate=10, options={"bf": "0"})
    info = probe_video(damage_video(broken, slice(20, None)))
    loader = loader_of([videos[0], info])
    pairs, _ = epoch_of(loader, numbers_in)
    assert list(loader.account.damaged) == [str(broken)]
    assert "decoding failed" in str(loader.account.damaged[str(broken)])
    assert "broken.mp4: decoding failed" in str(loader.account)
    from_broken = sorted(pair for pair in pairs if pair[0] >= 200)
    # The very last good frame may still be waiting for its successor.
    assert from_broken[:18] == [(200 + at, 201 + at) for at in range(18)]
    assert len(from_broken) <= 19
    assert len(pairs) - len(from_broken) == LENGTHS[0] - 1


@pytest.mark.parametrize("duration_s", [0, 0.5])
def test_headers_without_a_duration_or_with_too_short_a_one_lose_nothing(videos, numbers_in, duration_s):
    unknown = [replace(video, duration_s=duration_s) for video in videos]
    assert set(epoch_of(loader_of(unknown), numbers_in)[0]) == every_clip(2)


def test_sequences_follow_each_other_from_different_videos(videos, read_number):
    sequences = read_sequences(videos, SIZE, fps=10, clips=3, length=12)
    assert sequences.shape == (3, 12, 3, *SIZE)
    assert sequences.dtype == torch.uint8
    numbers = np.array([[read_number(frame) for frame in sequence] for sequence in sequences])
    assert (np.diff(numbers, axis=1) == 1).all()
    assert len(set(numbers[:, 0] // 100)) == 3
    # From the middle of a recording, not from its beginning.
    assert (numbers[:, 0] % 100 > 1).all()


def test_sequences_skip_what_is_too_short_or_broken(tmp_path, videos, read_number):
    (tmp_path / "gone.mp4").write_text("no video")
    gone = replace(videos[0], path=tmp_path / "gone.mp4")
    sequences = read_sequences([gone, *videos], SIZE, fps=10, clips=5, length=20)
    assert sorted(read_number(sequence[0]) // 100 for sequence in sequences) == [0, 1, 3]
    assert read_sequences(videos, SIZE, fps=10, clips=2, length=99).shape == (0, 99, 3, *SIZE)


def remove(path):
    path.unlink()


def overwrite(path):
    path.write_bytes(b"something else" * 100)


def swap(path):
    path.write_bytes(path.with_name("other.mp4").read_bytes())


def truncate(path):
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("happens", [remove, overwrite, swap, truncate])
def test_a_video_that_goes_or_changes_while_training_is_noted_and_the_others_go_on(
    tmp_path, encode_video, numbers_in, happens
):
    names = {"a.mp4": 100, "b.mp4": 200, "c.mp4": 300, "other.mp4": 400}
    for name, first in names.items():
        encode_video(tmp_path / name, 30, range(first, first + 30), rate=10)
    paths = [tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4")]
    videos = [probe_video(path) for path in paths]
    loaders = [loader_of(videos), loader_of(videos, strict=True)]
    happens(paths[1])
    pairs, _ = epoch_of(loaders[0], numbers_in)
    assert {before // 100 for before, _ in pairs} == {1, 3}
    assert str(loaders[0].account.damaged.pop(str(paths[1]))) == "it is gone, or has changed since the run began"
    assert loaders[0].account.damaged == {}
    with pytest.raises(VideoError, match=r"b\.mp4: it is gone, or has changed since the run began"):
        epoch_of(loaders[1], numbers_in)


@pytest.mark.parametrize(("suffix", "days"), [(".mkv", 23), (".mp4", 2), (".ts", 0.9)])
@pytest.mark.parametrize("look", [probe_video, count_frames])
def test_a_jump_of_the_clock_costs_nothing(tmp_path, encode_video, numbers_in, suffix, look, days):
    times_s = np.concatenate([np.arange(40), 10 * days * 24 * 3600 + np.arange(40)]) / 10
    video = look(encode_video(tmp_path / f"a{suffix}", times_s, rate=10, options={"g": "10"}, ticks_per_second=10))
    loader = loader_of([video])
    assert len(loader.segments) < 100
    clips, blocks = epoch_of(loader, numbers_in)
    assert set(clips) == every_clip(lengths=(40,)) | {(at, at + 1) for at in range(40, 79)}
    assert blocks == 1


def test_hours_of_keyframes_are_planned_in_linear_time(videos):
    times_s = tuple((np.arange(200_000) / 25).tolist())
    video = replace(videos[0], keyframes_s=times_s, duration_s=8000.0, gaps_s=tuple((at, 0.5) for at in times_s[::50]))
    segments = loader_of([video]).segments
    assert 130 <= len(segments) <= 134
