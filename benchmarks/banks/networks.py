"""Networks of the banks that are more than a chain of layers, in plain torch.

Other libraries' environments build them too, so nothing here imports this library.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResNet(nn.Module):
    """Residual blocks with BatchNorm for images of 32 pixels, after a stem of stride 2.

    Args:
        widths: channels of the blocks; each but the first halves the image.
        classes: how many.
    """

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.arguments = {"widths": list(widths), "classes": classes}
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        before = (widths[0], *widths[:-1])
        blocks = (Residual(i, o) for i, o in zip(before, widths, strict=True))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch.

        Args:
            images: `[b, 3, 32, 32]`.

        Returns:
            `[b, classes]`.
        """
        x = torch.relu(self.norm(self.stem(images)))
        return self.head(self.blocks(x).mean((2, 3)))


class Residual(nn.Module):
    """Two convolutions and what they are added to.

    Args:
        channels: of the input.
        width: of the output; if it is another, the image is halved.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.first = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The block.

        Args:
            x: `[b, channels, h, w]`.

        Returns:
            `[b, width, h, w]`, or half of `h` and `w`.
        """
        y = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(y)) + self.shortcut(x))


class Transformer(nn.Module):
    """One layer of attention and one of an MLP, normalised before each.

    Args:
        words: how many are known.
        length: of the longest text.
        width: numbers a word.
        heads: of the attention.
    """

    def __init__(self, words: int, length: int, width: int, heads: int) -> None:
        super().__init__()
        sizes = {"words": words, "length": length, "width": width, "heads": heads}
        self.arguments = sizes
        self.heads = heads
        self.words = nn.Embedding(words, width)
        self.positions = nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.mix = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.head = nn.Linear(width, words)

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
        query, key, value = (
            self.mix(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(later, -1e9)
        return (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)


# by name, to be built again from their `arguments`
NETWORKS: dict[str, type[nn.Module]] = {"ResNet": ResNet, "Transformer": Transformer}
