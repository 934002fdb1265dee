"""dattri: TRAK, influence functions with EK-FAC, and LoGra."""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from dattri.algorithm import LoGraAttributor
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.quality_table.exchange import BATCH, Problem, Scores, work

RIDGES = (0.0, 1.0, 3.0, 10.0)  # mean squared row norms
DAMPINGS = (0.0, 1e-3, 1e-2, 1e-1)
LOGRA_DAMPINGS = (0.01, 0.1, 1.0, 10.0, 100.0)  # mean eigenvalues


def loaders(problem: Problem) -> tuple[Any, Any]:
    """Batches of training examples and targets."""
    parts = (TensorDataset(*problem.train), TensorDataset(*problem.targets))
    return tuple(DataLoader(part, batch_size=BATCH) for part in parts)


def function(problem: Problem, model: Any, kind: str) -> Any:
    """A mean of losses or outputs, of a batch or of one example without batch axis."""

    def mean(params: Any, data: Any) -> Tensor:
        predictions, labels = predicted(problem, model, params, data)
        return getattr(problem, kind)(predictions, labels).mean()

    return mean


def predicted(problem: Problem, model: Any, params: Any, data: Any) -> Any:
    """Predictions and labels of a batch, or of one example without batch axis."""
    *inputs, labels = data
    if labels.ndim < problem.train[-1].ndim:
        inputs, labels = [part[None] for part in inputs], labels[None]
    return functional_call(model, params, tuple(inputs)), labels


def trak(problem: Problem, count: int) -> Scores:
    """TRAK with k = 512 and 2048, at every ridge."""
    model = problem.model()
    train, targets = loaders(problem)
    output = function(problem, model, "outputs")

    def probability(params: Any, data: Any) -> Tensor:
        predictions, labels = predicted(problem, model, params, data)
        return 1 - problem.slopes_of(predictions, labels)  # it takes one minus this

    found: Scores = {}
    for k in (512, 2048):
        unit = mean_square(problem, output, model)
        for ridge in RIDGES:
            task = AttributionTask(output, model, problem.states[:count])
            attributor = TRAKAttributor(
                task,
                probability,
                projector_kwargs={"proj_dim": k, "device": "cpu"},
                regularization=ridge * unit,
            )
            try:
                with torch.no_grad():
                    attributor.cache(train)
                    scores = attributor.attribute(targets)
            except torch.linalg.LinAlgError:  # a singular kernel, without a ridge
                continue
            found[f"k = {k}, ridge {ridge}"] = scores.double().numpy()
    return found


def mean_square(problem: Problem, output: Any, model: Any) -> float:
    """The mean squared norm of a first batch's projected rows, as TRAK scales them.

    Args:
        problem: the problem.
        output: what is attributed.
        model: the model.

    Returns:
        The squared gradient norm over the number of parameters; projections keep it.
    """
    task = AttributionTask(output, model, problem.states[0])
    parameters, _ = task.get_param()
    gradients = task.get_grad_loss_func(in_dims=(None, 0))(
        parameters, problem.batches(problem.train)[0]
    )
    return float(gradients.square().sum(1).mean()) / gradients.shape[1]


def ekfac(problem: Problem, count: int) -> Scores:
    """EK-FAC influence, at every damping, of linear layers.

    Its Fisher matrix is that of the target function, so the loss is on both sides, and
    each target's column is divided by the slope of its loss.
    """
    total: Scores = {}
    train, targets = loaders(problem)
    for j in range(count):
        model = problem.model(j)
        slopes = problem.slopes(j).numpy()
        for damping in DAMPINGS:
            task = AttributionTask(
                function(problem, model, "losses"), model, problem.states[j]
            )
            attributor = IFAttributorEKFAC(task, damping=damping)
            attributor.cache(train)
            found = attributor.attribute(train, targets).detach().double().numpy()
            label = f"damping {damping if damping else 'default'}"
            total[label] = total.get(label, 0) + found / slopes / count
    return total


class Keyed(nn.Module):
    """Takes a batch as a dict and returns a "loss", as LoGra asks a model to.

    What it returns is the targets' side, so it is the output; the training side is the
    loss function of the task.
    """

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.model = model
        self.problem = problem

    def forward(self, labels: Tensor, **inputs: Tensor) -> Any:
        """The mean output, and the predictions."""
        predictions = self.model(*(inputs[f"part{j}"] for j in range(len(inputs))))
        outputs = self.problem.outputs(predictions, labels)
        return SimpleNamespace(loss=outputs.mean(), predictions=predictions)


class Examples(Dataset[dict[str, Tensor]]):
    """Examples as dicts."""

    def __init__(self, parts: tuple[Tensor, ...]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts[-1])

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        *inputs, labels = (part[number] for part in self.parts)
        named = {f"part{j}": part for j, part in enumerate(inputs)}
        return {"labels": labels, **named}


def logra(problem: Problem, count: int) -> Scores:
    """LoGra, at every damping, of linear layers."""
    total: Scores = {}
    train, targets = (
        DataLoader(Examples(part), batch_size=BATCH)
        for part in (problem.train, problem.targets)
    )

    def loss(model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
        del device
        predictions = model(**batch).predictions
        return problem.losses(predictions, batch["labels"]).mean()

    for j in range(count):
        for damping in (None, *LOGRA_DAMPINGS):
            model = Keyed(problem.model(j), problem)
            state = {name: value.clone() for name, value in model.state_dict().items()}
            task = AttributionTask(loss, model, state)
            with tempfile.TemporaryDirectory() as folder:
                attributor = LoGraAttributor(
                    task,
                    damping=damping,
                    offload="none",
                    cache_dir=folder,
                )
                attributor.cache(train)
                part = attributor.attribute(train, targets).detach().double().numpy()
            # an example's step is against its loss gradient
            label = f"damping {'default' if damping is None else damping}"
            total[label] = total.get(label, 0) - part / count
    return total


if __name__ == "__main__":
    work("dattri", {"TRAK": trak, "EK-FAC": ekfac, "LoGra": logra})
