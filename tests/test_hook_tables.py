"""Tables: position ids, tied ones, and bags of embeddings."""

import pytest
import torch
from tests import reference
from tests.test_hook_parameters import LABELS, natively
from torch import nn
from torch.nn import functional


class Tokens(nn.Module):
    def __init__(self, build):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.position = nn.Embedding(8, 4)
        self.places = build
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        places = self.places(tokens)
        return self.head(torch.tanh(self.embed(tokens) + self.position(places)).mean(1))


@pytest.mark.parametrize("length", [2, 3, 4, 6])
@pytest.mark.parametrize(
    "places",
    [
        lambda t: torch.arange(t.shape[1]),
        lambda t: torch.arange(t.shape[1])[None],
        lambda t: torch.arange(t.shape[1]).expand(t.shape),
    ],
)
def test_position_ids_with_and_without_a_sample_axis(places, length):
    tokens = torch.randint(0, 9, (4, length))
    computer = natively(Tokens(places), tokens)
    more = (torch.randint(0, 9, (length, length)), LABELS[torch.arange(length) % 4])
    found = computer.compute_per_sample_grad(more)
    for name, rows in reference.gradient_rows(computer.model, more).items():
        torch.testing.assert_close(found[name].reshape(len(found[name]), -1), rows)


def test_one_number_a_sample_is_no_position():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, kinds):
            return self.head(torch.tanh(self.embed(kinds)))

    natively(Model(), torch.tensor([1, 1, 3, 8]))


def test_tied_tables_used_as_a_function():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 4)

        def forward(self, tokens):
            h = torch.tanh(self.embed(tokens)).mean(1)
            return functional.linear(
                h + functional.embedding(tokens[:, 0], self.embed.weight, 2),
                self.embed.weight,
            )

    natively(Model(), torch.randint(0, 7, (4, 5)))


class Bags(nn.Module):
    """Bags by rows, or laid end to end with offsets."""

    def __init__(self, form, **options):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, **options)
        self.head = nn.Linear(4, 3)
        self.form = form

    def forward(self, tokens):
        weights = None
        if "weights" in self.form:
            weights = torch.linspace(0.5, 2, tokens.shape[1], dtype=torch.float64)
            weights = weights.expand(tokens.shape).contiguous()
        if "two" in self.form:  # bags a sample
            tokens = tokens.reshape(-1, tokens.shape[1] // 2)
        offsets = None
        if "offsets" in self.form:
            length = tokens.shape[1]
            offsets = torch.arange(len(tokens) + ("last" in self.form)) * length
            tokens = tokens.flatten()
            weights = None if weights is None else weights.flatten()
        h = self.bag(tokens, offsets, per_sample_weights=weights)
        if "two" in self.form:
            h = h.reshape(-1, 2, 4).sin().sum(1)
        return self.head(torch.tanh(h))


FORMS = [
    {"rows"},
    {"offsets"},
    {"offsets", "last"},
    {"two"},
    {"offsets", "two"},
    {"weights"},
    {"weights", "offsets"},
]


# torch has weights for sums only
BAGS = [
    (form, mode)
    for form in FORMS
    for mode in ("sum", "mean", "max")
    if mode == "sum" or "weights" not in form
]


@pytest.mark.parametrize("padding_idx", [None, 3])
@pytest.mark.parametrize(("form", "mode"), BAGS)
def test_embedding_bags(form, mode, padding_idx):
    tokens = torch.tensor(
        [[1, 1, 3, 4], [0, 6, 1, 2], [3, 3, 3, 3], [8, 7, 3, 8]],
    )
    options = {
        "mode": mode,
        "padding_idx": padding_idx,
        "include_last_offset": "last" in form,
    }
    natively(Bags(form, **options), tokens)


def test_bags_of_different_lengths():
    class Model(Bags):
        def forward(self, tokens):
            kept = [row[row > 0] for row in tokens]
            lengths = torch.tensor([len(row) for row in kept])
            offsets = lengths.cumsum(0) - lengths
            return self.head(torch.tanh(self.bag(torch.cat(kept), offsets)))

    tokens = torch.tensor([[1, 2, 0, 0], [0, 0, 5, 0], [3, 4, 4, 8], [0, 0, 0, 0]])
    for mode in ("sum", "mean", "max"):
        natively(Model({"rows"}, mode=mode), tokens)
