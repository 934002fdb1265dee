"""Attention, whose projections are handed to functions, and windows."""

import pytest
import torch
from tests.cases import Attending
from tests.test_hook_parameters import natively
from tests.test_hooks import images
from torch import nn


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [None, "memory", "both"])
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("length", [5, 2])
def test_multihead_attention(batch_first, cross, weights, length):
    natively(Attending(batch_first, cross, weights), images(length, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"bias": False},
        {"kdim": 4, "vdim": 4, "cross": "memory"},
        {"mask": True},
        {"mask": True, "weights": True, "add_bias_kv": True},
    ],
)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_options(batch_first, options):
    natively(Attending(batch_first, **options), images(5, 6))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_layers(batch_first, norm_first):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            options = {"batch_first": batch_first, "norm_first": norm_first}
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(6, 2, 8, **options),
                2,
                enable_nested_tensor=False,
            )
            self.decoder = nn.TransformerDecoderLayer(6, 2, 8, **options)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            x = self.decoder(x, self.encoder(x))
            return self.head(x.mean(1 if batch_first else 0))

    natively(Model(), images(5, 6))


def test_windows_folded_into_the_batch_axis():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = x.reshape(-1, 3, 6)  # two windows a sample
            x = torch.tanh(self.attention(x, x, x)[0])
            return self.head(x.reshape(-1, 6, 6).mean(1))

    natively(Model(), images(6, 6))
