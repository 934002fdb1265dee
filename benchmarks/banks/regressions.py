"""Small regressions that are trained when they are asked for, all halves at once.

`CHOSEN` were looked at while the automatic ridge of squared losses was made; sixteen with
settings of no particular kind, and 24 with settings drawn by lot. `JUDGED` were drawn
afterwards, to judge it; how the usual ridge is kept was settled in their sight, too.
`LATER` were drawn when all was settled, that of trainings that came to rest included.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import datasets
from torch import Tensor, nn

HALVES, SEEDS, CHECKPOINTS = 64, 2, 3
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


@dataclass(frozen=True)
class Regression:
    """One way to train.

    Attributes:
        data: which.
        count: training examples, `n`.
        targets: how many.
        noise: standard deviation of what is added to answers.
        hidden: widths of hidden layers.
        activation: between layers.
        optimizer: `"sgd"` (momentum 0.9), `"adam"` or `"adamw"`.
        rate: learning rate at the start; it falls to 0.
        decay: weight decay.
        epochs: how many.
        batch: examples.
    """

    data: str
    count: int
    targets: int
    noise: float
    hidden: tuple[int, ...]
    activation: str
    optimizer: str
    rate: float
    decay: float
    epochs: int
    batch: int

    @property
    def name(self) -> str:
        """What it is called in results."""
        kind = f"{self.data} {self.count}, {'x'.join(map(str, self.hidden)) or 'linear'}"
        how = f"{self.optimizer} {self.rate:g}, decay {self.decay:g}"
        noise, length = f"noise {self.noise:g}", f"{self.epochs} epochs"
        return f"{kind} {self.activation}, {noise}, {how}, {length}"


CHOSEN = [
    Regression("diabetes", 300, 60, 0, (32,), "relu", "sgd", 0.05, 3e-3, 40, 25),
    Regression("diabetes", 300, 60, 0, (32,), "relu", "sgd", 0.05, 0, 150, 25),
    Regression("diabetes", 300, 60, 0, (32,), "tanh", "sgd", 0.02, 0, 5, 25),
    Regression("diabetes", 300, 60, 0, (32, 16), "relu", "adamw", 3e-3, 1e-2, 60, 25),
    Regression("friedman1", 300, 60, 0.3, (32,), "relu", "adamw", 1e-2, 1e-2, 60, 25),
    Regression("friedman1", 400, 80, 0.3, (48,), "tanh", "sgd", 0.05, 1e-3, 40, 32),
    Regression("friedman1", 200, 60, 0.1, (32,), "gelu", "sgd", 0.05, 0, 200, 25),
    Regression("friedman2", 400, 80, 0.1, (32,), "silu", "adam", 5e-3, 0, 50, 32),
    Regression("friedman3", 300, 60, 0.2, (24, 24), "tanh", "sgd", 0.05, 1e-3, 50, 25),
    Regression("sine", 500, 80, 0.1, (32, 32), "gelu", "adam", 5e-3, 0, 60, 32),
    Regression("sine", 500, 80, 0.3, (64,), "tanh", "sgd", 0.05, 0, 10, 32),
    Regression("housing", 800, 100, 0.2, (32,), "relu", "adam", 5e-3, 0, 40, 64),
    Regression("housing", 600, 100, 0.4, (48,), "relu", "sgd", 0.03, 1e-3, 30, 32),
    Regression("housing", 500, 80, 0.2, (32, 32, 16), "relu", "adamw", 3e-3, 0.05, 40, 32),
    Regression("linear", 200, 60, 1, (24,), "relu", "adam", 5e-3, 0, 60, 20),
    Regression("linear", 150, 60, 2, (), "relu", "sgd", 0.02, 1e-2, 60, 20),
]


def drawn(count: int, seed: int) -> list[Regression]:
    """Regressions whose settings are drawn by lot.

    Args:
        count: how many.
        seed: of the lots.

    Returns:
        The regressions.
    """
    rng = np.random.RandomState(seed)

    def one_of(*values: object) -> object:
        return values[rng.randint(len(values))]

    rates = {
        "sgd": (0.02, 0.05, 0.1),
        "adam": (2e-3, 5e-3, 1e-2),
        "adamw": (2e-3, 5e-3, 1e-2),
    }
    decays = {"sgd": (0, 1e-3, 5e-3), "adam": (0, 0, 1e-3), "adamw": (1e-2, 0.1, 0.5)}
    found = []
    for _ in range(count):
        data = one_of(
            "diabetes", "friedman1", "friedman2", "friedman3", "sine", "housing", "linear"
        )
        size = one_of(100, 150, 200, 300, 350, 500, 700)
        hidden = one_of((16,), (32,), (64,), (24, 24), (32, 16), (32, 32, 16), (48, 24))
        optimizer = one_of("sgd", "adam", "adamw")
        rate, decay = one_of(*rates[optimizer]), one_of(*decays[optimizer])
        if data == "diabetes":
            size, rate = min(size, 350), min(rate, 0.05)
        noise = one_of(0, 0.1, 0.3, 0.6)
        activation = one_of("relu", "tanh", "gelu", "silu")
        epochs, batch = one_of(5, 10, 20, 40, 80, 150), one_of(16, 25, 32, 64)
        shape = data, size, 60, noise, hidden, activation
        found.append(Regression(*shape, optimizer, rate, decay, epochs, batch))
    return found


CHOSEN += drawn(24, 2026)
JUDGED = drawn(16, 77)
LATER = drawn(32, 31415)


@dataclass(frozen=True)
class Trained:
    """A regression and what its retrained models answer.

    Attributes:
        models: of the whole training set.
        train: inputs and answers.
        targets: inputs and answers.
        masks: which examples each half has, `[h, n]`.
        outputs: of targets, `[h, s, m]` with `s` seeds.
    """

    models: list[nn.Module]
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    masks: NDArray[np.bool_]
    outputs: NDArray[np.float32]


def make(chosen: Regression) -> Trained:
    """Trains it.

    Args:
        chosen: which.

    Returns:
        Its models, data and truth.
    """
    train, targets = _data(chosen)
    size, rng = len(train[0]), np.random.RandomState(5)
    masks = np.zeros((HALVES, size), dtype=bool)
    for mask in masks:
        mask[rng.permutation(size)[: size // 2]] = True
    seeds = range(10, 10 + HALVES * SEEDS)
    halves = _trained(chosen, *train, masks.repeat(SEEDS, axis=0), list(seeds))
    answers = _forward(halves, targets[0], chosen.activation)
    whole = np.ones((CHECKPOINTS, size), dtype=bool)
    full = _trained(chosen, *train, whole, list(range(CHECKPOINTS)))
    models = [_model(chosen, [part[j] for part in full]) for j in range(CHECKPOINTS)]
    outputs = answers.view(HALVES, SEEDS, -1).numpy()
    return Trained(models, train, targets, masks, outputs)


def _data(chosen: Regression) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    count, every = chosen.count, chosen.count + chosen.targets
    rng = np.random.RandomState(0)
    x, y = _examples(chosen, every, rng)
    order = rng.permutation(len(x))
    x, y = x[order], y[order]
    x = (x - x[:count].mean(0)) / x[:count].std(0)
    y = (y - y[:count].mean()) / y[:count].std()
    found = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    train, targets = ((slice(0, count)), slice(count, every))
    return (found[0][train], found[1][train]), (found[0][targets], found[1][targets])


def _examples(
    chosen: Regression, every: int, rng: np.random.RandomState
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    noise = chosen.noise
    if chosen.data == "diabetes":
        return datasets.load_diabetes(return_X_y=True)
    if chosen.data == "linear":
        return datasets.make_regression(
            every, 12, n_informative=8, noise=noise * 30, random_state=0
        )
    if chosen.data == "sine":
        x = rng.uniform(-2, 2, (every, 3))
        y = np.sin(3 * x[:, 0]) + x[:, 1] * x[:, 2]
        return x, y + noise * rng.randn(every)
    if chosen.data == "housing":  # clusters, and prices that are cut off
        centres, where = rng.randn(12, 8) * 1.5, rng.randint(0, 12, every)
        x = centres[where] + rng.randn(every, 8) * 0.6
        y = np.exp(0.5 * np.tanh(x @ (rng.randn(8, 16) / 2)) @ rng.randn(16) / 2)
        y = y + noise * rng.randn(every)
        return x, np.minimum(y, np.quantile(y, 0.95))
    x, y = getattr(datasets, f"make_{chosen.data}")(every, noise=0, random_state=0)
    return x, (y - y.mean()) / y.std() + noise * rng.randn(every)


def _begun(widths: list[int], seeds: list[int]) -> list[Tensor]:
    # weights and biases of every model, [b, i, o] and [b, 1, o]
    parts: list[Tensor] = []
    for wide, narrow in itertools.pairwise(widths):
        bound = 1 / math.sqrt(wide)
        weight = torch.empty(len(seeds), wide, narrow)
        bias = torch.empty(len(seeds), 1, narrow)
        for j, seed in enumerate(seeds):
            rng = torch.Generator().manual_seed(1000 * seed + len(parts))
            weight[j] = (torch.rand(wide, narrow, generator=rng) * 2 - 1) * bound
            bias[j] = (torch.rand(1, narrow, generator=rng) * 2 - 1) * bound
        parts += [weight.requires_grad_(), bias.requires_grad_()]
    return parts


def _forward(parts: list[Tensor], x: Tensor, activation: str) -> Tensor:
    between = ACTIVATIONS[activation]()
    for j in range(0, len(parts), 2):
        x = x @ parts[j] + parts[j + 1]
        x = between(x) if j + 2 < len(parts) else x
    return x[..., 0]


def _trained(
    chosen: Regression, x: Tensor, y: Tensor, masks: NDArray[np.bool_], seeds: list[int]
) -> list[Tensor]:
    parts = _begun([x.shape[1], *chosen.hidden, 1], seeds)
    kinds = {
        "sgd": lambda: torch.optim.SGD(
            parts, lr=chosen.rate, momentum=0.9, weight_decay=chosen.decay
        ),
        "adam": lambda: torch.optim.Adam(parts, lr=chosen.rate, weight_decay=chosen.decay),
        "adamw": lambda: torch.optim.AdamW(
            parts, lr=chosen.rate, weight_decay=chosen.decay
        ),
    }
    optimizer = kinds[chosen.optimizer]()
    lots = [np.random.RandomState(77 + seed) for seed in seeds]
    own = [np.flatnonzero(mask) for mask in masks]
    each = math.ceil(len(own[0]) / chosen.batch)
    for epoch in range(chosen.epochs):
        orders = [rng.permutation(kept) for rng, kept in zip(lots, own, strict=True)]
        for step in range(each):
            start = step * chosen.batch
            stop = start + chosen.batch
            taken = torch.tensor(np.stack([order[start:stop] for order in orders]))
            left = 1 - (epoch * each + step) / (chosen.epochs * each)
            optimizer.param_groups[0]["lr"] = chosen.rate * left
            optimizer.zero_grad()
            outputs = _forward(parts, x[taken], chosen.activation)
            ((outputs - y[taken]) ** 2 / 2).mean(dim=1).sum().backward()
            optimizer.step()
    return [part.detach() for part in parts]


def _model(chosen: Regression, parts: list[Tensor]) -> nn.Module:
    layers: list[nn.Module] = []
    for weight, bias in zip(parts[::2], parts[1::2], strict=True):
        layer = nn.Linear(*weight.shape)
        layer.weight.data, layer.bias.data = weight.T.contiguous(), bias[0].clone()
        layers += [layer, ACTIVATIONS[chosen.activation]()]
    return nn.Sequential(*layers[:-1])
