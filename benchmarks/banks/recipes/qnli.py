"""Question/sentence pairs and a fine-tuned BERT of 2 layers, 0.4 million parameters.

Data and weights are those of examples/qnli.py. The embeddings, 4 million parameters, stay
as they were pretrained, so that what is trained and attributed is mostly matrices of
128 x 128 and 128 x 512, and a checkpoint fits into the repository.
"""

import gzip
import json
import random
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.banks.recipes import Recipe
from benchmarks.common import ROOT

DATA = ROOT / "examples" / "data"
LENGTH = 40  # longer pairs are left out, so that nothing is cut off
TRAIN_ARTICLES = 24  # of 48; targets are of the others


def recipe() -> Recipe:
    """The recipe.

    Returns:
        1,500 training pairs, 200 targets of other articles, 64 halves with 4 seeds each.
    """
    train, targets = _pairs()
    pretrained = _pretrained()
    return Recipe(
        train=_encode(train[:1500]),
        targets=_encode(targets[:200]),
        make_model=lambda: Classifier(pretrained),
        epochs=3,
        batch_size=25,
        learning_rate=3e-4,
        weight_decay=0.01,
        subsets=64,
        seeds=4,
        checkpoints=5,
        task="text_classification",
        optimizer="adamw",
        pretrained=pretrained,
    )


class Classifier(nn.Module):
    """BERT, which takes tensors and returns logits.

    Args:
        pretrained: weights by name.
    """

    def __init__(self, pretrained: dict[str, Tensor]) -> None:
        super().__init__()
        self.model = BertForSequenceClassification(_config())
        self.load_state_dict(pretrained)
        self.model.bert.embeddings.requires_grad_(False)

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Logits of a batch.

        Args:
            input_ids: tokens, `[b, s]`.
            token_type_ids: segments, `[b, s]`.
            attention_mask: 1 for tokens and 0 for padding, `[b, s]`.

        Returns:
            `[b, 2]`.
        """
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


def _config() -> Any:
    # dropout would be noise of the seed
    return BertConfig.from_pretrained(
        DATA / "bert-tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )


def _pretrained() -> dict[str, Tensor]:
    # the same random pooler and a classifier of zeros for every model, so that those of
    # one half differ by the order of their examples only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = BertForSequenceClassification(_config()).state_dict()
    state["classifier.weight"].zero_()
    found = load_file(DATA / "bert-tiny" / "model.safetensors")
    state |= {name: value.float() for name, value in found.items()}
    return {f"model.{name}": value for name, value in state.items()}


def _pairs() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    path = DATA / "qnli_squad.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in lines]
    draw = random.Random(0)
    draw.shuffle(pairs)
    articles = sorted({pair["title"] for pair in pairs})
    inside = set(draw.sample(articles, TRAIN_ARTICLES))
    lengths = _tokenizer()(*_texts(pairs), return_length=True)["length"]
    pairs = [pair for pair, n in zip(pairs, lengths, strict=True) if n <= LENGTH]
    train = [pair for pair in pairs if pair["title"] in inside]
    return train, [pair for pair in pairs if pair["title"] not in inside]


def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DATA / "bert-tiny")


def _texts(pairs: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
    return [pair["question"] for pair in pairs], [pair["sentence"] for pair in pairs]


def _encode(pairs: list[dict[str, Any]]) -> tuple[Tensor, ...]:
    names = ("input_ids", "token_type_ids", "attention_mask")
    encoded = _tokenizer()(
        *_texts(pairs), padding="max_length", max_length=LENGTH, return_tensors="pt"
    )
    labels = torch.tensor([pair["label"] for pair in pairs])
    return *(encoded[name] for name in names), labels
