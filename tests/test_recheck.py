"""Stored rows against a model whose code changed since."""

import logging

import pytest
import torch
from tests import runs
from torch import nn

from trak.modelout_functions import ImageClassificationModelOutput

N = 12


class Net(nn.Module):
    def __init__(self, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.activation = activation

    def forward(self, x):
        return self.second(self.activation(3 * self.first(x)))


class Edited(ImageClassificationModelOutput):
    """The task of the same name after its author has changed it."""

    def get_out_to_loss_grad(self, *args):
        return super().get_out_to_loss_grad(*args) / 2


Edited.__qualname__ = "ImageClassificationModelOutput"


def batch():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, 6, generator=generator),
        torch.randint(0, 3, (N,), generator=generator),
    )


def again(folder, model, caplog, **options):
    """Featurizes anew in a folder; returns what was warned of."""
    caplog.clear()
    traker = runs.make_traker(model, N, folder, **options)
    with caplog.at_level(logging.WARNING, "trak"):
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for start in range(0, N, 4):
            part = tuple(p[start : start + 4] for p in batch())
            traker.featurize(part, inds=range(start, start + 4))
    assert traker.saver.train_rows(0).done.all()
    return [r.getMessage() for r in caplog.records if "loss weight Q" in r.getMessage()]


@pytest.fixture
def folder(tmp_path):
    traker = runs.make_traker(Net(torch.relu), N, tmp_path)
    traker.load_checkpoint(traker.model.state_dict(), model_id=0)
    traker.featurize(tuple(p[:8] for p in batch()), inds=range(8))
    return tmp_path


def test_the_same_code_says_nothing(folder, caplog):
    assert not again(folder, Net(torch.relu), caplog)
    assert not again(folder, Net(torch.relu), caplog)


def test_another_forward_pass_is_warned_of_once(folder, caplog):
    (said,) = again(folder, Net(torch.tanh), caplog)
    assert "row 0" in said
    assert "another save_dir" in said


def test_another_loss_weight_is_warned_of(folder, caplog):
    assert again(folder, Net(torch.relu), caplog, task=Edited())
