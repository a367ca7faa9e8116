import ast
import json
from pathlib import Path

import pytest

import data
import jepa

ROOT = Path(__file__).resolve().parents[1]


def imported_packages(path):
    """Top-level names of everything that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0] if node.level == 0 else path.parent.name)
    return names


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("jepa", {"data", "pipelines", "av", "h5py"}),  # no files, no video, no HDF5 in the science
        ("data", {"jepa", "pipelines", "timm", "accelerate"}),  # nothing of models in the data
    ],
)
def test_rooms_keep_their_borders(room, forbidden):
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    crossings = {str(file.relative_to(ROOT)): imported_packages(file) & forbidden for file in files}
    assert {file: names for file, names in crossings.items() if names} == {}


def test_only_pipelines_import_both_rooms():
    both = {
        file.relative_to(ROOT).parts[0]
        for folder in ("jepa", "data", "pipelines")
        for file in (ROOT / folder).rglob("*.py")
        if {"jepa", "data"} <= imported_packages(file)
    }
    assert both == {"pipelines"}


def test_imports_inside_functions_are_seen(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("import os.path\n\ndef late():\n    from jepa.encoder import FrameEncoder\n")
    assert imported_packages(file) == {"os", "jepa"}


def test_notebooks_import_and_never_define():
    notebooks = [path for path in (ROOT / "notebooks").rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts]
    if not notebooks:
        pytest.skip("there are no notebooks yet")
    for notebook in notebooks:
        cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        for cell in cells:
            lines = "".join(cell["source"]).splitlines()
            code = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)
            defined = [
                node.name
                for node in ast.walk(ast.parse(code, str(notebook)))
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            ]
            assert defined == [], notebook


@pytest.mark.parametrize("package", [data, jepa])
def test_packages_come_from_this_repository(package):
    # Another `data` in site-packages would silently win over an editable install.
    assert Path(package.__file__).resolve() == ROOT / package.__name__ / "__init__.py"


def test_ignored_folders_are_anchored():
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines()]
    folders = [line for line in lines if line.endswith("/") and not line.startswith("#")]
    assert folders
    loose = [line for line in folders if not line.startswith("/")]
    assert set(loose) <= {"__pycache__/", ".ipynb_checkpoints/"}
    # A name without a slash at its end hides a folder just as well.
    assert not {"data", "cache", "runs", "videos", "jepa", "demo"} & set(lines)
