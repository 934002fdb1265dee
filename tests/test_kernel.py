"""The exact kernel, against explicit gradients and against rows of them."""

import json

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch import nn

from trak.blocks import FactoredBlock
from trak.errors import (
    InputError,
    NumericalError,
    PhaseError,
    StoreCorruptedError,
    StoreMismatchError,
)
from trak.gradient_computers import AbstractGradientComputer, FunctionalGradientComputer
from trak.pipeline import earlier
from trak.projectors import KernelProjector, NoOpProjector
from trak.savers import AbstractSaver
from trak.savers.gradient_files import GradientFiles
from trak.savers.journal import Journal

N, M = 23, 5


CLOSE = {torch.float64: 1e-8, torch.float32: 1e-4}


class Reader(nn.Module):
    """Tokens, positions, attention, a head tied to nothing; any length up to 12."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.places = nn.Embedding(12, 8)
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)
        self.value = nn.Linear(8, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 3)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        weights = (self.query(x) @ self.key(x).mT / 8**0.5).softmax(-1)
        return self.head(self.norm(weights @ self.value(x)).mean(1))


class Wide(nn.Module):
    """More parameters than examples by far, and layers that factors are smaller for."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 60)
        self.second = nn.Linear(60, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def world(name, dtype=torch.float64, n=N, m=M):
    """Model, training batch, target batch and two state dicts."""
    if name in cases.NAMES:
        return (*runs.data(name, n, m, dtype), cases.checkpoints(name, 2, dtype))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = (Reader() if name == "reader" else Wide()).to(dtype).eval()
        x = torch.randint(0, 50, (n + m, 6))
        if name == "wide":
            x = torch.randn(n + m, 40, dtype=dtype)
        batch = x, torch.randint(0, 3, (n + m,))
        states = [type(model)().to(dtype).state_dict() for _ in range(2)]
    return model, tuple(p[:n] for p in batch), tuple(p[n:] for p in batch), states


def kernel_traker(model, folder, n=N, **options):
    projector = KernelProjector(n, "cpu")
    return runs.make_traker(model, n, folder, **({"projector": projector} | options))


def rows_traker(model, folder, n=N, **options):
    return runs.make_traker(
        model, n, folder, projector=NoOpProjector(device="cpu"), **options
    )


def close(found, expected, rtol):
    error = np.abs(np.asarray(found) - np.asarray(expected)).max()
    assert error <= rtol * np.abs(np.asarray(expected)).max(), error


def both(tmp_path, name, dtype=torch.float64, **options):
    """Two runs of the same, by the kernel and by rows of gradients."""
    model, train, targets, states = world(name, dtype)
    trakers = [
        make(model, tmp_path / make.__name__, **options)
        for make in (kernel_traker, rows_traker)
    ]
    for traker in trakers:
        for model_id, state in enumerate(states):
            if options.get("whitening"):
                traker.load_checkpoint(state, model_id=model_id)
                for batch in runs.split(train, 9):
                    traker.fit_whitening(batch=batch)
            runs.featurize(traker, train, state, model_id)
        traker.finalize_features()
        for model_id, state in enumerate(states):
            runs.score(traker, targets, state, model_id)
        traker.finalize_scores("exp")
    return trakers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mlp", "cnn", "reader", "wide", "tied", "encoder"])
def test_scores_are_those_of_explicit_gradients(name, dtype, tmp_path):
    model, train, targets, states = world(name, dtype)
    traker = kernel_traker(model, tmp_path)
    found = runs.whole_run(traker, train, targets, states)
    expected = reference.trak_scores(runs.oracle(model, train, targets, states, None))
    assert traker.proj_dim == N + 1
    close(found, expected, CLOSE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["cnn", "reader", "wide", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"whitening": 0.5},
        {"curvature": True},
        {"lambda_reg": "auto"},
        {"whitening": 0.5, "curvature": True, "lambda_reg": "auto"},
    ],
    ids=["whitened", "curved", "auto", "all"],
)
def test_every_option_gives_the_scores_of_unprojected_rows(name, dtype, options, tmp_path):
    mine, rows = both(tmp_path, name, dtype, **options)
    close(mine.scores("exp"), rows.scores("exp"), CLOSE[dtype])


def test_inner_products_are_exact_and_the_factor_is_triangular(tmp_path):
    model, train, targets, states = world("reader")
    traker = kernel_traker(model, tmp_path)
    runs.whole_run(traker, train, targets, states[:1])
    model.load_state_dict(states[0])
    g, h = (
        reference.flat_rows(reference.gradient_rows(model, b)).numpy()
        for b in (train, targets)
    )
    phi = traker.saver.train_rows(0).array("grads")
    psi = traker.saver.target_rows("exp", 0).array("grads")
    close(phi @ phi.T, g @ g.T, 1e-10)
    close(phi @ psi.T, g @ h.T, 1e-10)
    close((psi**2).sum(1), (h**2).sum(1), 1e-10)  # the last column
    assert (psi[:, -1] > 0).all()
    assert not phi[:, -1].any()
    assert not np.triu(phi, 1).any()


@pytest.mark.parametrize("method", ["dot", "cosine", "relatif", "l_relatif", "unit_norm"])
def test_methods_that_need_norms(method, tmp_path):
    mine, rows = both(tmp_path, "wide")
    close(mine.scores("exp", method), rows.scores("exp", method), 1e-6)


def test_what_is_read_back(tmp_path):
    mine, rows = both(tmp_path, "wide")
    close(mine.self_influence(), rows.self_influence(), 1e-6)
    top, expected = (t.top_scores("exp", k=4) for t in (mine, rows))
    np.testing.assert_array_equal(top.indices, expected.indices)
    close(top.scores, expected.scores, 1e-6)
    sets = [t.sweep(["exp"], [0.1, "3x", None]) for t in (mine, rows)]
    for key in sets[0]:
        close(sets[0][key], sets[1][key], 1e-8)
    errors = [t.scores("exp", with_error=True).errors for t in (mine, rows)]
    close(*errors, 1e-6)


def test_one_checkpoint_tells_no_error_without_a_projection(tmp_path):
    model, train, targets, states = world("wide")
    traker = kernel_traker(model, tmp_path)
    runs.whole_run(traker, train, targets, states[:1])
    with pytest.raises(InputError, match="no random projection"):
        traker.scores("exp", with_error=True)


def test_batches_of_other_lengths(tmp_path):
    model, _, _, states = world("reader")
    torch.manual_seed(1)
    batches = [
        (torch.randint(0, 50, (b, s)), torch.randint(0, 3, (b,)))
        for b, s in ((9, 4), (8, 11), (6, 1))
    ]
    targets = torch.randint(0, 50, (M, 7)), torch.randint(0, 3, (M,))
    traker = kernel_traker(model, tmp_path)
    traker.load_checkpoint(states[0], model_id=0)
    for batch in batches:
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    runs.score(traker, targets, states[0])
    model.load_state_dict(states[0])
    rows = [reference.gradient_rows(model, b) for b in (*batches, targets)]
    *phi, psi = (reference.flat_rows(r) for r in rows)
    q = torch.cat([reference.loss_weights(model, b) for b in batches])
    expected = reference.trak_scores([(torch.cat(phi), psi, q)])
    close(traker.finalize_scores("exp"), expected, 1e-8)


def test_rows_go_on_with_another_batch_size_after_a_crash(tmp_path, monkeypatch):
    model, train, targets, states = world("wide")
    whole = runs.whole_run(kernel_traker(model, tmp_path / "a"), train, targets, states[:1])
    broken = kernel_traker(model, tmp_path / "b")
    broken.load_checkpoint(states[0], model_id=0)
    batches = runs.split(train, 5)
    for batch in batches[:2]:
        broken.featurize(batch, num_samples=5)
    with monkeypatch.context() as patch:  # gradients and rows are there, the record is not
        patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(OSError("cut")))
        with pytest.raises(OSError, match="cut"):
            broken.featurize(batches[2], num_samples=5)
    assert (tmp_path / "b/0/kernel/2.npz").exists()
    again = kernel_traker(model, tmp_path / "b")
    found = runs.whole_run(again, train, targets, states[:1])  # in batches of 7
    close(found, whole, 1e-10)
    names = {path.name for path in (tmp_path / "b/0/kernel").iterdir()}
    assert names == {*(f"{i}.npz" for i in range(5)), "lock"}  # 5, 5, 4, 7, 2


def test_examples_may_come_in_any_order_and_from_several_runs(tmp_path):
    model, train, targets, states = world("wide")
    whole = runs.whole_run(kernel_traker(model, tmp_path / "a"), train, targets, states[:1])
    takers = [kernel_traker(world("wide")[0], tmp_path / "b") for _ in range(2)]
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    for traker in takers:
        traker.load_checkpoint(states[0], model_id=0)
    for turn, inds in enumerate(order.split(4)):
        takers[turn % 2].featurize(tuple(p[inds] for p in train), inds=inds)
    takers[0].finalize_features()
    runs.score(takers[0], targets, states[0])
    close(takers[0].finalize_scores("exp"), whole, 1e-10)


def overtaken(tmp_path, elsewhere, here):
    """Featurizes a batch while another process featurizes one of its own."""
    states = world("wide")[3]
    first, second = (kernel_traker(world("wide")[0], tmp_path) for _ in range(2))
    for traker in (first, second):
        traker.load_checkpoint(states[0], model_id=0)
    run = second.gradient_computer.run

    def slow(*args):
        run(*args)
        second.gradient_computer.run = run
        first.featurize(elsewhere, inds=range(len(elsewhere[1])))

    second.gradient_computer.run = slow
    second.featurize(here, inds=range(len(here[1])))
    return second


@pytest.mark.parametrize("size", [3, 7, 10])
def test_what_another_process_wrote_meanwhile_is_not_written_twice(size, tmp_path):
    _, train, targets, states = world("wide")
    batches = [runs.split(train, count)[0] for count in (size, 7)]
    traker = overtaken(tmp_path / "one", *batches)
    assert traker.saver.train_rows(0).refresh().sum() == max(size, 7)
    files = traker.saver.gradient_files(0)
    assert files.path(1).exists() == (size < 7)
    assert not files.path(2).exists()
    runs.featurize(traker, train, states[0])
    traker.finalize_features()
    runs.score(traker, targets, states[0])
    whole = kernel_traker(world("wide")[0], tmp_path / "other")
    expected = runs.whole_run(whole, train, targets, states[:1])
    close(traker.finalize_scores("exp"), expected, 1e-10)


def test_other_examples_that_another_process_wrote_meanwhile_are_refused(tmp_path):
    train = world("wide")[1]
    there, here = runs.split(train, 7)[:2]
    with pytest.raises(StoreMismatchError, match="row 0 is not the one"):
        overtaken(tmp_path, there, here)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [4, 23])
def test_duplicates_and_examples_without_a_gradient(dtype, size, tmp_path):
    model, train, targets, states = world("wide", dtype)
    model.second.bias.requires_grad_(False)  # so that an input of zeros has no gradient
    model.first.bias.requires_grad_(False)
    states[0]["first.bias"].zero_()
    x, y = (p.clone() for p in train)
    x[3] = x[10] = x[19] = 0
    x[11:16], y[11:16] = x[2], y[2]
    x[20], y[20] = x[0], y[0]
    scores = []
    for make in (kernel_traker, rows_traker):
        traker = make(model, tmp_path / make.__name__)
        runs.featurize(traker, (x, y), states[0], size=size)
        traker.finalize_features()
        runs.score(traker, targets, states[0])
        scores.append(np.array(traker.finalize_scores("exp")))
        if make is kernel_traker:
            phi = traker.saver.train_rows(0).array("grads")
            assert not phi[[3, 10, 19]].any()
            empty = np.flatnonzero(~phi.any(axis=0)).tolist()
            assert empty == [3, 10, 11, 12, 13, 14, 15, 19, 20, N]
    close(scores[0], scores[1], CLOSE[dtype])
    close(scores[0][11:16], scores[0][[2] * 5], CLOSE[dtype])


def test_far_more_examples_than_directions(tmp_path):
    # most pivots are lost in rounding, which must not grow from one to the next
    model, train, targets, states = world("mlp", torch.float32, n=300)
    traker = kernel_traker(model, tmp_path / "a", n=300)
    found = runs.whole_run(traker, train, targets, states)
    expected = reference.trak_scores(runs.oracle(model, train, targets, states, None))
    close(found, expected, 1e-3)


def test_a_store_is_scored_later(tmp_path):
    model, train, targets, states = world("reader")
    first = kernel_traker(model, tmp_path)
    expected = np.array(runs.whole_run(first, train, targets, states))
    later = kernel_traker(model, tmp_path)
    close(later.finalize_scores("exp"), expected, 1e-14)
    for model_id, state in enumerate(states):
        runs.score(later, targets, state, model_id, exp_name="again", size=3)
    close(later.finalize_scores("again"), expected, 1e-10)


def test_gradients_that_are_read_from_files(tmp_path, monkeypatch):
    model, train, targets, states = world("reader")
    expected = runs.whole_run(kernel_traker(model, tmp_path / "a"), train, targets, states)
    monkeypatch.setattr(earlier, "IN_MEMORY", 0)
    monkeypatch.setattr(earlier, "_STRIP", 40)  # several strips
    read = []
    real = GradientFiles.read
    monkeypatch.setattr(GradientFiles, "read", lambda s, n: read.append(n) or real(s, n))
    found = runs.whole_run(kernel_traker(model, tmp_path / "b"), train, targets, states)
    close(found, expected, 1e-10)
    assert read.count(0) > 6


class Alone(AbstractGradientComputer):
    """The least that a computer of one's own must have."""

    def __init__(self, model, task, grad_dim=None, dtype=None, device=None, grad_wrt=None):
        super().__init__(model, task, grad_dim, dtype, device)
        self.inner = FunctionalGradientComputer(model, task)

    def load_model_params(self, model):
        self.inner.load_model_params(model)

    def compute_per_sample_grad(self, batch):
        grads = self.inner.compute_per_sample_grad(batch)
        return torch.cat([g.flatten(1) for g in grads.values()], dim=1)

    def compute_loss_grad(self, batch):
        return self.inner.compute_loss_grad(batch)


@pytest.mark.parametrize("computer", [FunctionalGradientComputer, Alone])
@pytest.mark.parametrize("whitening", [None, 0.5])
def test_computers_that_multiply_gradients_out(computer, whitening, tmp_path):
    options = {"gradient_computer": computer, "whitening": whitening}
    mine, rows = both(tmp_path, "reader", **options)
    close(mine.scores("exp"), rows.scores("exp"), 1e-8)
    with np.load(tmp_path / "kernel_traker/0/kernel/0.npz") as file:
        kinds = {name.split("/")[1] for name in file.files if "/" in name}
    assert kinds == {"rows", "gradient"}


def test_layers_are_never_multiplied_out(tmp_path, monkeypatch):
    model, train, targets, states = world("wide")
    traker = kernel_traker(model, tmp_path)
    traker.load_checkpoint(states[0], model_id=0)
    batches = runs.split(train, 6)
    traker.featurize(batches[0], num_samples=6)  # is held against exact gradients
    monkeypatch.setattr("trak.gradient_computers.ways.disagreeing", lambda *_, **__: set())
    largest = []

    def watched(self, left, right):
        raise AssertionError("multiplied out")

    monkeypatch.setattr(FactoredBlock, "sketch", watched)
    real = torch.Tensor.addmm_
    monkeypatch.setattr(
        torch.Tensor,
        "addmm_",
        lambda s, a, b, **k: largest.append(a.numel()) or real(s, a, b, **k),
    )
    for batch in batches[1:]:
        traker.featurize(batch, num_samples=len(batch[0]))
    assert max(largest) <= 6 * 60  # biases
    for number in range(4):
        with np.load(tmp_path / f"0/kernel/{number}.npz", allow_pickle=False) as file:
            shapes = {name[2:]: file[name].shape for name in file.files}
            b = len(file["0/rows"])
        assert shapes["left/first.weight"] == (b, 1, 60)
        assert shapes["right/first.weight"] == (b, 1, 40)
        assert shapes["gradient/first.bias"] == (b, 60)
        assert "gradient/first.weight" not in shapes


def test_the_store_says_what_it_is(tmp_path):
    model, train, _, states = world("wide")
    traker = kernel_traker(model, tmp_path)
    runs.featurize(traker, train, states[0])
    metadata = json.loads((tmp_path / "metadata.json").read_text())
    assert metadata["format"] == 3
    assert metadata["projection"] == {"kind": "kernel", "version": 1, "proj_dim": N + 1}
    with pytest.raises(StoreMismatchError):
        rows_traker(model, tmp_path)
    (tmp_path / "0/kernel/1.npz").unlink()
    with pytest.raises(StoreCorruptedError, match="files are lost"):
        again = kernel_traker(model, tmp_path)
        again.finalize_features()
        runs.score(again, train, states[0])


@pytest.mark.parametrize("damage", ["bytes", "format", "array"])
def test_damaged_gradients_are_named(damage, tmp_path, monkeypatch):
    model, train, targets, states = world("wide")
    traker = kernel_traker(model, tmp_path)
    runs.featurize(traker, train, states[0])
    traker.finalize_features()
    path = tmp_path / "0/kernel/0.npz"
    if damage == "bytes":
        path.write_bytes(path.read_bytes()[:300])
    else:
        with np.load(path) as file:
            arrays = dict(file)
        if damage == "format":
            arrays["format"] = np.array(2)
        else:
            arrays["0/left/first.weight"] = np.array([None], dtype=object)
        np.savez(path, **arrays)
    expected = "is of format 2" if damage == "format" else "is lost or damaged"
    with pytest.raises(StoreCorruptedError, match=expected):
        runs.score(kernel_traker(model, tmp_path), targets, states[0])


def test_what_is_refused(tmp_path):
    model, train, _, states = world("wide")
    with pytest.raises(InputError, match="train_set_size is 23"):
        kernel_traker(model, tmp_path, projector=KernelProjector(22, "cpu"))
    for row_dtype in ("float16", "bfloat16", "int8"):
        with pytest.raises(InputError, match="too coarse"):
            kernel_traker(model, tmp_path / "coarse", row_dtype=row_dtype)
    assert not (tmp_path / "coarse").exists()
    with pytest.raises(InputError, match="one by one"):
        KernelProjector(3, "cpu").project(torch.zeros(2, 3), 0)
    traker = kernel_traker(model, tmp_path)
    with pytest.raises(PhaseError, match="depend on those that are stored"):
        traker.pipeline.maker.rows(train, 0, list(range(N)))
    with pytest.raises(PhaseError, match="does not define gradient_files"):
        AbstractSaver.gradient_files(traker.saver, 0)
    traker.load_checkpoint(states[0], model_id=0)
    train[0][4, 0] = torch.nan
    with pytest.raises(NumericalError, match="sample 4 is not finite at model_id=0"):
        traker.featurize(train, num_samples=N)
    assert not (tmp_path / "0/kernel").exists()


def test_memory_that_runs_out_half_way(tmp_path, monkeypatch):
    model, train, targets, states = world("wide")
    expected = runs.whole_run(kernel_traker(model, tmp_path / "a"), train, targets, states)
    traker = kernel_traker(model, tmp_path / "b")
    real, failed = type(traker.pipeline.maker).finite_weights, []

    def fails(self, batch, numbers):  # after the gradients of the piece were kept
        if len(batch[0]) > 2:
            failed.append(len(batch[0]))
            raise torch.cuda.OutOfMemoryError
        return real(self, batch, numbers)

    monkeypatch.setattr(type(traker.pipeline.maker), "finite_weights", fails)
    found = runs.whole_run(traker, train, targets, states)
    assert failed
    close(found, expected, 1e-10)
