"""Standard errors and rank ranges, against loops written out."""

import logging
import math

import numpy as np
import pytest
import torch
from tests import cases, reference, runs

from trak.errors import InputError, NumericalError
from trak.pipeline import error_pass
from trak.pipeline.ranks_of_scores import Ranked, critical, noise_limit
from trak.pipeline.variances import VariancePass, cut
from trak.projectors import NoOpProjector
from trak.score_computers import AbstractScoreComputer
from trak.score_computers.linear import Weighted
from trak.score_computers.moderation import PEERS
from trak.score_computers.ridge_sample import drawn

N, M, C = 40, 5, 4


@pytest.fixture(params=["primal", "dual", "curvature", "dual and curvature"])
def finished(request, tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", C)
    dual = "dual" in request.param
    traker = runs.make_traker(
        model,
        N,
        tmp_path,
        proj_dim=64 if dual else 24,
        lambda_reg="2x",
        curvature="curvature" in request.param,
    )
    scores = runs.whole_run(traker, train, targets, states)
    assert traker.saver.load_factor(0)[1]["form"] == ("dual" if dual else "primal")
    rows = runs.oracle(model, train, targets, states, traker.projector)
    return traker, scores, [tuple(part.double() for part in one) for one in rows]


def solved(phi, psi, q, *, curvature, ridge=2.0):
    weights = (q * (1 - q / 2)).clamp(min=1e-4) if curvature else torch.ones_like(q)
    gram = phi.T @ (phi * weights.reshape(-1, 1))
    gram = gram + ridge * float(gram.trace()) / len(phi) * torch.eye(len(gram))
    return phi @ torch.linalg.inv(gram) @ psi.T


def jackknife(replicates):
    replicates = torch.stack(replicates)
    count = len(replicates)
    distances = (replicates - replicates.mean(0)).square().sum(0)
    return ((count - 1) / count * distances).sqrt().numpy()


def without_each(taus, qs):
    """`mean(tau) mean(q)` without each checkpoint."""
    replicates = []
    for left in range(len(taus)):
        tau = torch.stack([t for j, t in enumerate(taus) if j != left]).mean(0)
        q = torch.stack([q for j, q in enumerate(qs) if j != left]).mean(0)
        replicates.append(tau * q)
    return replicates


def checkpoint_squares(taus, qs):
    squares = jackknife(without_each(taus, qs)) ** 2
    both = [torch.stack(each).var(dim=0) / len(each) for each in (taus, qs)]
    return np.maximum(squares - (both[0] * both[1]).numpy(), squares / 2)


def test_errors_over_checkpoints_are_a_moderated_jackknife(finished):
    traker, scores, rows = finished
    found = traker.scores("exp", with_error=True)
    curved = traker.score_computer.curvature
    peers = drawn(N, PEERS)  # training examples in the role of targets
    taus = [
        solved(phi, torch.cat([psi, phi[peers]]), q.reshape(-1), curvature=curved)
        for phi, psi, q in rows
    ]
    qs = [q.reshape(-1, 1) for *_, q in rows]
    squares = checkpoint_squares(taus, qs)
    every = torch.stack(taus).mean(0) * torch.stack(qs).mean(0)
    expected, degrees = reference.moderated(every.numpy(), squares, peers, C - 1)
    np.testing.assert_allclose(found.errors, expected**0.5, rtol=2e-4, atol=1e-8)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-7)
    assert found.source == "checkpoints"
    assert found.degrees == pytest.approx(degrees, rel=1e-3)
    assert found.degrees > C - 1
    low, high = found.interval(0.9)
    reach = critical(0.9, found.degrees)
    np.testing.assert_allclose(high - low, 2 * reach * found.errors, rtol=1e-3)


def test_an_error_depends_on_no_other_target(finished):
    traker, *_ = finished
    both = traker.scores("exp", with_error=True)
    _, _, targets = runs.data("mlp", N, M)
    alone = [part[3:4] for part in targets]
    for number, state in enumerate(cases.checkpoints("mlp", C)):
        traker.start_scoring_checkpoint("one", state, number, 1)
        traker.score(batch=alone, num_samples=1)
    one = traker.scores("one", with_error=True)
    np.testing.assert_allclose(one.errors, both.errors[:, 3:4], rtol=1e-4)
    assert one.degrees == pytest.approx(both.degrees, rel=1e-5)


def test_few_examples_tell_errors_by_themselves(tmp_path):
    model, train, targets = runs.data("mlp", 6, 2)
    states = cases.checkpoints("mlp", 3)
    traker = runs.make_traker(model, 6, tmp_path, proj_dim=24, lambda_reg="2x")
    runs.whole_run(traker, train, targets, states)
    found = traker.scores("exp", with_error=True)
    rows = runs.oracle(model, train, targets, states, traker.projector)
    rows = [tuple(part.double() for part in one) for one in rows]
    taus = [solved(phi, psi, q, curvature=False) for phi, psi, q in rows]
    qs = [q.reshape(-1, 1) for *_, q in rows]
    expected = checkpoint_squares(taus, qs) ** 0.5
    np.testing.assert_allclose(found.errors, expected, rtol=1e-4, atol=1e-8)
    assert found.degrees == 2


def test_errors_of_one_sketch_leave_out_groups_of_columns(finished):
    traker, _, rows = finished
    found = traker.scores("exp", with_error=True, model_ids=[2])
    phi, psi, q = rows[2]
    curved = traker.score_computer.curvature
    replicates = []
    for group in torch.arange(phi.shape[1]).chunk(8):
        keep = [j for j in range(phi.shape[1]) if j not in group]
        tau = solved(phi[:, keep], psi[:, keep], q.reshape(-1), curvature=curved)
        replicates.append(tau * q.reshape(-1, 1))
    np.testing.assert_allclose(found.errors, jackknife(replicates), rtol=2e-3, atol=1e-7)
    assert (found.degrees, found.source) == (7, "sketch")


@pytest.mark.parametrize("width", [17, 57])
def test_there_are_eight_groups_of_any_number_of_columns(width, tmp_path):
    """Their degrees of freedom are counted as seven."""
    model, train, targets = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path, proj_dim=width, lambda_reg="2x")
    runs.whole_run(traker, train, targets, [model.state_dict()])
    found = traker.scores("exp", with_error=True)
    (rows,) = runs.oracle(model, train, targets, [model.state_dict()], traker.projector)
    phi, psi, q = (part.double() for part in rows)
    replicates = []
    for group in np.array_split(np.arange(width), 8):
        keep = np.setdiff1d(np.arange(width), group)
        tau = solved(phi[:, keep], psi[:, keep], q.reshape(-1), curvature=False)
        replicates.append(tau * q.reshape(-1, 1))
    np.testing.assert_allclose(found.errors, jackknife(replicates), rtol=2e-3, atol=1e-7)


def test_ranks_are_what_comparing_all_pairs_gives(finished, monkeypatch):
    traker, scores, _ = finished
    monkeypatch.setattr(VariancePass, "stretches", lambda self: cut(self.num_rows, 7))
    monkeypatch.setattr("trak.pipeline.ranks_of_scores._COMPARISONS", 300)
    full = traker.scores("exp", with_error=True)
    for helpful in (True, False):
        found = traker.top_scores("exp", k=6, helpful=helpful, with_error=True)
        plain = traker.top_scores("exp", k=6, helpful=helpful)
        np.testing.assert_array_equal(found.indices, plain.indices)
        np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-4)
        reach = critical(0.9, full.degrees)
        for j in range(M):
            s, e = full.scores[:, j].astype(float), full.errors[:, j].astype(float)
            s = s if helpful else -s
            for place, i in enumerate(found.indices[j]):
                unsure = reach * np.hypot(e, e[i])
                low = 1 + (s - s[i] > unsure).sum()
                high = N - (s[i] - s > unsure).sum()
                assert (found.rank_low[j, place], found.rank_high[j, place]) == (low, high)
                assert low <= place + 1 <= high
                np.testing.assert_allclose(found.errors[j, place], e[i], rtol=1e-5)


def test_lists_with_errors_take_one_pass_of_every_replicate(tmp_path, monkeypatch):
    model, train, targets = runs.data("mlp", N, M)
    options = {"proj_dim": 24, "lambda_reg": "2x", "row_dtype": "float16"}
    traker = runs.make_traker(model, N, tmp_path, **options)
    runs.whole_run(traker, train, targets, cases.checkpoints("mlp", 1))
    multiplied = []
    whole = Weighted.__call__

    def counted(self, start, stop):
        multiplied.append((stop - start, self.weights.dtype))
        return whole(self, start, stop)

    monkeypatch.setattr(Weighted, "__call__", counted)
    traker.top_scores("exp", k=2, with_error=True)
    assert sum(rows for rows, _ in multiplied) == 8 * N
    # 11 bits a number: only the scores themselves are multiplied in float64
    assert sum(rows for rows, dtype in multiplied if dtype is torch.float64) == N


@pytest.mark.parametrize("model_ids", [[2], [0, 1, 3]])
def test_single_scores_are_those_of_all(model_ids, finished, monkeypatch):
    traker, *_ = finished
    monkeypatch.setattr(VariancePass, "stretches", lambda self: cut(self.num_rows, 7))
    every = traker.scores("exp", model_ids=model_ids, with_error=True)
    places = torch.tensor([[3, 39, 3], [0, 1, 2], [38, 7, 20], [5, 5, 4], [9, 8, 7]])
    for many, pairs in ((0, 1 << 22), (0, 1), (1 << 40, 1)):
        monkeypatch.setattr("trak.pipeline.variances._MANY", many)
        monkeypatch.setattr("trak.score_computers.linear._PAIRS", pairs)
        found = error_pass(traker.pipeline, "exp", model_ids).single(places)
        for one, other in zip(found, (every.scores, every.errors**2), strict=True):
            expected = np.take_along_axis(other.T, places.numpy(), axis=1)
            np.testing.assert_allclose(one.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("degrees", "level", "expected"),
    [
        (1, 0.9, 6.3138),
        (1.05, 0.99, 52.7551),
        (2, 0.9, 2.9200),
        (4, 0.95, 2.7764),
        (9, 0.9, 1.8331),
    ],
)
def test_quantiles_of_students_t(degrees, level, expected):
    assert critical(level, degrees) == pytest.approx(expected, rel=1e-4)
    assert critical(0.95, 1_000_000) == pytest.approx(1.95996, rel=1e-4)
    with pytest.raises(InputError, match="between 0 and 1"):
        critical(1.0, degrees)
    for bad in (0, -0.1, "0.9", None, float("nan")):
        with pytest.raises(InputError, match="level must be a finite number above 0"):
            critical(bad, degrees)


def ranked(high, source="checkpoints"):
    high = np.asarray(high)
    ones = np.ones(high.shape)
    return Ranked(
        indices=np.tile(np.arange(high.shape[1]), (len(high), 1)),
        scores=ones.astype(np.float32),
        errors=ones.astype(np.float32),
        rank_low=ones.astype(np.int64),
        rank_high=high,
        level=0.9,
        source=source,
        limit=8,
    )


def test_noise_is_warned_of_and_clear_lists_are_not(caplog):
    noise = [[9, 9, 9, 2], [9, 9, 2, 9], [2, 2, 2, 2]]
    with caplog.at_level(logging.WARNING):
        ranked([[8, 8, 8, 8], [9, 9, 8, 8], [9, 9, 9, 9]]).warn_of_noise()
    assert not caplog.text
    ranked(noise).warn_of_noise()
    assert "mostly noise for 2 of 3 targets" in caplog.text
    assert "more checkpoints" in caplog.text
    caplog.clear()
    ranked(noise, "sketch").warn_of_noise()
    assert "larger proj_dim" in caplog.text


def test_lists_in_words():
    found = ranked([[1, 7]])
    for target in (-1, len(found.indices), "0"):
        with pytest.raises(InputError, match="target must be"):
            found.describe(target)
    assert found.describe(0).splitlines() == [
        "  1. example 0: 1 +- 1, rank 1",
        "  2. example 1: 1 +- 1, rank could be 1 to 7",
    ]


def test_a_run_of_noise_warns(tmp_path, caplog):
    torch.manual_seed(0)
    model, train, targets = runs.data("mlp", N, M)
    # checkpoints that have nothing in common
    states = [
        {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        for _ in range(3)
    ]
    traker = runs.make_traker(model, N, tmp_path, proj_dim=24)
    runs.whole_run(traker, train, targets, states)
    with caplog.at_level(logging.WARNING):
        traker.top_scores("exp", k=5, with_error=True)
    assert "mostly noise" in caplog.text


def test_bad_input(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 1)
    exact = runs.make_traker(model, N, tmp_path / "a", projector=NoOpProjector())
    runs.whole_run(exact, train, targets, states)
    with pytest.raises(InputError, match="one checkpoint and no random projection"):
        exact.scores("exp", with_error=True)
    narrow = runs.make_traker(model, N, tmp_path / "b", proj_dim=8)
    runs.whole_run(narrow, train, targets, states)
    with pytest.raises(InputError, match="too small"):
        narrow.scores("exp", with_error=True)
    for options in ({"method": "dot"}, {"groups": [[0]]}, {"checkpoint_weights": [1]}):
        with pytest.raises(InputError, match="with_error=True is for"):
            narrow.scores("exp", with_error=True, **options)
    with pytest.raises(InputError, match="k must be"):
        runs.make_traker(model, N, tmp_path / "b", proj_dim=8).top_scores("exp", k=0)
    assert math.isfinite(critical(0.5, 3))


@pytest.mark.parametrize(
    ("length", "count", "limit"), [(5, 40, 10), (19, 40, 29), (20, 40, 30), (40, 40, 40)]
)
def test_a_long_list_can_be_noise_too(length, count, limit):
    assert noise_limit(length, count) == limit


def test_lists_of_unrelated_models_are_noise_however_long_they_are(tmp_path, caplog):
    model, train, targets = runs.data("mlp", N, M)
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        states.append({k: torch.randn_like(v) for k, v in model.state_dict().items()})
    traker = runs.make_traker(model, N, tmp_path, proj_dim=24)
    runs.whole_run(traker, train, targets, states)
    for k in (5, N // 2, 3 * N // 4):
        caplog.clear()
        traker.top_scores("exp", k, with_error=True)
        assert "mostly noise" in caplog.text
    assert traker.top_scores("exp", 10**12, with_error=True).indices.shape == (M, N)


def test_errors_are_of_the_scores_that_were_written(finished):
    traker, _, _ = finished
    written = traker.finalize_scores("exp", model_ids=[0, 2])
    found = traker.scores("exp", with_error=True)
    np.testing.assert_allclose(found.scores, written, rtol=1e-4, atol=1e-7)
    assert found.degrees > 1
    top = traker.top_scores("exp", 3, model_ids=[0, 2], with_error=True)
    np.testing.assert_allclose(
        top.scores, traker.top_k("exp", 3).scores, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("file", ["0/grads.mmap", "0/exp_grads.mmap"])
def test_a_damaged_row_is_no_score(file, finished, tmp_path):
    traker, *_ = finished
    np.load(tmp_path / file, mmap_mode="r+")[3] = np.nan
    for call in (traker.scores, traker.top_scores):
        with pytest.raises(NumericalError, match="not finite"):
            call("exp", with_error=True)
    if file == "0/grads.mmap":
        with pytest.raises(NumericalError, match="Self-influence from row 0"):
            traker.self_influence()


class OverTargets(AbstractScoreComputer):
    """Scores that depend on which other targets there are."""

    def __init__(self, dtype, device, logging_level, lambda_reg):
        super().__init__(dtype, device)

    def get_xtx(self, grads):
        return grads.T @ grads

    def get_x_xtx_inv(self, grads, xtx):
        return grads @ torch.linalg.inv(xtx + torch.eye(len(xtx)))

    def get_scores(self, features, target_grads, accumulator):
        assert len(target_grads) == M
        found = features @ target_grads.T.to(features)
        accumulator += (found / found.norm(dim=1, keepdim=True)).cpu()


def test_other_score_computers_get_the_targets_alone(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    states = cases.checkpoints("mlp", 3)
    traker = runs.make_traker(model, N, tmp_path, score_computer=OverTargets)
    written = runs.whole_run(traker, train, targets, states)
    found = traker.scores("exp", with_error=True)
    np.testing.assert_allclose(found.scores, written, rtol=1e-4, atol=1e-6)
    assert found.degrees == 2


def test_learning_takes_scattered_rows_and_no_more_of_them_for_many_targets(tmp_path):
    model, train, targets = runs.data("mlp", 300, 4)
    states = cases.checkpoints("mlp", 2)
    traker = runs.make_traker(model, 300, tmp_path, lambda_reg="2x")
    runs.whole_run(traker, train, targets, states)
    taken = error_pass(traker.pipeline, "exp", None)
    assert taken._some() == [(i, min(i + 16, 300)) for i in range(0, 300, 16)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trak.pipeline.errors_of_scores._LEARNED_ROWS", 100)
        few = error_pass(traker.pipeline, "exp", None)
        rows = [i for start, stop in few._some() for i in range(start, stop)]
        assert len(rows) <= 100
        assert max(rows) - min(rows) > 200
        np.testing.assert_allclose(few.scores().scores, taken.scores().scores)
