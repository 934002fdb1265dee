"""Models and batches that engines are tried on; each case is (model, batch)."""

import torch
from torch import nn


class Reused(nn.Module):
    """One layer used twice, an in-place activation, free parameters, one a number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x):
        x = torch.relu_(self.layer(x))
        return self.head(self.layer(x) * self.scale) * self.gain


class Tied(nn.Module):
    """Embedding tied to the output layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5, padding_idx=0)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))


class Unused(nn.Module):
    """A parameter that the output does not depend on."""

    def __init__(self):
        super().__init__()
        self.used = nn.Linear(6, 3)
        self.unused = nn.Linear(6, 3)

    def forward(self, x):
        return self.used(x)


class Encoder(nn.Module):
    """A transformer encoder over vectors."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


def _cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 2, groups=2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


def _inputs(kind: str, size: int):
    if kind == "images":
        return torch.randn(size, 2, 6, 6)
    if kind == "tokens":
        return torch.randint(0, 7, (size, 4))
    if kind == "sequences":
        return torch.randn(size, 4, 8)
    return torch.randn(size, 6)


_TABLE = {
    "mlp": (_mlp, "vectors", 3),
    "cnn": (_cnn, "images", 3),
    "reused": (Reused, "vectors", 3),
    "tied": (Tied, "tokens", 7),
    "unused": (Unused, "vectors", 3),
    "encoder": (Encoder, "sequences", 3),
}
NAMES = tuple(_TABLE)


def make(name: str, size: int, dtype=torch.float64, seed: int = 0):
    """A model in evaluation mode and a batch (inputs, labels)."""
    build, kind, classes = _TABLE[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build().to(dtype).eval()
        inputs = _inputs(kind, size)
        labels = torch.randint(0, classes, (size,))
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    return model, (inputs, labels)


def checkpoints(name: str, count: int, dtype=torch.float64):
    """State dicts of differently initialised models."""
    return [make(name, 1, dtype, seed=100 + c)[0].state_dict() for c in range(count)]


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
