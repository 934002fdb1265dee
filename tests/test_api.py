"""The names, arguments and behaviour that scripts written for `traker` rely on."""

import inspect
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests import cases, reference, runs

import trak
from trak import TRAKer
from trak.errors import InputError
from trak.projectors import NoOpProjector
from trak.utils import get_matrix_mult, get_num_params, vectorize

# every argument of traker 0.3.2 with its default; `device` and `lambda_reg` differ on
# purpose (docs/differences.md)
UPSTREAM_ARGUMENTS = {
    "model": inspect.Parameter.empty,
    "task": inspect.Parameter.empty,
    "train_set_size": inspect.Parameter.empty,
    "save_dir": "./trak_results",
    "load_from_save_dir": True,
    "device": None,
    "gradient_computer": None,  # upstream: FunctionalGradientComputer; here the fastest
    "projector": None,
    "saver": None,
    "score_computer": None,
    "proj_dim": "auto",
    "logging_level": logging.INFO,
    "use_half_precision": True,
    "proj_max_batch_size": 32,
    "projector_seed": 0,
    "grad_wrt": None,
    "lambda_reg": "auto",
}
UPSTREAM_NAMES = {
    "trak": "TRAKer test_install __version__ VERSION",
    "trak.modelout_functions": """AbstractModelOutput ImageClassificationModelOutput
        CLIPModelOutput TextClassificationModelOutput
        IterativeImageClassificationModelOutput TASK_TO_MODELOUT""",
    "trak.gradient_computers": """AbstractGradientComputer FunctionalGradientComputer
        IterativeGradientComputer""",
    "trak.projectors": """ProjectionType AbstractProjector NoOpProjector
        BasicSingleBlockProjector BasicProjector CudaProjector ChunkedCudaProjector""",
    "trak.score_computers": """AbstractScoreComputer BasicSingleBlockScoreComputer
        BasicScoreComputer""",
    "trak.savers": "AbstractSaver MmapSaver ModelIDException",
    "trak.utils": """test_install parameters_to_vector get_num_params is_not_buffer
        vectorize get_output_memory get_free_memory get_matrix_mult_standard
        get_matrix_mult_blockwise get_matrix_mult get_parameter_chunk_sizes""",
    "trak.traker": "TRAKer",
}
METHODS = {
    "load_checkpoint": "checkpoint model_id _allow_featurizing_already_registered",
    "featurize": "batch inds num_samples",
    "finalize_features": "model_ids del_grads",
    "start_scoring_checkpoint": "exp_name checkpoint model_id num_targets",
    "score": "batch inds num_samples",
    "finalize_scores": "exp_name model_ids allow_skip",
    "init_projector": "projector proj_dim proj_max_batch_size",
}


def test_constructor_arguments_their_order_and_defaults():
    parameters = list(inspect.signature(TRAKer).parameters.values())
    found = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert list(found.items()) == list(UPSTREAM_ARGUMENTS.items())


@pytest.mark.parametrize("method", METHODS)
def test_method_arguments(method):
    parameters = list(inspect.signature(getattr(TRAKer, method)).parameters)
    assert parameters == ["self", *METHODS[method].split()]


@pytest.mark.parametrize("module", UPSTREAM_NAMES)
def test_names_are_where_upstream_has_them(module):
    found = __import__(module, fromlist=["x"])
    for name in UPSTREAM_NAMES[module].split():
        assert hasattr(found, name), name


def test_installation_check(capsys):
    trak.test_install(use_fast_jl=False)
    trak.utils.test_install(use_fast_jl=False)
    assert capsys.readouterr().out.count("TRAK is installed correctly!") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without CUDA")
def test_installation_check_says_what_a_gpu_check_needs():
    with pytest.raises(InputError, match="use_fast_jl=False"):
        trak.test_install()


@pytest.fixture
def finished(tmp_path):
    model, train, targets = runs.data("mlp", 30, 4)
    traker = runs.make_traker(model, 30, tmp_path)
    scores = runs.whole_run(traker, train, targets, cases.checkpoints("mlp", 2))
    return traker, train, targets, scores


def test_third_party_tools_can_score_from_the_inside(finished):
    """What wrappers do: gradients, projection, features and Q by hand."""
    traker, _, targets, _ = finished
    traker.saver.load_current_store(1)
    assert traker.saver.current_model_id == 1
    grads = traker.gradient_computer.compute_per_sample_grad(batch=targets)
    rows = traker.projector.project(grads, model_id=traker.saver.current_model_id)
    rows /= traker.normalize_factor
    features = torch.as_tensor(traker.saver.current_store["features"])
    scores = torch.zeros(30, 4, dtype=features.dtype)
    traker.score_computer.get_scores(features, rows, accumulator=scores)
    scores *= torch.as_tensor(traker.saver.current_store["out_to_loss"])
    by_traker = traker.finalize_scores("exp", model_ids=[1])
    np.testing.assert_allclose(scores.numpy(), by_traker, rtol=1e-6, atol=1e-12)


def test_the_current_store_answers_by_upstreams_names(finished):
    traker, train, targets, scores = finished
    store = traker.saver.current_store
    assert set(store) >= {"grads", "out_to_loss", "features", "exp_grads", "exp_scores"}
    assert store["grads"].shape == (30, 16)
    assert store["features"].shape == (30, 16)
    assert store["out_to_loss"].shape == (30, 1)
    assert store["is_featurized"].shape == (30, 1)
    assert store["is_featurized"].all()
    assert store["exp_grads"].shape == (4, 16)
    assert np.array_equal(store["exp_scores"], scores)
    q = reference.loss_weights(traker.model, train).numpy()
    np.testing.assert_allclose(store["out_to_loss"], q, rtol=1e-9)
    with pytest.raises(KeyError):
        store["nonsense"]
    assert traker.saver.model_ids[0] == {"is_featurized": 1, "is_finalized": 1}
    assert traker.saver.experiments["exp"]["num_targets"] == len(targets[0])
    assert float(traker.normalize_factor) == pytest.approx(traker.num_params_for_grad**0.5)


def test_features_follow_the_checkpoint_that_is_current(finished):
    traker, *_ = finished
    for model_id in (0, 1, 0):
        traker.saver.load_current_store(model_id)
        phi = traker.saver.current_store["grads"]
        ridge = np.square(phi).sum(1).mean()
        expected = phi @ np.linalg.inv(phi.T @ phi + ridge * np.eye(16))
        np.testing.assert_allclose(
            traker.saver.current_store["features"], expected, rtol=1e-6
        )


def test_reading_back(finished, tmp_path):
    traker, _, _, scores = finished
    again = runs.make_traker(traker.model, 30, tmp_path)
    assert np.array_equal(again.scores("exp"), scores)
    assert [c.model_id for c in again.checkpoints()] == [0, 1]
    assert all(c.is_finalized and c.num_featurized == 30 for c in again.checkpoints())
    (experiment,) = again.experiments()
    assert experiment.name == "exp"
    assert experiment.num_scored == {0: 4, 1: 4}
    assert experiment.model_ids == (0, 1)
    top = again.top_k("exp", k=3)
    assert np.array_equal(top.indices, np.argsort(-scores, axis=0, kind="stable")[:3].T)
    worst = again.top_k("exp", k=3, helpful=False)
    assert np.array_equal(worst.indices[:, 0], np.argmin(scores, axis=0))


def test_cpu_means_the_same_as_string_and_as_device(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    state = [model.state_dict()]
    found = [
        np.array(
            runs.whole_run(
                runs.make_traker(model, 12, tmp_path / str(j), device=device),
                train,
                targets,
                state,
            )
        )
        for j, device in enumerate(["cpu", torch.device("cpu"), None])
    ]
    assert np.array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-6)


@pytest.mark.parametrize(
    "form", [list, np.array, torch.tensor, lambda r: torch.tensor(r)[:, None], tuple]
)
def test_inds_in_any_form_and_order(form, tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    state = model.state_dict()
    plain = runs.make_traker(model, 12, tmp_path / "plain")
    expected = np.array(runs.whole_run(plain, train, targets, [state]))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    traker = runs.make_traker(model, 12, tmp_path / "inds")
    traker.load_checkpoint(state, model_id=0)
    for part in order.split(5):
        traker.featurize([p[part] for p in train], inds=form(part.tolist()))
    traker.finalize_features()
    traker.start_scoring_checkpoint("exp", state, 0, num_targets=3)
    for j in (2, 0, 1):
        traker.score([p[j : j + 1] for p in targets], inds=form([j]))
    np.testing.assert_allclose(traker.finalize_scores("exp"), expected, rtol=1e-9)


def test_utils():
    model, _ = cases.make("tied", 1)
    assert get_num_params(model) == 35
    grads = {"a": torch.randn(3, 2, 2), "b": torch.randn(3)}
    rows = vectorize(grads)
    assert torch.equal(rows, torch.cat([grads["a"].flatten(1), grads["b"][:, None]], 1))
    into = torch.zeros(3, 5)
    assert vectorize(grads, into, device="cpu") is into
    assert torch.equal(into, rows)
    a, b = torch.randn(7, 4), torch.randn(5, 4)
    for blockwise in (False, True):
        found = get_matrix_mult(a, b, batch_size=3, use_blockwise=blockwise)
        torch.testing.assert_close(found, a @ b.T)
    assert get_matrix_mult(a, b, target_dtype=torch.float64).dtype is torch.float64
    bound, chunks = trak.utils.get_parameter_chunk_sizes(torch.nn.Linear(10, 10), 2**26)
    assert (bound, chunks) == (63, [100, 10])


def test_custom_noop_projector_takes_the_gradients_width(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path, projector=NoOpProjector())
    assert traker.proj_dim == get_num_params(model)
    runs.whole_run(traker, train, targets, [model.state_dict()])


def test_finalize_scores_returns_a_writable_array_whose_file_stays(finished):
    traker, _, _, scores = finished
    before = np.array(scores)
    scores *= 0
    assert np.array_equal(traker.scores("exp"), before)


def test_warnings_are_seen_where_nobody_sets_up_logging():
    script = """
import logging, trak
log = logging.getLogger("trak.pipeline.ranks_of_scores")
log.info("hardly worth reading")
log.warning("mostly noise")
"""
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["mostly noise"]


def test_upstreams_readme_keywords(tmp_path):
    model, train, targets = runs.data("mlp", 12, 3)
    traker = runs.make_traker(model, 12, tmp_path)
    assert traker.ckpt_loaded == "no ckpt loaded"
    traker.load_checkpoint(model.state_dict(), model_id=5)
    assert traker.ckpt_loaded == 5
    traker.featurize(batch=train, num_samples=12)
    traker.finalize_features(model_ids=[5], del_grads=False)
    traker.start_scoring_checkpoint(
        checkpoint=model.state_dict(), exp_name="e", model_id=5, num_targets=3
    )
    traker.score(batch=targets, num_samples=3)
    assert traker.finalize_scores(exp_name="e", model_ids=[5]).shape == (12, 3)
