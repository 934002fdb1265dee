"""kronfluence: influence functions with EK-FAC, over a sweep of dampings or at one."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.quality_table.exchange import Problem, Scores, work

BATCH = 100
# 1e-8 is the default; None takes a tenth of a layer's mean eigenvalue
DAMPINGS = (
    1e-8,
    1e-12,
    1e-10,
    1e-6,
    1e-5,
    3e-5,
    1e-4,
    3e-4,
    1e-3,
    3e-3,
    1e-2,
    3e-2,
    0.1,
    None,
)


class Bank(Task):
    """The bank's loss and output."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def compute_train_loss(
        self, batch: Any, model: nn.Module, sample: bool = False
    ) -> Tensor:
        """The sum of losses, of labels drawn from the model if asked for."""
        *inputs, labels = batch
        predictions = model(*inputs)
        if sample:
            with torch.no_grad():
                if self.problem.regression:
                    labels = predictions[:, 0] + torch.randn_like(predictions[:, 0])
                else:
                    shares = predictions.softmax(-1).flatten(0, -2)
                    labels = torch.multinomial(shares, 1).view(predictions.shape[:-1])
        return self.problem.losses(predictions, labels).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """The sum of outputs."""
        *inputs, labels = batch
        return self.problem.outputs(model(*inputs), labels).sum()

    def get_attention_mask(self, batch: Any) -> Tensor | None:
        """Marks padding."""
        return batch[2] if len(batch) > 3 else None


def ekfac(
    problem: Problem, count: int, dampings: tuple[float | None, ...] = DAMPINGS
) -> Scores:
    """Mean over checkpoints of EK-FAC influence, at every damping."""
    total: Scores = {}
    for j in range(count):
        with tempfile.TemporaryDirectory() as folder:
            with problem.once():
                analyzer = fitted(problem, j, folder)
                parts = {dampings[0]: scores(problem, analyzer, dampings[0])}
            for damping in dampings[1:]:
                parts[damping] = scores(problem, analyzer, damping)
        for damping, part in parts.items():
            label = f"damping {damping}"
            total[label] = total.get(label, 0) + part / count
    return total


def fitted(problem: Problem, number: int, folder: str) -> Analyzer:
    """Covariances, their eigenvectors, and eigenvalues along these, of one checkpoint."""
    task = Bank(problem)
    analyzer = Analyzer(
        "bank",
        prepare_model(problem.model(number), task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=folder,
    )
    analyzer.fit_all_factors(
        "f",
        TensorDataset(*problem.train),
        per_device_batch_size=BATCH,
        factor_args=FactorArguments(strategy="ekfac"),
    )
    return analyzer


def scores(problem: Problem, analyzer: Analyzer, damping: float | None) -> Any:
    """Scores at one damping: minus the product with an example's loss gradient."""
    name = f"damping-{damping}"
    analyzer.compute_pairwise_scores(
        scores_name=name,
        factors_name="f",
        query_dataset=TensorDataset(*problem.targets),
        train_dataset=TensorDataset(*problem.train),
        # all at once: training gradients are computed anew for each batch of queries
        per_device_query_batch_size=len(problem.targets[-1]),
        per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=damping),
    )
    return -analyzer.load_pairwise_scores(name)["all_modules"].T.double().numpy()


def one(problem: Problem, count: int) -> Scores:
    """The default damping only: what a user runs."""
    return ekfac(problem, count, DAMPINGS[:1])


if __name__ == "__main__":
    work("kronfluence", {"EK-FAC": ekfac, "EK-FAC one damping": one})
