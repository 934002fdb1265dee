"""kronfluence: influence functions with EK-FAC, over a sweep of dampings."""

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

# 1e-8 is the default; None takes a tenth of the mean eigenvalue
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 0.1, 1.0, None)


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


def ekfac(problem: Problem, count: int) -> Scores:
    """Mean over checkpoints of EK-FAC influence, at every damping."""
    task = Bank(problem)
    total: Scores = {}
    for j in range(count):
        model = prepare_model(problem.model(j), task)
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "bank", model, task, cpu=True, disable_tqdm=True, output_dir=folder
            )
            train = TensorDataset(*problem.train)
            factors = FactorArguments(strategy="ekfac")
            analyzer.fit_all_factors(
                "f", train, per_device_batch_size=50, factor_args=factors
            )
            for damping in DAMPINGS:
                label = f"damping {damping}"
                analyzer.compute_pairwise_scores(
                    scores_name=label.replace(" ", "-"),
                    factors_name="f",
                    query_dataset=TensorDataset(*problem.targets),
                    train_dataset=train,
                    per_device_query_batch_size=50,
                    per_device_train_batch_size=50,
                    score_args=ScoreArguments(damping_factor=damping),
                )
                found = analyzer.load_pairwise_scores(label.replace(" ", "-"))
                # an example's step is against its loss gradient
                part = -found["all_modules"].T.double().numpy() / count
                total[label] = total.get(label, 0) + part
    return total


if __name__ == "__main__":
    work("kronfluence", {"EK-FAC": ekfac})
