"""What do frozen embeddings know? Probes read true state off them, and are judged on groups they never saw.

Everything is standardised. How much a probe is held back (the penalty of ridge regression and of the MLP, the number of
nearest neighbours) is chosen for each column by cross-validation over *groups*, such as videos: of a frame left out
alone, the frames before and after it would tell everything.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from einops import pack, unpack
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsRegressor
from sklearn.neural_network import MLPRegressor
from torch import Tensor
from tqdm import tqdm

from jepa.bootstrap import Bootstrap, interval

ProbeKind = Literal["ridge", "mlp", "knn"]

RIDGE_PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""On the squared weights, per sample."""
MLP_PENALTIES = (0.01, 0.1, 1.0)
MLP_WIDTH, MLP_BATCH, MLP_STEPS = 128, 256, 800
NEIGHBOURS = (3, 10, 30, 100)
INNER_FOLDS = 3


@dataclass(frozen=True)
class Probe:
    """Fitted probes, and for each column which of them reads it."""

    mean: Tensor
    """(D,), of the embeddings."""
    std: Tensor
    """(D,)"""
    target_mean: Tensor
    """float64 (columns,)"""
    target_std: Tensor
    """float64 (columns,)"""
    estimators: dict[float, Any]
    """By penalty or number of neighbours: from standardised embeddings to all standardised columns."""
    chosen: list[float]
    """Penalty per sample, or number of neighbours, for each column."""

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings (..., D) -> columns (..., columns), float64."""
        inputs, shape = pack([(embeddings - self.mean) / self.std], "* d")
        read = {
            choice: estimator.predict(inputs.numpy()).reshape(len(inputs), -1)
            for choice, estimator in self.estimators.items()
        }
        columns = np.stack([read[choice][:, column] for column, choice in enumerate(self.chosen)], axis=1)
        return unpack(torch.from_numpy(columns).double() * self.target_std + self.target_mean, shape, "* c")[0]


def fit_probe(kind: ProbeKind, embeddings: Tensor, targets: Tensor, groups: np.ndarray, seed: int = 0) -> Probe:
    """Fit a probe on some groups.

    Args:
        kind: `ridge` regression, `mlp` (one hidden layer, which all columns share) or `knn`, the mean of the nearest
            neighbours.
        embeddings: float (N, D).
        targets: float (N, columns).
        groups: int (N,), at least two different ones; samples of one group are held out together.
        seed: of the MLP's weights and batches.
    """
    mean, std = embeddings.mean(dim=0), embeddings.std(dim=0).clamp_min(1e-6)
    target_mean, target_std = targets.double().mean(dim=0), targets.double().std(dim=0).clamp_min(1e-12)
    inputs = ((embeddings - mean) / std).numpy()
    columns = ((targets - target_mean) / target_std).numpy()
    splits = list(GroupKFold(min(INNER_FOLDS, len(np.unique(groups)))).split(inputs, groups=groups))
    choices = _choices(kind, min(len(train) for train, _ in splits), seed)
    with warnings.catch_warnings():
        # The MLP is stopped after so many steps on purpose, and minds a single column.
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", DataConversionWarning)
        errors = [
            np.square(cross_val_predict(estimator, inputs, columns, cv=splits).reshape(columns.shape) - columns).mean(0)
            for estimator in choices.values()
        ]  # (choices, columns)
        chosen = [list(choices)[choice] for choice in np.argmin(errors, axis=0)]
        estimators = {choice: choices[choice].fit(inputs, columns) for choice in set(chosen)}
    return Probe(mean, std, target_mean, target_std, estimators, chosen)


def _choices(kind: ProbeKind, samples: int, seed: int) -> dict[float, Any]:
    """The estimators to choose among, by penalty per sample or number of neighbours; `samples` are fitted at least."""
    match kind:
        case "ridge":
            return {penalty: Ridge(penalty * samples) for penalty in RIDGE_PENALTIES}
        case "mlp":
            batch = min(MLP_BATCH, samples)
            return {
                penalty: MLPRegressor(
                    hidden_layer_sizes=(MLP_WIDTH,),
                    alpha=penalty * batch,
                    batch_size=batch,
                    max_iter=math.ceil(MLP_STEPS * batch / samples),
                    random_state=seed,
                )
                for penalty in MLP_PENALTIES
            }
        case "knn":
            enough = [k for k in NEIGHBOURS if k <= samples]
            return {k: KNeighborsRegressor(k) for k in enough or [samples]}


def read_out_of_fold(
    kind: ProbeKind, embeddings: Tensor, targets: Tensor, groups: np.ndarray, folds: int, seed: int = 0
) -> tuple[Tensor, list[Probe]]:
    """Read each group with a probe that was fitted, and whose penalty was chosen, on the groups of the other folds.

    Args:
        kind: see `fit_probe`; so are the next three.
        embeddings: float (N, D).
        targets: float (N, columns).
        groups: int (N,), at least `folds` different ones.
        folds: at least 3, so that two groups remain to choose a penalty by.
        seed: see `fit_probe`.

    Returns:
        float64 (N, columns), and the probe of each fold.
    """
    read, probes = torch.empty(targets.shape, dtype=torch.float64), []
    splits = GroupKFold(folds).split(embeddings, groups=groups)
    for train, test in tqdm(splits, total=folds, desc=f"{kind} on {embeddings.shape[1]} features", leave=False):
        probes.append(fit_probe(kind, embeddings[train], targets[train], groups[train], seed))
        read[test] = probes[-1](embeddings[test])
    return read, probes


@dataclass(frozen=True)
class Agreement:
    """How well what was read off agrees with the truth."""

    r2: np.ndarray
    """(...): coefficient of determination, 1 - residual / variance; below 0 the mean would have been nearer."""
    r2_interval: np.ndarray
    """(..., 2): 95 % confidence interval."""
    r: np.ndarray
    """(...): Pearson's correlation, blind to scale and offset; 0 where nothing varies."""
    r_interval: np.ndarray
    """(..., 2)"""


def measure_agreement(read: Tensor, true: Tensor, bootstrap: Bootstrap) -> Agreement:
    """R² and Pearson's r over the first dimension, (N, ...) twice; the bootstrap is over the same N."""
    # Moments alone say both; around the mean of the truth, so that they do not cancel.
    y, p = (value.double().numpy() - true.double().mean(dim=0).numpy() for value in (true, read))
    moments = np.stack([np.ones_like(y), y, p, y * y, p * p, y * p], axis=-1)  # (N, ..., 6)
    r2, r = _r2_and_r(moments.sum(axis=0))
    resampled_r2, resampled_r = _r2_and_r(bootstrap.sums(moments))
    return Agreement(r2, interval(resampled_r2), r, interval(resampled_r))


def _r2_and_r(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both from sums over samples of 1, y, p, y², p² and yp, (..., 6) -> (...) twice."""
    n, y, p, yy, pp, yp = np.moveaxis(sums, -1, 0)
    variance, predicted_variance, covariance = yy - y * y / n, pp - p * p / n, yp - y * p / n
    # What differs by rounding alone does not vary.
    varies = (variance > 1e-12 * yy) & (predicted_variance > 1e-12 * pp)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = np.where(varies, covariance / np.sqrt(variance * predicted_variance), 0.0)
        return 1 - (yy - 2 * yp + pp) / variance, r
