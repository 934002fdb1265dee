"""This library: `TRAKer.featurize` with its defaults."""

from __future__ import annotations

import logging
import tempfile
from typing import Any

from benchmarks.models import LanguageModelOutput
from benchmarks.peers import problem as work
from trak import TRAKer

PARTS = ("input_ids", "token_type_ids", "attention_mask", "labels")


def main() -> None:
    """Times; the driver has the checks."""
    problem, _ = work.read()
    model = problem.model()
    task: Any = "text_classification" if problem.kind == "bert" else LanguageModelOutput()
    batches = problem.batches()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task=task,
            train_set_size=problem.batch_size * len(batches),
            save_dir=folder,
            device="cpu",
            proj_dim=problem.proj_dim,
            logging_level=logging.WARNING,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in batches:
            start = problem.clock()
            parts = batch if problem.kind == "bert" else (batch["input_ids"],)
            traker.featurize(batch=parts, num_samples=problem.batch_size)
            seconds.append(problem.clock() - start)
        settings = traker.projector.settings()
    ran = f"TRAKer.featurize, k = {problem.proj_dim}"
    work.report("trak-attribution", seconds[problem.warmup :], ran=ran, projection=settings)


if __name__ == "__main__":
    main()
