from benchmarks import fuzz_videos


def test_mutated_clips_are_read_or_refused(shared, tmp_path):
    options = fuzz_videos.Options(
        mutations=12, videos=shared / "clips", largest_bytes=50_000, output_dir=tmp_path, limit_s=30
    )
    fuzz_videos.main(options)
    assert (tmp_path / "results.json").exists()
