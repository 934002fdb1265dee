"""Builds a bank: trains its models, in parallel, and goes on where it was interrupted."""

import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trak.arguments import as_integer
from trak.errors import (
    BankBuildError,
    BankMismatchError,
    InputError,
    InputTypeError,
)
from trak.evaluation.bank_files import MANIFEST, load_bank, prepared, save_bank
from trak.evaluation.banks import Bank
from trak.evaluation.functions import check_functions, name_of
from trak.evaluation.hashes import data_hash, hashes_of
from trak.evaluation.lock import only_build
from trak.evaluation.plan import MASK_RULE, SEED_RULE, BankPlan, Job
from trak.evaluation.processes import Outcome, run_jobs
from trak.evaluation.work import WORK, Evaluate, Train, WorkFolder
from trak.evaluation.worker import IN_WORKER
from trak.settings import LIBRARY_VERSION

_log = logging.getLogger(__name__)
_SECONDS = 30.0  # between two lines of the log


def build_bank(
    folder: str | Path,
    train: Train,
    evaluate: Evaluate,
    plan: BankPlan,
    *,
    name: str = "",
    examples: Any = None,
    checkpoints: Iterable[Mapping[str, Any] | str] = (),
    workers: int = 1,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Bank:
    """Trains models on random subsets and writes the bank of their outputs.

    Each model's outputs go to a small file as soon as it is trained, and a build that was
    interrupted or failed goes on from these. A finished bank is read instead. One build
    runs in a folder at a time; a second is a `BankBuildError`. With a `train` that depends
    on its arguments only, one worker and many build the same bank; torch's global generator
    has the model's seed too while it is trained.

    Args:
        folder: the bank's. `work/` in it holds what is not finished.
        train: `train(indices, seed)` gives a model trained on these training examples,
            ascending. For several workers, a function that can be imported.
        evaluate: `evaluate(model)` gives the targets' model outputs, `[m]`.
        plan: which models to train.
        name: what to call the bank. One that is finished must have this name, unless none
            is given.
        examples: `example_hashes` of the training examples, `[n]`.
        checkpoints: state dicts, or hashes, of the models whose scores are to be judged.
        workers: processes; 1 trains in this one.
        threads: of torch in each of them.
        progress: called with the number of models done and of all; if None, a line goes to
            the log every 30 seconds.

    Returns:
        The bank, as it was written.
    """
    check_functions(train, evaluate, progress)
    count = as_integer("workers", workers, least=1)
    threads = as_integer("threads", threads, least=1)
    bank = _empty(plan, name, examples, checkpoints)  # checked before hours of work
    folder = prepared(folder, bank).absolute()  # training may change the directory
    if (folder / MANIFEST).exists():
        _log.info("%s is finished: it is read, and nothing is trained.", folder)
    else:
        run = _here if count == 1 else _elsewhere
        outcomes = partial(run, train, evaluate, count, threads)
        _build(folder, plan, bank, outcomes, progress)
    return _finished(folder, plan, bank)


def _build(
    folder: Path,
    plan: BankPlan,
    bank: Bank,
    outcomes: Callable[[list[Job], BankPlan, WorkFolder], Generator[Outcome]],
    progress: Callable[[int, int], None] | None,
) -> None:
    if IN_WORKER in os.environ:
        raise InputError(
            "A worker of build_bank calls build_bank while it imports your script. Put the "
            'call under `if __name__ == "__main__":`.'
        )
    work = WorkFolder(folder / WORK / plan.key)
    with only_build(folder / WORK):
        if (folder / MANIFEST).exists():  # another process was faster
            return
        work.create(plan, _about(bank))
        jobs = [job for job in plan.jobs() if not work.has(job)]
        total = len(plan.jobs())
        _watch(outcomes(jobs, plan, work), total, len(jobs), work.path, progress)
        save_bank(replace(bank, outputs=work.collect(plan)), folder)


def _empty(
    plan: Any,
    name: str,
    examples: Any,
    checkpoints: Iterable[Mapping[str, Any] | str],
) -> Bank:
    if not isinstance(plan, BankPlan):
        raise InputTypeError(f"plan must be a BankPlan, got {type(plan).__name__}.")
    seeds = np.zeros((plan.subsets, plan.seeds), dtype=np.int64)
    for job in plan.jobs():
        seeds[job.subset, job.repetition] = job.seed
    return Bank(
        masks=plan.masks(),
        outputs=np.zeros((plan.subsets, plan.seeds, 1), np.float32),
        name=name,
        seeds=seeds,
        seed_rule=SEED_RULE,
        recipe=plan.recipe,
        data=plan.data,
        examples=examples,
        checkpoints=hashes_of(checkpoints),
        notes={
            "mask_seed": plan.mask_seed,
            "mask_rule": MASK_RULE,
            "build": plan.key,
            "versions": {
                "torch": torch.__version__,
                "numpy": np.__version__,
                "trak-attribution": LIBRARY_VERSION,
            },
        },
    )


def _finished(folder: Path, plan: BankPlan, asked: Bank) -> Bank:
    bank = load_bank(folder)
    if bank.notes.get("build") != plan.key:
        raise BankMismatchError(
            f"{folder} holds a finished bank of another plan: recipe, data, sizes or seeds "
            "differ. Build in another folder, or read it with load_bank."
        )
    known = np.zeros(0) if bank.examples is None else bank.examples
    differs = {
        "checkpoints": asked.checkpoints and asked.checkpoints != bank.checkpoints,
        "examples": asked.examples is not None
        and not np.array_equal(asked.examples, known),
        "name": asked.name and asked.name != bank.name,
    }
    if any(differs.values()):
        others = " and ".join(name for name in differs if differs[name])
        raise BankMismatchError(
            f"{folder} holds a finished bank, {bank.name!r}, that records other {others} "
            "than were given. If they belong to it all the same, load the bank, and save "
            "what dataclasses.replace makes of it."
        )
    _tidy(folder, plan)
    return bank


def _tidy(folder: Path, plan: BankPlan) -> None:
    # also what a crash left; where nothing may be removed, the bank is good all the same
    if (folder / WORK).exists():
        with suppress(BankBuildError, InputError, OSError), only_build(folder / WORK):
            shutil.rmtree(folder / WORK / plan.key, ignore_errors=True)


def _elsewhere(
    train: Train,
    evaluate: Evaluate,
    workers: int,
    threads: int,
    jobs: list[Job],
    plan: BankPlan,
    work: WorkFolder,
) -> Generator[Outcome]:
    setup = {
        "train": name_of("train", train),
        "evaluate": name_of("evaluate", evaluate),
        "threads": threads,
        "folder": str(work.path.resolve()),
        "plan": asdict(plan),
    }
    return run_jobs(jobs, workers, setup)


def _here(
    train: Train,
    evaluate: Evaluate,
    _workers: int,
    threads: int,
    jobs: list[Job],
    plan: BankPlan,
    work: WorkFolder,
) -> Generator[Outcome]:
    masks = plan.masks()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for job in jobs:
            try:
                work.train(job, masks[job.subset], train, evaluate)
            except Exception:  # reported like that of a worker
                yield job, traceback.format_exc()
                return
            yield job, None
    finally:
        torch.set_num_threads(before)


def _watch(
    outcomes: Generator[Outcome],
    total: int,
    todo: int,
    path: Path,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = total - todo
    report = progress or _Log()
    failed: list[Outcome] = []
    with closing(outcomes):  # whatever `progress` raises, no further model is trained
        report(done, total)
        for job, problem in outcomes:
            if problem is None:
                done += 1
                report(done, total)
            else:
                failed.append((job, problem))
    if failed:
        job, problem = failed[0]
        others = f" ({len(failed) - 1} others failed too)" if len(failed) > 1 else ""
        raise BankBuildError(
            f"Training on subset {job.subset}, repetition {job.repetition}, seed "
            f"{job.seed} failed{others}. {done} of {total} models are kept in {path}; the "
            f"same call goes on from there.\n\n{problem}"
        )


def _about(bank: Bank) -> dict[str, Any]:
    examples = None if bank.examples is None else data_hash(bank.examples)
    return {"examples": examples, "checkpoints": list(bank.checkpoints)}


class _Log:
    def __init__(self) -> None:
        self._last = -_SECONDS

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS or done == total:
            self._last = now
            _log.info("%d of %d models are trained.", done, total)
