"""The notebook runs on what the commands leave behind; stills are the very frames that were embedded."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient

from data.cache import ClipKey, EmbeddingCache
from data.cache_writer import CacheWriter, EmbeddedClip
from data.clock import read_on_clock
from data.decoder import VideoError
from data.manifest import file_state
from data.synthetic import BallWorld, write_ball_clip, write_video
from data.windows import Windows
from jepa.baselines import Ridge
from jepa.encoder import EncoderConfig, FrameEncoder
from jepa.networks import MLPConfig
from jepa.predictor import Predictor
from pipelines.run.artefacts import save_artefact
from pipelines.run.judging import calibrate
from pipelines.run.models import calibration_artefact
from pipelines.run.pictures import read_pictures

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WORLD = BallWorld()
SIZE = (32, 32)


def make_encoder():
    torch.manual_seed(0)
    return FrameEncoder(EncoderConfig(embedding_dimension=8, image_size=SIZE)).eval()


def embed(folder, videos, encoder, make_provenance, offset_s=0.0):
    """What cache_embeddings leaves behind."""
    space = {"encoder_fingerprint": encoder.fingerprint, "fps": float(WORLD.fps), "image_size": SIZE}
    provenance = make_provenance((8,), **space)
    with CacheWriter(folder, provenance) as writer:
        for video in videos:
            frames = list(read_on_clock(video, SIZE, fps=WORLD.fps, offsets_s=[offset_s]))
            with torch.no_grad():
                embeddings = encoder.embed(torch.from_numpy(np.stack([timed.frame for timed in frames]))[:, None])
            times_s, ticks = (np.array([timed[field] for timed in frames]) for field in (1, 2))
            key = ClipKey(*file_state(video), offset_s)
            writer.add(EmbeddedClip(key, {"embeddings": embeddings.numpy()}, times_s, ticks))
    return EmbeddingCache(folder)


@pytest.mark.slow
def test_the_notebook_runs_and_draws(tmp_path, monkeypatch, make_provenance):
    encoder = make_encoder()
    videos = [write_ball_clip(tmp_path, index, WORLD, seed=0) for index in range(6)]
    cache = embed(tmp_path / "cache", videos, encoder, make_provenance)
    embeddings = Windows(cache, 1).take(np.arange(cache.frames))[:, 0]
    predictor = Predictor(
        MLPConfig(context=4, width=16, depth=1), (8,), fps=float(WORLD.fps), encoder_fingerprint=encoder.fingerprint
    ).eval()
    predictor.mean.copy_(embeddings.mean(dim=0))
    predictor.std.copy_(embeddings.std(dim=0))
    ridge = Ridge(predictor.fps, 2, mean=predictor.mean, std=predictor.std)
    calibration, _ = calibrate(predictor, ridge, cache, horizon=3)
    (tmp_path / "predictor").mkdir()
    save_artefact(tmp_path / "predictor" / "predictor", "predictor", predictor.description(), predictor)
    save_artefact(tmp_path / "predictor" / "calibration", *calibration_artefact(calibration, predictor))
    monkeypatch.setenv("JEPA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("JEPA_PREDICTOR", str(tmp_path / "predictor"))
    monkeypatch.delenv("JEPA_VIDEO", raising=False)

    notebook = nbformat.read(NOTEBOOKS / "rollout_evaluation.ipynb", as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}})
    client.execute()  # raises CellExecutionError with the traceback of a cell that fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = {name: "".join(output.text for output in outputs if output.get("name") == name)
               for name in ("stdout", "stderr")}  # fmt: skip
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 7
    assert "6 clips, 240 frames at 10 fps" in printed["stdout"]
    assert "Warning" not in printed["stderr"]


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (cell.outputs == [] and cell.execution_count is None)


def test_pictures_are_the_very_frames_that_were_embedded(tmp_path, make_provenance):
    encoder = make_encoder()
    video = write_ball_clip(tmp_path, 0, BallWorld(fps=25, frames=50), seed=1)
    cache = embed(tmp_path / "cache", [video], encoder, make_provenance, offset_s=0.05)
    rows = np.arange(cache.frames)[::-3]
    pictures = read_pictures(video, cache.take(rows, "times_s"), cache.provenance, height=32).transpose(0, 3, 1, 2)
    with torch.no_grad():
        again = encoder.embed(torch.from_numpy(pictures.copy())[:, None]).numpy()
    np.testing.assert_allclose(again, cache.take(rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(VideoError, match=r"there is no frame at 5\.00 s: was it changed"):
        read_pictures(video, np.array([5.0]), cache.provenance)


def test_pictures_keep_the_shape_of_the_video(tmp_path, make_provenance):
    write_video(tmp_path / "wide.mp4", np.full((8, 36, 64, 3), 90, np.uint8), WORLD.fps)
    pictures = read_pictures(tmp_path / "wide.mp4", np.array([0.3]), make_provenance(fps=10.0), height=18)
    assert pictures.shape == (1, 18, 32, 3)
