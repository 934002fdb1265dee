"""Trains a bank's models in parallel, resumes, and writes the bank.

python -m benchmarks.banks.build digits mnist [--workers 2]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.banks.bank import FOLDER, Bank, save
from benchmarks.banks.recipes import NAMES, Recipe, margins, recipe, train
from benchmarks.common import environment

MASK_SEED = 2023
FULL_SEEDS = 10_000  # where the seeds of the models on everything begin


def masks_of(made: Recipe) -> NDArray[np.bool_]:
    """Draws the halves.

    Args:
        made: the recipe.

    Returns:
        `[subsets, n]`.
    """
    rng = np.random.default_rng(MASK_SEED)
    n = len(made.train[1])
    masks = np.zeros((made.subsets, n), dtype=bool)
    for row in masks:
        row[rng.permutation(n)[: n // 2]] = True
    return masks


def _work(job: tuple[str, int, int, str]) -> None:
    # one model: its targets' outputs go to a file of its own
    name, subset, seed, path = job
    torch.set_num_threads(1)
    made = recipe(name)
    indices = torch.as_tensor(np.flatnonzero(masks_of(made)[subset]))
    model = train(made, indices, seed=seed * made.subsets + subset)
    part = Path(path)
    partial = part.with_suffix(".part.npy")
    np.save(partial, margins(model, made.targets).numpy())
    partial.replace(part)


def build(name: str, workers: int) -> None:
    """Builds one bank; models that are there already are not trained again.

    Args:
        name: the bank.
        workers: processes.
    """
    made = recipe(name)
    folder = FOLDER / name
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    paths = {
        (subset, seed): work / f"{subset}-{seed}.npy"
        for subset in range(made.subsets)
        for seed in range(made.seeds)
    }
    jobs = [(name, *key, str(path)) for key, path in paths.items() if not path.exists()]
    with get_context("spawn").Pool(workers) as pool:
        for _ in tqdm(pool.imap_unordered(_work, jobs), total=len(jobs), desc=name):
            pass
    outputs = np.stack([
        np.stack([np.load(paths[subset, seed]) for seed in range(made.seeds)])
        for subset in range(made.subsets)
    ])
    torch.set_num_threads(1)
    everything = torch.arange(len(made.train[1]))
    models = [
        train(made, everything, FULL_SEEDS + j)
        for j in tqdm(range(made.checkpoints), desc=f"{name}, on everything")
    ]
    accuracy = [float((margins(m, made.targets) > 0).float().mean()) for m in models]
    digest = hashlib.sha256()
    for part in (*made.train, *made.targets):
        digest.update(part.numpy().tobytes())
    manifest = {
        "name": name,
        "n": len(made.train[1]),
        "targets": len(made.targets[1]),
        "subsets": made.subsets,
        "seeds": made.seeds,
        "subset_size": len(made.train[1]) // 2,
        "mask_seed": MASK_SEED,
        "data": digest.hexdigest(),
        "accuracy": accuracy,
        "recipe": made.describe(),
        "versions": environment()["versions"],
    }
    states = [dict(model.state_dict()) for model in models]
    save(Bank(masks_of(made), outputs.astype(np.float32), states, manifest), folder)
    shutil.rmtree(work)


def main() -> None:
    """Builds the banks that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=NAMES)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    for name in options.names:
        build(name, options.workers)


if __name__ == "__main__":
    main()
