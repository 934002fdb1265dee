"""A process that trains models of a bank: lines of JSON in, lines of JSON out."""

import json
import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from trak.evaluation.functions import find
from trak.evaluation.plan import BankPlan, Job
from trak.evaluation.work import WorkFolder

IN_WORKER = "TRAK_BANK_WORKER"
"""Set in the environment of workers, so that none starts workers of its own."""


def main() -> None:
    """Answers the first line, the set-up, and then each job, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what training prints must not be taken for an answer
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    with Path(os.devnull).open(encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), 0)  # training, and what it starts, must not take a job
    setup = json.loads(questions.readline())
    try:
        sys.path[:], sys.argv[:] = setup["path"], setup["argv"]
        torch.set_num_threads(setup["threads"])
        plan = BankPlan(**setup["plan"])
        folder, masks = WorkFolder(Path(setup["folder"])), plan.masks()
        train, evaluate = find(setup["train"]), find(setup["evaluate"])
    except Exception:  # whatever it is, the parent reports it
        _answer(answers, traceback.format_exc())
        return
    _answer(answers, None)
    for line in questions:
        job = Job(*json.loads(line))
        try:
            folder.train(job, masks[job.subset], train, evaluate)
        except Exception:  # whatever it is
            _answer(answers, traceback.format_exc())
        else:
            _answer(answers, None)


def _answer(answers: TextIO, error: str | None) -> None:
    value: dict[str, Any] = {"error": error}
    with suppress(AttributeError, OSError, ValueError):  # training may have closed it
        sys.stdout.flush()  # the parent ends the process as soon as it has its answer
    answers.write(json.dumps(value) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
