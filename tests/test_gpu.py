"""Everything on a CUDA device, against the oracle and against the same run on the CPU.

`pytest -m gpu` on a machine that has one; skipped elsewhere.
"""

import logging

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from tests.test_precision import rounded

import trak
from trak import TRAKer
from trak.evaluation import lds
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
)
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import BasicProjector, CudaProjector, NoOpProjector, make_projector
from trak.score_computers.gram import dual_gram, primal_gram

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
N, M = 30, 6
ENGINES = [HookGradientComputer, FunctionalGradientComputer]
KINDS = ["rademacher", "normal", "sparse", "factored", "hadamard", "masked"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}  # convolutions round to TF32


def moved(batch, device=GPU):
    return tuple(part.to(device) for part in batch)


def world(name, dtype=torch.float64, n=N, m=M, count=2):
    model, train, targets = runs.data(name, n, m, dtype)
    return model, train, targets, cases.checkpoints(name, count, dtype)


def call(model, train, targets, states, folder, **options):
    """The one call, where the model and the batches are."""
    return np.array(
        trak.attribute(
            model,
            task="image_classification",
            train=runs.split(train, 9),
            targets=runs.split(targets, 4),
            checkpoints=states,
            save_dir=folder,
            progress=False,
            **options,
        )
    )


def on_both(name, folder, dtype=torch.float64, **options):
    """The one call's scores on the GPU and on the CPU."""
    model, train, targets, states = world(name, dtype)
    expected = call(model, train, targets, states, folder / "cpu", device="cpu", **options)
    model, train, targets = model.to(GPU), moved(train), moved(targets)
    return call(model, train, targets, states, folder / "gpu", **options), expected


def close(found, expected, bound):
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", cases.NAMES)
def test_gradients_are_the_oracles(name, engine, dtype):
    model, batch = cases.make(name, 5, dtype)
    expected = reference.gradient_rows(model, batch)
    computer = engine(model.to(GPU), ImageClassificationModelOutput())
    found = computer.compute_per_sample_grad(moved(batch))
    for key, rows in found.items():
        assert rows.device.type == "cuda"
        error = (rows.reshape(len(rows), -1).cpu().double() - expected[key]).norm()
        assert error <= TOLERANCE[dtype] * expected[key].norm()


def test_gradients_of_one_backward_pass_a_sample():
    model, batch = cases.make("mlp", 5)
    expected = reference.gradient_rows(model, batch)

    class Task(ImageClassificationModelOutput):
        @staticmethod
        def get_output(model, weights, buffers, images, labels):
            logits = model(images)
            right = logits.gather(1, labels[:, None])[:, 0]
            wrong = logits.scatter(1, labels[:, None], -torch.inf)
            return right - wrong.logsumexp(1)

    computer = IterativeGradientComputer(model.to(GPU), Task())
    found = computer.compute_per_sample_grad(moved(batch)).cpu()
    torch.testing.assert_close(found, torch.cat(list(expected.values()), dim=1))


@pytest.mark.parametrize("name", ["cnn", "reused", "encoder"])
def test_rules_are_used_as_on_the_cpu(name):
    # in float32, where convolutions round to TF32: no layer may fall back to the slow way
    model, batch = cases.make(name, 5, torch.float32)
    covered = []
    for device in ("cpu", "cuda"):
        computer = HookGradientComputer(model.to(device), ImageClassificationModelOutput())
        computer.compute_per_sample_grad(moved(batch, device))
        covered.append(computer.coverage())
    assert covered[0] == covered[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mlp", "cnn", "tied"])
def test_rows_are_projections_of_the_oracles_gradients(name, kind, tmp_path):
    model, train, _, states = world(name)
    gradients = reference.gradient_rows(model, train)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"device": "cuda", "proj_dim": 40, "projector": kind}
    traker = runs.make_traker(model.to(GPU), N, tmp_path, **options)
    runs.featurize(traker, moved(train), state)
    rows = torch.from_numpy(traker.saver.train_rows(0).array("grads").copy()).double()
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    on_cpu = make_projector(shapes, 40, 0, torch.device("cpu"), kind)
    assert on_cpu.settings() == traker.projector.settings()
    expected = reference.projected_rows(gradients, on_cpu, 0)
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("projector", [CudaProjector, BasicProjector])
def test_a_dense_projection_has_the_same_entries_as_on_the_cpu(projector):
    rows = torch.randn(5, 300)
    found = projector(300, 64, 1, "rademacher", "cuda").project(rows.to(GPU), model_id=2)
    expected = BasicProjector(300, 64, 1, "rademacher", "cpu").project(rows, model_id=2)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["mlp", "cnn", "tied", "encoder"])
def test_scores_are_the_oracles(name, tmp_path):
    model, train, targets, states = world(name)
    traker = runs.make_traker(model.to(GPU), N, tmp_path, device="cuda")
    found = runs.whole_run(traker, moved(train), moved(targets), states)
    traker.projector.device = torch.device("cpu")
    traker.projector.free_memory()
    pieces = runs.oracle(model.cpu(), train, targets, states, traker.projector)
    close(found, reference.trak_scores(pieces), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_store_has_the_same_scores_on_both_devices(dtype, tmp_path):
    model, train, targets, states = world("mlp", torch.float32)
    options = {"row_dtype": dtype, "lambda_reg": "auto"}
    traker = runs.make_traker(model.to(GPU), N, tmp_path, device="cuda", **options)
    found = runs.whole_run(traker, moved(train), moved(targets), states).copy()
    again = runs.make_traker(model.cpu(), N, tmp_path, **options)
    again.finalize_features()
    close(again.finalize_scores("exp"), found, 1e-6)
    for method in ("dot", "cosine", "relatif", "l_relatif", "unit_norm"):
        close(traker.scores("exp", method), again.scores("exp", method), 1e-4)
    errors = [one.scores("exp", with_error=True).errors for one in (traker, again)]
    close(*errors, 1e-3)
    close(traker.self_influence(), again.self_influence(), 1e-4)
    tops = [one.top_scores("exp", 4, with_error=True) for one in (traker, again)]
    np.testing.assert_array_equal(tops[0].indices, tops[1].indices)
    tops = [one.top_k("exp", 4) for one in (traker, again)]
    np.testing.assert_array_equal(tops[0].indices, tops[1].indices)
    one, other = (t.sweep(["exp"], ["1x", "auto"]) for t in (traker, again))
    for key, scores in one.items():
        close(scores, other[key], 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whitening": 0.0, "curvature": False},
        {"whitening": 1.0},
        {"proj_dim": 40},
        {"proj_dim": 40, "whitening": 0.5, "projector": "factored"},
        {"proj_dim": "exact"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_the_one_call_on_both_devices(name, options, tmp_path):
    found, expected = on_both(name, tmp_path, **options)
    close(found, expected, 1e-5)


def test_the_exact_kernel(tmp_path):
    # more parameters than examples, so that no rows of gradients are kept
    found, expected = on_both("encoder", tmp_path, proj_dim="exact", row_dtype="float64")
    close(found, expected, 1e-8)


@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_float32_models(name, tmp_path):
    found, expected = on_both(name, tmp_path, torch.float32, lambda_reg="1x", whitening=0.5)
    close(found, expected, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "cnn", "encoder"])
def test_half_precision_models(name, dtype, tmp_path):
    model, train, targets, states = world(name, dtype)
    on_gpu = model.to(GPU), moved(train), moved(targets), states
    found = call(*on_gpu, tmp_path / "a", lambda_reg="1x", whitening=0.0)
    states = [{k: v.float() for k, v in state.items()} for state in states]
    batches = [(x.float(), y) for x, y in (train, targets)]
    exact = call(
        model.cpu().float(),
        *batches,
        states,
        tmp_path / "b",
        lambda_reg="1x",
        whitening=0.0,
    )
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.99


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_around_the_one_call(dtype, tmp_path):
    model, train, targets, states = world("mlp", torch.float32)
    exact = call(model, train, targets, states, tmp_path / "a", device="cpu", whitening=0.5)
    with torch.autocast("cuda", dtype):
        on_gpu = model.to(GPU), moved(train), moved(targets), states
        found = call(*on_gpu, tmp_path / "b", whitening=0.5)
    assert np.corrcoef(found.ravel(), exact.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("row_dtype", ["float16", "int8", "float32"])
def test_scores_do_not_depend_on_tf32(row_dtype, tmp_path):
    model, train, targets, states = world("mlp", torch.float32)
    model, train, targets = model.to(GPU), moved(train), moved(targets)
    options = {"device": "cuda", "row_dtype": row_dtype, "lambda_reg": "0.01x"}
    traker = runs.make_traker(model, N, tmp_path, **options)
    expected = runs.whole_run(traker, train, targets, states).copy()
    best = traker.scores("exp", "unit_norm")
    again = runs.make_traker(model, N, tmp_path, **(options | {"lambda_reg": "0.02x"}))
    again.finalize_features()
    again = runs.make_traker(model, N, tmp_path, **options)
    with rounded("high"):
        again.finalize_features()
        np.testing.assert_array_equal(again.finalize_scores("exp"), expected)
        np.testing.assert_array_equal(again.scores("exp", "unit_norm"), best)


@pytest.mark.parametrize("gram", [primal_gram, dual_gram])
def test_gram_matrices(gram):
    rows = torch.randn(400, 130)
    expected = gram(rows.double())
    torch.testing.assert_close(gram(rows.to(GPU)).cpu(), expected)


def test_batches_and_models_may_be_on_different_devices(tmp_path):
    model, train, targets, states = world("mlp")
    expected = call(model, train, targets, states, tmp_path / "a", device="cpu")
    on_gpu = {k: v.to(GPU) for k, v in states[0].items()}, states[1]
    found = call(model.to(GPU), train, targets, on_gpu, tmp_path / "b")
    close(found, expected, 1e-6)
    found = call(model, moved(train), moved(targets), states, tmp_path / "c", device="cpu")
    close(found, expected, 1e-6)


class Large(torch.nn.Module):
    """A layer whose per-sample gradients fill memory."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 4096)
        self.scale = torch.nn.Parameter(0.01 * torch.randn(4096, 512))
        self.head = torch.nn.Linear(512, 3)

    def forward(self, x):
        return self.head(self.first(x).relu() @ self.scale)


def test_a_batch_that_does_not_fit_is_split(tmp_path, caplog):
    model = Large().eval()
    train = torch.randn(64, 6), torch.randint(0, 3, (64,))
    expected = reference.gradient_rows(model, [part[:3] for part in train])
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    options = {"device": "cuda", "proj_dim": 32, "projector": "sparse"}
    traker = runs.make_traker(
        model.to(GPU), 64, tmp_path, gradient_computer=FunctionalGradientComputer, **options
    )
    state = model.state_dict()
    used = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction((used + (400 << 20)) / total)
    try:
        with caplog.at_level(logging.WARNING):
            runs.featurize(traker, moved(train), state, size=64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "Memory ran out" in caplog.text
    rows = torch.from_numpy(traker.saver.train_rows(0).array("grads")[:3].copy())
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    on_cpu = make_projector(shapes, 32, 0, torch.device("cpu"), "sparse")
    wanted = reference.projected_rows(expected, on_cpu, 0).float()
    torch.testing.assert_close(rows, wanted, rtol=1e-3, atol=1e-4)


def test_random_states_are_as_before(tmp_path):
    model, train, targets, states = world("mlp")
    before = torch.cuda.get_rng_state()
    call(model.to(GPU), moved(train), moved(targets), states, tmp_path)
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_installation_check(capsys):
    trak.test_install(use_fast_jl=True)
    assert "checked on cuda" in capsys.readouterr().out


def test_the_gpu_is_the_default(tmp_path):
    model = torch.nn.Linear(6, 3).to(GPU)
    traker = TRAKer(model, "image_classification", 4, tmp_path, projector=NoOpProjector())
    assert traker.device.type == "cuda"


def test_evaluation_takes_tensors_of_the_gpu():
    rng = np.random.default_rng(0)
    masks = rng.random((20, 30)) < 0.5
    outputs, scores = rng.normal(size=(20, 4)), rng.normal(size=(30, 4))
    found = lds(*(torch.as_tensor(a).to(GPU) for a in (scores, masks, outputs)))
    assert found.value == lds(scores, masks, outputs).value
