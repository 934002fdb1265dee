"""Checkpoints that do not fit, and weights that change after they were loaded."""

import numpy as np
import pytest
import torch
from tests import runs
from tests.defects.helpers import (
    M,
    N,
    data,
    featurize,
    net,
    tracker,
    weights,
)
from torch import nn

from trak import attribute
from trak.digests import checksum, state_digest
from trak.errors import AttributionError, InputError, PhaseError, StoreMismatchError
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer

REFUSED = {
    "missing": (lambda s: s.pop("2.bias"), r"missing: 2\.bias"),
    "shape": (lambda s: s.update({"2.bias": torch.zeros(4)}), r"2\.bias: shape \(4,\)"),
    "extra": (lambda s: s.update({"4.bias": torch.zeros(4)}), r"not in the model: 4\.bias"),
    "array": (lambda s: s.update({"2.bias": s["2.bias"].numpy()}), r"2\.bias: a ndarray"),
    "meta": (lambda s: s.update({"2.bias": s["2.bias"].to("meta")}), r"2\.bias: on the m"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("scoring", [False, True])
def test_a_refused_checkpoint_leaves_nothing_behind(kind, scoring, tmp_path):
    traker = tracker(tmp_path)
    if scoring:
        featurize(traker, data()[0], weights())
    files = sorted(tmp_path.rglob("*"))
    state = weights(1)
    change, message = REFUSED[kind]
    change(state)
    with pytest.raises(InputError, match=message):
        if scoring:
            traker.start_scoring_checkpoint("exp", state, 0, num_targets=M)
        else:
            traker.load_checkpoint(state, model_id=1)
    assert sorted(tmp_path.rglob("*")) == files
    assert traker.experiments() == []
    for name, value in traker.model.state_dict().items():
        assert torch.equal(value, weights(0)[name])


@pytest.mark.parametrize("what", ["path", "module", "nested", "pairs"])
def test_a_checkpoint_that_is_no_state_dict_is_explained(what, tmp_path):
    """A file name, a module, a training checkpoint with the weights inside."""
    given = {
        "path": "model.pt",
        "module": net(),
        "nested": {"state_dict": weights(), "epoch": 3},
        "pairs": list(weights().items()),
    }[what]
    with pytest.raises(AttributionError, match=r"state.dict"):
        tracker(tmp_path).load_checkpoint(given, model_id=0)
    assert not (tmp_path / "0").exists()


def step(make):
    def change(model):
        optimizer = make(model.parameters())
        inputs, labels = data()[0]
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return change


def new_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() + 1.0)


CHANGES = {
    "SGD": step(lambda p: torch.optim.SGD(p, 0.1)),
    "fused AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "data.add_": lambda model: model[0].weight.data.add_(1.0),
    "data =": lambda model: setattr(model[0].weight, "data", -model[0].weight.data),
    "one weight": lambda model: model[0].weight.data[2, 3].add_(1e-12),
    "order": lambda model: model[0].weight.data.copy_(model[0].weight.data.flip(0)),
    "new parameter": new_parameter,
    "new layer": lambda model: model.append(nn.Linear(3, 3).double()),
}


@pytest.mark.parametrize(
    "computer", [None, FunctionalGradientComputer, IterativeGradientComputer]
)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_after_loading_are_noticed(change, computer, tmp_path):
    """Fused optimizers and `parameter.data` go round torch's version counters."""
    kind = "iterative_" if computer is IterativeGradientComputer else ""
    options = {"task": f"{kind}image_classification", "gradient_computer": computer}
    model = net()
    traker = tracker(tmp_path, model, **options)
    traker.load_checkpoint(weights(), model_id=0)
    CHANGES[change](model)
    with pytest.raises(PhaseError, match="weights changed.*load_checkpoint"):
        traker.featurize(data()[0], inds=range(N))
    assert not traker.saver.train_rows(0).done.any()


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("size", [0, 1, 7, 256 * 8 + 13])
def test_the_checksum_covers_every_entry_of_any_tensor(dtype, size):
    whole = torch.zeros(size + 3, dtype=dtype)
    tensors = [whole[3:], whole[:0], torch.zeros((), dtype=dtype), whole.clone()[3:]]
    before = checksum(tensors)
    assert torch.equal(checksum([t.clone() for t in tensors]), before)
    for place in {3, size // 2 + 3, size + 2} if size else ():
        whole[place] = 1
        assert not torch.equal(checksum(tensors), before)
        whole[place] = 0
    tensors[3][-1:] = 1
    assert not size or not torch.equal(checksum(tensors), before)


BUFFERS = {
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.5, 0, torch.qint8),
    "channels": lambda x: torch.quantize_per_channel(
        x.float(), torch.full((4,), 0.5), torch.zeros(4).long(), 0, torch.qint8
    ),
}


class Fixed(nn.Sequential):
    """Multiplies its inputs by a matrix of some kind that is not trained."""

    def __init__(self, matrix):
        super().__init__(*net())
        self.register_buffer("matrix", matrix)

    def forward(self, x):
        matrix = self.matrix.dequantize() if self.matrix.is_quantized else self.matrix
        strided = matrix.layout is torch.strided
        matrix = (matrix if strided else matrix.to_dense()).to(x.dtype)
        return super().forward(x @ matrix)


@pytest.mark.filterwarnings("ignore:Sparse CS. tensor support:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize.*deprecated")
@pytest.mark.parametrize("kind", BUFFERS)
def test_buffers_of_any_kind(kind, tmp_path):
    matrix = 2 * torch.eye(4, dtype=torch.float64)
    model = Fixed(BUFFERS[kind](matrix))
    (x, y), (targets, labels) = data()
    arguments = {"task": "image_classification", "progress": False, "lambda_reg": 0.1}
    found, expected = (
        attribute(
            each, train=[(x * by, y)], targets=[(targets * by, labels)],
            save_dir=tmp_path / str(by), checkpoints=[each.state_dict()], **arguments,
        )
        for each, by in ((model, 1), (net(), 2))
    )  # fmt: skip
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    other = BUFFERS[kind](3 * torch.eye(4, dtype=torch.float64))
    assert not torch.equal(checksum([model.matrix]), checksum([other]))
    assert state_digest({"m": model.matrix}) == state_digest({"m": BUFFERS[kind](matrix)})
    assert state_digest({"m": model.matrix}) != state_digest({"m": other})


def test_state_dicts_that_share_memory_with_the_model_are_noticed(tmp_path):
    """`model.state_dict()` is a view: loading checkpoint 1 changes checkpoint 0's."""
    train, _ = data()
    model = net(0)
    traker = tracker(tmp_path, model)
    first = model.state_dict()
    featurize(traker, train, first, model_id=0)
    featurize(traker, train, weights(1), model_id=1)
    with pytest.raises(StoreMismatchError, match="model_id=0"):
        traker.start_scoring_checkpoint("exp", first, 0, num_targets=M)


def test_two_trakers_over_one_model_do_not_mix(tmp_path):
    model = net()
    one, other = tracker(tmp_path / "a", model), tracker(tmp_path / "b", model)
    one.load_checkpoint(weights(0), model_id=0)
    other.load_checkpoint(weights(1), model_id=0)
    with pytest.raises(PhaseError, match="weights changed"):
        one.featurize(data()[0], inds=range(N))
    runs.featurize(other, data()[0], weights(1))
