"""Gram matrix, scores and top-k over a store of float16 rows, against the bare product.

The bare product reads the same file block by block through a memory map, converts to
float32 with torch and multiplies; nothing else. Library and bare product alternate, and
medians of paired runs are reported.

    python -m benchmarks.streaming [--small]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import ROOT, Row, write
from trak.pipeline.scoring import ScorePass
from trak.pipeline.solving import ScoreSet
from trak.savers import MmapSaver
from trak.score_computers import RidgeScoreComputer

CPU = torch.device("cpu")
BLOCK = 8192
FULL = {"n": 1_000_000, "k": 512, "m": 1000, "top": 10, "rounds": 9, "files": 3}
SMALL = {"n": 40_000, "k": 64, "m": 50, "top": 10, "rounds": 3, "files": 1}


def open_store(folder, config):
    return MmapSaver(
        folder, {"precision": "float16"}, config["n"], config["k"], logging_level=30
    )


def make_store(folder, config):
    """A store as featurizing would leave it, with random rows."""
    saver = open_store(folder, config)
    saver.register_model_id(0, "0" * 32)
    saver.init_experiment("exp", config["m"], 0)
    random = torch.Generator().manual_seed(0)
    # columns of unequal size, so that the Gram matrix is no multiple of the identity
    size = 0.01 * torch.linspace(1, 0.1, config["k"])
    for rows, count in (
        (saver.train_rows(0), config["n"]),
        (saver.target_rows("exp", 0), config["m"]),
    ):
        for start in range(0, count, 50_000):
            stop = min(start + 50_000, count)
            made = torch.randn(stop - start, config["k"], generator=random) * size
            values = {
                "grads": made.half().numpy(),
                "examples": np.zeros((stop - start, 1), np.int64),
                "out_to_loss": torch.rand(stop - start, 1, generator=random).numpy(),
            }
            rows.commit(np.arange(start, stop), values)
    return saver


def bare_gram(rows):
    gram = torch.zeros(rows.shape[1], rows.shape[1])
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK].float()
        gram += block.T @ block
    return gram


def bare_scores(rows, weights):
    for start in range(0, len(rows), BLOCK):
        yield start, rows[start : start + BLOCK].float() @ weights


def bare_product(rows, weights):
    for _ in bare_scores(rows, weights):
        pass


def fresh_map(saver):
    """A map whose pages this process has not touched yet."""
    return torch.from_numpy(saver.train_rows(0).array("grads"))


def factor(saver):
    return RidgeScoreComputer().finalize(saver.train_rows(0).encoded())


def scores(saver):
    return ScorePass(
        scorer=RidgeScoreComputer(),
        saver=saver,
        sets=[ScoreSet("exp")],
        model_ids=[0],
        device=CPU,
    )


def write_file(saver):
    with closing(scores(saver).arrays()) as blocks:
        saver.save_score_sets([("exp", None)], blocks, {"model_ids": [0]})


def drop_file(saver):
    (saver.save_dir / "scores" / "exp.mmap").unlink(missing_ok=True)


def check(saver, config):
    """Everything that is timed is right, or nothing is timed."""
    rows = fresh_map(saver)
    gram = torch.zeros(config["k"], config["k"], dtype=torch.float64)
    for start in range(0, config["n"], BLOCK):
        block = rows[start : start + BLOCK].double()
        gram += block.T @ block
    matrix, info = factor(saver)
    lower = torch.from_numpy(matrix)
    exact = gram + info["ridge"] * torch.eye(config["k"])
    gram_error = float((lower @ lower.T - exact).abs().max() / exact.abs().max())
    targets = torch.from_numpy(saver.target_rows("exp", 0).array("grads")).double()
    weights = torch.linalg.solve(exact, targets.T)[:, :20]
    q = torch.from_numpy(saver.train_rows(0).array("out_to_loss")).double()
    full = torch.cat([
        rows[s : s + BLOCK].double() @ weights * q[s : s + BLOCK]
        for s in range(0, config["n"], BLOCK)
    ])
    saver.save_factor(0, matrix, info)
    found = scores(saver).top(config["top"], helpful=True)[0]
    best = full.topk(config["top"], dim=0)
    top_error = float(np.abs(found.scores[:20] - best.values.T.numpy()).max())
    same = float(np.mean(found.indices[:20] == best.indices.T.numpy()))
    result = {
        "gram_relative_error": gram_error,
        "top_relative_error": top_error / float(full.abs().max()),
        "top_rows_equal": same,
    }
    assert gram_error < 1e-6, result
    assert result["top_relative_error"] < 1e-5, result
    assert same > 0.99, result
    return result, torch.linalg.solve(exact, targets.T).float()


def seconds(call):
    """Wall-clock and processor seconds; the latter of all threads, spinning included."""
    start, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - used


def paired(bare, library, rounds, before=lambda: None, after=lambda: None):
    """Medians of alternating runs, and of the ratio within each pair."""
    times = {"bare": [], "library": []}
    for number in range(rounds + 1):
        order = [("bare", bare), ("library", library)]
        for name, call in order if number % 2 else order[::-1]:
            before()
            times[name].append(seconds(call))
            after()
    times = {name: values[1:] for name, values in times.items()}  # the first warms up
    result = {}
    for place, kind in enumerate(("", "cpu_")):
        a, b = ([t[place] for t in times[name]] for name in ("bare", "library"))
        ratios = [y / x for x, y in zip(a, b, strict=True)]
        result |= {
            f"{kind}ratio": statistics.median(ratios),
            f"{kind}ratio_range": [min(ratios), max(ratios)],
            f"{kind}ratio_of_fastest": min(b) / min(a),
            f"bare_{kind}s": statistics.median(a),
            f"library_{kind}s": statistics.median(b),
            f"all_bare_{kind}s": a,
            f"all_library_{kind}s": b,
        }
    return result


def raw_write(saver, config):
    """Seconds to write and sync as many zeros as there are score bytes."""
    path = saver.save_dir / "zeros"
    block = bytes(BLOCK * config["m"] * 4)
    try:
        with path.open("wb", buffering=0) as file:
            start = time.perf_counter()
            for _ in range(0, config["n"], BLOCK):
                file.write(block)
            os.fsync(file.fileno())
            return time.perf_counter() - start
    finally:
        path.unlink()


def forget(saver):
    """Drops the rows from the page cache, where the system can."""
    path = saver.train_rows(0).encoded().path
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def memory(kind, folder, config):
    """Peak resident memory of one pass above what was resident before, in bytes."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.streaming",
        "--memory-of",
        kind,
        "--store",
        str(folder),
    ]
    command += ["--config", json.dumps(config)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return json.loads(run.stdout)


def measure_memory(kind, folder, config):
    saver = open_store(folder, config)
    torch.ones(64, 64) @ torch.ones(64, 64)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    {
        "gram": lambda: factor(saver),
        "top": lambda: scores(saver).top(config["top"], helpful=True),
        "file": lambda: write_file(saver),
    }[kind]()
    print(json.dumps({"peak_above_baseline": status("VmHWM") - before}))


def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)


def rows_of(result):
    """Lines of the benchmark page."""
    config = result["config"]
    size = f"n = {config['n']:,}, k = {config['k']}, float16"
    kinds = {
        "gram_and_factor": f"Gram matrix and factor / bare product, {size}",
        "top": f"top {config['top']} for {config['m']:,} targets / bare product, {size}",
        "file": f"score file for {config['m']:,} targets / bare product, {size}",
    }
    for kind, what in kinds.items():
        if kind in result:
            found = result[kind]
            how = f"{found['library_s']:.1f} s against {found['bare_s']:.1f} s"
            ratio = found["ratio"]
            yield Row(what, "at most 1.3", f"{ratio:.2f}", ratio <= 1.3, how)
            cold = result.get(kind + "_cold")
            if cold:
                how = "the file is not in memory; the disk's speed varies"
                yield Row(f"{what}, cold", "", f"{cold['ratio']:.2f}", None, how)
    for kind, found in result["memory"].items():
        peak = found["peak_above_baseline"]
        yield Row(
            f"memory above the inputs, {kind}",
            "under 1 GB",
            f"{peak / 1e6:.0f} MB",
            peak < 1e9,
            "peak resident memory of a process of its own",
        )


def main(config=None):
    config = config or FULL
    folder = Path(tempfile.mkdtemp(prefix="streaming-"))
    need = config["n"] * (2 * config["k"] + 4 * config["m"]) * 1.2
    try:
        with_files = shutil.disk_usage(folder).free > need + (4 << 30)
        saver = make_store(folder, config)
        checked, weights = check(saver, config)
        result = {"config": config, "correctness": checked}
        rounds = config["rounds"]

        def product():
            return bare_product(fresh_map(saver), weights)

        def gram():
            return bare_gram(fresh_map(saver))

        def top():
            return scores(saver).top(config["top"], helpful=True)

        result["gram_and_factor"] = paired(gram, lambda: factor(saver), rounds)
        result["top"] = paired(product, top, rounds)
        few = max(2, rounds // 3)
        cold = {"before": lambda: forget(saver)}
        result["gram_and_factor_cold"] = paired(gram, lambda: factor(saver), few, **cold)
        result["top_cold"] = paired(product, top, few, **cold)
        result["memory"] = {kind: memory(kind, folder, config) for kind in ("gram", "top")}
        if with_files:
            result["file"] = paired(
                product,
                lambda: write_file(saver),
                config["files"],
                after=lambda: drop_file(saver),
            )
            result["memory"]["file"] = memory("file", folder, config)
            drop_file(saver)
            result["raw_write_s"] = raw_write(saver, config)
        return result
    finally:
        shutil.rmtree(folder)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--threads", type=int, help="of BLAS; as many as cores if absent")
    parser.add_argument("--memory-of", choices=["gram", "top", "file"])
    parser.add_argument("--store")
    parser.add_argument("--config", type=json.loads)
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.memory_of:
        measure_memory(given.memory_of, given.store, given.config)
    else:
        measured = main(SMALL if given.small else FULL)
        write("streaming", list(rows_of(measured)), measured, given.out)
