"""The demo, small: what it prints, what it writes, and that it resumes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[1] / "examples" / "qnli.py"
SMALL = ["--train-size=48", "--val-size=2", "--checkpoints=1", "--proj-dim=64"]


def run(*arguments, expect=0):
    done = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "error::UserWarning"},
    )
    assert done.returncode == expect, done.stderr
    return done


def test_the_demo_explains_its_targets_and_resumes(tmp_path):
    folder = tmp_path / "run"
    first = run("--save-dir", folder)
    assert "Featurizing" in first.stderr  # a progress bar
    assert first.stdout.count("Most helpful training pairs") == 2
    assert first.stdout.count("Most harmful training pairs") == 2
    for phase in ("load", "fine-tune", "featurize", "finalize", "score", "total"):
        assert f"\n{phase}" in first.stdout
    scores = np.load(folder / "qnli_scores.npy")
    assert scores.shape == (48, 2)
    assert np.array_equal(scores, np.load(folder / "scores" / "qnli.mmap"))
    report = json.loads((folder / "qnli_report.json").read_text())
    for column, target in enumerate(report["targets"]):
        best = np.argsort(-scores[:, column], kind="stable")[:5]
        assert [pair["index"] for pair in target["helpful"]] == best.tolist()
        assert target["question"] not in {pair["question"] for pair in target["helpful"]}

    second = run("--save-dir", folder)
    assert "Weights from" in second.stdout
    assert np.array_equal(scores, np.load(folder / "qnli_scores.npy"))
    refused = run("--save-dir", folder, "--seed=1", expect=1)
    assert "seed 0 (now 1)" in refused.stderr
    assert "--save-dir" in refused.stderr


def test_mistakes_are_one_line_of_help(tmp_path):
    missing = run("--ckpt", tmp_path / "none.pt", expect=2)
    assert "no such file" in missing.stderr
    hub = run("--model=no-such/model", "--save-dir", tmp_path / "x", expect=1)
    assert "Cannot load model no-such/model" in hub.stderr
    assert len(hub.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()
