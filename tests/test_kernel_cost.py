"""What the exact kernel costs, and when it is taken or refused."""

import json
import logging
import shutil
from collections import namedtuple

import pytest
import torch
from tests import runs
from tests.test_kernel import N, close, kernel_traker, world
from torch import nn

from trak import TRAKer
from trak.errors import InputError
from trak.gradient_computers import FunctionalGradientComputer
from trak.pipeline import kernel
from trak.projectors import KernelProjector, NoOpProjector, dimension
from trak.projectors.kernel import kernel_cost
from trak.savers.gradient_files import GradientFiles


def test_the_cost_is_told_before_the_first_gradient(tmp_path, caplog, monkeypatch):
    model, train, _, states = world("reader")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with caplog.at_level(logging.INFO):
        traker = kernel_traker(model, tmp_path)
    most = kernel_cost(shapes, N, 8)
    assert f"The exact kernel of {N} examples: at most {most}" in caplog.text
    caplog.clear()
    told = []
    monkeypatch.setattr(
        kernel,
        "KernelCost",
        lambda *a: (
            told.append(most._replace(**dict(zip(most._fields, a, strict=True))))
            or told[-1]
        ),
    )
    runs.featurize(traker, train, states[0])
    files = [GradientFiles(tmp_path / "0/kernel").read(i) for i in range(4)]
    there = 0
    for each in files:
        with each as arrays:
            there += sum(arrays[name].nbytes for name in arrays if arrays[name].ndim)
    rows = traker.saver.train_rows(0).array("grads")
    assert len(told) == 1
    assert there == told[0].gradients < most.gradients
    assert rows.nbytes == told[0].rows == most.rows
    assert told[0].products > 0


def test_the_formula_of_the_cost():
    shapes = {"w": (3, 4), "b": (5,)}
    found = kernel_cost(shapes, 10, 4)
    assert found == (10 * (4 * 17 + 8), 10 * 11 * 4, 55 * 17, 1000 / 6)
    assert found.disk == found.gradients + found.rows
    assert kernel_cost(shapes, 10, 4, positions=1).gradients == 10 * (4 * (7 + 5) + 8)
    assert kernel_cost(shapes, 10, 8, positions=9).gradients == 10 * (8 * 17 + 8)


class Words(nn.Module):
    """A table, and a layer that is smaller multiplied out."""

    def __init__(self, *, tied=False):
        super().__init__()
        self.table = nn.Embedding(400, 8)
        self.layer = nn.Linear(8, 400 if tied else 3)
        if tied:
            self.layer.weight = self.table.weight

    def forward(self, tokens):
        return self.layer(torch.tanh(self.table(tokens))).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_costs_what_the_store_writes(dtype, tmp_path):
    model = Words().to(dtype)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    traker = kernel_traker(model, tmp_path)
    train = torch.randint(0, 400, (N, 6)), torch.randint(0, 3, (N,))
    runs.featurize(traker, train, model.state_dict())
    there = 0
    for path in (tmp_path / "0/kernel").glob("*.npz"):
        with GradientFiles(tmp_path / "0/kernel").read(int(path.stem)) as arrays:
            there += sum(arrays[name].nbytes for name in arrays if arrays[name].ndim)
    size = dtype.itemsize
    expected = kernel_cost(shapes, N, size, positions=6, tables={"table.weight"})
    assert there == expected.gradients == N * (6 * (8 + 8 * size) + 27 * size + 8)
    few = kernel_cost(shapes, N, size, positions=6).gradients
    assert there < few / 10


def test_exact_knows_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(dimension, "FEW", 1000)
    options = {"task": "image_classification", "proj_dim": "exact", "device": "cpu"}

    def chosen(model, **more):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return type(TRAKer(model, save_dir=folder, **options, **more).projector)

    assert chosen(Words(), train_set_size=500) is KernelProjector
    assert chosen(Words(), train_set_size=4000) is NoOpProjector
    # a head's gradient has entries everywhere
    assert chosen(Words(tied=True), train_set_size=500) is NoOpProjector
    whole = FunctionalGradientComputer
    assert chosen(Words(), train_set_size=500, gradient_computer=whole) is NoOpProjector


def test_a_refusal_of_gradients_names_what_may_fit(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    options = {"task": "image_classification", "proj_dim": "exact", "device": "cpu"}
    layer = nn.Linear(100, 100)  # at 64 positions smaller multiplied out
    told = []
    for free in (10**6, 10**5):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        with pytest.raises(InputError, match="Unprojected gradients do not fit") as caught:
            TRAKer(layer, save_dir=tmp_path / "a", train_set_size=100, **options)
        told.append("KernelProjector(100), as exact" in str(caught.value))
    assert told == [True, False]


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    model, train, _, states = world("reader")
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    free = kernel_cost(shapes, N, 8).rows
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    with pytest.raises(InputError, match="does not fit: at least"):
        kernel_traker(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    traker = kernel_traker(model, tmp_path / "b")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 10_000))
    with pytest.raises(InputError, match="gradients of 23 examples do not fit"):
        runs.featurize(traker, train, states[0])
    assert not traker.saver.train_rows(0).refresh().any()
    assert not (tmp_path / "b/0/kernel/0.npz").exists()


def test_exact_takes_the_smaller_form(tmp_path, monkeypatch):
    wide, *_ = world("wide", torch.float32)
    options = {"task": "image_classification", "proj_dim": "exact", "device": "cpu"}
    assert isinstance(
        TRAKer(wide, train_set_size=N, save_dir=tmp_path / "a", **options).projector,
        NoOpProjector,
    )
    monkeypatch.setattr(dimension, "FEW", 1000)
    large = nn.Linear(600, 600)
    taken = TRAKer(large, train_set_size=50, save_dir=tmp_path / "b", **options)
    assert isinstance(taken.projector, KernelProjector)
    assert taken.dtype is torch.float32
    assert taken.proj_dim == 51
    small = TRAKer(nn.Linear(6, 3), train_set_size=50, save_dir=tmp_path / "c", **options)
    assert isinstance(small.projector, NoOpProjector)
    assert dimension.kernel_is_smaller({"w": (600, 600)}, 50, 4)
    assert not dimension.kernel_is_smaller({"w": (600, 600)}, 400_000, 4)
    assert not dimension.kernel_is_smaller({"w": (100, 100)}, 50, 4)  # 64 positions
    given = kernel_traker(wide, tmp_path / "d", use_half_precision=True)
    assert given.dtype is torch.float32


def test_attribute_with_a_strength_to_choose(tmp_path, monkeypatch):
    wide = world("wide", n=60)
    found = []
    for few in (1, 1 << 40):
        monkeypatch.setattr(dimension, "FEW", few)
        monkeypatch.setattr(dimension, "POSITIONS", 1)
        options = {"proj_dim": "exact", "use_half_precision": False}
        found.append(runs.one_call(wide, tmp_path / str(few), **options))
    kinds = [
        json.loads((tmp_path / str(few) / "metadata.json").read_text())["JL matrix type"]
        for few in (1, 1 << 40)
    ]
    assert kinds == ["kernel", "na"]
    close(found[0], found[1], 1e-8)
