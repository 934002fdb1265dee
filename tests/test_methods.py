"""Other methods over TRAK's rows, held against their formulae written out."""

import numpy as np
import pytest
import torch
from tests import runs

from trak.errors import InputError, InputTypeError, ModelIDException
from trak.modelout_functions import AbstractModelOutput
from trak.pipeline.methods import group_matrix
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


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint16", "uint32", "uint64"])
def test_groups_may_be_of_any_integers(dtype):
    group = np.array([3, 0, 1, 4, 2], dtype)
    for members in (group, group[:2], torch.from_numpy(group)):
        found = group_matrix([members], M)
        assert torch.equal(found, group_matrix([members.tolist()], M))


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
    message = r"method must be one of .*'cosine'.*got 'cosin'\. Did you mean cosine"
    with pytest.raises(InputError, match=message):
        traker.scores("exp", "cosin")
    for groups in ([], [[]], [[0, 0]], [[5]], [[-1]], [[0.5]], [0, 1], [[[0], [1, 2]]]):
        with pytest.raises(InputError, match=r"[Gg]roup"):
            traker.scores("exp", "dot", groups=groups)
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match="checkpoint_weights"):
            traker.scores("exp", "dot", checkpoint_weights=weights)
    with pytest.raises(InputError, match="finalize_scores"):
        traker.scores("exp", model_ids=[0])
    with pytest.raises(ModelIDException, match="7"):
        traker.self_influence([7])
    for method in (["dot"], None):
        with pytest.raises(InputError, match="method must be one of"):
            traker.scores("exp", method)
    with pytest.raises(InputError, match=r"method must be one of .*got 'dott'"):
        traker.scores("exp", "dott", with_error=True)
    for groups in (3, iter([[0]]), np.array(3), torch.tensor(3)):
        with pytest.raises(InputTypeError, match="groups must list"):
            traker.scores("exp", "dot", groups=groups)
    for weights in (3, {0: 1, 1: 1}, "12", np.array(1.0), {1, 2}):
        with pytest.raises(InputTypeError, match="checkpoint_weights must list"):
            traker.scores("exp", "dot", checkpoint_weights=weights)
    for ridges in ("3x", torch.tensor(0.1)):
        with pytest.raises(InputTypeError, match="lambda_regs must list"):
            traker.sweep(["exp"], ridges)
    for names in (3, None, np.array("exp")):
        with pytest.raises(InputTypeError, match="exp_names must list"):
            traker.sweep(names)
    with pytest.raises(InputTypeError, match="model_ids must be a list"):
        traker.scores("exp", "dot", model_ids=np.array(0))
    with pytest.raises(ModelIDException, match=r"model_ids is empty: .* \[0, 1\]"):
        traker.scores("exp", "dot", model_ids=[])
    for k in (0, 2.5, "3", True, None):
        for call in (traker.top_k, traker.top_scores):
            with pytest.raises(InputError, match="k must be an integer"):
                call("exp", k)


@pytest.mark.parametrize("answer", ["no", None, 2])
def test_flags_are_yes_or_no(answer, finished):
    traker, _ = finished
    calls = {
        "helpful": [traker.top_k, traker.top_scores],
        "with_error": [traker.scores, traker.top_scores],
        "allow_skip": [traker.finalize_scores],
    }
    for name, functions in calls.items():
        for call in functions:
            with pytest.raises(InputTypeError, match=f"{name} must be True or False"):
                call("exp", **{name: answer})


def test_lists_hold_what_there_is(finished):
    traker, _ = finished
    for method in ("trak", "dot"):
        assert traker.top_scores("exp", 10**12, method=method).indices.shape == (M, N)


def test_weights_belong_to_the_checkpoints_as_they_are_named(finished):
    traker, _ = finished
    one = traker.scores("exp", "dot", model_ids=[1])
    named = traker.scores("exp", "dot", model_ids=[1, 0], checkpoint_weights=[1, 0])
    np.testing.assert_allclose(named, one, rtol=1e-6)
    top = traker.top_scores(
        "exp", 3, method="dot", model_ids=[1, 0], checkpoint_weights=[1, 0]
    )
    only = traker.top_scores("exp", 3, method="dot", model_ids=[1])
    np.testing.assert_array_equal(top.indices, only.indices)
    rates = {1: 1, 0: 0}
    keyed = traker.scores(
        "exp", "dot", model_ids=rates.keys(), checkpoint_weights=rates.values()
    )
    np.testing.assert_array_equal(keyed, named)
    with pytest.raises(InputTypeError, match=r"model_ids is a set .* no order"):
        traker.scores("exp", "dot", model_ids={1, 0}, checkpoint_weights=[1, 0])


def test_another_checkpoint_that_is_not_ready(finished):
    traker, _ = finished
    model, *_ = runs.data("mlp", N, M)
    traker.load_checkpoint(model.state_dict(), model_id=2)
    with pytest.raises(ModelIDException, match=r"name them in model_ids\.$"):
        traker.top_scores("exp", 3, method="dot")
    assert traker.top_scores("exp", 3, method="dot", model_ids=[0, 1]).indices.shape


def test_scores_of_another_ridge_are_read_with_a_warning(finished, tmp_path, caplog):
    traker, _ = finished
    model, *_ = runs.data("mlp", N, M)
    traker.scores("exp")
    assert "not what this run asks for" not in caplog.text
    width = traker.projector.proj_dim
    other = runs.make_traker(model, N, tmp_path, proj_dim=width, lambda_reg="7x")
    other.scores("exp")
    assert "RidgeScoreComputer, lambda_reg='7x'). Call" in caplog.text


class Regression(AbstractModelOutput):
    """Half the squared error; the output is the prediction."""

    def get_output(self, model, weights, buffers, x, y):
        del y
        return torch.func.functional_call(model, (weights, buffers), x[None])[0, 0]

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        x, y = batch
        return (y - torch.func.functional_call(model, (weights, buffers), x)[:, 0])[:, None]


def test_methods_know_which_way_an_example_of_a_regression_pulls(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + M, 3, generator=generator, dtype=torch.float64)
    y = x.sum(1) + torch.randn(N + M, generator=generator, dtype=torch.float64)
    model = torch.nn.Linear(3, 1, bias=False).double()
    weights = torch.linalg.lstsq(x[:N], y[:N, None]).solution.T
    without = []  # predictions of models that lack one example
    for left in range(N):
        keep = [i for i in range(N) if i != left]
        one = torch.linalg.lstsq(x[keep], y[keep, None]).solution
        without.append((x[N:] @ one)[:, 0])
    change = (x[N:] @ weights.T)[:, 0] - torch.stack(without)
    traker = runs.make_traker(
        model, N, tmp_path, task=Regression(), projector=NoOpProjector(), lambda_reg=1e-9
    )
    state = {"weight": weights}
    runs.whole_run(traker, (x[:N], y[:N]), (x[N:], y[N:]), [state])
    for method in ("trak", "relatif", "l_relatif", "unit_norm"):
        scores = traker.scores("exp", method)
        np.testing.assert_array_equal(np.sign(scores), np.sign(change.numpy()))
    dot = traker.scores("exp", "dot")
    np.testing.assert_array_equal(np.sign(traker.scores("exp", "cosine")), np.sign(dot))
    assert (traker.self_influence() > 0).all()


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
