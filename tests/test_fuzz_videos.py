import os

import numpy as np

from benchmarks import fuzz_videos


def test_mutated_clips_are_read_or_refused(shared, tmp_path):
    options = fuzz_videos.Options(
        mutations=12, videos=shared / "clips", largest_bytes=50_000, output_dir=tmp_path, limit_s=30
    )
    fuzz_videos.main(options)
    assert (tmp_path / "results.json").exists()


def test_the_fuzzer_sees_hangs_and_crashes_and_goes_on(tmp_path, encode_video):
    video = encode_video(tmp_path / "a.mp4", np.arange(20) / 25, rate=25, ticks_per_second=25)
    os.mkfifo(tmp_path / "pipe")
    with fuzz_videos.Child(limit_s=30) as read:
        assert read(video, 20).verdict == "nothing seen"
        assert read(video, 21).verdict == "silent skip"
        read.process.kill()
        assert read(video, 20).verdict == "crash"
        assert read(video, 20).verdict == "nothing seen"
        read.limit_s = 0
        assert read(video, 20).verdict == "hang"
        read.limit_s = 30
        assert read(tmp_path / "missing.mp4", 20).verdict == "refused"
