"""One small file for each model of a bank that was trained: what a build goes on from."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trak.errors import BankCorruptedError
from trak.evaluation.arrays import Booleans, as_floats
from trak.evaluation.bank_files import replace_file
from trak.evaluation.plan import BankPlan, Job

Train = Callable[[NDArray[np.int64], int], Any]
Evaluate = Callable[[Any], Any]


class WorkFolder:
    """The files of a build that goes on.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, plan: BankPlan) -> None:
        """Makes the folder and says in it whose it is.

        Args:
            plan: the bank's.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(plan), indent=1) + "\n"
        replace_file(self.path / "plan.json", lambda file: file.write(text.encode()))

    def has(self, job: Job) -> bool:
        """Whether a model was trained.

        Args:
            job: the model.

        Returns:
            Whether its file exists.
        """
        return self._file(job).exists()

    def train(self, job: Job, mask: Booleans, train: Train, evaluate: Evaluate) -> None:
        """Trains a model and keeps its outputs.

        Torch's random state is the seed's while it runs, and as before afterwards.

        Args:
            job: the model.
            mask: the subset, `[n]`.
            train: the user's.
            evaluate: the user's.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            model = train(np.flatnonzero(mask), job.seed)
            outputs = evaluate(model)
        found = as_floats("What evaluate returned", outputs, axes=("target",))
        array = found.astype(np.float32)
        replace_file(self._file(job), lambda file: np.save(file, array, allow_pickle=False))

    def collect(self, plan: BankPlan) -> NDArray[np.float32]:
        """Puts the outputs of all models together.

        Args:
            plan: the bank's.

        Returns:
            `[subsets, seeds, m]`.

        Raises:
            BankCorruptedError: if a file is damaged, or of another number of targets.
        """
        jobs = plan.jobs()
        outputs = [self._read(job) for job in jobs]
        for job, found in zip(jobs, outputs, strict=True):
            if found.shape != outputs[0].shape:
                raise BankCorruptedError(
                    f"{self._file(job)} holds {len(found)} outputs, that of the first "
                    f"model {len(outputs[0])}: evaluate must return as many for each. "
                    "Delete the folder and build again."
                )
        return np.stack(outputs).reshape(plan.seeds, plan.subsets, -1).swapaxes(0, 1)

    def _read(self, job: Job) -> NDArray[np.float32]:
        path = self._file(job)
        try:
            found = np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise BankCorruptedError(
                f"{path} is damaged ({error}). Delete it and build again: only this model "
                "is trained anew."
            ) from error
        return found

    def _file(self, job: Job) -> Path:
        return self.path / f"{job.subset}-{job.repetition}.npy"
