"""Scores do not depend on how a caller lets products be rounded."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from tests import cases, runs

import trak
from trak.gradient_computers import FunctionalGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput
from trak.precision import full_precision

N, M = 60, 6


@contextmanager
def rounded(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def medium():
    return rounded("medium")


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


class Apart(ImageClassificationModelOutput):
    """Not under autocast itself: what the library computes is looked at alone."""

    def get_output(self, *args):
        with torch.autocast("cpu", enabled=False):
            return ImageClassificationModelOutput.get_output(*args)

    def get_batch_output(self, *args):
        with torch.autocast("cpu", enabled=False):
            return super().get_batch_output(*args)

    def get_out_to_loss_grad(self, *args):
        with torch.autocast("cpu", enabled=False):
            return super().get_out_to_loss_grad(*args)


@pytest.fixture
def world():
    model, train, targets = runs.data("mlp", N, M, torch.float32)
    return model, train, targets, cases.checkpoints("mlp", 2, torch.float32)


def one_call(world, folder, setting, **options):
    model, train, targets, states = world
    with setting():
        return trak.attribute(
            model,
            task=Apart(),
            train=runs.split(train, 9),
            targets=runs.split(targets, 4),
            checkpoints=states,
            save_dir=folder,
            progress=False,
            **options,
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whitening": 1.0},
        {"proj_dim": 200},
        {"proj_dim": 200, "row_dtype": "int8", "projector": "rademacher"},
        {"proj_dim": 40, "projector": "leading", "whitening": 0.5},
        {"gradient_computer": FunctionalGradientComputer, "proj_dim": 200},
    ],
    ids=str,
)
def test_autocast_around_the_one_call_is_for_the_model(options, world, tmp_path):
    expected = one_call(world, tmp_path / "a", nullcontext, **options)
    found = one_call(world, tmp_path / "b", autocast, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("setting", [autocast, medium])
@pytest.mark.parametrize("method", ["trak", "dot", "relatif", "unit_norm"])
def test_scores_do_not_depend_on_it(setting, method, world, tmp_path):
    model, train, targets, states = world

    def scores(folder, setting):
        options = {"proj_dim": 100, "row_dtype": "float16", "lambda_reg": "0.1x"}
        traker = runs.make_traker(model, N, folder, **options)
        for number, state in enumerate(states):
            runs.featurize(traker, train, state, number)
        with setting():
            traker.finalize_features()
        for number, state in enumerate(states):
            runs.score(traker, targets, state, number)
        with setting():
            traker.finalize_scores("exp")
            best = traker.top_scores("exp", 5, method=method)
            errors = traker.scores("exp", with_error=True).errors
            own = traker.self_influence()
            return traker.scores("exp", method), best.scores, errors, own

    every = scores(tmp_path / "b", setting), scores(tmp_path / "a", nullcontext)
    for found, expected in zip(*every, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_setting_is_as_before(precision):
    one, other = torch.randn(64, 512), torch.randn(512, 64)
    exact = (one.double() @ other.double()).float()
    with rounded(precision):
        with autocast(), full_precision():
            assert not torch.is_autocast_enabled("cpu")
            torch.testing.assert_close(one @ other, exact, rtol=1e-4, atol=1e-4)
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert torch.get_float32_matmul_precision() == precision


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.9's switch"
)
def test_the_newer_switches_are_as_before():
    switch = torch.backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        with full_precision():
            assert switch.fp32_precision == "ieee"
        assert switch.fp32_precision == "bf16"
    finally:
        switch.fp32_precision = before


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "device": lambda: torch.device("meta"),  # stands in for a GPU: nothing is made there
}


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"whitening": 0.5, "proj_dim": 40},
        {"proj_dim": 40, "projector": "masked", "row_dtype": "int8"},
        {"proj_dim": "exact"},
    ],
    ids=str,
)
def test_torchs_defaults_make_no_difference(options, defaults, world, tmp_path):
    expected = one_call(world, tmp_path / "a", nullcontext, **options)
    found = one_call(world, tmp_path / "b", DEFAULTS[defaults], **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_results_are_read_whatever_torchs_defaults_are(defaults, world, tmp_path):
    model, train, targets, states = world
    traker = runs.make_traker(model, N, tmp_path, proj_dim=24, lambda_reg="auto")
    runs.whole_run(traker, train, targets, states)

    def read():
        errors = traker.scores("exp", with_error=True)
        ranked = traker.top_scores("exp", 3, with_error=True)
        groups = traker.scores("exp", "relatif", groups=[[0, 1], [2]])
        sweep = traker.sweep(["exp"], ["1x"])["exp", "1x"]
        own = traker.self_influence()
        return (
            errors.errors,
            ranked.rank_low,
            groups,
            sweep,
            own,
            traker.top_k("exp").scores,
        )

    with DEFAULTS[defaults]():
        found = read()
    for one, other in zip(found, read(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)
