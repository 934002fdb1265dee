"""Models that keep in evaluation mode what they computed from their weights."""

import pytest
import torch
from tests import reference, runs
from torch import nn

from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    IterativeGradientComputer,
    surroundings,
)
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    IterativeImageClassificationModelOutput,
)
from trak.projectors import NoOpProjector

N = 9


class Keeping(nn.Module):
    """Indexes its biases once, as LeViT does."""

    keeps = True

    def __init__(self):
        super().__init__()
        self.biases = nn.Parameter(torch.randn(5))
        self.register_buffer("places", torch.tensor([0, 1, 2, 3, 4, 0]))
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.kept = {}

    @torch.no_grad()
    def train(self, mode=True):
        super().train(mode)
        if mode:
            self.kept = {}

    def forward(self, x):
        if self.training or not self.keeps:
            found = self.biases[self.places]
        elif "biases" in self.kept:
            found = self.kept["biases"]
        else:
            found = self.kept["biases"] = self.biases[self.places]
        return self.head(torch.tanh(self.layer(x) * found))


class Plain(Keeping):
    """The same, which keeps nothing."""

    keeps = False

    def eval(self):
        super().eval()
        return self


def made(count):
    torch.manual_seed(0)
    models = [Plain().double() for _ in range(count)]
    x = torch.randn(N + 3, 6, dtype=torch.float64)
    y = torch.arange(N + 3) % 3
    return models, (x[:N], y[:N]), (x[N:], y[N:])


@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
def test_what_is_kept_has_its_gradient(kind):
    (plain,), batch, _ = made(1)
    model = Keeping().double()
    model.load_state_dict(plain.state_dict())
    model.eval()
    with torch.no_grad():
        wanted = model(batch[0])
    computer = kind(model, ImageClassificationModelOutput())
    expected = reference.gradient_rows(plain, batch)
    for _ in range(2):
        found = computer.compute_per_sample_grad(batch)
        for name, rows in expected.items():
            torch.testing.assert_close(found[name].flatten(1), rows, msg=name)
        assert not model.training
        assert not model.kept
        torch.testing.assert_close(model(batch[0]), wanted)


def test_one_backward_pass_a_sample():
    (plain,), batch, _ = made(1)
    model = Keeping().double()
    model.eval()
    model(batch[0])
    model.load_state_dict(plain.state_dict())
    computer = IterativeGradientComputer(model, IterativeImageClassificationModelOutput())
    expected = torch.cat([*reference.gradient_rows(plain, batch).values()], dim=1)
    for _ in range(2):
        torch.testing.assert_close(computer.compute_per_sample_grad(batch), expected)
        weights = computer.compute_loss_grad(batch)
        torch.testing.assert_close(weights, reference.loss_weights(plain, batch))


def test_each_checkpoint_has_its_own(tmp_path):
    models, train, targets = made(2)
    states = [{n: v.clone() for n, v in m.state_dict().items()} for m in models]
    model = Keeping().double()
    model.eval()
    model(train[0])  # with other weights than those to come
    traker = runs.make_traker(model, N, tmp_path, projector=NoOpProjector())
    scores = torch.from_numpy(runs.whole_run(traker, train, targets, states))
    known = runs.oracle(models[0], train, targets, states, None)
    expected = torch.from_numpy(reference.trak_scores(known))
    torch.testing.assert_close(scores, expected, check_dtype=False)


def test_models_of_transformers_are_not_switched_for_every_batch():
    transformers = pytest.importorskip(
        "transformers", reason="the [hf] extra; make test has it"
    )

    class Classifier(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, inner):
            super().__init__(transformers.PretrainedConfig())
            self.inner, self.modes = inner, []

        def forward(self, x):
            return self.inner(x)

    class Counting(Classifier):
        def train(self, mode=True):
            self.modes.append(mode)
            return super().train(mode)

    _, batch, _ = made(0)
    plain = nn.Linear(6, 3).double()
    model, own = Classifier(plain).eval(), Counting(plain).eval()
    assert surroundings._switching(model) == []
    assert surroundings._switching(own) == [own]
    before = len(own.modes)
    HookGradientComputer(own, ImageClassificationModelOutput()).compute_per_sample_grad(
        batch
    )
    assert len(own.modes) > before  # it may keep something
    keeping = Classifier(Keeping().double()).eval()
    assert surroundings._switching(keeping) == [keeping.inner]
