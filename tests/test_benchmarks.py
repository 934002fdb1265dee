"""The benchmarks run, at the smallest size, and their page can be made."""

import json
import sys
import time

import pytest

pytest.importorskip("transformers", reason="the [hf] extra; make test has it")

from benchmarks import __main__ as every
from benchmarks import common, render, step
from benchmarks.peers import run as peers

TINY = {"name": "bert-tiny", "proj_dim": 64}


def test_featurizing_is_checked_and_timed():
    assert step.check(**TINY) < 1e-5
    found = step.measure(
        **TINY, batch_size=2, dtype="float32", rounds=2, clock=time.perf_counter
    )
    assert found["computer"] == "HookGradientComputer"
    assert {len(each) for each in found["seconds"].values()} == {2}
    row = step.row_of(found, bar=1e9)
    assert row.passed
    assert row.what == "featurize / step, bert-tiny x 2, float32, k = 64"


def test_results_become_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["-", "--small"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # python -
    rows = [
        common.Row("one | two", "at most 1", "0.5", True, "how", "steps"),
        common.Row("three", "at least 2", "1", False, ""),
        common.Row("four", "", "7", None, ""),
    ]
    common.write("new", rows, {"seconds": [1.0]}, tmp_path / "new.json")
    common.write("step", rows[:1], {}, tmp_path / "step.json")
    (tmp_path / "other.json").write_text(json.dumps({"config": {}}))
    assert "NO  three: 1 (bar: at least 2)" in capsys.readouterr().out
    page = render.page(tmp_path)
    assert page.index("## Featurizing against") < page.index("## new")
    assert "| one \\| two | at most 1 | 0.5 steps | met | how |" in page
    assert "| three | at least 2 | 1 | **not met** |  |" in page
    assert "`python -m benchmarks.new --small`" in page


def test_a_library_that_does_not_run_keeps_its_line(monkeypatch, tmp_path):
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    row, details = peers.compare("dattri", small=True, threads=1)
    assert row.measured == "did not run"
    assert row.passed is None
    assert "make bench-peers" in details["error"]


def test_every_benchmark_is_there():
    folder = common.ROOT / "benchmarks"
    assert all((folder / f"{name}.py").exists() for name in every.NAMES)
    assert all((folder / "peers" / f"worker_{name}.py").exists() for name in peers.PEERS)
    pinned = {path.stem for path in (folder / "peers" / "requirements").glob("*.txt")}
    assert pinned == set(peers.PEERS)
