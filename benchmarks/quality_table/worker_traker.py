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

# mean squared row norms
RIDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)

BATCH = 500  # its random matrix is drawn anew for every batch


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
        with problem.once():
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
            # finalizing again fails in its projector, which has nothing left to free
            traker.projector.free_memory = lambda: None
            found[f"ridge {RIDGES[0]}"] = first(problem, traker, count)
        unit = mean_square(traker, count)
        for ridge in RIDGES[1:]:
            traker.score_computer.lambda_reg = ridge * unit
            for j in range(count):
                traker.saver.model_ids[j]["is_finalized"] = 0
            traker.finalize_features()
            found[f"ridge {ridge}"] = np.array(traker.finalize_scores("t"), np.float64)
    return found


def first(problem: Problem, traker: TRAKer, count: int) -> Any:
    """All steps with the ridge that it has."""
    for j in range(count):
        traker.load_checkpoint(problem.states[j], model_id=j)
        for batch in problem.batches(problem.train, BATCH):
            traker.featurize(batch=batch, num_samples=len(batch[0]))
    traker.finalize_features()
    for j in range(count):
        m = len(problem.targets[-1])
        traker.start_scoring_checkpoint("t", problem.states[j], j, m)
        for batch in problem.batches(problem.targets, BATCH):
            traker.score(batch=batch, num_samples=len(batch[0]))
    return np.array(traker.finalize_scores("t"), np.float64)


def mean_square(traker: TRAKer, count: int) -> float:
    """The mean squared norm of its stored rows, the unit of ridges."""
    units = []
    for j in range(count):
        traker.saver.load_current_store(j)
        rows = np.asarray(traker.saver.current_store["grads"], dtype=np.float64)
        units.append(float((rows**2).sum(1).mean()))
    return float(np.mean(units))


if __name__ == "__main__":
    work(
        "traker",
        {
            "default": scores,
            "k = 512": lambda problem, count: scores(problem, count, proj_dim=512),
        },
    )
