"""The command for a GPU: rehearsed whole, cut, gone on with, and what it says of what is owed."""

import json

import pytest

from benchmarks import gpu, pack
from benchmarks.gpu import DOCUMENT, MEASUREMENTS, Options


def test_the_document_has_the_table_of_what_is_committed(tmp_path, monkeypatch):
    copy = tmp_path / "performance.md"
    copy.write_text(DOCUMENT.read_text())
    monkeypatch.setattr(gpu, "DOCUMENT", copy)
    gpu.document()
    assert copy.read_text() == DOCUMENT.read_text(), "python -m benchmarks.gpu --document"


@pytest.mark.slow
def test_all_of_it_is_rehearsed(tmp_path, shared, monkeypatch):
    monkeypatch.setenv("JEPA_SHARED", str(shared.absolute()))
    pack.pack_material(tmp_path / "material", {"train": 4000, "test": 1000}, {"train": 5100, "test": 100})
    monkeypatch.setenv("JEPA_SHARED", str(tmp_path / "material"))
    options = Options(budget_minutes=30, output_dir=tmp_path / "out", work_dir=tmp_path / "work", rehearse=True)
    gpu.main(options)
    found = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert {name: one for name, one in found.items() if "failed" in one} == {}
    assert found.keys() == MEASUREMENTS.keys()
    for name, measurement in MEASUREMENTS.items():
        assert found[name]["figures"].keys() >= measurement.figures.keys()
