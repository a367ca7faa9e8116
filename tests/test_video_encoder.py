"""Clip encoders: a small V-JEPA 2 with random weights, embedded as transformers does it, and never from the future."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from einops import rearrange
from tqdm import tqdm

from data.cache import ClipKey
from data.clock import read_on_clock
from data.content import content_of
from jepa.components import principal_components
from jepa.errors import ConfigurationError
from jepa.video_encoder import load_clip_encoder
from pipelines.run.artefacts import save_artefact
from pipelines.run.command import UserError
from pipelines.run.embed import Task, embed_videos
from pipelines.run.encoders import find_encoder, load_encoder
from pipelines.run.published import PublishedOptions

SIZE, WINDOW, FPS = 32, 8, 10.0
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Folder of a small random V-JEPA 2 as transformers saves it, and the model."""
    torch.manual_seed(0)
    config = transformers.VJEPA2Config(
        crop_size=SIZE, patch_size=8, frames_per_clip=WINDOW, hidden_size=48, num_attention_heads=4,
        num_hidden_layers=2, mlp_ratio=2.0, pred_hidden_size=24, pred_num_attention_heads=2, pred_num_hidden_layers=1,
    )  # fmt: skip
    model = transformers.VJEPA2Model(config).eval()
    with torch.no_grad():  # so large that what is attended to matters
        for name, weight in model.named_parameters():
            if name.endswith(("query.weight", "key.weight", "value.weight")):
                weight.mul_(20)
    folder = tmp_path_factory.mktemp("published")
    model.save_pretrained(folder)
    return folder, model


def windows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, WINDOW, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


def reference(model, clips):
    """The tokens that transformers gives for the last temporal slot, (B, rows, columns, F)."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (clips / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        tokens = model.get_vision_features(pixel_values_videos=pixels)
    return rearrange(tokens, "b (t h w) f -> b t h w f", h=SIZE // 8, w=SIZE // 8)[:, -1]


@pytest.mark.parametrize("tokens", ["grid", "vector"])
def test_embeddings_are_transformers_own_and_the_same_after_saving(published, tokens, tmp_path):
    folder, model = published
    encoder = load_clip_encoder(str(folder), tokens=tokens)
    expected = reference(model, windows(3))
    expected = expected if tokens == "grid" else expected.mean(dim=(1, 2))
    embeddings = encoder.embed(windows(3))
    torch.testing.assert_close(embeddings, expected, rtol=1e-5, atol=1e-5)
    assert (encoder.window, encoder.image_size) == (WINDOW, (SIZE, SIZE))
    assert embeddings.shape == (3, *encoder.shape)
    encoder.replace_head(principal_components([embeddings], 2))
    save_artefact(tmp_path / "encoder", "encoder", encoder.config, encoder)
    loaded = load_encoder(tmp_path / "encoder")
    assert torch.equal(loaded.embed(windows(3)), encoder.embed(windows(3)))
    assert loaded.fingerprint == encoder.fingerprint


def embed(encoder, path, *, offsets_s=(0.0,), batch_size=4):
    keys = [ClipKey(str(path), content_of(path), offset_s) for offset_s in offsets_s]
    with tqdm(disable=True) as bar:
        (task,) = embed_videos(
            Accelerator(cpu=True), encoder, [Task(path, keys)], fps=FPS, image_fps=25.0, batch_size=batch_size,
            strict=False, bar=bar,
        )  # fmt: skip
    assert task.refused == ""
    return task.clips()


def write_video(encode_video, path, times_s, changed_from=None):
    """Noise, the same up to a frame, and another from there on; each frame coded on its own, without loss."""
    pictures = []
    for index in range(len(times_s)):
        is_other = changed_from is not None and index >= changed_from
        pictures.append(np.random.default_rng([index, is_other]).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    encode_video(path, times_s, pictures, codec="ffv1", pixel_format="bgr0")
    return path


def test_changing_the_future_leaves_the_past_bit_equal(published, encode_video, tmp_path):
    encoder = load_clip_encoder(str(published[0]), tokens="grid")
    times_s = np.arange(21) / FPS
    (before,) = embed(encoder, write_video(encode_video, tmp_path / "before.mkv", times_s))
    for first in (1, 9, 20):
        (after,) = embed(encoder, write_video(encode_video, tmp_path / f"{first}.mkv", times_s, changed_from=first))
        one, other = before.columns["embeddings"], after.columns["embeddings"]
        assert np.array_equal(one[:first], other[:first])
        seen = slice(first, first + WINDOW)  # every window that holds a changed frame
        assert (np.abs(one[seen] - other[seen]).max(axis=(1, 2, 3)) > 1e-3).all()


def test_windows_end_at_the_tick_and_repeat_the_first_frame_after_a_gap(published, encode_video, tmp_path):
    folder, model = published
    encoder = load_clip_encoder(str(folder), tokens="grid")
    times_s = np.concatenate([np.arange(5), np.arange(9, 20)]) / FPS  # ticks 5 to 8 are missing
    path = write_video(encode_video, tmp_path / "gap.mkv", times_s)
    frames = torch.from_numpy(np.stack([timed.frame for timed in read_on_clock(path, (SIZE, SIZE), fps=FPS)]))
    (clip,) = embed(encoder, path)
    assert clip.ticks.tolist() == [*range(5), *range(9, 20)]
    for begin, end in ((0, 5), (5, 16)):
        for row in range(begin, end):
            rows = [max(begin, row - ago) for ago in reversed(range(WINDOW))]
            torch.testing.assert_close(
                torch.from_numpy(clip.columns["embeddings"][row]), reference(model, frames[rows][None])[0],
                rtol=1e-4, atol=1e-4,
            )  # fmt: skip


def test_clocks_and_chunks_have_windows_of_their_own(published, encode_video, tmp_path):
    encoder = load_clip_encoder(str(published[0]))
    path = write_video(encode_video, tmp_path / "video.mkv", np.arange(40) / (2 * FPS))
    both = embed(encoder, path, offsets_s=(0.0, 0.05))
    alone = [embed(encoder, path, offsets_s=(offset_s,))[0] for offset_s in (0.0, 0.05)]
    for one, other in zip(both, alone, strict=True):
        assert np.array_equal(one.ticks, other.ticks)
        assert np.array_equal(one.columns["embeddings"], other.columns["embeddings"])


def test_what_is_no_clip_encoder_is_one_line(published, tmp_path, monkeypatch):
    folder, _ = published
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "config.json").write_bytes((folder / "config.json").read_bytes())
    cases = {
        str(tmp_path / "other"): "it is a bert, and only vjepa2 is known here",
        str(tmp_path / "part"): "cannot be had or used: .*safetensors",
        "nobody/no-such-model": "cannot be had or used",
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, complaint in cases.items():
        with pytest.raises(ConfigurationError, match=complaint) as raised:
            find_encoder(f"hf:{name}", PublishedOptions())
        assert "\n" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="window is 5: it must be a multiple of 2"):
        find_encoder(f"hf:{folder}", PublishedOptions(window=5))
    with pytest.raises(UserError, match=r"--levels is not for --encoder hf:.*, which is hf: drop it"):
        find_encoder(f"hf:{folder}", PublishedOptions(levels=(1,)))
    assert find_encoder(f"hf:{folder}", PublishedOptions(window=4)).window == 4


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigurationError, match=r"needs transformers.* pip install 'video-jepa\[clips\]'"):
        load_clip_encoder("anything")
