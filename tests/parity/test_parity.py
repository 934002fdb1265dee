"""Scores equal those of `traker` 0.3.2, which runs in an environment of its own."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.parity import run_cases

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """Folder with what the reference implementation computes for every case."""
    default = ROOT / ".venv-traker" / "bin" / "python"
    python = Path(os.environ.get("TRAKER_PYTHON", default))
    if not python.exists():
        pytest.fail(f"{python} is missing; `make test` makes it (or set TRAKER_PYTHON).")
    folder = tmp_path_factory.mktemp("upstream")
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = Path(run_cases.__file__)
    done = subprocess.run(
        [python, script, folder],
        env=clean,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "version").read_text() == "0.3.2"
    return folder


def distance(found, expected):
    """Largest difference, relative to the largest entry."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", run_cases.CASES)
def test_parity_with_the_reference_implementation(case, upstream, tmp_path):
    expected = np.load(upstream / f"{case}.npz")
    found = run_cases.run(case, tmp_path)
    assert found["scores"].shape == expected["scores"].shape == (run_cases.N, run_cases.M)
    assert expected["scores"].std() > 0
    for name in ("scores", "features"):
        assert distance(found[name], expected[name]) < TOLERANCE, name
    for one, other in zip(found["scores"].T, expected["scores"].T, strict=True):
        assert distance(one, other) < TOLERANCE
    for name in ("grads", "out_to_loss"):
        assert distance(found[name], expected[name]) < 1e-5, name
