"""The expander: its layers are those that its widths name, and tokens are samples."""

import pytest
import torch

from jepa.errors import ConfigurationError
from jepa.expander import Expander, ExpanderConfig


def test_widths_name_hidden_layers_and_the_output():
    shapes = [tuple(layer.weight.shape) for layer in Expander(5, ExpanderConfig((7, 8, 3))) if hasattr(layer, "weight")]
    assert shapes == [(7, 5), (7,), (8, 7), (8,), (3, 8)]
    embeddings = torch.randn(2, 4, 5)
    assert torch.equal(Expander(5, ExpanderConfig(()))(embeddings), embeddings)
    with pytest.raises(ConfigurationError, match="widths is 4 0: it must be at least 1"):
        ExpanderConfig((4, 0))


def test_tokens_are_samples_of_the_batch_normalisation():
    expander = Expander(5, ExpanderConfig((7, 3)))
    tokens = torch.randn(4, 2, 3, 5)
    assert torch.equal(expander(tokens).flatten(0, 2), expander(tokens.flatten(0, 2)))
    assert expander(tokens).shape == (4, 2, 3, 3)
