"""Parameters outside layers with a rule: free ones, attention, shared tables."""

import logging

import pytest
import torch
from tests import reference
from tests.test_hooks import check, hooked, images
from torch import nn
from torch.nn import functional

from trak.gradient_computers import HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput

LABELS = torch.tensor([0, 2, 1, 1])


def natively(model, inputs, labels=LABELS, names=None):
    """Equal to the oracle, and nothing was left to the exact computer."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.double().eval()
    computer = check(model, (inputs, labels), names=names)
    assert computer.coverage().names_exactly == ()
    assert computer.coverage().share == 1.0
    return computer


class Patches(nn.Module):
    """A small vision transformer without attention: tokens, positions, layer scales."""

    def __init__(self, token, expand):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(token))
        self.expand = expand
        self.position = nn.Parameter(torch.zeros(1, 6, 4))
        self.inner = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.shift = nn.Parameter(torch.ones(4))
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.cat([self.expand(self.token, len(x)), x], dim=1) + self.position
        x = x + self.scale * torch.tanh(self.inner(x)).mean(1, keepdim=True) + self.shift
        return self.head((x * self.gain).flatten(1).unflatten(1, (6, 4)).tanh().mean(1))


@pytest.mark.parametrize(
    ("token", "expand"),
    [
        ((1, 1, 4), lambda t, b: t.expand(b, -1, -1)),
        ((1, 1, 4), lambda t, b: t.repeat(b, 1, 1)),
        ((1, 1, 4), lambda t, b: t.expand(b, 1, 4)),
        ((4,), lambda t, b: t.expand(b, 1, -1)),
        ((1, 4), lambda t, b: t.repeat(b, 1).unsqueeze(1)),
    ],
)
def test_class_tokens_positions_scales(token, expand):
    computer = natively(Patches(token, expand), images(5, 4))
    more = (torch.randn(7, 5, 4, dtype=torch.float64), torch.randint(0, 3, (7,)))
    found = computer.compute_per_sample_grad(more)
    for name, rows in reference.gradient_rows(computer.model, more).items():
        torch.testing.assert_close(found[name].reshape(len(found[name]), -1), rows)


class Free(nn.Module):
    def __init__(self, shape, use, width=4):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.free = nn.Parameter(torch.ones(shape))
        self.use = use
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.use(torch.tanh(self.inner(x)), self.free).flatten(1))


FREE = {
    "bias": ((4,), (4,), lambda x, p: x + p),
    "bias over positions": ((4,), (5, 4), lambda x, p: x + p),
    "as many positions as samples tried": ((4,), (2, 4), lambda x, p: x * p),
    "three positions": ((4,), (3, 4), lambda x, p: x * p),
    "positions without a batch axis": ((5, 4), (5, 4), lambda x, p: x + p),
    "scale over space": ((4,), (2, 3, 4), lambda x, p: x * p),
    "channels first": ((2, 1, 1), (2, 3, 4), lambda x, p: x * p),
    "a number": ((), (5, 4), lambda x, p: x * p.exp()),
    "softplus": (
        (4,),
        (5, 4),
        lambda x, p: functional.softplus(x * functional.softplus(p)),
    ),
    "linear": ((4, 4), (5, 4), functional.linear),
    "linear by name": (
        (4, 4),
        (5, 4),
        lambda x, p: functional.linear(weight=p, input=x),
    ),
    "a matrix product": ((4, 4), (5, 4), lambda x, p: x @ p),
    "rows of linear": ((8, 4), (5, 4), lambda x, p: functional.linear(x, p[3:7])),
    "parts of linear": (
        (8, 4),
        (5, 4),
        lambda x, p: functional.linear(x, p[:4]) * functional.linear(x, p[4:]),
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_free_parameters(name):
    shape, space, use = FREE[name]
    model = Free(shape, use).double()
    inputs = images(*space)
    model(inputs)
    natively(model, inputs)


@pytest.mark.parametrize(
    ("shape", "use"),
    [
        ((4, 4), lambda x, p: x @ (p * p).t()),
        ((9, 4), lambda x, p: x + p[: x.shape[1]]),
    ],
)
def test_what_cannot_be_given_out_is_exact(shape, use, caplog):
    model = Free(shape, use).double()
    inputs = images(5, 4)
    model(inputs)
    with caplog.at_level(logging.INFO, "trak"):
        computer = check(model, (inputs, LABELS))
    assert computer.coverage().names_exactly == ("free",)
    assert sum("covered by layer rules" in r.getMessage() for r in caplog.records) == 1


def test_a_length_that_comes_later_is_exact_for_that_batch(caplog):
    # given out as [b, 5, 4], which other lengths do not fit
    def use(x, p):
        return (x + p[:, : x.shape[1]] if x.shape[1] < 5 else x + p[0]).mean(1)

    model = Free((1, 5, 4), use).double()
    model(images(5, 4))
    with caplog.at_level(logging.INFO, "trak"):
        computer = check(model, (images(5, 4), LABELS))
        for length in (5, 3):
            batch = (images(length, 4), LABELS)
            found = computer.compute_per_sample_grad(batch)
            for name, rows in reference.gradient_rows(model, batch).items():
                torch.testing.assert_close(found[name].reshape(len(found[name]), -1), rows)


class Attending(nn.Module):
    def __init__(self, batch_first, cross=None, weights=False, mask=False, **kwargs):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first, **kwargs)
        self.batch_first, self.cross, self.weights = batch_first, cross, weights
        self.mask = mask
        self.memory = nn.Linear(6, kwargs.get("kdim") or 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        memory = self.memory(x)
        padding = None
        if self.mask:
            padding = torch.zeros(x.shape[:2], dtype=torch.bool)
            padding[:, -1] = True
        causal = torch.ones(len(x[0]), len(x[0]), dtype=torch.bool).triu(1)
        if not self.batch_first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        key, value = {
            None: (x, x),
            "memory": (memory, memory),
            "both": (memory, memory * 2),
        }[self.cross]
        out, _ = self.attention(
            x,
            key,
            value,
            key_padding_mask=padding,
            need_weights=self.weights,
            attn_mask=causal if self.mask else None,
        )
        return self.head(torch.tanh(out).mean(1 if self.batch_first else 0))


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


class Routed(nn.Module):
    """Half of the samples go through another layer, which the first ones do not reach."""

    def __init__(self):
        super().__init__()
        self.common, self.rare = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.common(x))
        rare = x[:, 0] > 0
        if bool(rare.any()):
            h = h.index_add(0, rare.nonzero()[:, 0], self.rare(x[rare]))
        return self.head(h)


def test_a_layer_that_the_first_samples_do_not_reach():
    torch.manual_seed(0)
    model = Routed().double()
    x = torch.randn(8, 4, dtype=torch.float64)
    x[:, 0] = torch.tensor([-1, -1, 1, 1, -1, 1, -1, 1])
    labels = torch.arange(8) % 3
    computer = hooked(model)
    for rows in (slice(0, 3), slice(0, 8), slice(2, 6), slice(0, 8), slice(0, 3)):
        batch = (x[rows], labels[rows])
        found = computer.compute_per_sample_grad(batch)
        for name, expected in reference.gradient_rows(model, batch).items():
            torch.testing.assert_close(found[name].reshape(len(found[name]), -1), expected)


def test_single_samples_first():
    model = Attending(False).double().eval()
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    inputs = images(4, 6)
    for size in (1, 4, 2, 1):
        batch = (inputs[:size], LABELS[:size])
        found = computer.compute_per_sample_grad(batch)
        for name, expected in reference.gradient_rows(model, batch).items():
            torch.testing.assert_close(found[name].reshape(len(found[name]), -1), expected)


def test_equal_first_samples_prove_nothing():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.layer(x))
            return self.head(x + h - h.mean(0))

    model = Mixing().double()
    x = images(4)
    x[1] = x[0]
    batch = (x, torch.tensor([0, 0, 1, 2]))
    found = hooked(model).compute_per_sample_grad(batch)
    for name, expected in reference.gradient_rows(model, batch).items():
        torch.testing.assert_close(found[name].reshape(len(found[name]), -1), expected)


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


class Experts(nn.Module):
    """Each token goes to one of two layers, in the order of the tokens."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        tokens = x.reshape(-1, 4)
        choice = tokens[:, 0] > 0
        out = torch.zeros_like(tokens)
        for mine, expert in zip((choice, ~choice), self.experts, strict=True):
            rows = mine.nonzero()[:, 0]
            out = out.index_add(0, rows, torch.tanh(expert(tokens[rows])))
        return self.head((out.reshape(x.shape) * self.gate(x).softmax(-1)[..., :1]).mean(1))


class ChannelsFirst(nn.LayerNorm):
    """As in ConvNeXt: a subclass with a forward of its own."""

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def test_layer_norms_with_a_forward_of_their_own():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2), ChannelsFirst(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    natively(model, images(2, 3, 3))


def test_experts_with_as_many_tokens_as_if_they_had_been_dealt_evenly():
    torch.manual_seed(0)
    model = Experts().double()
    x = torch.randn(6, 4, 4, dtype=torch.float64)
    first = torch.tensor(
        [[1, 1, -1, -1], [1, 1, -1, -1], [1, 1, 1, -1], [1, -1, -1, -1]]
        + [[1, 1, -1, -1]] * 2
    )
    x[:, :, 0] = first * x[:, :, 0].abs()
    computer = hooked(model)
    for rows in ([0, 1], [0, 1, 2, 3], [2, 3], [0, 1, 4, 5]):
        batch = (x[rows], torch.arange(len(rows)) % 3)
        found = computer.compute_per_sample_grad(batch)
        for name, expected in reference.gradient_rows(model, batch).items():
            torch.testing.assert_close(found[name].flatten(1), expected)


def test_positions_folded_into_the_batch_axis(caplog):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            h = torch.tanh(self.norm(self.layer(x.reshape(-1, 4))))
            return self.head(h.reshape(x.shape).mean(1))

    computer = natively(Model(), images(5, 4))
    with caplog.at_level(logging.INFO, "trak"):
        for length in (5, 3, 8, 4, 1):
            batch = (images(length, 4), LABELS)
            found = computer.compute_per_sample_grad(batch)
            for name, rows in reference.gradient_rows(computer.model, batch).items():
                torch.testing.assert_close(found[name].flatten(1), rows)
    assert not any("told apart" in r.getMessage() for r in caplog.records)
