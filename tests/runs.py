"""Whole runs for the tests: featurize, finalize and score cases from tests/cases.py."""

import numpy as np
import torch
from tests import cases, reference

import trak
from trak import TRAKer


def split(batch, size):
    """A batch cut into batches of `size`."""
    return [tuple(p[i : i + size] for p in batch) for i in range(0, len(batch[0]), size)]


def make_traker(model, n, folder, **options):
    defaults = {
        "task": "image_classification",
        "device": "cpu",
        "proj_dim": 16,
        "use_half_precision": False,
    }
    if "score_computer" not in options:
        defaults["lambda_reg"] = "1x"  # the oracle's
    return TRAKer(
        model=model,
        train_set_size=n,
        save_dir=folder,
        **(defaults | options),
    )


def featurize(traker, train, state, model_id=0, size=7):
    traker.load_checkpoint(state, model_id=model_id)
    for batch in split(train, size):
        traker.featurize(batch=batch, num_samples=len(batch[0]))


def score(traker, targets, state, model_id=0, size=7, exp_name="exp"):
    traker.start_scoring_checkpoint(
        exp_name=exp_name, checkpoint=state, model_id=model_id, num_targets=len(targets[0])
    )
    for batch in split(targets, size):
        traker.score(batch=batch, num_samples=len(batch[0]))


def whole_run(traker, train, targets, states):
    """Scores of all checkpoints together."""
    for model_id, state in enumerate(states):
        featurize(traker, train, state, model_id)
    traker.finalize_features()
    for model_id, state in enumerate(states):
        score(traker, targets, state, model_id)
    return traker.finalize_scores(exp_name="exp")


def data(name, n, m, dtype=torch.float64):
    """Model, training batch and target batch of a case."""
    model, batch = cases.make(name, n + m, dtype)
    return model, tuple(p[:n] for p in batch), tuple(p[n:] for p in batch)


def oracle(model, train, targets, states, projector, names=None):
    """What `reference.trak_scores` takes: (Phi, targets, Q) of every checkpoint."""
    per_checkpoint = []
    for model_id, state in enumerate(states):
        model.load_state_dict(state)
        gradients = [reference.gradient_rows(model, b, names) for b in (train, targets)]
        if projector is None:
            rows = [reference.flat_rows(g) for g in gradients]
        else:
            rows = [reference.projected_rows(g, projector, model_id) for g in gradients]
        per_checkpoint.append((*rows, reference.loss_weights(model, train)))
    return per_checkpoint


def one_call(world, folder, **options):
    """Scores of a world of `conftest.py` by `trak.attribute`."""
    model, train, targets, states = world
    defaults = {
        "task": "image_classification",
        "checkpoints": states,
        "train": split(train, 9),
        "targets": split(targets, 4),
        "progress": False,
    }
    return trak.attribute(model, save_dir=folder, **(defaults | options))


def other_weights(model):
    return {name: value + 0.1 for name, value in model.state_dict().items()}


def expect(traker, train, targets, states, found):
    per_checkpoint = oracle(traker.model, train, targets, states, traker.projector)
    expected = reference.trak_scores(per_checkpoint)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
