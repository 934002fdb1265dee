"""Batches, row numbers and model outputs in the forms people have them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests import reference
from tests.defects.helpers import (
    N,
    assert_scores,
    data,
    net,
    oracle,
    take,
    tracker,
    weights,
    whole_run,
)
from torch import nn

from trak.errors import AttributionError, InputError, InputTypeError
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer
from trak.modelout_functions import AbstractModelOutput, ImageClassificationModelOutput

COMPUTERS = [None, FunctionalGradientComputer, IterativeGradientComputer]


def started(folder, **options):
    """A TRAKer that waits for its first batch."""
    traker = tracker(folder, **options)
    traker.load_checkpoint(weights(), model_id=0)
    return traker


def assert_rows(traker, rows=range(N)):
    """The store holds the oracle's gradients in these rows, and no others."""
    stored = traker.saver.train_rows(0)
    assert np.flatnonzero(stored.refresh()).tolist() == sorted(rows)
    gradients = reference.gradient_rows(net(), data()[0])
    expected = reference.projected_rows(gradients, traker.projector, 0)[list(rows)]
    np.testing.assert_allclose(stored.array("grads")[list(rows)], expected, rtol=1e-9)


INDS = {
    "int32 array": np.array([7, 2, 19], dtype=np.int32),
    "uint64 array": np.array([7, 2, 19], dtype=np.uint64),
    "uint8 tensor": torch.tensor([7, 2, 19], dtype=torch.uint8),
    "list of tensors": list(torch.tensor([7, 2, 19])),
    "iterator": iter([7, 2, 19]),
}


@pytest.mark.parametrize("form", INDS)
def test_inds_in_further_forms(form, tmp_path):
    traker = started(tmp_path)
    traker.featurize(take(data()[0], [7, 2, 19]), inds=INDS[form])
    assert_rows(traker, [2, 7, 19])


@pytest.mark.parametrize(
    ("inds", "message"),
    [
        (torch.tensor([0.5, 1.0, 2.0]), "integers.*float32"),
        ([torch.tensor(i) for i in (0.0, 1.7, 2.0)], "integers.*float"),
        ([torch.tensor(True), torch.tensor(False), torch.tensor(True)], "integers.*bool"),
        (["0", "1", "2"], "integers"),
        ([None, 1, 2], "integers"),
        ({"a": 1}, "integers"),
        ([[0], [1, 2]], "one list of integers"),
        ({7, 2, 19}, "a set, which has no order"),
    ],
)
def test_inds_that_cannot_be_are_explained(inds, message, tmp_path):
    """A set would permute rows in silence."""
    traker = started(tmp_path)
    with pytest.raises(InputTypeError, match=message):
        traker.featurize(take(data()[0], slice(3)), inds=inds)
    assert not traker.saver.train_rows(0).done.any()


FORMS = {
    "dict": lambda b: {"image": b[0], "label": b[1]},
    "dict, labels": lambda b: {"labels": b[1], "images": b[0]},
    "arrays": lambda b: tuple(part.numpy() for part in b),
    "list of labels": lambda b: (b[0], b[1].tolist()),
    "generator": iter,
    "strided": lambda b: (b[0].T.contiguous().T, b[1].repeat_interleave(2)[::2]),
    "needs grad": lambda b: (b[0].clone().requires_grad_(), b[1]),
    "part of a graph": lambda b: (b[0].clone().requires_grad_() * 1.0, b[1]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("computer", [None, FunctionalGradientComputer])
def test_batches_in_every_form(form, computer, tmp_path):
    traker = started(tmp_path, gradient_computer=computer)
    traker.featurize(FORMS[form](data()[0]), inds=range(N))
    assert_rows(traker)


def ragged(x):
    """A nested tensor of the layout that needs no further library."""
    return torch.nested.nested_tensor(list(x), layout=torch.jagged)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda x, y: (x, nn.functional.one_hot(y)), r"\(24, 3\).*a task of their own"),
        (lambda x, y: (x, y[:, None]), r"its label \[b\]"),
        (lambda x, y: (x, y.float()), r"float32.*labels\.long\(\)"),
        (lambda x, y: (x, torch.full_like(y, -100)), "Sample 0 .* has label -100"),
        (lambda x, y: (x,), "two parts"),
        (lambda x, y: (x, y, y), "two parts.*got 3"),
        (lambda x, y: ({"image": x}, y), r"batch\[0\] is a dict of tensors.*not nested"),
        (lambda x, y: ([x, x[:, :1]], y), r"batch\[0\] is a list of tensors.*not nested"),
        (lambda x, y: ([x] * N, y), r"batch\[0\] is a list of tensors.*not nested"),
        (lambda x, y: (ragged(x), y), r"batch\[0\] must be.*nested.*to_padded_tensor"),
        (lambda x, y: (x.to_sparse(), y), r"batch\[0\] must be.*layout.*to_dense"),
        (lambda x, y: {"image": x}, "labels under one of"),
        (lambda x, y: {"image": x, "label": y, "labels": y}, "labels under one of"),
        (lambda x, y: {"image": x, "text": ["a"] * N}, r"batch\['text'\] is a list.*Drop"),
    ],
)
def test_batches_that_cannot_be_are_explained(wrap, message, tmp_path):
    traker = started(tmp_path)
    with pytest.raises((InputError, InputTypeError), match=message):
        traker.featurize(wrap(*data()[0]), inds=range(N))
    assert not traker.saver.train_rows(0).done.any()


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8])
@pytest.mark.parametrize("computer", COMPUTERS)
def test_labels_of_any_integer_dtype_are_right(dtype, computer, tmp_path):
    """Labels as they come from a file."""
    kind = "iterative_" if computer is IterativeGradientComputer else ""
    options = {"task": f"{kind}image_classification", "gradient_computer": computer}
    traker = tracker(tmp_path, **options)
    train, targets = data()
    batches = [(x, y.to(dtype)) for x, y in (train, targets)]
    found = whole_run(traker, *batches, [weights()])
    assert_scores(found, oracle(traker, train, targets))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_models_with_one_logit_take_labels_of_any_dtype(dtype, tmp_path):
    """2 * 0 - 1 is 255 in uint8."""
    torch.manual_seed(1)
    model = nn.Linear(4, 1).double()
    train, targets = data(classes=2)
    found = [
        whole_run(
            tracker(tmp_path / str(kind), model),
            *[(x, y.to(kind)) for x, y in (train, targets)],
            [model.state_dict()],
        )
        for kind in (torch.int64, dtype)
    ]
    np.testing.assert_array_equal(*found)


class Wrapped(nn.Module):
    """A model that returns something else than a tensor."""

    def __init__(self, wrap):
        super().__init__()
        self.net, self.wrap = net(), wrap

    def forward(self, x):
        return self.wrap(self.net(x))


OUTPUTS = {
    "tuple": lambda logits: (logits, "hidden"),
    "dict": lambda logits: {"logits": logits},
    "object": lambda logits: SimpleNamespace(logits=logits, loss=None),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_model_outputs_in_every_form(form, tmp_path):
    train, targets = data()
    model, plain = Wrapped(OUTPUTS[form]), Wrapped(lambda logits: logits)
    traker = tracker(tmp_path, model)
    states = [model.state_dict()]
    found = whole_run(traker, train, targets, states)
    assert_scores(found, oracle(traker, train, targets, states, model=plain))


def test_an_output_without_logits_is_explained(tmp_path):
    model = Wrapped(lambda logits: {"scores": logits})
    traker = tracker(tmp_path, model)
    traker.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(AttributionError, match="logits.*got dict"):
        traker.featurize(data()[0], inds=range(N))


class Page(AbstractModelOutput):
    """Two methods: no `__init__`, no `@staticmethod`."""

    def get_output(model, weights, buffers, image, label):  # noqa: N805
        return ImageClassificationModelOutput.get_output(
            model, weights, buffers, image, label
        )

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        task = ImageClassificationModelOutput()
        return task.get_out_to_loss_grad(model, weights, buffers, batch)


class Static(Page):
    """With `@staticmethod`."""

    get_output = staticmethod(vars(Page)["get_output"])


class Unrelated:
    """Derives from nothing, with methods that take `self`."""

    def get_output(self, *args):
        return Static.get_output(*args)

    def get_out_to_loss_grad(self, *args):
        return Page().get_out_to_loss_grad(*args)[:, 0]


@pytest.mark.parametrize("task", [Page, Page(), Static, Unrelated])
def test_tasks_of_ones_own(task, tmp_path):
    train, targets = data()
    traker = tracker(tmp_path, task=task)
    found = whole_run(traker, train, targets, [weights()])
    assert_scores(found, oracle(traker, train, targets))


@pytest.mark.parametrize("settings", [5, {"weights": torch.ones(2)}, None])
def test_settings_that_no_store_can_keep_are_explained(settings, tmp_path):
    task = type("Wrong", (Static,), {"settings": lambda self: settings})
    with pytest.raises(InputTypeError, match=r"settings\(\) of Wrong must return a dict"):
        tracker(tmp_path / "store", task=task)
    assert not (tmp_path / "store").exists()


def test_the_iterative_computer_says_which_tasks_it_takes(tmp_path):
    traker = started(tmp_path, gradient_computer=IterativeGradientComputer)
    with pytest.raises(InputError, match="whole batch.*iterative_image_classification"):
        traker.featurize(data()[0], inds=range(N))


WRONG = {
    "get_output: number": lambda f: 3.0,
    "get_output: none": lambda f: None,
    "get_output: vector": lambda f: f.expand(2),
    "get_batch_output: number": lambda f: 3.0,
    "get_batch_output: one": lambda f: f.sum(),
    "get_out_to_loss_grad: none": lambda q: None,
    "get_out_to_loss_grad: one": lambda q: q.mean(),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_a_task_returns_is_checked(what, tmp_path):
    method = what.partition(":")[0]
    base = ImageClassificationModelOutput if "batch" in what else Static

    def wrong(self, *args):
        return WRONG[what](getattr(base(), method)(*args))

    traker = started(tmp_path, task=type("Wrong", (base,), {method: wrong}))
    with pytest.raises((InputError, InputTypeError), match=method):
        traker.featurize(data()[0], inds=range(N))
    assert not traker.saver.train_rows(0).done.any()
