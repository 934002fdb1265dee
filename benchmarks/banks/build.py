"""Trains a bank's models in parallel, resumes, and writes the bank.

python -m benchmarks.banks.build digits mnist [--workers 2]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from benchmarks.banks.bank import FOLDER, Bank, save
from benchmarks.banks.differences import shrink
from benchmarks.banks.recipes import (
    Recipe,
    outputs,
    recipe,
    train,
    train_together,
)
from benchmarks.common import ROOT, environment

MASK_SEED = 2023
FULL_SEEDS = 10_000  # where the seeds of the models on everything begin
SEED_RULE = (
    "seed * subsets + subset for the models of the subsets, "
    f"{FULL_SEEDS} + checkpoint for those on everything"
)


def masks_of(made: Recipe) -> NDArray[np.bool_]:
    """Draws the halves.

    Args:
        made: the recipe.

    Returns:
        `[subsets, n]`.
    """
    return draw_halves(made.subsets, len(made.train[-1]))


def draw_halves(subsets: int, n: int, seed: int = MASK_SEED) -> NDArray[np.bool_]:
    """`masks_of`, of numbers.

    Args:
        subsets: how many halves.
        n: training examples.
        seed: of the lots.

    Returns:
        `[subsets, n]`.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((subsets, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[: n // 2]] = True
    return masks


def description(name: str, made: Recipe) -> dict[str, Any]:
    """What the numbers of a bank follow from.

    Args:
        name: the bank.
        made: its recipe.

    Returns:
        JSON values.
    """
    digest = hashlib.sha256()
    for part in (*made.train, *made.targets):
        digest.update(part.numpy().tobytes())
    return {
        "name": name,
        "n": len(made.train[-1]),
        "targets": len(made.targets[-1]),
        "subsets": made.subsets,
        "seeds": made.seeds,
        "subset_size": len(made.train[-1]) // 2,
        "mask_seed": MASK_SEED,
        "seed_rule": SEED_RULE,
        "data": digest.hexdigest(),
        "recipe": made.describe(),
    }


def work(made: Recipe, folder: Path, worker: int, workers: int) -> None:
    """Trains one worker's share of the models that are not there yet.

    Args:
        made: the recipe.
        folder: where each model's targets' outputs go, to a file of its own.
        worker: which worker this is.
        workers: how many there are.
    """
    masks = masks_of(made)
    jobs = [(j, seed) for seed in range(made.seeds) for j in range(made.subsets)]
    groups = [jobs[j : j + made.together] for j in range(0, len(jobs), made.together)]
    for group in groups[worker::workers]:
        todo = [job for job in group if not _path(folder, *job).exists()]
        subsets = [torch.as_tensor(np.flatnonzero(masks[j])) for j, _ in todo]
        seeds = [seed * made.subsets + j for j, seed in todo]
        for job, model in zip(todo, _train(made, subsets, seeds), strict=True):
            path = _path(folder, *job)
            partial = path.with_suffix(".part.npy")
            np.save(partial, outputs(made, model, made.targets).numpy(), allow_pickle=False)
            partial.replace(path)


def build(name: str, workers: int) -> None:
    """Builds one bank; models that are there already are not trained again.

    Args:
        name: the bank.
        workers: processes, of one thread each.
    """
    made = recipe(name)
    about = description(name, made)
    # a changed recipe works in another folder, so that no outputs of two are mixed
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]
    folder = FOLDER / name / "partial" / key
    folder.mkdir(parents=True, exist_ok=True)
    _run(name, folder, workers, total=made.subsets * made.seeds)
    began = min(path.stat().st_mtime for path in folder.glob("*.npy"))
    truth = np.stack([
        np.stack([
            np.load(_path(folder, j, seed), allow_pickle=False)
            for seed in range(made.seeds)
        ])
        for j in range(made.subsets)
    ])
    states = _on_everything(made, name)
    manifest = {
        **about,
        "checkpoints": made.checkpoints,
        "losses": [round(made.loss(state), 4) for state in states],
        "seconds": round(time.time() - began),
        "versions": environment()["versions"],
    }
    save(Bank(masks_of(made), truth, states, manifest), FOLDER / name)
    shutil.rmtree(FOLDER / name / "partial")


def _on_everything(made: Recipe, name: str) -> list[dict[str, torch.Tensor]]:
    # checkpoints as they are stored
    everything = torch.arange(len(made.train[-1]))
    torch.set_num_threads(1)
    models = [
        train(made, everything, FULL_SEEDS + j)
        for j in tqdm(range(made.checkpoints), desc=f"{name}, on everything")
    ]
    return [shrink(dict(model.state_dict()), made.pretrained) for model in models]


def _train(made: Recipe, subsets: list[torch.Tensor], seeds: list[int]) -> list[nn.Module]:
    if made.together > 1 and subsets:
        return train_together(made, subsets, seeds)
    return [train(made, *job) for job in zip(subsets, seeds, strict=True)]


def _path(folder: Path, subset: int, seed: int) -> Path:
    return folder / f"{subset}-{seed}.npy"


def _run(name: str, folder: Path, workers: int, total: int) -> None:
    # workers report by the files that they write
    command = [sys.executable, "-m", "benchmarks.banks.build", name]
    command += ["--folder", str(folder), "--workers", str(workers), "--worker"]
    running = [
        subprocess.Popen([*command, str(worker)], cwd=ROOT) for worker in range(workers)
    ]
    try:
        with tqdm(total=total, desc=name) as bar:
            while any(process.poll() is None for process in running):
                time.sleep(1)
                bar.n = sum(1 for path in folder.glob("*.npy") if path.stem[-5:] != ".part")
                bar.refresh()
    finally:
        for process in running:
            process.terminate()
    if any(process.wait() for process in running):
        raise SystemExit(f"A worker of {name} failed; run again to go on.")


def main() -> None:
    """Builds the banks that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", help="modules of benchmarks.banks.recipes")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        torch.set_num_threads(1)
        made = recipe(options.names[0])
        work(made, options.folder, options.worker, options.workers)
        return
    for name in options.names:
        build(name, options.workers)


if __name__ == "__main__":
    main()
