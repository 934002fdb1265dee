"""Parameters outside layers with a rule: free ones, attention, shared tables."""

import logging

import pytest
import torch
from tests import reference
from tests.cases import Attending
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
