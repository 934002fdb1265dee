"""kronfluence: `compute_pairwise_scores` with the identity for a Hessian, one query.

It keeps no gradients, so the least that it does with a batch of training examples is to
take their inner products with the gradient of one query. It covers linear layers.
"""

from __future__ import annotations

import tempfile
from typing import Any

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from benchmarks.peers import problem as work


class Margins(Task):
    """Gradients of the margins, for queries and training examples."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def compute_train_loss(
        self, batch: dict[str, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        """The sum over the batch."""
        del sample
        return work.margins(self.kind, model(**batch).logits, batch).sum()

    def compute_measurement(self, batch: dict[str, Tensor], model: nn.Module) -> Tensor:
        """The same."""
        return self.compute_train_loss(batch, model)

    def get_attention_mask(self, batch: dict[str, Tensor]) -> Tensor:
        """Marks padding."""
        return batch["attention_mask"]


def main() -> None:
    """Checks or times."""
    problem, mode = work.read()
    task = Margins(problem.kind)
    original = problem.model()
    layers = [n for n, m in original.named_modules() if isinstance(m, nn.Linear)]
    names = [name for name, _ in original.named_parameters()]
    model = prepare_model(original, task)
    watch = work.Stopwatch(model, problem)
    data = problem.data()
    most = 1 if mode == "time" else None
    queries = work.Examples({name: values[:most] for name, values in data.items()})
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peer", model, task, cpu=True, disable_tqdm=True, output_dir=folder
        )
        factors: Any = FactorArguments(strategy="identity")
        analyzer.fit_all_factors("none", work.Examples(data), factor_args=factors)
        analyzer.compute_pairwise_scores(
            scores_name="scores",
            factors_name="none",
            query_dataset=queries,
            train_dataset=work.Examples(data),
            per_device_query_batch_size=len(queries),
            per_device_train_batch_size=problem.batch_size,
            score_args=ScoreArguments(),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
    seconds = None
    if mode == "time":
        count = len(data["input_ids"]) // problem.batch_size
        seconds = watch.seconds(count, problem.warmup)
    else:
        work.save_gram(problem, scores)
    own = [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    work.report(
        "kronfluence",
        seconds,
        covered=[name for name in own if name in names],
        ran="compute_pairwise_scores, strategy identity, one query, nothing stored",
    )


if __name__ == "__main__":
    main()
