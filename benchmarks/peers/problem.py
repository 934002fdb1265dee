"""The work that every library does: a model, its batches, and what to report.

The driver writes it into a folder once; each worker reads it. Imports torch,
transformers and numpy only, since workers run in the other libraries' environments,
where `trak` is missing or is another package.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertForSequenceClassification, GPT2LMHeadModel

_CLASSES = {"bert": BertForSequenceClassification, "gpt2": GPT2LMHeadModel}


@dataclass(frozen=True)
class Problem:
    """What a worker is asked for.

    Attributes:
        folder: where everything lies.
        kind: `"bert"` or `"gpt2"`.
        proj_dim: projection dimension, or the nearest that a library offers.
        batch_size: examples a batch.
        warmup: batches that are not timed.
        threads: of torch.
        cpu_time: measure the process's CPU seconds, for busy machines.
    """

    folder: str
    kind: str
    proj_dim: int
    batch_size: int
    warmup: int
    threads: int
    cpu_time: bool = False

    def clock(self) -> float:
        """Now.

        Returns:
            Seconds.
        """
        return time.process_time() if self.cpu_time else time.perf_counter()

    def model(self, **options: Any) -> Any:
        """The model, in evaluation mode.

        Args:
            options: for `from_pretrained`.

        Returns:
            A Hugging Face model.
        """
        return _CLASSES[self.kind].from_pretrained(self.folder, **options).eval()

    def data(self) -> dict[str, Tensor]:
        """All examples.

        Returns:
            Name to tensor, `[n, ...]`.
        """
        arrays = np.load(Path(self.folder) / "data.npz")
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    def batches(self) -> list[dict[str, Tensor]]:
        """The examples in batches.

        Returns:
            One dict a batch.
        """
        data = self.data()
        count = len(data["input_ids"])
        return [
            {name: values[start : start + self.batch_size] for name, values in data.items()}
            for start in range(0, count, self.batch_size)
        ]


class Examples(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Examples by number.

    Args:
        data: name to tensor, `[n, ...]`.
    """

    def __init__(self, data: dict[str, Tensor]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: values[index] for name, values in self.data.items()}


def write(problem: Problem, model: Any, data: dict[str, Tensor]) -> None:
    """Puts a problem into its folder.

    Args:
        problem: what to write.
        model: the model.
        data: name to tensor, `[n, ...]`.
    """
    folder = Path(problem.folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    arrays: dict[str, Any] = {name: values.numpy() for name, values in data.items()}
    np.savez(folder / "data.npz", **arrays)
    (folder / "problem.json").write_text(json.dumps(asdict(problem)), encoding="utf-8")


def margins(kind: str, logits: Tensor, data: dict[str, Tensor]) -> Tensor:
    """The model output that is attributed, `log p / (1 - p)` of the right answer.

    Args:
        kind: of the problem.
        logits: `[b, classes]`, or `[b, s, vocabulary]`.
        data: the batch.

    Returns:
        `[b]`; for a language model the mean over the tokens that have a next one.
    """
    labels = data["labels"] if kind == "bert" else data["input_ids"][:, 1:]
    logits = logits if kind == "bert" else logits[:, :-1]
    right = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, labels.unsqueeze(-1), -torch.inf).logsumexp(-1)
    found = right - others
    return found if kind == "bert" else found.mean(1)


class Stopwatch:
    """When each forward pass of a model began.

    Args:
        model: the model.
        problem: knows the clock.
    """

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        self.times: list[float] = []
        model.register_forward_pre_hook(lambda *_: self.times.append(problem.clock()))

    def seconds(self, batches: int, warmup: int) -> list[float]:
        """From one batch's forward pass to the next one's.

        Args:
            batches: how many batches the last pass over the data had.
            warmup: how many of them to leave out.

        Returns:
            Seconds a batch, `batches - warmup - 1` of them.
        """
        times = self.times[-batches:]
        return [b - a for a, b in itertools.pairwise(times)][warmup:]


def read() -> tuple[Problem, str]:
    """Reads a worker's command line and sets torch up.

    Returns:
        The problem, and `"check"` or `"time"`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("mode", choices=["check", "time"])
    given = parser.parse_args()
    text = (given.folder / "problem.json").read_text(encoding="utf-8")
    problem = Problem(**json.loads(text))
    torch.manual_seed(0)
    torch.set_num_threads(problem.threads)
    return problem, given.mode


def report(package: str, seconds: list[float] | None, **check: Any) -> None:
    """Prints a worker's one line.

    Args:
        package: the library.
        seconds: of each timed batch.
        check: what the driver needs to compare the work, and what was run.
    """
    versions = {name: metadata.version(name) for name in (package, "torch", "transformers")}
    line = {
        "seconds_per_batch": seconds,
        "check": check,
        "versions": versions,
        "load_average": os.getloadavg()[0],
    }
    print("\n" + json.dumps(line), flush=True)


def save_gram(problem: Problem, gram: Tensor) -> None:
    """Leaves inner products of per-sample gradients for the driver.

    Args:
        problem: the problem.
        gram: `[n, n]`.
    """
    np.save(Path(problem.folder) / "gram.npy", gram.detach().double().numpy())
