"""The notebook runs on what the commands leave behind; stills are the very frames that were embedded."""

from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from nbclient import NotebookClient

from data.cache import EmbeddingCache
from data.errors import VideoError
from data.frames import fitting_size, read_again, read_frames
from data.synthetic import BallWorld, write_ball_clip, write_ball_videos, write_video
from pipelines import cache_embeddings
from tests.conftest import save_encoder

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
WORLD = BallWorld()


@pytest.fixture
def embed(tmp_path):
    """Embed videos by the command; the encoder never trained."""

    def run(videos, **changes):
        encoder = save_encoder(tmp_path / "encoder", embedding_dimension=8, image_size=(32, 32))
        options = {"videos": tuple(videos), "encoder": str(tmp_path / "encoder"), "output_dir": tmp_path / "cache"}
        AcceleratorState._reset_state(reset_partial_state=True)
        cache_embeddings.main(cache_embeddings.Options(**options | changes, fps=float(WORLD.fps), dtype="float32"))
        return EmbeddingCache(tmp_path / "cache"), encoder

    return run


@pytest.mark.slow
def test_the_notebook_runs_and_draws(tmp_path, monkeypatch, embed, save_model):
    cache, _ = embed(write_ball_videos(tmp_path, 6, WORLD, seed=0))
    save_model(tmp_path / "predictor", cache, horizon=3)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [("collapse", 1), ("your_own_videos", 1), ("surprise", 3), ("make_a_predictor", 1), ("plan_to_a_goal", 1)],
)
def test_notebooks_that_train_run_in_few_steps(name, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("JEPA_NOTEBOOK_FOLDER", str(tmp_path))
    monkeypatch.setenv("JEPA_NOTEBOOK_STEPS", "10")
    monkeypatch.setenv("JEPA_NOTEBOOK_EPISODES", "1")
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == pictures
    assert name != "your_own_videos" or (tmp_path / "runs" / "report" / "report.html").exists()


def test_pictures_are_the_very_frames_that_were_embedded(tmp_path, embed):
    video = write_ball_clip(tmp_path, 0, BallWorld(fps=25, frames=50), seed=1)
    cache, encoder = embed([video], clocks=2)
    rows = np.arange(cache.frames)[::-3]
    pictures = read_again(video, cache.take(rows, "times_s"), (32, 32), cache.provenance)
    with torch.no_grad():
        again = encoder.embed(torch.from_numpy(pictures)[:, None]).numpy()
    np.testing.assert_allclose(again, cache.take(rows), rtol=1e-4, atol=1e-5)
    with pytest.raises(VideoError, match=r"there is no frame at 5\.00 s: was it changed"):
        read_again(video, np.array([5.0]), (32, 32), cache.provenance)


def test_pictures_keep_the_shape_of_the_video(tmp_path, make_provenance, embed):
    write_video(tmp_path / "wide.mp4", np.full((8, 36, 64, 3), 90, np.uint8), WORLD.fps)
    write_video(tmp_path / "high.mp4", np.full((8, 64, 36, 3), 90, np.uint8), WORLD.fps)
    assert fitting_size(tmp_path / "wide.mp4", make_provenance(fps=10.0), (32, 32)) == (18, 32)
    cache, _ = embed([tmp_path / "wide.mp4", tmp_path / "high.mp4"], clocks=1)
    high, wide = read_frames(cache, np.array([cache.clips[0].start, cache.clips[1].start]), (18, 32), keep_shape=True)
    assert (wide > 60).all()
    assert (high[:, :, 11:21] > 60).all()
    assert not high[:, :, :10].any()
    assert not high[:, :, 22:].any()
