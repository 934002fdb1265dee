"""What examples/qnli.py prints: the report of each target, and the times."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from qnli_data import Pair

from trak import TRAKer

LABELS = ("entailment", "not_entailment")
IN_WORDS = ("the sentence answers", "the sentence does not answer")


class Stopwatch:
    """Seconds spent in each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to the phase."""
        start = time.perf_counter()
        yield
        passed = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + passed


def make_report(
    targets: list[Pair], train: list[Pair], probs: np.ndarray, traker: TRAKer
) -> list[dict[str, Any]]:
    """One entry a target: the pair, its prediction, the strongest training pairs."""
    strongest = {
        "helpful": traker.top_k("qnli", k=5),
        "harmful": traker.top_k("qnli", k=5, helpful=False),
    }
    report = []
    for column, target in enumerate(targets):
        prediction = int(probs[column].argmax())
        entry = {
            **target,
            "prediction": prediction,
            "probability": round(float(probs[column, prediction]), 4),
        }
        for effect, top in strongest.items():
            pairs = zip(top.indices[column], top.scores[column], strict=True)
            entry[effect] = [
                {"score": float(score), "index": int(i), **train[i]} for i, score in pairs
            ]
        report.append(entry)
    return report


def print_report(report: list[dict[str, Any]], width: int) -> None:
    """Prints the report as plain text for readers of any terminal."""

    def show(lead: str, text: str, lines: int = 3) -> None:
        indent = " " * len(lead)
        print(
            textwrap.fill(
                " ".join(text.split()),
                width,
                initial_indent=lead,
                subsequent_indent=indent,
                max_lines=lines,
                placeholder=" ...",
            )
        )

    for number, target in enumerate(report, 1):
        label, prediction = target["label"], target["prediction"]
        title = target["title"].replace("_", " ")
        print(f"\n{'=' * width}\nTarget {number} of {len(report)}: {title}\n")
        show("  Question    ", target["question"])
        show("  Sentence    ", target["sentence"], lines=4)
        print(f"  True label  {LABELS[label]}: {IN_WORDS[label]}")
        verdict = "correct" if label == prediction else "WRONG"
        sure = f"{target['probability']:.0%} sure, {verdict}"
        print(f"  Prediction  {LABELS[prediction]}: {IN_WORDS[prediction]} ({sure})")
        for effect, does in ("helpful", "raise"), ("harmful", "lower"):
            print(f"\n  Most {effect} training pairs (they {does} the true label):")
            for pair in target[effect]:
                title = pair["title"].replace("_", " ")
                print(f"\n  {pair['score']:+9.3g}  {LABELS[pair['label']]} | {title}")
                show(f"{'Q  ':>16}", pair["question"], lines=2)
                show(f"{'S  ':>16}", pair["sentence"], lines=2)


def print_times(seconds: dict[str, float]) -> None:
    """Prints the seconds of each phase and their sum."""
    print("\nphase       seconds")
    for name, value in [*seconds.items(), ("total", sum(seconds.values()))]:
        print(f"{name:<11} {value:>7.1f}")
