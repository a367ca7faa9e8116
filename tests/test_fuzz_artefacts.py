from benchmarks import fuzz_artefacts


def test_harmed_artefacts_are_refused_found_or_harmless(tmp_path):
    fuzz_artefacts.main(fuzz_artefacts.Options(mutations=40, output_dir=tmp_path, limit_s=120))
    assert (tmp_path / "results.json").exists()
