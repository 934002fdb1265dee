"""A tiny model and short runs for the tests of this folder."""

import numpy as np
import torch
from tests import reference, runs
from torch import nn

from trak import TRAKer

N, M = 24, 5  # training examples, targets


def net(seed: int = 0) -> nn.Module:
    """An MLP with 51 parameters; each seed is another checkpoint."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return model.double().eval()


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """The checkpoint of `net(seed)`."""
    return {name: value.clone() for name, value in net(seed).state_dict().items()}


def data(classes: int = 3):
    """Training batch and target batch, each (inputs, labels)."""
    generator = torch.Generator().manual_seed(1000)
    inputs = torch.randn(N + M, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (N + M,), generator=generator)
    return (inputs[:N], labels[:N]), (inputs[N:], labels[N:])


def take(batch, index):
    """Some rows of a batch."""
    return tuple(part[index] for part in batch)


def tracker(folder, model=None, **options) -> TRAKer:
    """A TRAKer over the tiny model."""
    model = net() if model is None else model
    defaults = {
        "model": model,
        "task": "image_classification",
        "train_set_size": N,
        "save_dir": folder,
        "device": "cpu",
        "proj_dim": 12,
        "use_half_precision": False,
    }
    if "score_computer" not in options:
        defaults["lambda_reg"] = "1x"  # the oracle's
    return TRAKer(**(defaults | options))


def featurize(traker, train, state, model_id=0):
    """A checkpoint's training pass, and its factor."""
    runs.featurize(traker, train, state, model_id)
    traker.finalize_features(model_ids=[model_id])


def whole_run(traker, train, targets, states):
    """Scores of all checkpoints together."""
    return np.array(runs.whole_run(traker, train, targets, states))


def oracle(traker, train, targets, states=None, ridge=None, model=None):
    """What a whole run must give, from gradients one by one and written-out matrices."""
    states = [weights()] if states is None else states
    model = net() if model is None else model
    rows = runs.oracle(model, train, targets, states, traker.projector)
    return reference.trak_scores(rows, ridge)


def assert_scores(found, expected, tolerance=1e-8):
    """Both are equal, and no accident: no target's scores are all zero."""
    assert found.shape == expected.shape
    assert (np.abs(expected).max(axis=0) > 0).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()
