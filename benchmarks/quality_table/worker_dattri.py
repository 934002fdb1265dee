"""dattri: TRAK, influence functions with EK-FAC, and LoGra."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from dattri.algorithm import LoGraAttributor
from dattri.algorithm import trak as library
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.quality_table.exchange import BATCH, Problem, Scores, work

DIMS = (512, 2048)  # the first is the default
# mean squared row norms; the default, 0, is not the first because it may not go through
RIDGES = (1.0, 0.0, 0.01, 0.1, 0.3, 3.0, 10.0, 30.0, 100.0)
DAMPINGS = (0.0, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1000.0)
# mean eigenvalues; None is the default, 1e-5 of them
LOGRA_DAMPINGS = (None, 0.1, 1.0, 10.0, 100.0)


def loaders(problem: Problem, size: int = BATCH) -> tuple[Any, Any]:
    """Batches of training examples and targets."""
    parts = (TensorDataset(*problem.train), TensorDataset(*problem.targets))
    return tuple(DataLoader(part, batch_size=size) for part in parts)


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


class Memory:
    """Projected gradients of a first run, so that the next ones need not compute them.

    dattri computes them anew for every ridge. What it does with them stays its own.
    """

    def __init__(self, project: Any) -> None:
        self.project = project
        self.kept: list[Tensor] = []
        self.place = 0
        self.playing = False

    def __call__(self, sample: Tensor, *arguments: Any, **options: Any) -> Any:
        """Stands for dattri's `random_project`."""

        def projected(rows: Tensor, ensemble_id: int) -> Tensor:
            if not self.playing:
                made = self.project(sample, *arguments, **options)
                self.kept.append(made(rows, ensemble_id=ensemble_id).detach().clone())
            self.place += 1
            return self.kept[self.place - 1].clone()

        return projected

    def rewind(self, attributor: Any) -> None:
        """Gives back what is kept to another attributor, which needs no gradients."""
        self.place, self.playing = 0, True

        def nothing(_: Any, data: Any) -> Tensor:
            return torch.zeros(len(data[-1]), 1)

        attributor.grad_loss_func = attributor.grad_target_func = nothing


def trak(problem: Problem, count: int) -> Scores:
    """TRAK with k = 512 and 2048, at every ridge."""
    found: Scores = {}
    original = library.random_project
    unit = mean_square(problem)
    train, targets = loaders(problem)
    for k in DIMS:
        library.random_project = memory = Memory(original)
        for number, ridge in enumerate(RIDGES):
            attributor = attributor_of(problem, count, k, ridge * unit)
            if number:
                memory.rewind(attributor)
            once = problem.once() if (k, ridge) == (DIMS[0], RIDGES[0]) else nullcontext()
            try:
                with torch.no_grad(), once:
                    attributor.cache(train)
                    scores = attributor.attribute(targets)
            except torch.linalg.LinAlgError:  # a singular kernel, without a ridge
                continue
            found[f"k = {k}, ridge {ridge}"] = scores.double().numpy()
    return found


def attributor_of(problem: Problem, count: int, k: int, ridge: float) -> Any:
    """TRAK of some checkpoints."""
    model = problem.model()

    def probability(params: Any, data: Any) -> Tensor:
        predictions, labels = predicted(problem, model, params, data)
        return 1 - problem.slopes_of(predictions, labels)  # it takes one minus this

    output = function(problem, model, "outputs")
    return library.TRAKAttributor(
        AttributionTask(output, model, problem.states[:count]),
        probability,
        projector_kwargs={"proj_dim": k, "device": "cpu"},
        regularization=ridge,
    )


def mean_square(problem: Problem) -> float:
    """The mean squared norm of a first batch's projected rows, as TRAK scales them.

    Args:
        problem: the problem.

    Returns:
        The squared gradient norm over the number of parameters; projections keep it.
    """
    model = problem.model()
    output = function(problem, model, "outputs")
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
    train, _ = loaders(problem)
    # gradients of targets are computed anew for each batch of training examples
    pair = loaders(problem, size=500)
    for j in range(count):
        model = problem.model(j)
        slopes = problem.slopes(j).numpy()
        parts = {}
        with problem.once():
            task = AttributionTask(
                function(problem, model, "losses"), model, problem.states[j]
            )
            attributor = IFAttributorEKFAC(task)
            attributor.cache(train)
            parts[DAMPINGS[0]] = attributor.attribute(*pair)
        for damping in DAMPINGS[1:]:
            attributor.damping = damping
            parts[damping] = attributor.attribute(*pair)
        for damping, part in parts.items():
            label = f"damping {damping if damping else 'default'}"
            found = part.detach().double().numpy() / slopes / count
            total[label] = total.get(label, 0) + found
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
        model = Keyed(problem.model(j), problem)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        parts = {}
        with tempfile.TemporaryDirectory() as folder:
            with problem.once():
                attributor = LoGraAttributor(
                    AttributionTask(loss, model, state), offload="none", cache_dir=folder
                )
                attributor.cache(train)
                parts[LOGRA_DAMPINGS[0]] = attributor.attribute(train, targets)
            for damping in LOGRA_DAMPINGS[1:]:
                attributor.compute_preconditioners(damping)
                attributor.compute_ifvp()
                parts[damping] = attributor.attribute(train, targets)
        for damping, part in parts.items():
            # an example's step is against its loss gradient
            label = f"damping {'default' if damping is None else damping}"
            found = -part.detach().double().numpy() / count
            total[label] = total.get(label, 0) + found
    return total


if __name__ == "__main__":
    work("dattri", {"TRAK": trak, "EK-FAC": ekfac, "LoGra": logra})
