"""What an environment is handed: data, checkpoints, a model in plain torch; scores back.

Nothing here imports this library: `traker` has the same import name.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.banks.networks import NETWORKS

BATCH = 100
_ARGUMENTS = {
    "Linear": ("in_features", "out_features"),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding"),
    "BatchNorm2d": ("num_features",),
    "ReLU": (),
    "GELU": (),
    "SiLU": (),
    "Tanh": (),
    "Flatten": (),
}


class Classifier(nn.Module):
    """A Hugging Face classifier that takes tensors and returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
        """Logits of a batch."""
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


def describe(model: nn.Module) -> dict[str, Any]:
    """A model in JSON.

    Args:
        model: an `nn.Sequential` of known layers, one of `NETWORKS`, or a Hugging Face
            classifier in `model`.

    Returns:
        What `build` takes.
    """
    kind = type(model).__name__
    if kind in NETWORKS:
        return {"network": kind, "arguments": model.arguments}
    inner: Any = getattr(model, "model", None)
    if inner is not None:
        return {"bert": inner.config.to_dict()}
    layers: list[Any] = []
    for layer in model.children():
        name = type(layer).__name__
        layers.append((name, {key: getattr(layer, key) for key in _ARGUMENTS[name]}))
    return {"layers": layers}


def build(described: dict[str, Any]) -> nn.Module:
    """The model that `describe` saw, with other weights.

    Args:
        described: JSON.

    Returns:
        The model.
    """
    if "network" in described:
        return NETWORKS[described["network"]](**described["arguments"])
    if "bert" in described:
        import transformers  # noqa: PLC0415 - an environment may lack it

        config = transformers.BertConfig(**described["bert"], attn_implementation="eager")
        model = Classifier(transformers.BertForSequenceClassification(config))
        model.model.bert.embeddings.requires_grad_(False)
        return model
    layers = [getattr(nn, name)(**arguments) for name, arguments in described["layers"]]
    return nn.Sequential(*layers)


class Problem:
    """A bank's data, checkpoints and model.

    Args:
        folder: where `write` put them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seconds_one = 0.0
        found = json.loads((folder / "problem.json").read_text("utf-8"))
        self.regression: bool = found["regression"]
        self.described: dict[str, Any] = found["model"]
        self.states = [
            load_file(folder / f"checkpoint-{j}.safetensors")
            for j in range(found["checkpoints"])
        ]
        data = load_file(folder / "data.safetensors")
        self.train, self.targets = (
            tuple(data[f"{part}-{j}"] for j in range(found["parts"]))
            for part in ("train", "targets")
        )

    @contextmanager
    def once(self) -> Iterator[None]:
        """Counts what runs inside as the time of one setting, without the rest of a sweep.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds_one += time.perf_counter() - start

    def model(self, number: int = 0) -> nn.Module:
        """A checkpoint's model, in evaluation mode.

        Args:
            number: of the checkpoint.

        Returns:
            The model.
        """
        model = build(self.described)
        model.load_state_dict(self.states[number])
        return model.eval()

    def check(self) -> None:
        """Asserts that the models give here what they gave where they were written.

        Raises:
            AssertionError: if an output differs by 1e-3.
        """
        for j in range(len(self.states)):
            *inputs, labels = (part[:BATCH] for part in self.targets)
            with torch.no_grad():
                outputs = self.outputs(self.model(j)(*inputs), labels)
            expected = torch.from_numpy(np.load(self.folder / f"outputs-{j}.npy"))
            apart = float((outputs - expected).abs().max())
            if not apart < 1e-3:
                raise AssertionError(f"checkpoint {j}: outputs differ by {apart:.1e}")

    def slopes(self, number: int) -> Tensor:
        """`slopes_of` the targets.

        Args:
            number: of the checkpoint.

        Returns:
            `[m]`, float64.
        """
        *inputs, labels = self.targets
        with torch.no_grad():
            predictions = self.model(number)(*inputs).double()
            return self.slopes_of(predictions, labels)

    def slopes_of(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """`d loss / d output`, negated: Q.

        Args:
            predictions: `[b, classes]`, or `[b, s, words]`.
            labels: `[b]`, or `[b, s]`.

        Returns:
            `[b]`; `1 - p` of the right class, in the mean over words, or label minus
            prediction.
        """
        if self.regression:
            return labels - predictions[:, 0]
        return _over_words(torch.sigmoid(-_margins(predictions, labels)))

    def batches(
        self, examples: tuple[Tensor, ...], size: int = BATCH
    ) -> list[tuple[Tensor, ...]]:
        """Cuts examples into batches.

        Args:
            examples: tensors of one length.
            size: of a batch.

        Returns:
            The batches.
        """
        return list(zip(*(part.split(size) for part in examples), strict=True))

    def outputs(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """What is attributed: `log p / (1 - p)` of the right class, or the prediction.

        Args:
            predictions: `[b, classes]`, or `[b, s, words]`.
            labels: `[b]`, or `[b, s]`: the mean over words is attributed.

        Returns:
            `[b]`.
        """
        if self.regression:
            return predictions[:, 0]
        return _over_words(_margins(predictions, labels))

    def losses(self, predictions: Tensor, labels: Tensor) -> Tensor:
        """The training loss.

        Args:
            predictions: `[b, classes]`, or `[b, s, words]`.
            labels: `[b]`, or `[b, s]`.

        Returns:
            `[b]`.
        """
        if self.regression:
            return (predictions[:, 0] - labels).square() / 2
        # cross entropy, whose digits survive where the loss is tiny
        return _over_words(nn.functional.softplus(-_margins(predictions, labels)))


def _margins(predictions: Tensor, labels: Tensor) -> Tensor:
    # log p / (1 - p) of each label
    right = labels[..., None]
    others = predictions.scatter(-1, right, -float("inf")).logsumexp(-1)
    return predictions.gather(-1, right)[..., 0] - others


def _over_words(values: Tensor) -> Tensor:
    # [b] of [b] or [b, s]
    return values if values.ndim == 1 else values.mean(1)


def write(
    folder: Path,
    model: nn.Module,
    states: list[dict[str, Tensor]],
    train: tuple[Tensor, ...],
    targets: tuple[Tensor, ...],
    *,
    regression: bool,
    outputs: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Writes a problem.

    Args:
        folder: where to.
        model: the model.
        states: its checkpoints.
        train: training examples, labels last.
        targets: the same of the targets.
        regression: whether labels are numbers.
        outputs: what is attributed, of predictions and labels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = {f"train-{j}": part.contiguous() for j, part in enumerate(train)}
    parts |= {f"targets-{j}": part.contiguous() for j, part in enumerate(targets)}
    save_file(parts, folder / "data.safetensors")
    for j, state in enumerate(states):
        whole = {name: value.clone().contiguous() for name, value in state.items()}
        save_file(whole, folder / f"checkpoint-{j}.safetensors")
        model.load_state_dict(state)
        *inputs, labels = (part[:BATCH] for part in targets)
        with torch.no_grad():
            found = outputs(model.eval()(*inputs), labels)
        np.save(folder / f"outputs-{j}.npy", found.numpy())
    described = {
        "model": describe(model),
        "regression": regression,
        "checkpoints": len(states),
        "parts": len(train),
    }
    text = json.dumps(described)
    (folder / "problem.json").write_text(text, encoding="utf-8")


def peak_megabytes() -> float:
    """The largest resident memory of this process so far.

    Returns:
        Megabytes. `getrusage` would begin with the parent's.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (each for each in lines if each.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


Scores = dict[str, Any]
Method = Callable[[Problem, int], Scores]


def work(package: str, methods: dict[str, Method]) -> None:
    """Runs methods and leaves their scores, as a worker's whole program.

    Args:
        package: for messages.
        methods: name to a function of the problem and a number of checkpoints, which gives
            scores `[n, m]` by label and does the work of one setting in `Problem.once`.
    """
    folder, wanted, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    torch.manual_seed(0)
    problem = Problem(folder)
    problem.check()
    start = time.perf_counter()
    found = methods[wanted](problem, count)
    seconds = time.perf_counter() - start
    peak = peak_megabytes()
    for j, (label, scores) in enumerate(found.items()):
        array = torch.as_tensor(np.asarray(scores)).float().numpy()
        np.save(folder / f"{package}-{wanted}-{count}-{j}.npy", array)
        print(f"{label}\t{folder / f'{package}-{wanted}-{count}-{j}.npy'}")
    figures = {"seconds": seconds, "megabytes": peak}
    if problem.seconds_one:
        figures["seconds_one"] = problem.seconds_one
    print(json.dumps(figures))
