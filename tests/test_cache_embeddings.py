"""From videos and an encoder to a cache: published encoders by name and file, columns, precision, what is refused."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate.state import AcceleratorState

from data.cache import CacheError, EmbeddingCache
from data.clock import read_on_clock
from data.errors import DataError
from data.synthetic import BallWorld, write_ball_clip
from jepa.errors import ConfigurationError
from pipelines import cache_embeddings
from pipelines.cache_embeddings import Options
from pipelines.run.command import UserError
from pipelines.run.encoders import find_encoder, load_encoder
from pipelines.run.files import write_json
from pipelines.run.published import PublishedOptions
from tests.conftest import save_encoder

ROOT = Path(__file__).parent.parent
CLIPS = 4
CLIP = "clip_00002.mp4"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Videos with tables, an encoder of ours, and published weights of `test_resnet`."""
    folder = tmp_path_factory.mktemp("material")
    (folder / "videos").mkdir()
    for index in range(CLIPS):
        write_ball_clip(folder / "videos", index, BallWorld(size=32, radius=3, frames=60, fps=10), seed=0)
    save_encoder(folder / "encoder", embedding_dimension=8, image_size=(32, 32))
    torch.manual_seed(0)
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), folder / "weights.safetensors")
    return folder


@pytest.fixture
def embed(material, tmp_path):
    """Run the command in this process, with other options than those for the encoder of ours."""

    def run(output="cache", **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        values = {"videos": (material / "videos",), "encoder": str(material / "encoder"), "fps": 10.0, "batch_size": 16}
        cache_embeddings.main(Options(**values | {"output_dir": tmp_path / output} | changes))
        return EmbeddingCache(tmp_path / output)

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def published(material, **changes):
    """Options for 3x4 tokens of two levels of `test_resnet`."""
    values = {"encoder": "timm:test_resnet", "encoder_weights": material / "weights.safetensors", "tokens": "grid",
              "grid": (3, 4), "levels": (1, 2), "image_size": (48, 64), "pca": 6}  # fmt: skip
    return values | changes


def read_account(folder):
    return json.loads((folder / "account.json").read_text())


@pytest.mark.parametrize("tokens", ["vector", "flat", "grid"])
def test_a_published_backbone_gives_what_timm_gives(embed, shared, tokens, tmp_path):
    weights, size = shared / "weights" / "tf_efficientnet_lite0.safetensors", (240, 352)
    videos = sorted((shared / "ped2" / "train").glob("*.mp4"))[:1]
    cache = embed(
        videos=tuple(videos), encoder="timm:tf_efficientnet_lite0", encoder_weights=weights, image_size=size,
        tokens=tokens, levels=() if tokens == "vector" else (3,), fps=0.5, dtype="float32", batch_size=2,
    )  # fmt: skip
    assert cache.shape == {"vector": (1280,), "flat": (112 * 15 * 22,), "grid": (15, 22, 112)}[tokens]
    # Strictly into the plain model, whose features are then asked for.
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(safetensors.torch.load_file(weights))
    features = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(3,)).eval()
    features.load_state_dict({name: model.state_dict()[name] for name in features.state_dict()})
    timed = list(read_on_clock(videos[0], size, fps=0.5))
    images = (torch.from_numpy(np.stack([one.frame for one in timed])) / 255 - 0.5) / 0.5
    with torch.no_grad():
        if tokens != "vector":
            (maps,) = features(images)
            expected = maps.permute(0, 2, 3, 1) if tokens == "grid" else maps.flatten(1)
        else:
            expected = model.forward_head(model.forward_features(images), pre_logits=True)
    # Of the largest number: in batches of another size convolutions may sum in another order.
    largest = float(expected.abs().max())
    np.testing.assert_allclose(cache.take(cache.clips[0].rows), expected, rtol=0, atol=1e-5 * largest)
    np.testing.assert_array_equal(cache.take(cache.clips[0].rows, "times_s"), [one.time_s for one in timed])
    # The folder that is left is an encoder like any other.
    assert find_encoder(str(tmp_path / "cache" / "encoder"), PublishedOptions()).fingerprint == (
        cache.provenance.encoder_fingerprint
    )


def test_components_are_fitted_once_and_serve_other_videos(embed, material, tmp_path, capsys):
    first = embed(**published(material))
    assert first.shape == (3, 4, 6)
    encoder = tmp_path / "cache" / "encoder"
    assert f"--encoder {encoder}" in capsys.readouterr().out
    written = (encoder / "model.safetensors").stat().st_mtime_ns
    again = embed(**published(material))
    assert f"{CLIPS} of {CLIPS} clips are in the cache already" in capsys.readouterr().out
    assert (encoder / "model.safetensors").stat().st_mtime_ns == written
    others = embed("others", encoder=str(encoder))
    for one, other, third in zip(first.clips, again.clips, others.clips, strict=True):
        assert one == other
        assert np.array_equal(first.take(one.rows), others.take(third.rows))
    # Components are of the features of all tokens, about their mean.
    values = np.concatenate([first.take(clip.rows) for clip in first.clips]).reshape(-1, 6)
    spread = values.std(axis=0)
    assert (np.diff(spread) < 0.05 * spread[:-1]).all()
    for change in ({"pca": 5}, {"grid": (4, 4)}, {"levels": (2,)}, {"image_size": (64, 64)}):
        with pytest.raises(UserError, match="encoder holds another encoder than the one asked for: take another --out"):
            embed(**published(material, **change))


def test_columns_are_on_the_clock_and_gaps_are_gaps(embed, material, tmp_path, capsys):
    videos = tmp_path / "videos"
    shutil.copytree(material / "videos", videos)
    table = videos / "clip_00000.csv"
    header, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows[:20], *rows[30:]]) + "\n")
    (videos / "clip_00001.csv").unlink()
    names = tuple(header.split(",")[2:4])
    cache = embed(videos=(videos,), columns=("ball_1_?",), fps=5.0)
    assert [Path(clip.key.source).name for clip in cache.clips] == [f"clip_{index:05d}.mp4" for index in (0, 2, 3)]
    ((source, reason),) = read_account(tmp_path / "cache")["refused"].items()
    assert source == str(videos / "clip_00001.mp4")
    assert "No such file" in reason
    given = np.array([[float(value) for value in row.split(",")] for row in rows])
    values = np.stack([cache.take(cache.clips[0].rows, name) for name in names], axis=1)
    assert values.dtype == np.float64
    assert np.isnan(values[10:15]).all()
    np.testing.assert_array_equal(
        np.delete(values, range(10, 15), axis=0), np.delete(given[::2, 2:4], range(10, 15), 0)
    )
    said = capsys.readouterr().out
    assert "its table has changed" not in said
    assert f"{names[0]}: the tables say nothing of it at 5 of {cache.frames} ticks" in said
    assert "one table of several videos" not in said
    other = (videos / "clip_00001.mp4").read_bytes() + b"\0\0\0\x08free"  # another content, or it would be a double
    (videos / "clip_00003.mov").write_bytes(other)
    embed("twice", videos=(videos,), columns=names, fps=5.0)
    assert f"one table of several videos, and not of one of them: {videos}/clip_00003.csv" in capsys.readouterr().out
    (videos / "clip_00003.mov").unlink()
    os.utime(table, (time.time() + 9, time.time() + 9))
    embed(videos=(videos,), columns=names, fps=5.0)
    said = re.findall("its table has changed, and what is cached has not: .*: (.*)", capsys.readouterr().out)
    assert said == [str(table.with_suffix(".mp4"))]
    with pytest.raises(DataError, match=r"clip_00001\.csv: cannot be read"):
        embed("strict", videos=(videos,), columns=names, strict=True)
    with pytest.raises(CacheError, match="holds embeddings with columns"):
        embed(videos=(videos,), columns=names[:1], fps=5.0)
    for name in ("ticks", "embeddings", "a/b", ""):
        with pytest.raises(UserError, match="a cache has no place for a column of this name"):
            embed("refused", columns=(name,))


def test_a_cache_holds_one_precision(embed):
    cache = embed(precision="bf16", dtype="float32")
    assert cache.provenance.precision == "bf16"
    exact = embed("exact", precision="fp32", dtype="float32")
    difference = np.abs(cache.take(cache.clips[0].rows) - exact.take(exact.clips[0].rows)).max()
    assert 1e-4 < difference < 0.5
    with pytest.raises(CacheError, match="holds embeddings with precision bf16, not fp32"):
        embed(precision="fp32", dtype="float32")


@pytest.mark.parametrize(
    ("encoder", "changes", "complaint"),
    [
        ("{ours}", {"tokens": "grid"}, r"--tokens is not for --encoder .*, which is a folder: drop it"),
        ("{ours}/nowhere", {}, r"there is no encoder here"),
        ("timm:test_resnet", {"window": 4}, r"--window is not for --encoder timm:test_resnet, which is timm: drop it"),
        ("timm:test_resnet", {"grid": (3, 4)}, r"--grid needs --tokens grid"),
        ("timm:test_resnt", {}, r"encoder is test_resnt, which timm does not know"),
        (
            "timm:test_resnet",
            {"encoder_weights": None},
            r"encoder the hub does not give the weights of test_resnet.*\(--encoder-weights FILE\)",
        ),
    ],
)
def test_what_an_encoder_does_not_take_names_the_option(material, encoder, changes, complaint, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    weights = {} if encoder.startswith("{") else {"encoder_weights": material / "weights.safetensors"}
    with pytest.raises((UserError, ConfigurationError), match=complaint) as raised:
        find_encoder(encoder.format(ours=material / "encoder"), PublishedOptions(**weights | changes))
    assert "\n" not in str(raised.value)


def test_defaults_of_a_published_model_are_its_own(material):
    encoder = find_encoder(
        "timm:test_resnet", PublishedOptions(encoder_weights=material / "weights.safetensors", tokens="grid")
    )
    assert encoder.image_size == timm.get_pretrained_cfg("test_resnet").input_size[1:]
    assert encoder.shape == (5, 5, encoder.backbone.feature_info[-1]["num_chs"])


def test_a_video_that_vanishes_or_changes_is_listed_and_the_others_are_embedded(embed, material, tmp_path, monkeypatch):
    videos = tmp_path / "videos"
    shutil.copytree(material / "videos", videos)
    look = cache_embeddings.missing_clips

    def look_and_lose(*args, **kwargs):
        (videos / "clip_00000.mp4").unlink()  # before it is looked at again
        tasks = look(*args, **kwargs)
        (videos / CLIP).unlink()  # before it is read
        shutil.copy(videos / "clip_00001.mp4", videos / "clip_00003.mp4")
        return tasks

    monkeypatch.setattr(cache_embeddings, "missing_clips", look_and_lose)
    cache = embed(videos=(videos,))
    assert [Path(clip.key.source).name for clip in cache.clips] == ["clip_00001.mp4"]
    refused = read_account(tmp_path / "cache")["refused"]
    changed = refused.pop(str(videos / "clip_00003.mp4"))
    assert "clip_00003.mp4: it has changed since it was looked at" in changed
    assert set(refused) == {str(videos / "clip_00000.mp4"), str(videos / CLIP)}
    assert all("o such file" in reason and reason.endswith("(6.0 s left out)") for reason in refused.values())


def test_what_is_there_already_is_no_place_for_a_cache(embed, material, tmp_path):
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "run.json", {})
    (tmp_path / "file").write_text("mine")
    shutil.copytree(material / "encoder", tmp_path / "runs" / "encoder" / "encoder")
    write_json(tmp_path / "runs" / "encoder" / "run.json", {})
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    for output, complaint in (
        ("run", "run holds run.json, and is no cache: take another one"),
        ("file", "is no folder"),
        ("runs", r"runs/encoder holds encoder, run\.json, and is no model: move it, or take another folder"),
    ):
        for more in ({}, published(material)):
            with pytest.raises(UserError, match=complaint):
                embed(output, **more)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_embeddings_are_those_of_frames_at_their_times(embed, material):
    cache = embed(fps=4.0, clocks=2, dtype="float32", batch_size=7)
    encoder = load_encoder(material / "encoder")
    assert len(cache.clips) == 2 * CLIPS
    for clip in cache.clips:
        timed = list(read_on_clock(Path(clip.key.source), (32, 32), fps=4.0, offsets_s=(clip.key.offset_s,)))
        expected = encoder.embed(torch.from_numpy(np.stack([one.frame for one in timed]))[:, None])
        np.testing.assert_allclose(cache.take(clip.rows), expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(cache.take(clip.rows, "times_s"), [one.time_s for one in timed])
        np.testing.assert_array_equal(cache.take(clip.rows, "ticks"), [one.tick for one in timed])


def test_several_clocks_in_one_pass_give_what_each_gives_alone(embed, capsys):
    both = embed("both", fps=4.0, clocks=2)
    embed("alone", fps=4.0)
    alone = embed("alone", fps=4.0, clocks=2)
    assert f"{CLIPS} of {2 * CLIPS} clips are in the cache already" in capsys.readouterr().out
    assert [(clip.key, clip.crc32) for clip in both.clips] == [(clip.key, clip.crc32) for clip in alone.clips]
    embed("more", fps=4.0, clocks=3)
    said = capsys.readouterr().out
    assert f"warning: {CLIPS} videos of fewer frames a second than all clocks together, such as " in said
    assert "clip_00000.mp4 of 10: on 3 clocks its frames come twice" in said


def test_damaged_videos_are_kept_as_far_as_they_go_and_accounted_for(embed, material, tmp_path, damage_video, capsys):
    videos = tmp_path / "videos"
    shutil.copytree(material / "videos", videos)
    broken = damage_video(videos / "clip_00000.mp4", slice(40, None))
    (videos / "clip_00001.mp4").write_bytes(b"no video")
    cache = embed(videos=(videos,))
    account, said = read_account(tmp_path / "cache"), capsys.readouterr().out
    assert list(account["refused"]) == [str(videos / "clip_00001.mp4")]
    assert list(account["damaged"]) == [str(broken)]
    assert f"read {CLIPS - 1} videos" in said
    assert "clip_00000.mp4: decoding failed after" in said
    frames = {Path(clip.key.source).name: clip.frames for clip in cache.clips}
    assert 30 <= frames["clip_00000.mp4"] <= 40
    assert "clip_00001.mp4" not in frames
    # Nothing is left to do, and the account still tells of both.
    embed(videos=(videos,))
    assert f"{CLIPS - 1} of {CLIPS - 1} clips are in the cache already" in capsys.readouterr().out
    assert read_account(tmp_path / "cache") == account
    with pytest.raises(DataError, match=r"clip_00001\.mp4: not a readable video"):
        embed("strict", videos=(videos,), strict=True)
    (videos / "clip_00001.mp4").unlink()
    with pytest.raises(DataError, match=r"clip_00000\.mp4: decoding failed"):
        embed("strict", videos=(videos,), strict=True)
