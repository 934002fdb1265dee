"""Other methods over TRAK's rows, held against their formulae written out."""

import numpy as np
import pytest
import torch
from tests import runs

from trak.errors import InputError, ModelIDException
from trak.projectors import NoOpProjector
from trak.score_computers import BasicScoreComputer

N, M = 12, 5
METHODS = ["dot", "tracin", "cosine", "relatif", "l_relatif", "unit_norm"]


@pytest.fixture(params=["primal", "dual"])
def finished(request, tmp_path):
    """A TRAKer with two finalized checkpoints and scored targets, and the oracle's rows."""
    torch.manual_seed(0)
    model, train, targets = runs.data("mlp", N, M)
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({
            k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()
        })
    options = {"proj_dim": 6} if request.param == "primal" else {"proj_dim": 40}
    traker = runs.make_traker(model, N, tmp_path, **options)
    runs.whole_run(traker, train, targets, states)
    assert traker.saver.load_factor(0)[1]["form"] == request.param
    rows = runs.oracle(model, train, targets, states, traker.projector)
    return traker, [tuple(part.double() for part in one) for one in rows]


def systems(rows):
    """(Phi, Psi, q, K^-1) of each checkpoint, K with the default ridge."""
    for phi, psi, q in rows:
        ridge = phi.square().sum(1).mean()
        gram = phi.T @ phi + ridge * torch.eye(phi.shape[1], dtype=phi.dtype)
        yield phi, psi, q.reshape(-1, 1), torch.linalg.inv(gram)


def written_out(method, rows, weights):
    found = []
    for phi, psi, q, inverse in systems(rows):
        scores = torch.zeros(len(phi), len(psi), dtype=torch.float64)
        for i, row in enumerate(phi):
            for j, target in enumerate(psi):
                energy = row @ inverse @ row
                scores[i, j] = {
                    "dot": q[i, 0] * (row @ target),
                    "tracin": q[i, 0] * (row @ target),
                    "cosine": row @ target / row.norm() / target.norm(),
                    "relatif": row @ inverse @ target / (inverse @ row).norm(),
                    "l_relatif": row @ inverse @ target / energy.sqrt(),
                    "unit_norm": row
                    @ inverse
                    @ target
                    / (energy * (target @ inverse @ target)).sqrt(),
                }[method]
        found.append(scores)
    total = sum(w * s for w, s in zip(weights, found, strict=True))
    return total if method == "tracin" else total / sum(weights)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0]])
@pytest.mark.parametrize("method", METHODS)
def test_methods_are_their_formulae(method, weights, finished):
    traker, rows = finished
    expected = written_out(method, rows, weights or [1.0, 1.0])
    found = traker.scores("exp", method, checkpoint_weights=weights)
    assert found.shape == (N, M)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["dot", "relatif"])
def test_one_checkpoint(method, finished):
    traker, rows = finished
    found = traker.scores("exp", method, model_ids=[1])
    expected = written_out(method, rows[1:], [1.0])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["trak", *METHODS])
def test_groups_are_means_of_their_targets(method, finished):
    traker, _ = finished
    groups = [[0, 3], [4], [1, 2, 3]]
    scores = traker.scores("exp", method)
    expected = np.stack([scores[:, group].mean(1) for group in groups], axis=1)
    found = traker.scores("exp", method, groups=groups)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("helpful", [True, False])
@pytest.mark.parametrize("method", ["cosine", "l_relatif"])
def test_top_scores_are_those_of_all_scores(method, helpful, finished):
    traker, _ = finished
    scores = traker.scores("exp", method)
    found = traker.top_scores("exp", 4, helpful=helpful, method=method)
    order = np.argsort(-scores if helpful else scores, axis=0, kind="stable")[:4].T
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(
        found.scores, np.take_along_axis(scores.T, order, axis=1), rtol=1e-6
    )
    grouped = traker.top_scores("exp", 4, helpful=helpful, method=method, groups=[[2]])
    np.testing.assert_array_equal(grouped.indices[0], order[2])


def test_self_influence_is_the_diagonal(finished):
    traker, rows = finished
    parts = list(systems(rows))
    energy = sum(((phi @ k) * phi).sum(1) for phi, _, _, k in parts) / 2
    expected = energy * sum(q[:, 0] for _, _, q, _ in parts) / 2
    np.testing.assert_allclose(traker.self_influence(), expected.numpy(), rtol=1e-4)
    phi, _, q, k = parts[0]
    expected = ((phi @ k) * phi).sum(1) * q[:, 0]
    np.testing.assert_allclose(traker.self_influence([0]), expected.numpy(), rtol=1e-4)


def test_examples_without_a_gradient_score_zero(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    traker = runs.make_traker(model, N, tmp_path)
    runs.whole_run(traker, train, targets, [model.state_dict()])
    np.load(tmp_path / "0" / "grads.mmap", mmap_mode="r+")[3] = 0.0
    for method in METHODS:
        scores = traker.scores("exp", method)
        assert np.isfinite(scores).all()
        assert (scores[3] == 0).all()
        assert (scores[2] != 0).all()


def test_what_cannot_be_asked_for(finished):
    traker, _ = finished
    with pytest.raises(InputError, match=r"method is one of .*'cosine'.*got 'cosin'"):
        traker.scores("exp", "cosin")
    for groups in ([], [[]], [[0, 0]], [[5]], [[-1]], [[0.5]], [0, 1]):
        with pytest.raises(InputError, match=r"[Gg]roup"):
            traker.scores("exp", "dot", groups=groups)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="checkpoint_weights"):
            traker.scores("exp", "dot", checkpoint_weights=weights)
    with pytest.raises(InputError, match="finalize_scores"):
        traker.scores("exp", model_ids=[0])
    with pytest.raises(ModelIDException, match="7"):
        traker.self_influence([7])


def test_methods_that_solve_need_the_ridge(tmp_path):
    model, train, targets = runs.data("mlp", N, M)
    options = {"projector": NoOpProjector(), "score_computer": BasicScoreComputer}
    traker = runs.make_traker(model, N, tmp_path, lambda_reg=1.0, **options)
    runs.whole_run(traker, train, targets, [model.state_dict()])
    assert traker.scores("exp", "cosine").shape == (N, M)
    with pytest.raises(InputError, match="RidgeScoreComputer"):
        traker.scores("exp", "relatif")
    with pytest.raises(InputError, match="RidgeScoreComputer"):
        traker.self_influence()
