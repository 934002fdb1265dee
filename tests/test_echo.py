"""Q comes from the forward pass of the gradients, where it is the same call."""

import numpy as np
import pytest
import torch
from tests import cases, reference, runs
from torch import nn

from trak.gradient_computers import HookGradientComputer
from trak.gradient_computers.echo import Echo
from trak.modelout_functions import ImageClassificationModelOutput


def count_calls(model):
    calls = []
    model.register_forward_hook(lambda *_: calls.append(None))
    return calls


def test_featurizing_runs_the_model_once_a_batch(tmp_path):
    model, train, _ = runs.data("mlp", 50, 5)
    traker = runs.make_traker(model, 50, tmp_path)
    traker.load_checkpoint(model.state_dict(), model_id=0)
    first, second = runs.split(train, 40)
    traker.featurize(first, num_samples=40)  # of which enough are compared
    calls = count_calls(model[0])
    traker.featurize(second, num_samples=10)
    assert len(calls) == 1
    assert traker.pipeline.losses.known(0)  # which the same pass told


@pytest.mark.parametrize("change", ["none", "answer", "input", "other input", "text"])
def test_only_the_same_call_is_answered(change):
    class Doubling(nn.Module):
        def forward(self, x, text="a"):
            return x * (2 if text == "a" else 3)

    model, echo, x = Doubling(), Echo(), torch.ones(3)
    with echo.recording(model):
        answer = model(x, text="a")
    if change == "answer":
        answer.add_(1)
    if change == "input":
        x.add_(1)
    text = "b" if change == "text" else "a"
    with echo.answering(model):
        found = model(x.clone() if change == "other input" else x, text=text)
    assert (found.data_ptr() == answer.data_ptr()) == (change == "none")
    expected = Doubling()(x, text=text)
    assert torch.equal(found, expected)
    assert "forward" not in vars(model)


def test_a_model_with_a_forward_of_its_own_gets_it_back():
    model, echo = nn.Linear(2, 2), Echo()
    usual = model.forward
    own = lambda x: usual(x) + 1  # noqa: E731
    model.forward = own
    with echo.recording(model):
        model(torch.ones(1, 2))
    with pytest.raises(ZeroDivisionError), echo.answering(model):
        raise ZeroDivisionError
    assert model.forward is own


def test_a_task_that_changes_its_logits_gets_the_right_weights(tmp_path):
    class Masking(ImageClassificationModelOutput):
        def get_batch_output(self, model, batch):
            logits = model(batch[0])
            logits *= 2
            return logits.gather(1, batch[1][:, None]).squeeze(1)

        @staticmethod
        def get_output(model, weights, buffers, x, label):
            logits = torch.func.functional_call(model, (weights, buffers), (x[None],)) * 2
            return logits[0].gather(0, label.reshape(1)).sum()

    model, train, _ = runs.data("mlp", 20, 5)
    traker = runs.make_traker(model, 20, tmp_path, task=Masking())
    traker.load_checkpoint(cases.checkpoints("mlp", 1)[0], model_id=0)
    traker.featurize(train, num_samples=20)
    traker.saver.load_current_store(0)
    found = torch.as_tensor(traker.saver.current_store["out_to_loss"][:]).flatten()
    p = model(train[0]).softmax(1).gather(1, train[1][:, None]).squeeze(1)
    torch.testing.assert_close(found.double(), (1 - p).double().detach())


@pytest.mark.parametrize("halve", [lambda y: y / 2, lambda y: y.mul_(0.5)])
def test_hooks_of_the_user_change_outputs_once(halve, tmp_path):
    model, train, targets = runs.data("mlp", 20, 5)
    model.register_forward_hook(lambda module, args, output: halve(output))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    traker = runs.make_traker(model, 20, tmp_path)
    scores = runs.whole_run(traker, train, targets, [state])
    rows = runs.oracle(model, train, targets, [state], traker.projector)
    np.testing.assert_allclose(scores, reference.trak_scores(rows), rtol=1e-8)


def test_layers_that_are_the_whole_model_may_be_called_by_name():
    class Named(ImageClassificationModelOutput):
        def get_batch_output(self, model, batch):
            logits = model(input=batch[0])
            return logits.gather(1, batch[1][:, None]).squeeze(1)

        @staticmethod
        def get_output(model, weights, buffers, x, label):
            named = {"input": x[None]}
            logits = torch.func.functional_call(model, (weights, buffers), (), named)
            return logits[0].gather(0, label.reshape(1)).sum()

    model = nn.Linear(6, 3).double()
    batch = torch.randn(5, 6, dtype=torch.float64), torch.arange(5) % 3
    computer = HookGradientComputer(model, Named())
    found = computer.compute_per_sample_grad(batch)
    expected = torch.zeros(5, 3, 6, dtype=torch.float64)
    expected[torch.arange(5), batch[1]] = batch[0]
    torch.testing.assert_close(found["weight"], expected)
    assert computer.coverage().names_exactly == ()
