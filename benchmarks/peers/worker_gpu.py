"""`TRAKer.featurize` on a CUDA device, in whichever package is called `trak` here.

The same lines run in this library and in `traker`, whose names it has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trak import TRAKer

BATCHES = 5


class Residual(nn.Module):
    """Two convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(width, width), convolution(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `nn.Module`."""
        return x + self.body(x)


def convolution(channels: int, width: int) -> nn.Module:
    """A convolution with what follows it."""
    conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def network() -> nn.Module:
    """A ResNet-9 for images of 32 pixels, as in TRAK's CIFAR example."""
    return nn.Sequential(
        convolution(3, 64),
        convolution(64, 128),
        nn.MaxPool2d(2),
        Residual(128),
        convolution(128, 256),
        nn.MaxPool2d(2),
        Residual(256),
        convolution(256, 128),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10, bias=False),
    )


def main() -> None:
    """Times, and leaves the rows' inner products."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--proj-dim", type=int, default=2048)
    given = parser.parse_args()
    torch.manual_seed(0)
    model = network().cuda().eval()
    count = given.batch * BATCHES
    images, labels = torch.randn(count, 3, 32, 32), torch.randint(0, 10, (count,))
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=count,
            save_dir=folder,
            device="cuda",
            proj_dim=given.proj_dim,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, count, given.batch):
            part = slice(start, start + given.batch)
            batch = [images[part].cuda(), labels[part].cuda()]
            torch.cuda.synchronize()
            begun = time.perf_counter()
            traker.featurize(batch=batch, num_samples=given.batch)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        traker.saver.load_current_store(0)
        rows = torch.tensor(traker.saver.current_store["grads"][: given.batch]).double()
    np.save(given.out, (rows @ rows.T).numpy())
    name = type(traker.projector).__name__
    line = {
        "seconds": seconds[2:],
        "projector": name,
        "peak": torch.cuda.max_memory_allocated(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print("\n" + json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
