"""traker 0.3.2: its defaults, k = 512, and each with the best ridge of a sweep."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import numpy as np
from torch.func import functional_call

from benchmarks.quality_table.exchange import Problem, Scores, work
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput

RIDGES = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # mean squared row norms


class Output(AbstractModelOutput):
    """The bank's output, for models of any number of inputs."""

    problem: Any = None

    def __init__(self) -> None:
        """Upstream's class is abstract here."""

    @staticmethod
    def get_output(model: Any, weights: Any, buffers: Any, *parts: Any) -> Any:
        """One example's output."""
        *inputs, label = parts
        tensors = tuple(part.unsqueeze(0) for part in inputs)
        predictions = functional_call(model, (weights, buffers), tensors)
        return Output.problem.outputs(predictions, label.unsqueeze(0)).sum()

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Any:
        """One minus the probability of the right class, or label minus prediction."""
        *inputs, labels = batch
        predictions = functional_call(model, (weights, buffers), tuple(inputs))
        slopes = Output.problem.slopes_of(predictions, labels)
        return slopes.reshape(-1, 1).clone().detach()


def scores(problem: Problem, count: int, **options: Any) -> Scores:
    """Scores with no ridge and at every other one."""
    Output.problem = problem
    found: Scores = {}
    named = dict(problem.model().named_parameters())
    trained = [name for name, value in named.items() if value.requires_grad]
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=problem.model(),
            task=Output(),
            train_set_size=len(problem.train[-1]),
            grad_wrt=trained if len(trained) < len(named) else None,
            save_dir=folder,
            device="cpu",
            logging_level=logging.ERROR,
            **options,
        )
        # finalizing a second time fails in its projector, which has nothing left to free
        traker.projector.free_memory = lambda: None
        for j in range(count):
            traker.load_checkpoint(problem.states[j], model_id=j)
            for batch in problem.batches(problem.train):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        units = []
        for j in range(count):
            traker.saver.load_current_store(j)
            rows = np.asarray(traker.saver.current_store["grads"], dtype=np.float64)
            units.append(float((rows**2).sum(1).mean()))
        for ridge in RIDGES:
            traker.score_computer.lambda_reg = ridge * float(np.mean(units))
            for j in range(count):
                traker.saver.model_ids[j]["is_finalized"] = 0
            traker.finalize_features()
            if ridge == RIDGES[0]:
                for j in range(count):
                    traker.start_scoring_checkpoint(
                        "t", problem.states[j], j, len(problem.targets[-1])
                    )
                    for batch in problem.batches(problem.targets):
                        traker.score(batch=batch, num_samples=len(batch[0]))
            found[f"ridge {ridge}"] = np.array(traker.finalize_scores("t"), np.float64)
    return found


if __name__ == "__main__":
    work(
        "traker",
        {
            "default": scores,
            "k = 512": lambda problem, count: scores(problem, count, proj_dim=512),
        },
    )
