r"""A sentence JEPA: the objective of the frame encoder, on words.

  python examples/sentence_jepa.py --seeds 0 1 2 --output-dir runs/examples/sentence_jepa

Nothing in `jepa/` knows what it embeds. Here two views of a *sentence* (`WordCrop`: a random run of words) go through a
small transformer that starts from nothing, then through the same expander to the same VICReg. It learns from the
sentences of the STS benchmark's training part alone, without their scores; what it is worth is Spearman's rank
correlation between the cosine of two embeddings and how alike people found the sentences (Cer et al. 2017,
arXiv:1708.00055). Beside it: the same encoder untrained, and TF-IDF. A second column whitens the encoders' embeddings
first, on the training sentences.

Read it honestly: from 10,000 short sentences the gain comes from variance and covariance, not from the invariance,
without which it is the same (dev, one seed, .701 against .703), and an eighth of the sentences gives all of it; the
untrained encoder, whitened, is better than anything trained is unwhitened. The settings follow from that: the
covariance weighs as much as the rest, and the expander is linear. They were chosen on `--split dev`.

Prints a table in Markdown and writes `results.json`.
"""

import csv
import re
import time
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics.pairwise import paired_cosine_distances
from torch import Tensor, nn
from tqdm import tqdm

from jepa.config import Bounded, Positive, PositiveInt
from jepa.diagnostics import collapse_stats
from jepa.expander import Expander, ExpanderConfig
from jepa.objectives import VICReg
from pipelines.run.command import require, run_command
from pipelines.run.files import write_json

PADDING, FIRST_BUCKET, BUCKETS = 0, 2, 2048
HEADS = 4
WARMUP_STEPS = 50


@dataclass(frozen=True)
class Options(Bounded):
    """A sentence JEPA against its untrained twin and TF-IDF."""

    text: Path = Path("../shared/text")
    """Folder of the STS benchmark: `stsb-en-{train,dev,test}.csv`, rows `sentence1,sentence2,score`, no header."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each makes its own encoder, from which all that are compared start."""
    output_dir: Path = Path("runs/examples/sentence_jepa")
    """Where the results are left."""
    split: Literal["dev", "test"] = "test"
    """Pairs to report on: `dev` while settings are chosen."""
    steps: PositiveInt = 200
    """Steps of training."""
    batch_size: PositiveInt = 256
    """Sentences in a step."""
    crop_words: PositiveInt = 8
    """Words in a crop; shorter sentences are taken whole."""
    dimension: PositiveInt = 384
    """Width of the encoder, and of the embedding; a multiple of 4."""
    depth: PositiveInt = 1
    """Layers of the encoder."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    expander: ExpanderConfig = field(default_factory=lambda: ExpanderConfig(widths=(384,)))
    objective: VICReg = field(default_factory=lambda: VICReg(covariance_weight=25.0))


class Pairs(NamedTuple):
    """Sentences in twos."""

    first: list[str]
    second: list[str]
    scores: list[float]
    """How alike people found them, from 0 to 5."""


def main(options: Options) -> None:
    """The story: read, train and compare for each seed, print."""
    train = read_pairs(options.text / "stsb-en-train.csv")
    sentences = list(dict.fromkeys(train.first + train.second))
    pairs = read_pairs(options.text / f"stsb-en-{options.split}.csv")
    results: dict[str, Any] = {"options": options, "sentences": len(sentences), "pairs": len(pairs.scores)}
    results["tf_idf"] = tf_idf(sentences, pairs)
    results["runs"] = [compare(seed, sentences, pairs, options) for seed in options.seeds]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(options.output_dir / "results.json", results)
    print(table(results))


def read_pairs(path: Path) -> Pairs:
    """Rows `sentence1,sentence2,score` of a CSV file without a header. Raises `UserError` if it is not there."""
    require(path.is_file(), f"{path}: the STS benchmark is not there: name its folder with --text")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return Pairs([row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows])


class Vocabulary:
    """Numbers of words. Words that occur at least twice have one of their own; all others share those of buckets.

    By hashing, a word that training never saw still equals itself in both sentences of a pair.
    """

    def __init__(self, sentences: Sequence[str]) -> None:
        counts = Counter(word for sentence in sentences for word in split_words(sentence))
        common = [word for word, count in counts.items() if count > 1]
        self.numbers = {word: FIRST_BUCKET + BUCKETS + index for index, word in enumerate(common)}

    def __len__(self) -> int:
        return FIRST_BUCKET + BUCKETS + len(self.numbers)

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Sentences to int64 (N, words of the longest), padded on the right."""
        rows = [[self.number(word) for word in split_words(sentence)] for sentence in sentences]
        return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PADDING)

    def number(self, word: str) -> int:
        return self.numbers.get(word, FIRST_BUCKET + zlib.crc32(word.encode()) % BUCKETS)


def split_words(sentence: str) -> list[str]:
    """Words in lower case, without punctuation; a sentence that has none is itself a word."""
    return re.findall(r"\w+", sentence.lower()) or [sentence]


class WordCrop:
    """The view: a random run of words; a sentence that is no longer is taken whole."""

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Sentences, int64 (N, T), to crops (N, words), both padded on the right."""
        lengths = (tokens != PADDING).sum(dim=1)  # (N,)
        places = (lengths - self.words).clamp(min=0) + 1
        starts = (torch.rand(len(tokens), generator=generator) * places).long()
        positions = starts[:, None] + torch.arange(self.words)  # (N, words)
        found = tokens.gather(1, positions.clamp(max=tokens.shape[1] - 1))
        return found.where(positions < lengths[:, None], PADDING)


class SentenceEncoder(nn.Module):
    """A transformer over words; the embedding is the mean over words. Blind to order, and to padding."""

    def __init__(self, words: int, dimension: int, depth: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, dimension, padding_idx=PADDING)
        layer = nn.TransformerEncoderLayer(
            dimension, HEADS, dimension, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        # Without a last normalisation: it would make all words equally long, and none could weigh more than another.
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Int64 (N, T) to float32 (N, T, D), one for each word."""
        hidden: Tensor = self.layers(self.words(tokens), src_key_padding_mask=tokens == PADDING)
        return hidden

    def forward(self, tokens: Tensor) -> Tensor:
        """Int64 (N, T) to embeddings, float32 (N, D)."""
        real = rearrange(tokens != PADDING, "n t -> n t 1").float()
        return reduce(self.hidden(tokens) * real, "n t d -> n d", "sum") / reduce(real, "n t 1 -> n 1", "sum")


class SentenceJEPA(nn.Module):
    """Two crops of a sentence alike, and not all sentences alike."""

    def __init__(self, encoder: SentenceEncoder, options: Options) -> None:
        super().__init__()
        self.encoder, self.objective, self.crop = encoder, options.objective, WordCrop(options.crop_words)
        self.expander = Expander(options.dimension, options.expander)

    def forward(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """The loss on sentences (N, T)."""
        views = torch.cat([self.crop(tokens, generator), self.crop(tokens, generator)])
        first, second = self.expander(self.encoder(views)).chunk(2)  # (N, width) each
        return self.objective(first, second, generator=generator).loss


def train(learner: SentenceJEPA, tokens: Tensor, seed: int, options: Options) -> None:
    """Train on sentences (N, T), in place."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(learner.parameters(), options.learning_rate, weight_decay=1e-4)
    warmup = min(WARMUP_STEPS / options.steps, 0.5)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, options.steps, pct_start=warmup, cycle_momentum=False
    )
    for _ in tqdm(range(options.steps), unit="step", desc=f"seed {seed}"):
        loss = learner(tokens[torch.randint(len(tokens), (options.batch_size,), generator=generator)], generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def embed(encoder: SentenceEncoder, tokens: Tensor) -> Tensor:
    """Embeddings (N, D) of sentences (N, T), a few at a time, and those no longer than they are."""
    batches = [batch[:, : int((batch != PADDING).sum(dim=1).max())] for batch in tokens.split(256)]
    return torch.cat([encoder(batch) for batch in batches])


def compare(seed: int, sentences: list[str], pairs: Pairs, options: Options) -> dict[str, dict[str, float]]:
    """The encoder of one seed, before and after training."""
    torch.manual_seed(seed)
    vocabulary = Vocabulary(sentences)
    tokens = vocabulary.encode(sentences)
    learner = SentenceJEPA(SentenceEncoder(len(vocabulary), options.dimension, options.depth), options)
    untrained = measure(learner.encoder, vocabulary, tokens, pairs)
    started = time.process_time()
    train(learner, tokens, seed, options)
    cost = {"cpu_s": time.process_time() - started}
    trained = measure(learner.encoder, vocabulary, tokens, pairs)
    outputs = learner.expander.eval()(embed(learner.encoder, tokens)).detach()
    of_outputs = {f"output_{key}": value for key, value in collapse_stats(outputs)._asdict().items()}
    return {"untrained": untrained | {"cpu_s": 0}, "jepa": trained | cost | of_outputs}


def measure(encoder: SentenceEncoder, vocabulary: Vocabulary, tokens: Tensor, pairs: Pairs) -> dict[str, float]:
    """Spearman's correlation on pairs, as it is and whitened; collapse statistics of training sentences (N, T)."""
    trained = embed(encoder, tokens)
    sides = [embed(encoder, vocabulary.encode(side)).numpy() for side in (pairs.first, pairs.second)]
    whiten = PCA(whiten=True).fit(trained.numpy()).transform
    return {
        "spearman": correlation(pairs, *sides),
        "spearman_whitened": correlation(pairs, *map(whiten, sides)),
        **collapse_stats(trained)._asdict(),
    }


def tf_idf(sentences: list[str], pairs: Pairs) -> float:
    """Spearman's correlation of TF-IDF, by the default settings of scikit-learn."""
    transform = TfidfVectorizer().fit(sentences).transform
    return correlation(pairs, transform(pairs.first), transform(pairs.second))


def correlation(pairs: Pairs, first: Any, second: Any) -> float:
    """Spearman's, of the cosines of rows (N, D) with the scores of pairs."""
    return float(spearmanr(1 - paired_cosine_distances(first, second), pairs.scores).statistic)


def table(results: dict[str, Any]) -> str:
    """Means over seeds, with the range."""
    lines = ["| encoder | Spearman | whitened | std | effective rank | CPU s |", "| --- " * 6 + "|"]
    for name in ("untrained", "jepa"):
        cells = []
        for key in ("spearman", "spearman_whitened", "std", "effective_rank", "cpu_s"):
            values = [run[name][key] for run in results["runs"]]
            cells.append(f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| TF-IDF | {results['tf_idf']:.3f} | | | | |"])


if __name__ == "__main__":
    run_command(main, Options)
