"""Models that answer differently every time are told of, and no others."""

import logging
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import trak
from trak.errors import StoreMismatchError

N = 24


class Dropping(nn.Module):
    """Its dropout may know of evaluation mode."""

    def __init__(self, *, knows):
        super().__init__()
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 3)
        self.knows = knows

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return self.last(dropout(hidden, 0.5, training=self.training or not self.knows))


class Drawing(nn.Linear):
    """Draws a number that it does not use, as layer drop may."""

    def forward(self, x):
        torch.rand([])
        return super().forward(x)


def featurized(model, path, task="image_classification", **options):
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    y = torch.arange(N) % 3
    traker = trak.TRAKer(
        model,
        task,
        train_set_size=N,
        save_dir=path,
        proj_dim=16,
        use_half_precision=False,
        **options,
    )
    traker.load_checkpoint(model.state_dict(), 0)
    traker.featurize(batch=(x[:16], y[:16]), num_samples=16)
    traker.featurize(batch=(x[16:], y[16:]), num_samples=N - 16)
    return traker


@pytest.mark.parametrize(
    "computer", [None, trak.gradient_computers.FunctionalGradientComputer]
)
def test_random_models_are_told_of_once(computer, tmp_path, caplog):
    options = {} if computer is None else {"gradient_computer": computer}
    with caplog.at_level(logging.WARNING):
        featurized(Dropping(knows=False), tmp_path, **options)
    told = [r.getMessage() for r in caplog.records if "random" in r.getMessage()]
    assert len(told) == 1
    assert "training=self.training" in told[0]


class Small(trak.modelout_functions.ImageClassificationModelOutput):
    """Outputs in a unit in which all are small, as of regressions."""

    def get_output(self, *args):
        return 1e-6 * super().get_output(*args)

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]))


def test_small_outputs_are_told_of_too(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        featurized(
            Dropping(knows=False),
            tmp_path,
            task=Small(),
            gradient_computer=trak.gradient_computers.FunctionalGradientComputer,
        )
    assert sum("The model is random" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("kind", ["dropout", "drawing", "plain"])
def test_other_models_are_not(kind, tmp_path, caplog):
    models = {
        "dropout": lambda: Dropping(knows=True),
        "drawing": lambda: Drawing(6, 3),
        "plain": lambda: nn.Linear(6, 3),
    }
    with caplog.at_level(logging.WARNING):
        featurized(models[kind](), tmp_path)
    assert not [r for r in caplog.records if "random" in r.getMessage()]


def test_the_random_state_stays(tmp_path):
    model = Dropping(knows=False)
    state = torch.get_rng_state()
    featurized(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_one_call_tells_too(tmp_path, caplog):
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    batches = [(x, torch.arange(N) % 3)]
    model = Dropping(knows=False)
    with caplog.at_level(logging.WARNING):
        trak.attribute(
            model,
            task="image_classification",
            train=batches,
            targets=batches,
            checkpoints=[model.state_dict()],
            save_dir=tmp_path,
            progress=False,
        )
    assert sum("The model is random" in r.getMessage() for r in caplog.records) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_single_samples_of_random_models_are_not_blamed_on_picking(resumed, tmp_path):
    torch.manual_seed(0)  # or dropout may show at once that no rule fits
    x = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    model = Dropping(knows=False)

    def featurize():
        traker = trak.TRAKer(model, "image_classification", N, tmp_path, proj_dim=16)
        traker.load_checkpoint(model.state_dict(), 0)
        for j in range(N):
            traker.featurize(batch=(x[j : j + 1], torch.tensor([j % 3])), inds=[j])

    if resumed:
        with suppress(StoreMismatchError):
            featurize()
    with pytest.raises(StoreMismatchError, match="random: outputs of the same samples"):
        featurize()


class NoisyWeights(trak.modelout_functions.ImageClassificationModelOutput):
    """Its loss weights, and nothing else, are drawn."""

    def get_out_to_loss_grad(self, *args):
        return super().get_out_to_loss_grad(*args) * torch.rand(())


def test_random_loss_weights_are_told_of_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        featurized(nn.Linear(6, 3), tmp_path, task=NoisyWeights())
    told = [r.getMessage() for r in caplog.records if "random" in r.getMessage()]
    assert len(told) == 1
    assert "get_out_to_loss_grad" in told[0]
