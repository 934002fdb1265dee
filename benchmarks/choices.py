"""What the choices inside TRAK do for the LDS, bank by bank.

Averages over checkpoints, loss weights, leverage, centred and normalized rows, layers,
dtypes: each against the library's default, at the best ridge of a sweep for both, for plain
TRAK and for whitened rows weighted by the loss's curvature (as `trak.attribute` has them).

    python -m benchmarks.choices [--bank digits] [--small]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from benchmarks.banks.bank import Bank, load
from benchmarks.banks.recipes import NAMES, Recipe, recipe
from benchmarks.choice_variants import (
    ALL,
    CHOICES,
    Choice,
    Part,
    kernels,
    merged,
    scores,
    without_changes,
)
from benchmarks.common import RESULTS, Row, environment, write
from benchmarks.systems import RIDGES, Swept, checkpoint, curvatures, sweep
from trak.evaluation import lds_difference
from trak.score_computers.curvature import RULE

COUNTS = (1, 3, 5)
SETTINGS = {"plain": (0.0, False), "whitened, curvature": (0.5, True)}
DRAWS = 400
NORMS = (nn.LayerNorm, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)  # noqa: SLF001
NEEDS_NORMS = ("no norms", "matrices")  # as without biases where there are none
KERNELS_ONLY = ("kernels", "equal kernels")


def parts_of(
    made: Recipe, bank: Bank, count: int, settings: Sequence[str]
) -> dict[str, list[Part]]:
    """The checkpoints of a bank in each setting.

    Args:
        made: data and model.
        bank: ground truth.
        count: checkpoints.
        settings: names of settings.

    Returns:
        Setting to one part a checkpoint.
    """
    modules = made.make_model().named_modules()
    norms = frozenset(name for name, module in modules if isinstance(module, NORMS))
    found: dict[str, list[Part]] = {name: [] for name in settings}
    for number in range(count):
        one = checkpoint(made, bank, number)
        for name in settings:
            strength, curvature = SETTINGS[name]
            gradients = one.whitened(strength)
            sizes = sum(
                rows[one.n :].double().square().sum(1) for rows in gradients.values()
            )
            part = Part(
                kernels(one, gradients, norms),
                one.loss,
                torch.as_tensor(sizes),
                curvature=curvature,
            )
            found[name].append(part)
    return found


def swept(choice: Choice, parts: Sequence[Part], bank: Bank) -> Swept | None:
    """A choice's scores at its best ridge.

    Args:
        choice: the choice.
        parts: the checkpoints.
        bank: ground truth.

    Returns:
        The sweep; None if the choice is nothing else than the default there.
    """
    alone = choice.average != "mean" or choice.q == "own"
    if len(parts) == 1 and alone:
        return None
    if choice.kernel in NEEDS_NORMS and choice.kernel not in parts[0].made:
        return None
    probable = curvatures(parts[0].loss) is not None
    if not probable and (choice.targets == "loss" or choice.power != 1 or choice.weights):
        return None  # outputs are predictions, Q residuals
    if choice.weights == (RULE if parts[0].curvature else "1"):
        return None
    used = list(parts)
    if choice.average in KERNELS_ONLY:
        used = [merged(parts, equal=choice.average == "equal kernels")]
        choice = without_changes(choice)
    return sweep(lambda ridge: scores(choice, used, ridge), bank)


def measure(
    name: str, counts: Sequence[int], settings: Sequence[str], choices: Sequence[str]
) -> dict[str, Any]:
    """Choices on one bank.

    Args:
        name: the bank.
        counts: of checkpoints.
        settings: names of settings.
        choices: their names; what they are compared with comes before them.

    Returns:
        Details of the result.
    """
    made, bank = recipe(name), load(name)
    every = parts_of(made, bank, max(counts), settings)
    entries = []
    for setting in settings:
        for count in counts:
            kept: dict[str, NDArray[Any]] = {}
            for label in choices:
                choice = CHOICES[label]
                found = swept(choice, every[setting][:count], bank)
                if found is None:
                    continue
                entry: dict[str, Any] = {
                    "setting": setting,
                    "checkpoints": count,
                    "choice": label,
                    "ridge": found.best,
                    "lds": round(found.lds, 4),
                }
                kept[label] = found.scores
                if choice.against in kept and choice.against != label:
                    entry |= compared(found.scores, kept[choice.against], bank)
                entries.append(entry)
                print(name, entry, flush=True)
    width = every[settings[0]][0].made[ALL].shape
    return {"bank": name, "n, n + m": list(width), "entries": entries, "ran": environment()}


def compared(mine: NDArray[Any], other: NDArray[Any], bank: Bank) -> dict[str, Any]:
    """The paired difference of two LDS.

    Args:
        mine: scores.
        other: scores that they are compared with.
        bank: ground truth.

    Returns:
        Difference and its 95 % interval over targets and subsets.
    """
    found = lds_difference(mine, other, bank.masks, bank.outputs, draws=DRAWS)
    ends = (found.jointly.low, found.jointly.high)
    return {
        "difference": round(found.value, 4),
        "interval": [round(end, 4) for end in ends],
    }


def verdicts(details: Sequence[dict[str, Any]], setting: str) -> dict[str, dict[str, int]]:
    """Where each choice differs from what it is compared with.

    Args:
        details: one entry a bank.
        setting: name of the setting.

    Returns:
        Choice to how often it is better, worse, and compared.
    """
    found: dict[str, dict[str, int]] = {}
    for detail in details:
        for entry in detail["entries"]:
            if entry["setting"] != setting or "interval" not in entry:
                continue
            counts = found.setdefault(
                entry["choice"], {"better": 0, "worse": 0, "compared": 0}
            )
            counts["compared"] += 1
            counts["better"] += entry["interval"][0] > 0
            counts["worse"] += entry["interval"][1] < 0
    return found


def rows_of(details: Sequence[dict[str, Any]]) -> list[Row]:
    """Lines of the page, one a setting.

    Args:
        details: one entry a bank.

    Returns:
        The lines.
    """
    rows = []
    for setting in SETTINGS:
        found = verdicts(details, setting)
        winners = [
            f"{name} (better in {v['better']} of {v['compared']})"
            for name, v in found.items()
            if 2 * v["better"] > v["compared"] and not v["worse"]
        ]
        rows.append(
            Row(
                f"choices better than the default, {setting}",
                "none that is better in most cases and worse in none",
                "; ".join(winners) or "none",
                not winners,
                f"{len(found)} choices, {len(details)} banks, best ridges of {len(RIDGES)}",
            )
        )
    return rows


def merge(
    details: list[dict[str, Any]], banks: Sequence[str], path: Path
) -> list[dict[str, Any]]:
    """Keeps what was measured before on other banks.

    Args:
        details: of this run.
        banks: of this run.
        path: the result file.

    Returns:
        Details of all banks, in the order of their names.
    """
    known = json.loads(path.read_text("utf-8"))["details"] if path.exists() else []
    every = [*details, *(entry for entry in known if entry["bank"] not in banks)]
    return sorted(every, key=lambda entry: NAMES.index(entry["bank"]))


def added(detail: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adds some choices to what was measured before on the same bank.

    Args:
        detail: of this run.
        path: the result file.

    Returns:
        This run's entries, and the others that are there.
    """
    known = json.loads(path.read_text("utf-8"))["details"] if path.exists() else []
    before = [
        entry
        for other in known
        if other["bank"] == detail["bank"]
        for entry in other["entries"]
        if entry["choice"] in CHOICES
    ]
    keys = ("setting", "checkpoints", "choice")
    mine = {tuple(entry[key] for key in keys) for entry in detail["entries"]}
    kept = [e for e in before if tuple(e[key] for key in keys) not in mine]
    return {**detail, "entries": [*kept, *detail["entries"]]}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bank", action="append", choices=NAMES)
    parser.add_argument("--choice", action="append", choices=CHOICES, help="these only")
    parser.add_argument("--small", action="store_true", help="one bank, one checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, action="append", help="averaged over")
    parser.add_argument("--out", type=Path, help="another file; banks in it are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    banks = options.bank or (["diabetes"] if options.small else NAMES)
    counts = options.checkpoints or (COUNTS[:1] if options.small else COUNTS)
    choices = ["default", *(options.choice or [c for c in CHOICES if c != "default"])]
    details: list[dict[str, Any]] = []
    for name in banks:
        path = options.out or RESULTS / "choices.json"
        detail = measure(name, counts, list(SETTINGS), choices)
        details.append(added(detail, path) if options.choice else detail)
        every = merge(details, banks, path) if not options.small else details
        write("choices", rows_of(every), every, options.out)


if __name__ == "__main__":
    main()
