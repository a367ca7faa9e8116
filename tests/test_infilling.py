"""Infilling: what is hidden has no influence, linear interpolation is where it starts, and training beats it."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import jepa.infilling
from data.embedding_cache import ClipKey, EmbeddedClip, EmbeddingCache
from data.windows import Windows
from jepa.encoder import ConfigurationError
from jepa.infilling import (
    Infiller,
    InfillerConfig,
    copy_last,
    draw_gaps,
    fit_trust,
    linear_interpolation,
    measure_windows,
    middle_gap,
    nearest_visible,
)
from pipelines import train_infiller
from pipelines.stage import UserError
from pipelines.train_infiller import RIDGE_PENALTIES, Options, evaluate, fit_ridge, main, spread, table

ROOT = Path(__file__).parent.parent
SMALL = InfillerConfig(longest_gap=3, context=4, width=16, depth=2, heads=2)


def make(config: InfillerConfig = SMALL) -> Infiller:
    """An infiller whose head is no longer zero, so that it says something."""
    torch.manual_seed(0)
    infiller = Infiller(config, 5, 4.0, "abc").eval()
    torch.nn.init.normal_(infiller.head.weight)
    return infiller


def waves(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Oscillations that a straight line misses, (count, length, 5)."""
    generator = torch.Generator().manual_seed(seed)
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    return torch.sin(0.8 * torch.arange(length)[:, None] + phase + torch.arange(5))


def mask(*rows: str) -> torch.Tensor:
    """Such as "..XX.", hidden where an X stands."""
    return torch.tensor([[letter == "X" for letter in row] for row in rows])


@pytest.mark.parametrize("value", [10.0, float("nan")])
@pytest.mark.parametrize("name", ["infiller", "linear_interpolation", "copy_last"])
def test_hidden_embeddings_have_no_influence(name, value):
    fill = {"infiller": make(), "linear_interpolation": linear_interpolation, "copy_last": copy_last}[name]
    embeddings, hidden = torch.randn(3, 11, 5), mask("...XXX.....", "....X......", ".X..XX.XXX.")
    changed = torch.where(hidden[..., None], value, embeddings)
    with torch.no_grad():
        before, after = fill(embeddings, hidden), fill(changed, hidden)
        assert torch.equal(before, after)
        assert torch.equal(before[~hidden], embeddings[~hidden])
        assert not torch.equal(before[hidden], embeddings[hidden])


def test_both_sides_matter():
    embeddings, hidden = torch.randn(1, 11, 5), mask("....XXX....")
    infiller = make()
    with torch.no_grad():
        filled = infiller(embeddings, hidden)
        for place in (0, 2, 8, 10):  # further than the ends of the line across
            changed = embeddings.clone()
            changed[:, place] += 1
            assert not torch.equal(infiller(changed, hidden)[hidden], filled[hidden])


def test_a_new_infiller_interpolates_linearly():
    embeddings, hidden = torch.randn(2, 11, 5), mask("...XXX.....", ".X..XX.X...")
    infiller = Infiller(SMALL, 5, 4.0, "abc")
    assert torch.equal(infiller(embeddings, hidden), linear_interpolation(embeddings, hidden))


def test_lines_and_copies_across_gaps():
    hidden = mask("..XXX.X.")
    before, after = nearest_visible(hidden)
    assert before[0].tolist() == [0, 1, 1, 1, 1, 5, 5, 7]
    assert after[0].tolist() == [0, 1, 5, 5, 5, 5, 7, 7]
    values = torch.tensor([7.0, 1, 0, 0, 0, 9, 0, -1])[None, :, None]
    assert linear_interpolation(values, hidden)[0, :, 0].tolist() == [7, 1, 3, 5, 7, 9, 4, -1]
    assert copy_last(values, hidden)[0, :, 0].tolist() == [7, 1, 1, 1, 1, 9, 9, -1]


@pytest.mark.parametrize("row", ["X....", "....X", "XXXXX"])
def test_a_gap_has_two_sides(row):
    with pytest.raises(ValueError, match="a gap needs a visible one on both sides"):
        make()(torch.randn(1, 5, 5), mask(row))


def test_gaps_are_of_every_length_at_every_place():
    hidden = draw_gaps(2000, SMALL, torch.Generator().manual_seed(0))
    assert hidden.shape == (2000, SMALL.window)
    assert not hidden[:, [0, -1]].any()
    begins = (hidden[:, 1:] & ~hidden[:, :-1]).sum(dim=1)
    assert (begins == 1).all()  # one gap in each
    found = {(int(row.sum()), int(row.int().argmax())) for row in hidden}
    assert found == {(length, start) for length in (1, 2, 3) for start in range(1, SMALL.window - length)}
    shares = torch.bincount(hidden.sum(dim=1), minlength=4)[1:] / 2000
    assert shares.min() > 0.28
    assert [middle_gap(length, SMALL).nonzero().flatten().tolist() for length in (1, 2, 3)] == [[5], [4, 5], [4, 5, 6]]


def test_training_beats_linear_interpolation():
    infiller = make()
    torch.nn.init.zeros_(infiller.head.weight)
    windows = 3 + 2 * waves(256, SMALL.window)
    measure_windows(infiller, windows)
    standardised = infiller.standardise(windows)
    assert standardised.mean().abs() < 1e-5
    assert fit_trust(infiller, standardised).tolist() == [1, 1, 1]
    optimizer, generator = torch.optim.Adam(infiller.parameters(), 3e-3), torch.Generator().manual_seed(0)
    for _ in range(60):
        optimizer.zero_grad()
        infiller.loss(standardised, draw_gaps(256, SMALL, generator)).backward()
        optimizer.step()
    unseen = infiller.standardise(3 + 2 * waves(100, SMALL.window, seed=1))
    assert fit_trust(infiller, unseen).max() < 0.3
    assert infiller.trust.min() > 0.8


def test_a_feature_that_hardly_varied_in_training_swamps_nothing():
    infiller, windows = make(), waves(256, SMALL.window)
    windows[..., 1] = 0.1
    measure_windows(infiller, windows)
    assert infiller.standardise(windows[0] + 0.01).abs().max() < 3
    assert infiller.std[[0, 2, 3, 4]].min() > 0.5
    assert (infiller.sigma[:, 1] > 1e-3 * infiller.sigma[:, 0]).all()


def test_what_is_worse_than_the_line_is_not_trusted():
    infiller = make()
    windows = waves(50, SMALL.window)
    hidden = middle_gap(2, SMALL).expand(50, -1)
    line, before = linear_interpolation(windows, hidden), infiller(windows, hidden)
    opposite = torch.where(hidden[..., None], 2 * line - before, windows)  # the truth lies on the other side
    assert fit_trust(infiller, opposite)[1] == 1
    assert torch.equal(infiller(opposite, hidden), line)
    halfway = torch.where(hidden[..., None], 0.5 * (line + before), windows)
    assert fit_trust(infiller, halfway)[1] < 1e-6
    assert infiller.trust[1] == pytest.approx(0.5, abs=1e-4)


def test_save_and_load(tmp_path):
    infiller = make()
    infiller.mean.fill_(0.5)
    infiller.trust.fill_(0.7)
    infiller.save_pretrained(tmp_path)
    loaded = Infiller.from_pretrained(tmp_path).eval()
    embeddings, hidden = torch.randn(1, 9, 5), mask("...XX....")
    with torch.no_grad():
        assert torch.equal(loaded(embeddings, hidden), infiller(embeddings, hidden))
    assert (loaded.config, loaded.fps, loaded.encoder_fingerprint) == (SMALL, 4.0, "abc")
    assert torch.equal(loaded.standardise(embeddings), embeddings - 0.5)


def test_the_guide_fills_a_gap(tmp_path, monkeypatch):
    """What docs/guide.md says is run as it stands there."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(), re.DOTALL)
    infiller = make()
    measure_windows(infiller, 3 + 2 * waves(50, SMALL.window))
    infiller.save_pretrained(tmp_path / "runs" / "infiller" / "infiller")
    monkeypatch.chdir(tmp_path)
    whole, hidden = 3 + 2 * waves(2, 20, seed=1), mask("....XX......X.......", ".....XXX............")
    embeddings = torch.where(hidden[..., None], torch.nan, whole)
    names = {"jepa": jepa, "torch": torch, "embeddings": embeddings, "hidden": hidden}
    exec(textwrap.dedent(code), names)
    assert torch.allclose(names["filled"][~hidden], whole[~hidden], atol=1e-5)
    with torch.no_grad():
        expected = infiller(infiller.standardise(whole), hidden)
    assert torch.allclose(infiller.standardise(names["filled"]), expected, atol=1e-4)


def test_half_precision_is_finite():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert make()(torch.randn(1, 30, 5), mask("....X.....XXXXXXXXXX.....X....")).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads 3 does not divide"),
        ({"heads": 0}, "heads is 0"),
        ({"longest_gap": 0}, "longest-gap is 0"),
        ({"context": 0}, "context is 0"),
        ({"width": 0}, "width is 0"),
        ({"depth": -1}, "depth is -1"),
        ({"dropout": 1.0}, "dropout is 1: it must be at least 0, below 1"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_impossible_configurations_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        Infiller(InfillerConfig(**{"width": 16} | options), 5, 4.0, "abc")


@pytest.fixture
def caches(tmp_path, write_cache):
    """Clips of waves, for training, validation and test."""
    for split, clips in {"train": 6, "val": 3, "test": 3}.items():
        values = waves(clips, 20, seed=len(split) + clips).numpy()
        write_cache(
            tmp_path / split,
            [
                EmbeddedClip(ClipKey(f"{split}_{index}.mp4", 1, 1, 0.0), clip, np.arange(20) / 4, np.arange(20))
                for index, clip in enumerate(values)
            ],
        )
    return tmp_path


def test_every_guess_is_judged_in_every_place(caches):
    infiller = Infiller(SMALL, 5, 4.0, "0123abcd").eval()
    train, validation, test = (
        Windows(EmbeddingCache(caches / split), SMALL.window) for split in ("train", "val", "test")
    )
    measured = train.take(np.arange(len(train)))
    measure_windows(infiller, measured)
    held_out = infiller.standardise(validation.take(np.arange(len(validation))))
    results = evaluate(infiller, infiller.standardise(measured), held_out, test, seed=0)
    assert results["interval"] == "too few stretches of 5.5 s (3) for an interval"
    assert set(results["guesses"]) == {"model", "linear_interpolation", "copy_last", "ridge"}
    for name, records in results["guesses"].items():
        for gap, record in enumerate(records, start=1):
            assert record["gap"] == gap
            assert len(record["places"]["mse"]) == len(record["places"]["relative_to_linear"]) == gap
            assert record["mse_interval"] is record["places"]["relative_to_linear_interval"] is None
            assert np.mean(record["places"]["mse"]) == pytest.approx(record["mse"])
            if name in ("model", "linear_interpolation"):  # it is new
                assert record["relative_to_linear"] == pytest.approx(1)
            elif name == "ridge":  # waves obey a linear law
                assert record["relative_to_linear"] < 0.1
            else:
                assert record["relative_to_linear"] > 1.5
    assert len(table(results).splitlines()) == 14
    assert table(results).endswith(results["interval"])


def test_intervals_are_over_stretches_as_long_as_two_windows(tmp_path, write_cache):
    (values,) = waves(1, 200).numpy()
    clip = EmbeddedClip(ClipKey("long.mp4", 1, 1, 0.0), values, np.arange(200) / 4, np.arange(200))
    test = Windows(EmbeddingCache(write_cache(tmp_path, [clip])), SMALL.window)
    infiller = Infiller(SMALL, 5, 4.0, "0123abcd").eval()
    measured = torch.from_numpy(values).unfold(0, SMALL.window, 1).mT.contiguous()
    results = evaluate(infiller, measured, measured, test, seed=0)
    assert results["interval"] == "95 %, bootstrap over 9 stretches of 5.5 s"
    for record in results["guesses"]["copy_last"]:
        for judged in (record, {name: value[0] for name, value in record["places"].items()}):
            low, high = judged["relative_to_linear_interval"]
            assert low < judged["relative_to_linear"] < high


@pytest.mark.parametrize("shared", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_a_video_belongs_to_one_cache_alone(caches, shared):
    folders = {"train": caches / "train", "validation": caches / "val", "test": caches / "test"}
    one, other = shared
    folders[other] = folders[one]
    options = {f"{name}_cache": folder for name, folder in folders.items()}
    with pytest.raises(UserError, match=rf"0\.mp4 is in both --{one}-cache and --{other}-cache: keep videos apart"):
        main(Options(**options, output_dir=caches / "out", tracker=("none",)))
    assert not (caches / "out").exists()


@pytest.mark.parametrize("still", ["train", "val", "test"])
def test_embeddings_that_never_change_are_refused(caches, write_cache, still):
    folders = {name: caches / name for name in ("train", "val", "test")}
    clip = EmbeddedClip(ClipKey("still.mp4", 1, 1, 0.0), np.ones((20, 5), np.float32), np.arange(20) / 4, np.arange(20))
    folders[still] = write_cache(caches / "still", [clip])
    options = Options(
        folders["train"], folders["val"], folders["test"], caches / "out", tracker=("none",), infiller=SMALL
    )
    with pytest.raises(UserError, match="/still: no embedding ever changes, so nothing can beat a straight line: bri"):
        main(options)
    assert not (caches / "out").exists()


def test_nothing_is_learned_from_one_window(caches):
    windows = Windows(EmbeddingCache(caches / "train").only({"train_0.mp4"}), 20)
    with pytest.raises(UserError, match="train holds one window of 20 embeddings, and at least 2 are needed: bring lo"):
        spread(windows, 100)


def test_the_penalty_of_ridge_is_chosen_on_validation_windows(monkeypatch):
    gap = middle_gap(3, SMALL)
    noisy = waves(240, SMALL.window) + 0.5 * torch.randn(
        240, SMALL.window, 5, generator=torch.Generator().manual_seed(0)
    )
    train, held_out = noisy[:40].repeat(5, 1, 1), noisy[40:]  # as windows that overlap, each is nearly there again

    def error():
        return float((fit_ridge(train, held_out, gap)(held_out) - held_out[:, gap]).square().mean())

    chosen, errors = error(), []
    for penalty in RIDGE_PENALTIES:
        monkeypatch.setattr(train_infiller, "RIDGE_PENALTIES", (penalty,))
        errors.append(error())
    assert chosen == min(errors)
    assert chosen < 0.8 * errors[0]  # which is best for windows of which others are nearly the same


def test_ridge_is_trusted_as_far_as_validation_windows_advise():
    gap = middle_gap(3, SMALL)
    generator = torch.Generator().manual_seed(0)
    start, slope = torch.randn(2, 50, 1, 5, generator=generator)
    lines = start + slope * torch.arange(SMALL.window)[:, None]
    bent = waves(200, SMALL.window)
    assert torch.allclose(fit_ridge(bent, lines, gap)(lines), lines[:, gap], atol=1e-5)  # not at all
    assert torch.allclose(fit_ridge(bent, bent, gap)(bent), bent[:, gap], atol=0.02)  # as far as it goes


def run(*words: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "pipelines/train_infiller.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


def test_the_stage_leaves_what_it_promises_and_resumes_to_the_bit(caches):
    words = f"""--train-cache {caches}/train --validation-cache {caches}/val --test-cache {caches}/test
        --infiller.longest-gap 3 --infiller.context 4 --infiller.width 16 --infiller.heads 2 --optimizer.ema-decay 0.5
        --steps 8 --log-every 2 --checkpoints.every-steps 4 --tracker none""".split()
    whole, cut = caches / "whole", caches / "cut"
    done = run(*words, "--output-dir", whole)
    assert done.returncode == 0, done.stderr
    assert "in the middle of the gap" in done.stdout
    assert "train_predictor.py --train-cache" in done.stdout
    assert (whole / "infilling.png").stat().st_size > 5000
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["validation_relative_to_linear"] <= 1
    assert metrics["relative_to_linear_in_gap_3"] > 0

    # As if the machine had gone down after step 4.
    shutil.copytree(whole, cut)
    for name in ("infilling.json", "infilling.png", "metrics.json"):
        (cut / name).unlink()
    for folder in (cut / "infiller", cut / "training_state" / "step_00000008"):
        shutil.rmtree(folder)
    resumed = run(*words, "--output-dir", cut, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    before, after = (load_file(folder / "infiller" / "model.safetensors") for folder in (whole, cut))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (cut / "infilling.json").read_text() == (whole / "infilling.json").read_text()
