"""The quality table keeps what it measured, and its page says what the data say."""

import argparse
import json

import numpy as np
import pytest
from benchmarks import quality_time
from benchmarks.quality_table import bars, render, results, run

COMMON = {"bank": "digits", "checkpoints": 1}
BEST, DEFAULT = results.BEST, results.DEFAULT


def entry(side, setting, lds, label="auto", *, run=None, count=1, **more):
    return results.Entry(
        bank="digits",
        run=run or side,
        side=side,
        checkpoints=count,
        setting=setting,
        label=label,
        lds=lds,
        commit="c" * 40,
        date="2026-11-26",
        **more,
    )


def table():
    return [
        entry("trak.attribute", DEFAULT, 0.7, jointly=(0.68, 0.72)),
        entry("TRAKer", DEFAULT, 0.6),
        entry("TRAKer", BEST, 0.62, "ridge 3x"),
        entry("TRAKer, method dot", DEFAULT, 0.3, "method dot", run="TRAKer"),
        entry("TRAKer, method cosine", DEFAULT, 0.4, "method cosine", run="TRAKer"),
        entry("traker default", DEFAULT, 0.5, "ridge 0.0"),
        entry("traker default", BEST, 0.61, "ridge 1.0"),
        entry("traker k = 512", BEST, 0.55, "ridge 3.0"),
        entry("kronfluence EK-FAC", BEST, 0.65, "damping 0.01", seconds_one=2.5),
        results.Entry("digits", "dattri LoGra", "dattri LoGra", 1, note="it | broke"),
    ]


def made(entries, judged=()):
    return {
        "environment": {
            "python": "3.11",
            "versions": {"torch": "2"},
            "cpu": "cpu",
            "cores": 2,
        },
        "ceilings": {"digits": 0.9},
        "entries": results.merge({}, entries),
        "bars": list(judged),
    }


def judge(entries, ranks=None):
    found = bars.bars(results.merge({}, entries), "digits", 1, ranks or {}, np.zeros(1))
    return {bar["bar"]: bar for bar in found}


def test_a_run_replaces_its_own_entries_only():
    before = {"entries": results.merge({}, table())}
    again = [
        entry("TRAKer", DEFAULT, 0.8),
        entry("TRAKer", DEFAULT, 0.9, count=3),
    ]
    merged = results.merge(before, again)
    sides = [one["side"] for one in merged if one["run"] == "TRAKer"]
    assert sides == ["TRAKer", "TRAKer"]  # what its methods were is no longer true
    assert len(merged) == len(table()) - 4 + 2
    other = next(one for one in merged if one["side"] == "kronfluence EK-FAC")
    assert (other["lds"], other["commit"]) == (0.65, "c" * 40)


def test_bars_follow_from_the_figures():
    found = judge(table())
    half = found["TRAKer's default, 1.5 x traker's"]
    assert (half["met"], half["value"]) == (False, 1.2)
    tuned = found["TRAKer's default, tuned traker"]
    assert (tuned["met"], tuned["against"]) == (False, "traker default, ridge 1.0")
    share = found["TRAKer's default, 97% of its best ridge"]
    assert (share["met"], share["value"]) == (False, round(0.6 / 0.62, 3))
    call = found["trak.attribute, better of tuned TRAKer and tuned EK-FAC"]
    assert call["met"]
    assert call["against"] == "kronfluence EK-FAC, damping 0.01"
    assert call["value"] == pytest.approx(0.05)
    assert call["interval"] is None  # no ranks were kept


def test_a_bar_without_its_rival_is_left_out():
    assert judge([one for one in table() if one.side == "TRAKer, method dot"]) == {}


def test_ranks_that_are_kept_give_the_interval_of_a_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RANKS", tmp_path)
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(40, 1, 30))
    close = truth[:, 0] + 0.1 * rng.normal(size=(40, 30))
    far = truth[:, 0] + 3 * rng.normal(size=(40, 30))
    places = {("trak.attribute", DEFAULT): close, ("kronfluence EK-FAC", BEST): far}
    for (side, setting), scores in places.items():
        results.keep_ranks("digits", side[:4], {results.key(side, setting, 1): scores})
    results.keep_ranks("digits", "kron", {"another|default|1": far})
    ranks = results.kept_ranks("digits")
    assert len(ranks) == 3
    assert {one.dtype for one in ranks.values()} == {np.dtype(np.uint8)}
    low, high = bars.interval(*places, 1, ranks, truth)
    assert 0 < low < high
    assert bars.interval(*places, 3, ranks, truth) is None


def test_a_sweep_with_its_best_at_the_end_is_marked():
    reached = {"damping 0.1": 0.3, "damping 1.0": 0.4, "damping None": 0.2}
    assert results.at_edge("damping 1.0", reached)
    assert not results.at_edge("damping None", reached)
    assert not results.at_edge("damping 0.1", reached | {"damping 0.01": 0.1})
    # another dimension is another sweep
    assert results.at_edge(
        "k = 512, ridge 3.0",
        {"k = 512, ridge 3.0": 1, "k = 512, ridge 1.0": 0, "k = 2048, ridge 9.0": 0},
    )


def test_settings_that_are_shown():
    reached = {"auto": 0.5, "ridge 1x": 0.6, "method dot": 0.9}
    assert results.chosen("TRAKer", reached) == [
        ("TRAKer", DEFAULT, "auto"),
        ("TRAKer", BEST, "ridge 1x"),
        ("TRAKer, method dot", DEFAULT, "method dot"),
    ]
    assert results.chosen("trak.attribute", {"auto": 0.5}) == [
        ("trak.attribute", DEFAULT, "auto")
    ]


def test_the_default_is_the_library_s_own_also_where_a_sweep_holds_another_s():
    reached = {"damping 1e-08": 0.1, "damping default": 0.2, "damping 1.0": 0.3}
    assert results.chosen("dattri EK-FAC", reached)[0][2] == "damping default"


def test_the_page():
    judged = judge(table()).values()
    page = render.page(made(table(), judged))
    assert "| **trak.attribute**, default | 0.700 (0.68-0.72) |" in page
    assert "| TRAKer, best other method | 0.400 (cosine) |" in page
    assert "| traker, best of k and ridge | 0.610 |" in page
    assert "| dattri LoGra, best damping | - |" in page
    assert "| dattri LoGra | not run | it / broke | - |" in page
    assert "tuned EK-FAC: met in 1 of 1." in page
    assert "| digits | 1 | 0.600 | 0.500 (traker default, ridge 0.0) | 1.20 times |" in page
    assert "| dot | 0.300 |" in page
    assert "| 2.5 | - | - | ccccccccc, 2026-11-26 |" in page
    assert page.index("## Summary") < page.index("## Bars") < page.index("## Every side")


def test_a_difference_within_noise_says_so():
    bar = judge(table())["trak.attribute, better of tuned TRAKer and tuned EK-FAC"]
    assert render.verdict(bar | {"interval": [-0.01, 0.1]})[-1] == "met, within noise"
    assert render.verdict(bar | {"interval": [0.01, 0.1]})[-1] == "met"
    below = bar | {"met": False, "value": -0.1, "interval": [-0.2, -0.01]}
    assert render.verdict(below)[-1] == "**not met**"


def test_what_is_kept_counts_until_its_worker_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "WORK", tmp_path)
    (tmp_path / "digits").mkdir()
    asked = []
    monkeypatch.setattr(run, "launch", lambda *given: asked.append(given) or {"files": []})
    options = argparse.Namespace(fresh=False, kept=False, threads=1)
    side = ("digits", "kronfluence", "EK-FAC", 1)
    assert run.run_side(*side, options)["threads"] == 1
    assert run.run_side(*side, options)["date"]
    assert len(asked) == 1
    kept = tmp_path / "digits" / "kronfluence-EK-FAC-1.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"of": "another"}))
    options.kept = True
    assert run.run_side(*side, options) is None
    options.kept = False
    run.run_side(*side, options)
    assert len(asked) == 2


def test_a_worker_that_fails_leaves_its_last_words():
    assert run.understood(1, "", "a\nValueError: b\n") == {"error": "ValueError: b"}
    assert run.understood(1, "", "") == {"error": "it said nothing"}
    found = run.understood(0, 'noise\nridge 0\tx.npy\n{"seconds": 1.0}', "")
    assert found == {"files": [["ridge 0", "x.npy"]], "seconds": 1.0}


def test_the_time_of_the_one_call_is_a_median_of_pairs():
    seconds = {
        "trak.attribute": [1.0, 9.0, 2.0],
        "kronfluence": [4.0, 4.0, 4.0],
        "kronfluence tuned": [8.0, 8.0, 8.0],
    }
    megabytes = {"trak.attribute": [10] * 3, **dict.fromkeys(quality_time.RIVALS, [20] * 3)}
    found = {
        "bank": "digits",
        "checkpoints": 1,
        "threads": 2,
        "seconds": seconds,
        "megabytes": megabytes,
    }
    row = quality_time.row_of(found, "kronfluence")
    assert (row.measured, row.passed) == ("0.50", True)
    assert row.what.endswith("digits, one checkpoint")
    several = quality_time.row_of({**found, "checkpoints": 3}, "kronfluence")
    assert several.what.endswith("digits, 3 checkpoints")
    assert "trak.attribute 2.0 s, 10 MB" in row.how
    assert "tuned" not in row.how
    row = quality_time.row_of(found, "kronfluence tuned")
    assert row.measured == "0.25"
    missing = {"bank": "digits", "checkpoints": 1, "error": "no environment"}
    failed = quality_time.row_of(missing, "kronfluence")
    assert (failed.passed, failed.how) == (None, "no environment")


def test_times_of_other_banks_and_numbers_of_checkpoints_are_kept(tmp_path):
    known = [
        {"bank": b, "checkpoints": c, "n": 0} for b in ("mnist", "digits") for c in (1, 3)
    ]
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"details": known}))
    found = quality_time.with_others([{"bank": "digits", "checkpoints": 3, "n": 1}], path)
    assert [(e["bank"], e["checkpoints"], e["n"]) for e in found] == [
        ("digits", 1, 0),
        ("mnist", 1, 0),
        ("digits", 3, 1),
        ("mnist", 3, 0),
    ]
