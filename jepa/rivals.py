"""Simple scores of how surprising a moment is, for a model's energy to be compared with.

*copying*: the energy of copying the last embedding, at the same horizons. *mahalanobis*: how unusual the embeddings
there are, whatever came before. *nearest*: their squared distance to the nearest of ordinary ones, exact, in blocks; of
a grid all three at the most surprising places. *difference*: the mean square change since the tick before.
"""

from collections.abc import Sequence as Several
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from jepa.calibration import energy, most_surprising, usual_errors

Rival = Literal["copying", "mahalanobis", "nearest", "difference"]
PATCHES, BLOCK = 40_000, 2000
"""Ordinary embeddings, each place counted, that the nearest is looked for among at most; rows of a block."""


class Rivals:
    """Simple scores of windows by what is usual in ordinary ones, (N, length, *tokens, D), standardised.

    A window is `context` embeddings and what came; each score is the mean over the ticks `ahead`, without the places
    (*tokens) that are ignored.
    """

    def __init__(
        self, names: Several[Rival], ordinary: Tensor, *, context: int, ahead: Several[int], ignored: Tensor | None
    ) -> None:
        self.names, self.context, self.ahead, self.ignored = names, context, ahead, ignored
        places = rearrange(ordinary[:, context], "n ... d -> (n ...) d")
        self.known = places[:: -(-len(places) // PATCHES)]
        self.usual = usual_errors(places.double())
        self.usual_changes = {ticks: usual_errors(self._changes(ordinary, ticks).flatten(0, -2).double())
                              for ticks in ahead if "copying" in names}  # fmt: skip

    def __call__(self, windows: Tensor) -> dict[str, Tensor]:
        """Scores (B,) by name, of windows (B, length, *tokens, D), standardised."""
        return {name: torch.stack([self._score(name, windows, ticks) for ticks in self.ahead]).mean(dim=0)
                for name in self.names}  # fmt: skip

    def _score(self, name: Rival, windows: Tensor, ticks: int) -> Tensor:
        """One score of what came so many ticks ahead, (B,)."""
        came = windows[:, self.context + ticks - 1]
        if name == "difference":
            change = came - windows[:, self.context + ticks - 2]
            return change.square().flatten(1).mean(dim=1)
        if name == "nearest":
            energies = self._nearest(came.flatten(0, -2)).view(came.shape[:-1])
        else:
            usual = self.usual_changes[ticks] if name == "copying" else self.usual
            energies = energy(self._changes(windows, ticks) if name == "copying" else came, *usual)
        energies = energies if self.ignored is None else energies.masked_fill(self.ignored, 0)
        return most_surprising(energies[:, None])[:, 0]

    def _changes(self, windows: Tensor, ticks: int) -> Tensor:
        """What copying misses, (B, *tokens, D)."""
        return windows[:, self.context + ticks - 1] - windows[:, self.context - 1]

    def _nearest(self, rows: Tensor) -> Tensor:
        """Squared distance per feature of each row (N, D) to the nearest that is known, (N,)."""
        norms = self.known.square().sum(dim=1)
        found = [(norms - 2 * part @ self.known.T).amin(dim=1) + part.square().sum(dim=1) for part in rows.split(BLOCK)]
        return torch.cat(found).clamp_min(0) / rows.shape[1]
