"""Questions and a word-level language model: a transformer of 80 thousand parameters."""

import gzip
import json
import random
import re
from collections import Counter

import torch
from torch import Tensor, nn

from benchmarks.banks.networks import Transformer
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
    weights = _model().state_dict()
    return Recipe(
        train=(x[:1200], y[:1200]),
        targets=(x[1200:1400], y[1200:1400]),
        make_model=_model,
        epochs=10,
        batch_size=25,
        learning_rate=3e-3,
        weight_decay=1.0,
        subsets=64,
        seeds=6,
        checkpoints=5,
        task="language_modelling",
        optimizer="adamw",
        pretrained={name: torch.zeros_like(v) for name, v in weights.items()},
    )


def _model() -> nn.Module:
    return Transformer(WORDS, LENGTH, WIDTH, HEADS)


def _texts() -> Tensor:
    with gzip.open(DATA, "rt", encoding="utf-8") as lines:
        questions = {json.loads(line)["question"] for line in lines}
    texts = [re.findall(r"[a-z]+|\d+|\?", text.lower()) for text in sorted(questions)]
    counts = Counter(word for text in texts for word in text)
    known = {word: j for j, (word, _) in enumerate(counts.most_common(WORDS - 1), start=1)}
    long = [text[: LENGTH + 1] for text in texts if len(text) > LENGTH]
    random.Random(0).shuffle(long)
    return torch.tensor([[known.get(word, 0) for word in text] for text in long])
