"""Numbers that were wrong in silence."""

import numpy as np
import pytest
import torch
from tests.defects.helpers import (
    M,
    N,
    data,
    featurize,
    net,
    tracker,
    weights,
    whole_run,
)

from trak.errors import NumericalError
from trak.modelout_functions import ImageClassificationModelOutput


def test_one_target_that_is_not_finite_is_named(tmp_path):
    train, targets = data()
    targets[0][2] = torch.inf
    traker = tracker(tmp_path)
    featurize(traker, train, weights())
    traker.start_scoring_checkpoint("exp", weights(), 0, num_targets=M)
    with pytest.raises(NumericalError, match="sample 2 "):
        traker.score(targets, num_samples=M)
    assert not traker.saver.target_rows("exp", 0).done.any()


def test_a_loss_weight_that_is_not_finite_is_named(tmp_path):
    class Broken(ImageClassificationModelOutput):
        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            q = super().get_out_to_loss_grad(model, weights, buffers, batch)
            return torch.where(batch[0][:, :1] == train[0][5, 0], torch.nan, q)

    train, _ = data()
    traker = tracker(tmp_path, task=Broken())
    traker.load_checkpoint(weights(), model_id=3)
    with pytest.raises(NumericalError, match="Q of sample 5"):
        traker.featurize(train, num_samples=N)


@pytest.mark.parametrize("half", [False, True])
def test_q_of_confident_examples_is_not_zero(half, tmp_path):
    """1 - softmax rounds to 0 in float32, and float16 ends at 6e-8."""
    model = net().float()
    with torch.no_grad():
        model[2].weight *= 100.0
        inputs = data()[0][0].float()
        labels = model(inputs).argmax(-1)
        assert ((1 - model(inputs).softmax(-1).amax(-1)) == 0).sum() > 3
    traker = tracker(tmp_path, model, use_half_precision=half)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize((inputs, labels), num_samples=N)
    stored = traker.saver.train_rows(0).array("out_to_loss")[:, 0]
    others = model.double()(inputs.double()).softmax(-1).topk(2, dim=-1).values[:, 1]
    assert (stored > 0).all()
    assert (np.abs(stored / others.detach().numpy() - 1) < 1).all()  # 3 classes


def test_rows_that_are_all_zero_are_an_error(tmp_path):
    """A task of one's own whose output depends on no weight."""

    class Constant(ImageClassificationModelOutput):
        @staticmethod
        def get_output(model, weights, buffers, image, label):
            return 0 * sum(w.sum() for w in weights.values()) + image.sum()

    with pytest.raises(NumericalError, match=r"zero.*constant"):
        featurize(tracker(tmp_path, task=Constant()), data()[0], weights())


def test_a_task_that_ignores_the_weights_it_is_given_has_those_of_the_checkpoint(tmp_path):
    class Heeds(ImageClassificationModelOutput):
        @staticmethod
        def get_output(model, weights, buffers, image, label):
            called = torch.func.functional_call(model, (weights, buffers), image[None])
            return called[0, label]

    class Ignores(ImageClassificationModelOutput):
        @staticmethod
        def get_output(model, weights, buffers, image, label):
            return model(image[None])[0, label]

    states = [weights(), {name: 2 * value for name, value in weights().items()}]
    right, found = (
        whole_run(tracker(tmp_path / task.__name__, task=task()), *data(), states)
        for task in (Heeds, Ignores)
    )
    np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-6 * np.abs(right).max())


def test_torchs_default_dtype_does_not_matter(tmp_path):
    train, targets = data()
    batches = [(x.float(), y) for x, y in (train, targets)]
    state = net().float().state_dict()
    expected = whole_run(tracker(tmp_path / "a", net().float()), *batches, [state])
    torch.set_default_dtype(torch.float64)
    try:
        traker = tracker(tmp_path / "b", net().float())
        found = whole_run(traker, *batches, [state])
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(found, expected)
