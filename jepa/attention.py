"""What transformers in this house have in common, whatever they attend to."""

import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor, nn


class AttentionBlock(nn.Module):
    """Pre-norm self-attention, then an MLP (Xiong et al. 2020, arXiv:2002.04745); where to look is the subclass's."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (B, T, width) to queries, keys and values (3, B, heads, T, width / heads)."""
        projected = self.queries_keys_values(self.attention_norm(hidden))
        return rearrange(projected, "b t (three h c) -> three b h t c", three=3, h=self.heads)

    def attend(self, hidden: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What the block leaves of hidden states (B, T, width); the mask is (T, keys), or (heads, T, keys), or None."""
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0
        )
        hidden = hidden + self.mix(rearrange(attended, "b h t c -> b t (h c)"))
        return hidden + self.mlp(hidden)
