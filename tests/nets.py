"""Random models that sort, route, tie, fold and call again inside, one output a sample."""

import random

import torch
from torch import nn
from torch.nn.functional import linear

WIDTH, LENGTH, CLASSES = 6, 4, 3


def first(x):
    return x.reshape(len(x), -1)[:, 0]


class Reordered(nn.Module):
    """Its samples in another order, and back."""

    def __init__(self, draw, depth):
        super().__init__()
        self.inner = part(draw, depth + 1)
        self.kind = draw.choice(["sort", "flip", "roll", "split", "swap"])

    def order(self, x):
        places = torch.arange(len(x))
        if self.kind == "sort":
            return first(x).argsort()
        if self.kind == "flip":
            return places.flip(0)
        if self.kind == "roll":
            return places.roll(1)
        if self.kind == "split":
            return torch.cat([places[first(x) > 0], places[first(x) <= 0]])
        if len(x) > 5:
            places[[3, 5]] = places[[5, 3]]
        return places

    def forward(self, x):
        order = self.order(x)
        return self.inner(x[order])[order.argsort()]


class Folded(nn.Module):
    """Samples and positions on one axis, in one order or the other."""

    def __init__(self, draw, depth):
        super().__init__()
        self.inner = plain(draw) if draw.random() < 0.5 else part(draw, depth + 1)
        self.turned = draw.random() < 0.5

    def forward(self, x):
        if x.dim() < 3:
            return self.inner(x)
        if self.turned:
            x = x.transpose(0, 1)
        y = self.inner(x.reshape(-1, WIDTH)).reshape(x.shape)
        return y.transpose(0, 1) if self.turned else y


class Again(nn.Module):
    """Calls a part twice, after itself or with twice as many samples."""

    def __init__(self, draw, depth):
        super().__init__()
        self.inner = part(draw, depth + 1)
        self.kind = draw.choice(["after", "beside", "residual"])

    def forward(self, x):
        if self.kind == "after":
            return self.inner(self.inner(x))
        if self.kind == "residual":
            return x + self.inner(x) / 2
        one, other = self.inner(torch.cat([x, -x])).chunk(2)
        return one - other


class Routed(nn.Module):
    """One layer for some tokens, another one for the rest."""

    def __init__(self, draw):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        self.limit = draw.choice([0.0, 1.0, -1.0, 2.5])

    def forward(self, x):
        y = torch.zeros_like(x)
        chosen = x[..., 0] > self.limit
        for layer, some in zip(self.layers, (chosen, ~chosen), strict=True):
            if some.any():
                y = y.masked_scatter(some[..., None], layer(x[some]))
        return x + y


class Tied(nn.Module):
    """Reads its weight again, for all samples or some of them."""

    def __init__(self, draw):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.limit = draw.choice([-9.0, 0.5, 1.5])

    def forward(self, x):
        y = self.layer(x)
        some = (first(x) > self.limit).reshape(-1, *[1] * (x.dim() - 1))
        return y + linear(torch.tanh(y), self.layer.weight.T) * some


class Distinct(nn.Module):
    """Computes each different value once."""

    def __init__(self, draw):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.sharp = draw.choice([1.0, 3.0])

    def forward(self, x):
        values = (self.sharp * x.detach().reshape(-1, WIDTH)[:, 0]).round()
        values, places = torch.unique(values, return_inverse=True)
        found = torch.tanh(self.layer(values[:, None].expand(-1, WIDTH).contiguous()))
        return x + found[places].reshape(x.shape)


class Bare(nn.Module):
    """Parameters without a layer."""

    def __init__(self, draw):
        super().__init__()
        self.matrix = nn.Parameter(0.4 * torch.randn(WIDTH, WIDTH))
        self.vector = nn.Parameter(1 + torch.randn(WIDTH) / 2)
        self.kind = draw.choice(["linear", "matmul", "einsum", "gated"])

    def forward(self, x):
        x = x * self.vector
        if self.kind == "linear":
            return linear(x, self.matrix)
        if self.kind == "matmul":
            return torch.tanh(x @ self.matrix)
        if self.kind == "einsum":
            return torch.einsum("...i,ij->...j", x, self.matrix)
        return linear(x, self.matrix * self.matrix.sigmoid())


def plain(draw):
    kind = draw.choice(["linear", "norm", "tanh", "bare"])
    if kind == "linear":
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    if kind == "bare":
        return Bare(draw)
    return nn.LayerNorm(WIDTH) if kind == "norm" else nn.Tanh()


def part(draw, depth=0):
    chance = draw.random()
    if depth > 3 or chance < 0.4:
        kind = draw.choice([plain, plain, Routed, Tied, Distinct])
        return kind(draw)
    if chance < 0.55:
        return nn.Sequential(part(draw, depth + 1), part(draw, depth + 1))
    return draw.choice([Reordered, Folded, Again])(draw, depth)


class Net(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.inner = nn.Sequential(part(draw), part(draw))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        y = self.inner(x)
        return self.head(y.mean(1) if y.dim() > 2 else y)


def make(seed):
    """A model, and batches of one to 24 samples, the first perhaps sorted."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Net(draw).double().eval()
    shape = (LENGTH, WIDTH) if draw.random() < 0.6 else (WIDTH,)
    batches = []
    for size in draw.choice([(8, 8, 8), (2, 5, 8), (1, 1, 1, 8), (12,), (24, 3)]):
        x = torch.randn(size, *shape, dtype=torch.float64)
        if draw.random() < 0.3 and not batches:
            x = x[first(x).argsort()]
        batches.append((x, torch.randint(0, CLASSES, (size,))))
    return model, batches
