"""Notebooks run on what the stages leave behind, and are stored as plain text that defines nothing."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from data.decoder import VideoError
from data.embedding_cache import CacheWriter, ClipKey, EmbeddedClip, EmbeddingCache, Provenance
from data.manifest import file_state
from data.synthetic import BallWorld, write_ball_clip, write_video
from data.video import TRANSFORM, read_on_clock
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.energy import calibrate_energy
from jepa.predictor import Predictor, PredictorConfig
from pipelines.evaluate_rollout import clip_of_row, read_pictures
from pipelines.train_predictor import Split, fit_ridge_on, hold_out, measure_embeddings, validation_errors

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "notebooks"
WORLD = BallWorld()
SIZE = (32, 32)


def write_cache(folder, videos, encoder, phases=(0.0,)):
    """What cache_embeddings leaves behind."""
    provenance = Provenance(
        encoder_fingerprint=encoder.fingerprint(),
        embedding_dimension=encoder.embedding_dimension,
        fps=float(WORLD.fps),
        image_fps=25.0,
        transform=TRANSFORM,
        image_size=SIZE,
        dtype="float32",
        versions={},
    )
    with CacheWriter(folder, provenance) as writer:
        for video in videos:
            for phase_s in phases:
                frames = list(read_on_clock(video, SIZE, WORLD.fps, phase_s))
                with torch.no_grad():
                    embeddings = encoder(torch.from_numpy(np.stack([timed.frame for timed in frames]))).numpy()
                times_s, ticks = (np.array([timed[field] for timed in frames]) for field in (1, 2))
                writer.add(EmbeddedClip(ClipKey(*file_state(video), phase_s), embeddings, times_s, ticks))
    return EmbeddingCache(folder)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory):
    """A cache, its encoder, and a predictor that was trained for 0 steps, but measured."""
    folder = tmp_path_factory.mktemp("artefacts")
    torch.manual_seed(0)
    videos = [write_ball_clip(folder, index, WORLD, seed=0) for index in range(6)]
    encoder = FrameEncoder(EncoderConfig(embedding_dimension=8, image_size=SIZE)).eval()
    encoder.save_pretrained(folder / "encoder")
    cache = write_cache(folder / "cache", videos, encoder)
    config = PredictorConfig(context=4, width=16, depth=1)
    predictor = Predictor(config, 8, float(WORLD.fps), encoder.fingerprint()).eval()
    measure_embeddings(predictor, cache)
    splits = [Split(cache, cache)]
    fit_ridge_on(splits, [hold_out(splits[0], predictor, config.context + 3, 100)], predictor)
    calibrate_energy(predictor, validation_errors(splits, predictor, members=1))
    predictor.save_pretrained(folder / "predictor")
    return folder


def test_notebook_runs_and_draws(artefacts, monkeypatch):
    for name in ("cache", "encoder", "predictor"):
        monkeypatch.setenv(f"JEPA_{name.upper()}", str(artefacts / name))
    monkeypatch.delenv("JEPA_VIDEO", raising=False)
    pictures, printed = execute("rollout_evaluation")
    assert pictures >= 4
    assert "6 clips, 240 frames at 10 fps" in printed["stdout"]
    assert "Warning" not in printed["stderr"]


def execute(name):
    """How many pictures a notebook draws, and what it prints."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()  # raises CellExecutionError with the traceback of a cell that fails

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output for output in outputs if output.output_type == "error"] == []
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    return len(pictures), {
        name: "".join(output.text for output in outputs if output.get("name") == name) for name in ("stdout", "stderr")
    }


def test_cifar_study_runs_and_draws(tmp_path, write_images, monkeypatch):
    for split, count in (("train", 40), ("test", 20)):
        write_images(tmp_path / "images" / split, {"a": count, "b": count, "c": count}, seed=count)
    common = (
        f"--images {tmp_path}/images --views.kind cifar --encoder.image-size 16 16 --encoder.head-widths 16 8 "
        "--expander.width 16 --steps 60 --log-every 20 --batch-size 32 --tracker csv"
    )
    for name, options in {
        "25_25_1": "",
        "1_1_1": "--objective.variance-weight 1 --objective.invariance-weight 1",
        "invariance": "--objective.kind invariance --expander.output-dimension 2",
    }.items():
        words = f"{common} {options} --output-dir {tmp_path}/study/{name}".split()
        subprocess.run(
            [sys.executable, "pipelines/pretrain_encoder.py", *words], cwd=ROOT, check=True, capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    monkeypatch.setenv("JEPA_STUDY", str(tmp_path / "study"))
    monkeypatch.setenv("JEPA_IMAGES", str(tmp_path / "images"))
    pictures, printed = execute("vicreg_cifar10")
    assert pictures == 3
    assert "60 test images of 3 classes" in printed["stdout"]
    alarms = {line.split()[0]: line.split("alarms: ")[1] for line in printed["stdout"].splitlines() if "alarms" in line}
    assert alarms["25_25_1"] == "none"
    assert "standard deviation" in alarms["invariance"]
    assert "Warning" not in printed["stderr"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_clean_and_define_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code_cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code_cells
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code_cells:
        assert cell.outputs == []
        assert cell.execution_count is None
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, definitions)]
        assert found == [], f"a definition in the notebook, in line {found[0].lineno} of a cell: {cell.source[:60]}"


def test_pictures_are_the_very_frames_that_were_embedded(tmp_path):
    torch.manual_seed(0)
    videos = [write_ball_clip(tmp_path, index, BallWorld(fps=25, frames=50), seed=1) for index in range(2)]
    encoder = FrameEncoder(EncoderConfig(embedding_dimension=8, image_size=SIZE)).eval()
    cache = write_cache(tmp_path / "cache", videos, encoder, phases=(0.0, 0.05))
    assert len(cache.clips) == 4
    clip = cache.clips[3]
    assert clip.key.phase_s == 0.05
    assert [clip_of_row(cache, row) for row in (0, clip.start, clip.start + clip.frames - 1)] == [
        cache.clips[0],
        clip,
        clip,
    ]
    rows = np.concatenate(cache.unbroken_runs())[::-3]
    pictures = np.stack(read_pictures(cache, rows, height=32)).transpose(0, 3, 1, 2)
    again = encoder(torch.from_numpy(pictures.copy())).detach().numpy()
    np.testing.assert_allclose(again, cache.take(rows), rtol=1e-4, atol=1e-5)

    videos[1].unlink()
    with pytest.raises(VideoError, match="no such file"):
        read_pictures(cache, [clip.start])


def test_pictures_keep_the_shape_of_the_video(tmp_path):
    write_video(tmp_path / "wide.mp4", np.full((8, 36, 64, 3), 90, np.uint8), WORLD.fps)
    encoder = FrameEncoder(EncoderConfig(embedding_dimension=8, image_size=SIZE)).eval()
    cache = write_cache(tmp_path / "cache", [tmp_path / "wide.mp4"], encoder)
    assert read_pictures(cache, [3], height=18)[0].shape == (18, 32, 3)
