"""Questions and a word-level language model: a transformer of 80 thousand parameters."""

import gzip
import json
import random
import re
from collections import Counter

import torch
from torch import Tensor, nn

from benchmarks.banks.recipes import Recipe
from benchmarks.common import ROOT

DATA = ROOT / "examples" / "data" / "qnli_squad.jsonl.gz"
LENGTH = 12  # words that are predicted, each from those before it
WORDS = 500  # the most frequent ones; 0 stands for all others
WIDTH, HEADS = 48, 4


def recipe() -> Recipe:
    """The recipe.

    Returns:
        1,200 training questions, 200 targets, 64 halves with 6 seeds each.
    """
    texts = _texts()
    x, y = texts[:, :-1], texts[:, 1:]
    weights = Transformer().state_dict()
    return Recipe(
        train=(x[:1200], y[:1200]),
        targets=(x[1200:1400], y[1200:1400]),
        make_model=Transformer,
        epochs=10,
        batch_size=25,
        learning_rate=3e-3,
        weight_decay=0.1,
        subsets=64,
        seeds=6,
        checkpoints=5,
        task="language_modelling",
        optimizer="adamw",
        pretrained={name: torch.zeros_like(v) for name, v in weights.items()},
    )


class Transformer(nn.Module):
    """One layer of attention and one of an MLP, normalised before each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.merge = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next words.

        Args:
            tokens: `[b, s]`.

        Returns:
            `[b, s, words]`.
        """
        x = self.words(tokens) + self.positions(torch.arange(tokens.shape[1]))
        x = x + self.merge(self._attend(self.norms[0](x)))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x))

    def _attend(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        query, key, value = self.mix(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(later, -1e9)
        return (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)


def _texts() -> Tensor:
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        questions = {json.loads(line)["question"] for line in lines}
    texts = [re.findall(r"[a-z]+|\d+|\?", text.lower()) for text in sorted(questions)]
    counts = Counter(word for text in texts for word in text)
    known = {word: j for j, (word, _) in enumerate(counts.most_common(WORDS - 1), start=1)}
    long = [text[: LENGTH + 1] for text in texts if len(text) > LENGTH]
    random.Random(0).shuffle(long)
    return torch.tensor([[known.get(word, 0) for word in text] for text in long])
