"""What each dtype of stored rows costs in accuracy and in bytes.

Scores of every dtype are held against float64 scores of the unrounded rows, which are
computed here from float64 rows with an explicit inverse. Rows are the projected gradients
of classifiers of the digits of scikit-learn.

    python -m benchmarks.row_dtypes [--small]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.common import Row, write
from trak import TRAKer
from trak.encodings import ENCODINGS

FULL = {"n": 1500, "m": 200, "hidden": 64, "epochs": 40, "k": 512, "checkpoints": 3}
SMALL = {"n": 300, "m": 20, "hidden": 16, "epochs": 5, "k": 64, "checkpoints": 1}


def trained(config, seed):
    """A classifier in float64, and its training and target examples."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    inputs = torch.from_numpy(x[order]).double() / 16
    labels = torch.from_numpy(y[order]).long()
    torch.manual_seed(seed)
    layers = nn.Linear(64, config["hidden"]), nn.ReLU(), nn.Linear(config["hidden"], 10)
    model = nn.Sequential(*layers).double()
    train = inputs[: config["n"]], labels[: config["n"]]
    targets = tuple(p[config["n"] : config["n"] + config["m"]] for p in (inputs, labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(config["epochs"]):
        for batch in torch.randperm(config["n"]).split(64):
            loss = nn.functional.cross_entropy(model(train[0][batch]), train[1][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model, train, targets


def run(row_dtype, folder, config, states, parts):
    """Scores `[n, m]`, rows, target rows and Q of every checkpoint."""
    model, train, targets = parts
    traker = TRAKer(
        model,
        "image_classification",
        config["n"],
        save_dir=folder,
        device="cpu",
        proj_dim=config["k"],
        row_dtype=row_dtype,
        logging_level=30,
    )
    for model_id, state in enumerate(states):
        traker.load_checkpoint(state, model_id)
        traker.featurize(train, num_samples=config["n"])
    traker.finalize_features()
    for model_id, state in enumerate(states):
        traker.start_scoring_checkpoint("exp", state, model_id, config["m"])
        traker.score(targets, num_samples=config["m"])
    scores = np.array(traker.finalize_scores("exp"), dtype=np.float64)
    saver = traker.saver
    files = folder / "0" / "grads.mmap", folder / "0" / "scales.mmap"
    size = sum(path.stat().st_size for path in files if path.exists())
    stored = [
        (
            np.array(saver.train_rows(i).array("grads")),
            np.array(saver.target_rows("exp", i).array("grads")),
            np.array(saver.train_rows(i).array("out_to_loss")),
        )
        for i in range(len(states))
    ]
    return scores, stored, size


def exact(parts):
    """Scores in float64 by an explicit inverse."""
    scores, weights = [], []
    for phi, targets, q in parts:
        gram = phi.T @ phi
        ridge = np.mean(np.sum(phi**2, axis=1))
        inverse = np.linalg.inv(gram + ridge * np.eye(len(gram)))
        scores.append(phi @ inverse @ targets.T)
        weights.append(q)
    return np.mean(scores, axis=0) * np.mean(weights, axis=0)


def ranks(values):
    return values.argsort(axis=0).argsort(axis=0).astype(np.float64)


def compare(found, expected, top=10):
    error = np.abs(found - expected)
    a, b = ranks(found), ranks(expected)
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    spearman = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    chosen, right = (np.argsort(-s, axis=0)[:top].T for s in (found, expected))
    shared = [len(set(c) & set(r)) / top for c, r in zip(chosen, right, strict=True)]
    return {
        "largest_error_over_largest_score": float(error.max() / np.abs(expected).max()),
        "rms_error_over_rms_score": float(
            np.sqrt(np.mean(error**2)) / np.sqrt(np.mean(expected**2))
        ),
        "spearman_of_the_worst_target": float(spearman.min()),
        "spearman_median": float(statistics.median(spearman)),
        f"shared_of_the_top_{top}": float(np.mean(shared)),
    }


def rows_of(result):
    """Lines of the benchmark page."""
    for name, found in result["row_dtypes"].items():
        yield Row(
            f"scores from {name} rows, against exact ones",
            "",
            f"{found['rms_error_over_rms_score']:.2g}",
            None,
            f"root mean square error over that of the scores; {found['bytes_a_row']:.0f} "
            f"bytes a row; median Spearman {found['spearman_median']:.4f}",
        )


def main(config=None):
    config = config or FULL
    runs = [trained(config, seed) for seed in range(config["checkpoints"])]
    states = [{k: v.clone() for k, v in each[0].state_dict().items()} for each in runs]
    result = {"config": config, "row_dtypes": {}}
    with tempfile.TemporaryDirectory() as folder:
        stored = {
            name: run(name, Path(folder) / name, config, states, runs[0])
            for name in ENCODINGS
        }
    expected = exact(stored["float64"][1])
    true_rows = stored["float64"][1][0][0]
    for name, (scores, parts, size) in stored.items():
        lost = np.linalg.norm(parts[0][0] - true_rows, axis=1)
        result["row_dtypes"][name] = {
            "bytes_a_row": size / config["n"],
            "rows_lost_rms": float(
                np.sqrt(np.mean(lost**2 / np.sum(true_rows**2, axis=1)))
            ),
            **compare(scores, expected),
        }
    errors = [
        each["largest_error_over_largest_score"] for each in result["row_dtypes"].values()
    ]
    assert errors == sorted(errors), errors  # more bits, smaller errors
    assert errors[0] < 1e-9, errors
    return result


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    measured = main(SMALL if given.small else FULL)
    write("row_dtypes", list(rows_of(measured)), measured, given.out)
