"""One small file for each model of a bank that was trained: what a build goes on from."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trak.errors import (
    UNREADABLE,
    BankCorruptedError,
    BankMismatchError,
    InputError,
    not_of_the_file,
)
from trak.evaluation.arrays import Booleans, as_floats, as_single
from trak.evaluation.described import as_json
from trak.evaluation.files import replace_file
from trak.evaluation.plan import BankPlan, Job

WORK = "work"
"""The folder, in that of a bank, of what is not finished."""

Train = Callable[[NDArray[np.int64], int], Any]
Evaluate = Callable[[Any], Any]


class WorkFolder:
    """The files of a build that goes on.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, plan: BankPlan, about: Mapping[str, Any]) -> None:
        """Makes the folder and says in it whose it is.

        Args:
            plan: the bank's.
            about: what else the models are of, as JSON values.

        Raises:
            BankMismatchError: if models in it are of something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / "about.json"
        known = _read(path, about) if path.exists() else about
        if known != about:
            others = sorted(key for key in about if known[key] != about[key])
            raise BankMismatchError(
                f"{self.path} holds models of a build that was begun with other "
                f"{' and '.join(others)}. Go on with those, build in another folder, or "
                "delete this one."
            )
        for name, value in (("plan", asdict(plan)), ("about", about)):
            text = as_json(name, value) + "\n"
            replace_file(
                self.path / f"{name}.json",
                lambda file, text=text: file.write(text.encode()),
            )

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

        Raises:
            InputError: if there are more or fewer outputs than those of other models.
        """
        devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(job.seed)
            model = train(np.flatnonzero(mask), job.seed)
            outputs = evaluate(model)
        found = as_floats("What evaluate returned", outputs, axes=("target",))
        array = as_single("What evaluate returned", found)
        other = next((f for f in self.path.glob("*-*.npy") if f != self._file(job)), None)
        if other is not None and len(_load(other)) != len(array):
            raise InputError(
                f"evaluate returned {len(array)} outputs, and {len(_load(other))} for "
                f"another model ({other}): it must return one for each target."
            )
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
        return _load(self._file(job))

    def _file(self, job: Job) -> Path:
        return self.path / f"{job.subset}-{job.repetition}.npy"


def _load(path: Path) -> NDArray[np.float32]:
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (*UNREADABLE, MemoryError) as error:
        if not_of_the_file(error, path):
            raise
        raise BankCorruptedError(_damaged(path, type(error).__name__)) from error
    if found.ndim != 1 or found.dtype != np.float32 or not np.isfinite(found).all():
        raise BankCorruptedError(_damaged(path, "not finite numbers of one axis"))
    return found


def _damaged(path: Path, why: str) -> str:
    return (
        f"{path} is damaged ({why}). Delete it and build again: only this model is "
        "trained anew."
    )


def _read(path: Path, like: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise BankCorruptedError(_unknown(path, str(error))) from error
    if not isinstance(found, dict) or set(found) != set(like):
        raise BankCorruptedError(_unknown(path, f"it must hold {' and '.join(like)}"))
    return found


def _unknown(path: Path, why: str) -> str:
    return (
        f"{path} is damaged ({why}), so nobody can tell what the models beside it are of. "
        "Delete its folder and build again."
    )
