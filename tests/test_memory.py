"""Memory that runs out: fewer samples at once, and the same rows."""

import logging

import pytest
import torch
from tests import runs

from trak.errors import NotEnoughMemoryError
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer

ALLOCATOR = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."
FAILURES = [torch.cuda.OutOfMemoryError("CUDA out of memory."), RuntimeError(ALLOCATOR)]


def hungry(kind, failure, most, at):
    """A computer that fails with more than `most` samples, at a point of its work."""

    class Hungry(kind):
        sizes = None

        def run(self, batch, sink, layout):
            size = len(batch[0])
            self.sizes.append(size)
            emitted = []

            def count(block):
                sink(block)
                emitted.append(block.name)
                if at == "sink" and size > most and len(emitted) == 2:
                    raise failure

            if at == "forward" and size > most:
                raise failure
            super().run(batch, count, layout)

        def compute_loss_grad(self, batch):
            if at == "loss" and len(batch[0]) > most:
                raise failure
            return super().compute_loss_grad(batch)

    Hungry.sizes = []
    return Hungry


@pytest.mark.parametrize("at", ["forward", "sink", "loss"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("kind", [FunctionalGradientComputer, HookGradientComputer])
def test_batches_are_halved_and_nothing_counts_twice(kind, failure, at, tmp_path, caplog):
    model, train, _ = runs.data("cnn", 24, 1)
    plain = runs.make_traker(model, 24, tmp_path / "plain", gradient_computer=kind)
    runs.featurize(plain, train, model.state_dict(), size=12)
    computer = hungry(kind, failure, 4, at)
    traker = runs.make_traker(model, 24, tmp_path / "small", gradient_computer=computer)
    with caplog.at_level(logging.INFO, "trak"):
        runs.featurize(traker, train, model.state_dict(), size=12)
    for kind in ("grads", "out_to_loss"):
        found, expected = (t.saver.train_rows(0).array(kind) for t in (traker, plain))
        assert abs(found - expected).max() <= 1e-12 * abs(expected).max()
    lines = [r for r in caplog.records if "Memory ran out" in r.getMessage()]
    assert len(lines) == 1
    assert "12 samples at once; going on with 3" in lines[0].getMessage()
    if at != "loss":  # the size is remembered
        assert computer.sizes == [12, 6, *[3] * 8]


def test_a_single_sample_that_does_not_fit_is_an_error(tmp_path):
    model, train, _ = runs.data("mlp", 6, 1)
    computer = hungry(HookGradientComputer, FAILURES[0], 0, "forward")
    traker = runs.make_traker(model, 6, tmp_path, gradient_computer=computer)
    with pytest.raises(NotEnoughMemoryError, match="single sample"):
        runs.featurize(traker, train, model.state_dict(), size=6)
    assert computer.sizes == [6, 3, 1]
    assert not traker.saver.train_rows(0).done.any()


def test_other_errors_are_not_taken_for_missing_memory(tmp_path):
    model, train, _ = runs.data("mlp", 6, 1)
    computer = hungry(HookGradientComputer, RuntimeError("shape"), 0, "forward")
    traker = runs.make_traker(model, 6, tmp_path, gradient_computer=computer)
    with pytest.raises(RuntimeError, match="shape"):
        runs.featurize(traker, train, model.state_dict(), size=6)
    assert computer.sizes == [6]


def test_a_model_whose_layers_run_out_of_memory(tmp_path):
    class Large(torch.nn.Linear):
        def forward(self, x):
            if len(x) > 5:
                raise FAILURES[0]
            return super().forward(x)

    model, train, _ = runs.data("mlp", 16, 1)
    state = model.state_dict()
    plain = runs.make_traker(model, 16, tmp_path / "plain")
    runs.featurize(plain, train, state, size=16)
    model[0].__class__ = Large
    traker = runs.make_traker(
        model, 16, tmp_path / "small", gradient_computer=HookGradientComputer
    )
    runs.featurize(traker, train, state, size=16)
    found, expected = (t.saver.train_rows(0).array("grads") for t in (traker, plain))
    assert abs(found - expected).max() <= 1e-12 * abs(expected).max()


def test_the_hook_computer_takes_more_samples_at_once_than_all_gradients_allow(
    monkeypatch, tmp_path
):
    model, train, _ = runs.data("mlp", 40, 1)
    width = sum(p.numel() for p in model.parameters())
    largest = max(p.numel() for p in model.parameters())
    monkeypatch.setattr("trak.pipeline.project.GRADIENT_BYTES", 4 * 8 * width)
    computer = hungry(HookGradientComputer, None, 1000, "never")
    traker = runs.make_traker(model, 40, tmp_path, gradient_computer=computer)
    runs.featurize(traker, train, model.state_dict(), size=40)
    assert computer.sizes[:2] == [8, 8 * width // largest]


def test_whitened_coordinates_take_whole_batches(monkeypatch, tmp_path):
    model, train, _ = runs.data("mlp", 40, 1)
    width = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr("trak.pipeline.project.GRADIENT_BYTES", 4 * 8 * width)
    computer = hungry(HookGradientComputer, None, 1000, "never")
    traker = runs.make_traker(
        model, 40, tmp_path, gradient_computer=computer, whitening=0.5
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.fit_whitening(train)
    fitted = len(computer.sizes)
    traker.featurize(train, num_samples=40)
    assert traker.projector.kind == "leading"
    assert computer.sizes[fitted:] == [40]
