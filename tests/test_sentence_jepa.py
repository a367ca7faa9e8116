import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.sentence_jepa import (
    FIRST_BUCKET,
    MASK,
    PADDING,
    Options,
    SentenceEncoder,
    Vocabulary,
    WordCrop,
    compare,
    embed,
    main,
    read_pairs,
)
from jepa.expander import ExpanderConfig
from jepa.objectives import ObjectiveConfig
from pipelines.stage import UserError

ROOT = Path(__file__).resolve().parents[1]
NOUNS = ("plane", "flute", "pizza", "horse", "river", "market")
VERBS = ("takes", "plays", "eats", "rides", "crosses", "leaves", "paints", "sees")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder as $JEPA_SHARED, with a made-up benchmark: sentences are alike by the words that they share."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "text").mkdir()
    rng = np.random.default_rng(0)

    def sentence():
        nouns, verbs = rng.choice(NOUNS, 3), rng.choice(VERBS, 2)
        return f"The {nouns[0]} {verbs[0]} a {nouns[1]}, and {verbs[1]} the {nouns[2]}."

    for split in ("train", "dev", "test"):
        pairs = [(sentence(), sentence()) for _ in range(60)]
        rows = [(*pair, 5 * len(set(pair[0].split()) & set(pair[1].split())) / 9) for pair in pairs]
        with (folder / "text" / f"stsb-en-{split}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def small(**changes):
    """Options of a run of a second."""
    fixed = {
        "seeds": (0,), "steps": 5, "batch_size": 16, "crop_words": 4, "dimension": 8,
        "expander": ExpanderConfig(width=8, hidden_layers=0),
    }  # fmt: skip
    return Options(**{**fixed, **changes})


def test_crops_are_runs_of_words_and_all_places_occur():
    tokens = torch.zeros(400, 9, dtype=torch.int64)
    tokens[:, :7] = torch.arange(11, 18)
    crops = WordCrop(3)(tokens, torch.Generator().manual_seed(0))
    assert crops.shape == (400, 3)
    assert (crops - crops[:, :1] == torch.arange(3)).all()
    assert set(crops[:, 0].tolist()) == {11, 12, 13, 14, 15}


def test_a_short_sentence_is_taken_whole():
    tokens = torch.tensor([[5, 6, 0, 0], [5, 6, 7, 0], [5, 6, 7, 8]])
    crops = WordCrop(6)(tokens, torch.Generator().manual_seed(0))
    assert crops.tolist() == [[5, 6, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0], [5, 6, 7, 8, 0, 0]]


def test_words_that_training_never_saw_still_equal_themselves():
    vocabulary = Vocabulary(["A man plays.", "a man sings"])
    seen, unseen, silent = vocabulary.encode(["A MAN", "zebra, Zebra", "?!"])
    assert seen.tolist() == [len(vocabulary) - 2, len(vocabulary) - 1]
    assert unseen[0] == unseen[1]
    assert FIRST_BUCKET <= unseen[0] < len(vocabulary) - 2
    assert silent[0] not in (PADDING, MASK)


def test_padding_does_not_change_an_embedding():
    torch.manual_seed(0)
    encoder = SentenceEncoder(words=30, dimension=8, depth=2)
    sentence = torch.tensor([[7, 9, 4]])
    padded = torch.tensor([[7, 9, 4, 0, 0, 0], [5, 6, 7, 8, 9, 3]])
    alone, together = embed(encoder, sentence), encoder(padded)
    torch.testing.assert_close(together[:1], alone)
    assert (together[1] - alone[0]).abs().max() > 0.1


def test_a_run_leaves_its_results(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JEPA_SHARED", str(text))
    main(small(output_dir=tmp_path / "out", split="dev", seeds=(0, 1), sweep=True, steps=2))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results.keys() == {"options", "sentences", "pairs", "tf_idf", "runs", "sweep"}
    assert results["pairs"] == 60
    assert [run["seed"] for run in results["runs"]] == [0, 1]
    for run in results["runs"]:
        for name in ("untrained", "jepa", "masked_language_model"):
            assert run[name].keys() >= {"spearman", "spearman_whitened", "std", "rank"}
    varied = [record["varied"] for record in results["sweep"]]
    weights = ["variance weight", "invariance weight", "covariance weight"]
    assert list(dict.fromkeys(varied)) == [
        "nothing", *weights, "batch size", "expander width", "expander layers", "sentences",
    ]  # fmt: skip
    # Everyone of a seed starts from the same weights, so the sweep's untrained encoder is that of the first run.
    assert results["sweep"][0]["untrained"] == results["runs"][0]["untrained"]
    assert "| jepa |" in capsys.readouterr().out


def test_a_run_can_be_repeated(text):
    pairs = read_pairs(text / "text" / "stsb-en-dev.csv")
    first, second = (compare(3, pairs.first, pairs, small(), ["jepa"])["jepa"]["spearman"] for _ in range(2))
    assert first == second


def test_a_small_variance_weight_collapses(text):
    pairs = read_pairs(text / "text" / "stsb-en-train.csv")
    outputs = {}
    for weight in (0.1, 25.0):
        options = small(objective=ObjectiveConfig(variance_weight=weight), steps=120, learning_rate=1e-2)
        outputs[weight] = compare(0, pairs.first, pairs, options, ["jepa"])["jepa"]["output_std"]
    # Of whole sentences, which are more alike than the crops that the objective holds at 1.
    assert outputs[0.1] < 0.05 < 0.25 < outputs[25.0]


def test_without_the_benchmark_there_is_one_line(tmp_path):
    script = [sys.executable, ROOT / "examples" / "sentence_jepa.py", "--output-dir", tmp_path / "out"]
    environment = {**os.environ, "JEPA_SHARED": str(tmp_path)}
    run = subprocess.run(script, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert run.stderr.splitlines() == [
        f"error: {tmp_path}/text/stsb-en-train.csv: the STS benchmark is not there; set JEPA_SHARED"
    ]
    assert not (tmp_path / "out").exists()


def test_a_row_that_is_none_is_named(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("One.,Two.,3.5\nOne.,Two.\n")
    with pytest.raises(UserError, match=r"pairs.csv, row 2: One.,Two. is not sentence1,sentence2,score"):
        read_pairs(path)
