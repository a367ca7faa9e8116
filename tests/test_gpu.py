"""The command for a GPU: rehearsed whole, cut, gone on with, and what it says of what is owed."""

import json

import pytest

from benchmarks import gpu, pack
from benchmarks.gpu import DOCUMENT, MEASUREMENTS, Measurement, Options


def test_the_document_has_the_table_of_what_is_committed(tmp_path, monkeypatch):
    copy = tmp_path / "performance.md"
    copy.write_text(DOCUMENT.read_text())
    monkeypatch.setattr(gpu, "DOCUMENT", copy)
    gpu.document()
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks.gpu --document"


def test_a_measurement_that_hangs_or_fails_costs_only_itself_and_is_tried_again(tmp_path, monkeypatch, capsys):
    figures = {"speed": ("speed", "≥ 3")}
    write = "import json; json.dump({'speed': 3.5}, open('FOLDER/results.json', 'w'))"
    measurements = {
        "hangs": Measurement(2, '-c "import time; time.sleep(60)"', "", figures),
        "fails": Measurement(20, "-c \"raise SystemExit('why')\"", "", figures),
        "says nothing": Measurement(20, '-c ""', "", figures),
        "works": Measurement(20, f'-c "{write}"', "", figures),
    }
    monkeypatch.setattr(gpu, "MEASUREMENTS", measurements)
    monkeypatch.setattr(gpu, "LEAST_S", 0.0)
    options = Options(output_dir=tmp_path / "out", work_dir=tmp_path / "work")
    gpu.main(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert {name: one.get("failed") for name, one in found.items()} == {
        "hangs": "stopped after 2 s", "fails": "exit code 1", "says nothing": "no speed", "works": None,
    }  # fmt: skip
    assert found["fails"]["output"].strip() == "why"
    assert "| speed | ≥ 3 | 3.5 |" in capsys.readouterr().out
    gpu.main(options)
    said = capsys.readouterr().out
    assert "fails, at most" in said
    assert "works, at most" not in said
    gpu.main(
        Options(output_dir=tmp_path / "again", work_dir=tmp_path / "work", earlier=(tmp_path / "out/results.json",))
    )
    assert "works, at most" not in capsys.readouterr().out


@pytest.mark.slow
def test_all_of_it_is_rehearsed(tmp_path, shared, monkeypatch):
    monkeypatch.setenv("JEPA_SHARED", str(shared.absolute()))
    pack.pack_material(tmp_path / "material", {"train": 600, "test": 200}, {"train": 5100, "test": 100})
    monkeypatch.setenv("JEPA_SHARED", str(tmp_path / "material"))
    options = Options(budget_minutes=30, output_dir=tmp_path / "out", work_dir=tmp_path / "work", rehearse=True)
    gpu.main(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert {name: one for name, one in found.items() if "failed" in one} == {}
    assert found.keys() == MEASUREMENTS.keys()
    for name, measurement in MEASUREMENTS.items():
        assert found[name]["figures"].keys() >= measurement.figures.keys()
