"""What sides reached: entries of the result, and the ranks that differences need.

An entry stays until its side runs again, with the commit and the day it was measured at.
Of a few settings the ranks of the group scores are kept beside it, a byte each, since an
LDS and its bootstrap depend on nothing else: the difference of two sides can be had
without running both.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.banks.bank import load
from benchmarks.common import RESULTS
from benchmarks.lds import lds
from trak.errors import InputError
from trak.evaluation import group_scores
from trak.evaluation import lds as with_intervals
from trak.evaluation.ranks import average_ranks

RESULT = RESULTS / "quality_table.json"
RANKS = RESULTS / "quality_ranks"
DRAWS = 400
HUGE = 1e30
DEFAULT, BEST = "default", "best of its sweep"
DEFAULTS = ("auto", "ridge 0.0", "damping default", "damping 1e-08", "k = 512, ridge 0.0")
# sides whose ranks are kept: those that a bar holds against each other
HEADLINE = (
    "trak.attribute",
    "TRAKer",
    "traker default",
    "traker k = 512",
    "kronfluence EK-FAC",
    "dattri EK-FAC",
)


@dataclass(frozen=True)
class Entry:
    """One setting of a side on one bank.

    Attributes:
        bank: the bank.
        run: library and method: what ran as a whole.
        side: the same, with the method of scoring where it is another.
        checkpoints: averaged over.
        setting: the library's default, or the best one of a sweep.
        label: what was set.
        lds: mean over targets; None if it did not run.
        jointly: 95 % bootstrap interval over targets and subsets.
        over_targets: over targets only.
        over_subsets: over subsets only.
        seconds: for all settings together.
        seconds_one: for one setting, where it was timed.
        megabytes: peak of the process.
        threads: that it had.
        edge: whether the best setting is at an end of its sweep.
        commit: it was measured at.
        date: and when.
        note: why it did not run.
    """

    bank: str
    run: str
    side: str
    checkpoints: int
    setting: str = ""
    label: str = ""
    lds: float | None = None
    jointly: tuple[float, float] | None = None
    over_targets: tuple[float, float] | None = None
    over_subsets: tuple[float, float] | None = None
    seconds: float | None = None
    seconds_one: float | None = None
    megabytes: float | None = None
    threads: int | None = None
    edge: bool = False
    commit: str = ""
    date: str = ""
    note: str = ""


Found = dict[str, Any]
Ranks = NDArray[np.float64]


def entries(
    bank: str, library: str, side: str, count: int, found: Found
) -> tuple[list[Entry], dict[str, Ranks]]:
    """What a side reached.

    Args:
        bank: the bank.
        library: `"ours"` or a peer.
        side: its method.
        count: checkpoints.
        found: what the run gave.

    Returns:
        Its default, the best of its sweep if it has one, and its other methods; ranks of
        group scores by `key`.
    """
    run = side if library == "ours" else f"{library} {side}"
    common = {
        "bank": bank,
        "run": run,
        "checkpoints": count,
        **{name: found.get(name, "") for name in ("commit", "date")},
        "threads": found.get("threads"),
    }
    if "error" in found:
        return [Entry(**common, side=run, note=found["error"])], {}
    whole = load(bank)
    predicted = {
        label: average_ranks(group_scores(_numbers(path), whole.masks))
        for label, path in found["files"]
    }
    truth = whole.outputs
    reached = {label: float(lds(one, truth).mean()) for label, one in predicted.items()}
    made, kept = [], {}
    for shown, setting, label in chosen(run, reached):
        made.append(
            Entry(
                **common,
                side=shown,
                setting=setting,
                label=label,
                lds=round(reached[label], 4),
                **intervals(predicted[label], truth),
                seconds=round(found["seconds"], 1),
                seconds_one=rounded(found.get("seconds_one")),
                megabytes=round(found["megabytes"]),
                edge=setting == BEST and at_edge(label, reached),
            )
        )
        if shown in HEADLINE:
            kept[key(shown, setting, count)] = predicted[label]
    return made, kept


def chosen(run: str, reached: dict[str, float]) -> list[tuple[str, str, str]]:
    """Which settings are shown.

    Args:
        run: library and method.
        reached: LDS by label.

    Returns:
        Side, setting and label of each.
    """
    methods = [label for label in reached if label.startswith("method ")]
    swept = [label for label in reached if label not in methods]
    best = max(swept, key=lambda label: reached[label])
    default = next((label for label in DEFAULTS if label in reached), None)
    shown = [] if default is None else [(run, DEFAULT, default)]
    if len(swept) > 1:
        shown.append((run, BEST, best))
    return shown + [(f"{run}, {label}", DEFAULT, label) for label in methods]


def at_edge(label: str, reached: dict[str, float]) -> bool:
    """Whether a setting is the smallest or largest of a sweep.

    Args:
        label: ends with a number, or with words for what a library chooses itself.
        reached: LDS by label.

    Returns:
        False for what a library chooses itself.
    """
    kind, value = _split(label)
    values = [number for other in reached for of, number in [_split(other)] if of == kind]
    numbers = [number for number in values if number is not None]
    return value is not None and len(numbers) > 1 and value in (min(numbers), max(numbers))


def _split(label: str) -> tuple[str, float | None]:
    kind, _, value = label.rpartition(" ")
    try:
        return kind, float(value.removesuffix("x"))
    except ValueError:
        return kind, None


def intervals(ranks: Ranks, truth: NDArray[Any]) -> dict[str, Any]:
    """Bootstrap intervals of an LDS.

    Args:
        ranks: of group scores, `[subsets, m]`.
        truth: outputs of retrained models, `[subsets, seeds, m]`.

    Returns:
        `jointly`, `over_targets` and `over_subsets`; nothing where a target's predictions
        are constant.
    """
    try:
        found = with_intervals(ranks, np.eye(len(ranks)), truth, draws=DRAWS)
    except InputError:
        return {}
    names = ("jointly", "over_targets", "over_subsets")
    return {name: tuple(round(end, 4) for end in getattr(found, name)) for name in names}


def rounded(seconds: float | None) -> float | None:
    """Seconds as they are written.

    Args:
        seconds: or None.

    Returns:
        To a hundredth.
    """
    return None if seconds is None else round(seconds, 2)


def key(side: str, setting: str, count: int) -> str:
    """The name of kept ranks.

    Args:
        side: of the entry.
        setting: of the entry.
        count: checkpoints.

    Returns:
        The name.
    """
    return f"{side}|{setting}|{count}"


def merge(before: dict[str, Any], after: list[Entry]) -> list[dict[str, Any]]:
    """Replaces the entries of what ran, and keeps all others.

    Args:
        before: the result as it was.
        after: entries of what ran this time.

    Returns:
        Entries in JSON.
    """
    ran = {(entry.bank, entry.run, entry.checkpoints) for entry in after}
    kept = [
        entry
        for entry in before.get("entries", [])
        if (entry["bank"], entry["run"], entry["checkpoints"]) not in ran
    ]
    return kept + [asdict(entry) for entry in after]


def read(path: Path | None = None) -> dict[str, Any]:
    """The result.

    Args:
        path: the file; the one in `benchmarks/results` if None.

    Returns:
        `ceilings`, `entries`, `bars`; empty if there is none.
    """
    path = path or RESULT
    if not path.exists():
        return {"ceilings": {}, "entries": [], "bars": []}
    return json.loads(path.read_text("utf-8"))


def keep_ranks(bank: str, library: str, ranks: dict[str, Ranks]) -> None:
    """Keeps ranks beside those that are kept already.

    Args:
        bank: the bank.
        library: whose they are.
        ranks: by `key`.
    """
    path = RANKS / f"{bank}-{library}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = _read(path) | {name: _bytes(one) for name, one in ranks.items()}
    np.savez_compressed(path, **{name: whole[name] for name in sorted(whole)})


def kept_ranks(bank: str) -> dict[str, NDArray[np.uint8]]:
    """All ranks of a bank that are kept.

    Args:
        bank: the bank.

    Returns:
        By `key`, `[subsets, m]`.
    """
    found: dict[str, NDArray[np.uint8]] = {}
    for path in sorted(RANKS.glob(f"{bank}-*.npz")):
        found |= _read(path)
    return found


def _read(path: Path) -> dict[str, NDArray[np.uint8]]:
    if not path.exists():
        return {}
    with np.load(path, allow_pickle=False) as whole:
        return {name: whole[name] for name in whole}


def _bytes(ranks: Ranks) -> NDArray[np.uint8]:
    # equal ranks stay equal: the number of smaller entries, of at most 255
    return np.stack([np.searchsorted(np.sort(c), c) for c in ranks.T], 1).astype(np.uint8)


def _numbers(path: str) -> NDArray[np.float64]:
    # half precision overflows without a ridge: such scores stay large
    scores = np.load(path).astype(np.float64)
    return np.nan_to_num(scores, posinf=HUGE, neginf=-HUGE)
