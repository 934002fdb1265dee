"""A training that worker processes can import (ridge regression with noise), and banks."""

import contextlib
import dataclasses
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from trak.evaluation import Bank

N, M = 24, 5
_RNG = np.random.default_rng(0)
INPUTS, LABELS = _RNG.normal(size=(N, 4)), _RNG.normal(size=N)
TARGETS = _RNG.normal(size=(M, 4))


def damaged_array(kind):
    """The bytes of an .npy file that is damaged inside its header."""
    header = {
        "no end": "{'descr': '<f4', 'fortran_order': (False, 'shape': (3, 3), }",
        "too large": f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**63}, 3), }}",
        "no number": "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 3), }",
    }[kind]
    header = header.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def train(indices, seed):
    """Weights, with noise from torch's global generator."""
    sys.stdout.write(f"training with seed {seed}\n")  # must not confuse anybody
    x, y = INPUTS[indices], LABELS[indices]
    weights = np.linalg.solve(x.T @ x + np.eye(4), x.T @ y)
    return weights + 0.1 * torch.randn(4, dtype=torch.float64).numpy(), seed


def evaluate(model):
    """Outputs, and the number of threads and the seed as two further targets."""
    weights, seed = model
    return [*(TARGETS @ weights), torch.get_num_threads(), seed]


def fail_once(indices, seed):
    """Raises in the model of seed 4, unless it is the second time."""
    marker = Path(os.environ["BANK_MARKER"])
    if seed == 4 and not marker.exists():
        marker.touch()
        raise ValueError("the loss is infinite")
    return train(indices, seed)


def die_once(indices, seed):
    """Kills the worker in the model of seed 4, unless it is the second time."""
    marker = Path(os.environ["BANK_MARKER"])
    if seed == 4 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return train(indices, seed)


def read_input(indices, seed):
    """Starts a command that reads all of its input, as ssh does."""
    subprocess.run([sys.executable, "-c", "import sys; sys.stdin.read()"], check=True)
    assert not sys.stdin.readline()
    return train(indices, seed)


def close_output(indices, seed):
    """Leaves nothing to print to, as daemons do."""
    with contextlib.redirect_stdout(sys.stderr):
        made = train(indices, seed)
    sys.stdout = io.StringIO() if seed else None
    if seed:
        sys.stdout.close()
    return made


def train_slowly(indices, seed):
    """Takes a while."""
    time.sleep(0.3)
    return train(indices, seed)


def arrays(subsets=6, n=21, seeds=2, m=4):
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(subsets, seeds, m)).astype(np.float32)
    return {"masks": rng.random((subsets, n)) < 0.5, "outputs": outputs}


def full_bank(**changes):
    given = {
        **arrays(),
        "name": "toy",
        "seeds": np.arange(12).reshape(6, 2),
        "seed_rule": "any",
        "recipe": {"epochs": 3},
        "data": "a" * 64,
        "examples": np.arange(1, 22),
        "checkpoints": ("0" * 32, "1" * 32),
        "notes": {"accuracy": [0.5]},
        **changes,
    }
    return Bank(**given)


def states(count=2):
    torch.manual_seed(0)
    return [
        {
            "weight": torch.randn(3, 2),
            "half": torch.randn(2).bfloat16(),
            "single": torch.tensor(1.5, dtype=torch.float64),
            "steps": torch.tensor([j, 7]),
            "flags": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
        }
        for j in range(count)
    ]


def write_weights(folder, made):
    folder.mkdir(exist_ok=True)
    tensors = {f"{j}/{k}": v for j, state in enumerate(made) for k, v in state.items()}
    save_file(tensors, folder / "checkpoints.safetensors")


def assert_equal(one, other):
    for field in dataclasses.fields(Bank):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name
