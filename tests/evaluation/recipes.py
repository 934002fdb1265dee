"""A training that worker processes can import: ridge regression with noise of the seed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

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


def train_slowly(indices, seed):
    """Takes a while."""
    time.sleep(0.3)
    return train(indices, seed)
