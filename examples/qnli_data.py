"""The question/sentence pairs of examples/qnli.py, as text and as a loader."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import default_data_collator

EMBEDDED_PAIRS = Path(__file__).resolve().parent / "data" / "qnli_squad.jsonl.gz"
MAX_LENGTH = 96  # 128 in the tutorial; 1 pair in 40 is longer than this
# The 5,000 training pairs are of eleven articles that share no topic, so that a reader can
# see whether an attribution makes sense. The targets ask other questions about the same
# articles; accuracy is measured on the 37 articles that are left out altogether, since
# pairs of one article resemble each other.
TRAIN_ARTICLES = (
    "Doctor_Who",
    "Chloroplast",
    "Rhine",
    "Apollo_program",
    "Genghis_Khan",
    "Oxygen",
    "Immune_system",
    "Kenya",
    "Huguenot",
    "Steam_engine",
    "Warsaw",
)
NUM_TARGETS = 66

Pair = dict[str, Any]  # id, title, question, sentence, label


class Split(NamedTuple):
    """Pairs to train on, to explain, and to measure accuracy on."""

    train: list[Pair]
    targets: list[Pair]
    held_out: list[Pair]


def embedded_pairs(seed: int) -> Split:
    """Reads the embedded pairs, shuffled; targets take turns by article."""
    with gzip.open(EMBEDDED_PAIRS, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    random.Random(seed).shuffle(pairs)
    targets: dict[str, Pair] = {}  # by question: its other pair must not be trained on
    for turn in range(NUM_TARGETS):
        article = TRAIN_ARTICLES[turn % len(TRAIN_ARTICLES)]
        new = next(
            pair
            for pair in pairs
            if pair["title"] == article and _question(pair) not in targets
        )
        targets[_question(new)] = new
    inside = [pair for pair in pairs if pair["title"] in TRAIN_ARTICLES]
    train = [pair for pair in inside if _question(pair) not in targets]
    held_out = [pair for pair in pairs if pair["title"] not in TRAIN_ARTICLES]
    return Split(train, list(targets.values()), held_out)


def _question(pair: Pair) -> str:
    return pair["id"].rpartition("-")[0]  # a question's two pairs end in -p and -n


def glue_pairs() -> Split:
    """Downloads QNLI of the GLUE benchmark: its training and validation pairs."""
    from datasets import load_dataset  # noqa: PLC0415  (needed by this choice only)

    raw = load_dataset("glue", "qnli")

    def pairs(split: str) -> list[Pair]:
        return [
            {"id": f"{split}-{row['idx']}", "title": f"{split} {row['idx']}", **row}
            for row in raw[split]
        ]

    return Split(pairs("train"), pairs("validation"), pairs("validation"))


def make_loader(
    pairs: list[Pair], tokenizer: Any, **options: Any
) -> DataLoader[dict[str, Tensor]]:
    """Tokenizes pairs and wraps them in a loader, in order unless options say else."""
    encoded = tokenizer(
        [pair["question"] for pair in pairs],
        [pair["sentence"] for pair in pairs],
        padding="max_length",
        max_length=MAX_LENGTH,
        truncation=True,
        return_token_type_ids=True,
    )
    rows = [
        {**{name: column[i] for name, column in encoded.items()}, "label": pair["label"]}
        for i, pair in enumerate(pairs)
    ]
    return DataLoader(rows, collate_fn=default_data_collator, **options)
