"""Models of known shapes with random weights, and tasks, for the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from trak.modelout_functions import AbstractModelOutput

LENGTH = 128
BERT = {  # layers, width, heads; Turc et al. 2019, "Well-read students learn better"
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
GPT2 = {
    "gpt2-4x256": (4, 256, 4),
    "gpt2-6x384": (6, 384, 6),
    "gpt2-12x768": (12, 768, 12),
}
NAMES = (*BERT, *GPT2, "resnet18")


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        model: the model, in evaluation mode.
        task: the task, for `TRAKer`.
        batch: one batch.
        loss: the mean training loss of a batch.
    """

    model: nn.Module
    task: Any
    batch: tuple[Tensor, ...]
    loss: Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


def make(
    name: str,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Case:
    """Makes a model with a batch.

    Args:
        name: one of `NAMES`.
        batch_size: examples a batch.
        dtype: of the model.
        device: of both.

    Returns:
        The case.
    """
    torch.manual_seed(0)
    case = _made(name, batch_size, dtype)
    batch = tuple(part.to(device) for part in case.batch)
    return replace(case, model=case.model.to(device), batch=batch)


def _made(name: str, batch_size: int, dtype: torch.dtype) -> Case:
    if name in BERT:
        return _bert(BERT[name], batch_size, dtype)
    if name in GPT2:
        return _gpt2(GPT2[name], batch_size, dtype)
    model = ResNet18().to(dtype).eval()
    images = torch.randn(batch_size, 3, 32, 32, dtype=dtype)
    labels = torch.randint(0, 10, (batch_size,))
    return Case(model, "image_classification", (images, labels), _classification_loss)


class Classifier(nn.Module):
    """A Hugging Face classifier that takes tensors and returns logits."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        layers, width, heads = shape
        self.model = BertForSequenceClassification(
            BertConfig(
                num_hidden_layers=layers,
                hidden_size=width,
                num_attention_heads=heads,
                intermediate_size=4 * width,
            )
        )

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Logits of a batch.

        Args:
            input_ids: tokens, `[b, s]`.
            token_type_ids: segments, `[b, s]`.
            attention_mask: 1 for tokens and 0 for padding, `[b, s]`.

        Returns:
            `[b, classes]`.
        """
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


class LanguageModelOutput(AbstractModelOutput):
    """The mean over tokens of the next token's margin, `log p / (1 - p)`."""

    @staticmethod
    def get_output(
        model: nn.Module, weights: Any, buffers: Any, input_ids: Tensor
    ) -> Tensor:
        """The output of one text.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            input_ids: tokens, `[s]`.

        Returns:
            A scalar.
        """
        found = torch.func.functional_call(model, (weights, buffers), (input_ids[None],))
        return _language_margin(found.logits, input_ids[None]).sum()

    def get_batch_output(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """The outputs of a batch.

        Args:
            model: the model.
            batch: tokens, `[b, s]`.

        Returns:
            `[b]`.
        """
        return _language_margin(model(batch[0]).logits, batch[0])

    def get_out_to_loss_grad(
        self, model: nn.Module, weights: Any, buffers: Any, batch: tuple[Tensor, ...]
    ) -> Tensor:
        """One minus the mean probability of the right token.

        Args:
            model: the model.
            weights: its parameters.
            buffers: its buffers.
            batch: tokens, `[b, s]`.

        Returns:
            `[b]`.
        """
        logits = torch.func.functional_call(model, (weights, buffers), batch).logits
        return 1 - _log_p(logits, batch[0]).exp().mean(1)


def _language_margin(logits: Tensor, tokens: Tensor) -> Tensor:
    log_p = _log_p(logits, tokens)
    return (log_p - torch.log1p(-log_p.exp())).mean(1)


def _log_p(logits: Tensor, tokens: Tensor) -> Tensor:
    # by the function that the training step's loss uses
    logits = logits[:, :-1].float().flatten(0, 1)
    found = functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return -found.unflatten(0, (len(tokens), -1))


def _bert(shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype) -> Case:
    model = Classifier(shape).to(dtype).eval()
    tokens = torch.randint(1000, 30000, (batch_size, LENGTH))
    ones = torch.ones_like(tokens)
    labels = torch.randint(0, 2, (batch_size,))
    batch = (tokens, torch.zeros_like(tokens), ones, labels)
    return Case(model, "text_classification", batch, _text_loss)


def _gpt2(shape: tuple[int, int, int], batch_size: int, dtype: torch.dtype) -> Case:
    layers, width, heads = shape
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        n_positions=LENGTH,
        vocab_size=8192,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
    batch = (torch.randint(0, 8192, (batch_size, LENGTH)),)
    return Case(model, LanguageModelOutput(), batch, _language_loss)


def _text_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    *inputs, labels = batch
    return functional.cross_entropy(model(*inputs).float(), labels)


def _classification_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    images, labels = batch
    return functional.cross_entropy(model(images).float(), labels)


def _language_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    logits = model(batch[0]).logits[:, :-1].float()
    return functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


class ResNet18(nn.Module):
    """ResNet-18 for images of 32 pixels (He et al. 2016, Sec. 4.2's stem)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(64)
        widths = [64, 64, 128, 128, 256, 256, 512, 512]
        before = [64, *widths[:-1]]
        self.blocks = nn.Sequential(
            *(_Residual(i, o) for i, o in zip(before, widths, strict=True))
        )
        self.head = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: `[b, 3, 32, 32]`.

        Returns:
            `[b, classes]`.
        """
        x = torch.relu(self.norm(self.stem(images)))
        return self.head(self.blocks(x).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


def num_parameters(model: nn.Module) -> int:
    """Counts a model's parameters.

    Args:
        model: the model.

    Returns:
        How many scalars it has.
    """
    return sum(math.prod(p.shape) for p in model.parameters())
