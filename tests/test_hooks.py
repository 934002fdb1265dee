"""The hook computer against the oracle, on every layer rule and awkward model."""

import logging

import pytest
import torch
from tests import cases, reference, runs
from tests.test_gradients import TOLERANCE, assert_equal
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trak.errors import InputError
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.gradient_computers.rules import register, rule_for
from trak.modelout_functions import (
    AbstractModelOutput,
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)

transformers = pytest.importorskip(
    "transformers", reason="the [hf] extra; make test has it"
)


def hooked(model, grad_wrt=None, task=None):
    task = task or ImageClassificationModelOutput()
    return HookGradientComputer(model=model, task=task, grad_wrt=grad_wrt)


def check(model, batch, dtype=torch.float64, names=None):
    """Gradients equal the oracle's; returns the computer."""
    computer = hooked(model, names)
    found = computer.compute_per_sample_grad(batch)
    flat = {name: rows.reshape(len(rows), -1) for name, rows in found.items()}
    assert_equal(flat, reference.gradient_rows(model, batch, names), dtype)
    return computer


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", cases.NAMES)
def test_shared_cases(name, size, dtype):
    model, batch = cases.make(name, size, dtype)
    check(model, batch, dtype)


class Positions(nn.Module):
    """A convolution or the like between random input and a linear head."""

    def __init__(self, layer, before=None):
        super().__init__()
        self.layer = layer
        self.before = before or nn.Identity()
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        return self.head(self.layer(self.before(x)).flatten(1))


def images(*shape):
    return torch.randn(4, *shape, dtype=torch.float64)


LAYERS = {
    "conv1d": (nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2), images(3, 12)),
    "conv2d": (nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), images(2, 7, 6)),
    "conv2d groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), images(4, 5, 5)),
    "conv2d depthwise": (nn.Conv2d(4, 4, 3, groups=4), images(4, 5, 5)),
    "conv2d same": (nn.Conv2d(2, 3, (5, 3), padding="same", dilation=2), images(2, 6, 6)),
    "conv2d reflect": (
        nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"),
        images(2, 6, 6),
    ),
    "conv2d circular": (
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        images(2, 6, 6),
    ),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=2, padding=1), images(2, 4, 5, 3)),
    "transposed 1d": (nn.ConvTranspose1d(3, 4, 3, 2, 1, output_padding=1), images(3, 5)),
    "transposed 2d": (
        nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2),
        images(4, 4, 3),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), images(2, 3, 2, 2)),
    "layer norm": (nn.LayerNorm(6), images(5, 6)),
    "layer norm two axes": (nn.LayerNorm((5, 6)), images(2, 5, 6)),
    "layer norm no bias": (nn.LayerNorm(6, bias=False), images(5, 6)),
    "rms norm": (nn.RMSNorm(6), images(5, 6)),
    "group norm": (nn.GroupNorm(2, 4), images(4, 3, 3)),
    "instance norm": (nn.InstanceNorm2d(4, affine=True), images(4, 3, 3)),
    "instance norm running": (
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        images(4, 6),
    ),
    "batch norm 1d": (nn.BatchNorm1d(6), images(6)),
    "batch norm 1d positions": (nn.BatchNorm1d(3), images(3, 5)),
    "batch norm 2d": (nn.BatchNorm2d(4), images(4, 3, 3)),
    "batch norm 3d": (nn.BatchNorm3d(2), images(2, 3, 2, 2)),
    "prelu one": (nn.PReLU(), images(4, 3)),
    "prelu channels": (nn.PReLU(4), images(4, 3)),
    "linear no bias": (nn.Linear(6, 5, bias=False), images(3, 6)),
    "linear many axes": (nn.Linear(6, 5), images(2, 3, 6)),
    "hf conv1d": (transformers.pytorch_utils.Conv1D(5, 6), images(3, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_rule(name):
    layer, inputs = LAYERS[name]
    torch.manual_seed(0)
    model = Positions(layer).double().eval()
    model(inputs)
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter)
    computer = check(model, (inputs, torch.tensor([0, 2, 1, 1])))
    assert not computer._told, "a rule should cover this"


def test_bilinear_layers():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(4, 3, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x):
            return self.head(self.layer(x[:, :4], x[:, 4:]))

    computer = check(Two().double(), (images(7), torch.tensor([0, 2, 1, 1])))
    assert not computer._told


@pytest.mark.parametrize("padding_idx", [None, 3])
def test_embeddings_with_repeated_and_padding_tokens(padding_idx):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 5, padding_idx=padding_idx)
            self.position = nn.Embedding(6, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, tokens):
            places = torch.arange(tokens.shape[1])[None]
            return self.head(torch.tanh(self.embed(tokens) + self.position(places)).sum(1))

    tokens = torch.tensor([[1, 1, 3, 3], [0, 6, 1, 2], [3, 3, 3, 3]])
    computer = check(Bag().double(), (tokens, torch.tensor([0, 1, 2])))
    assert not computer._told


class InPlace(nn.Module):
    """Changes what the first layer has read."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.first(x)
        out = self.second(h)
        h.mul_(3.0)
        return out + h[:, :3]


class LateChange(nn.Module):
    """Changes a layer's input in place for some batches only, if `limit` is reached."""

    def __init__(self, limit):
        super().__init__()
        self.limit = limit
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        hidden = torch.tanh(self.first(x)) * 1.0
        out = self.second(hidden)
        if (x > self.limit).any():
            hidden.mul_(0.5)
        return out


@pytest.mark.parametrize("projector", ["factored", "rademacher"])
def test_inputs_that_change_in_place_in_a_later_batch(projector, tmp_path, caplog):
    model, same = LateChange(50.0).double(), LateChange(torch.inf).double()
    same.load_state_dict(model.state_dict())  # autograd itself fails on the other
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    x[6, 0] = 100.0
    traker = runs.make_traker(model, 8, tmp_path, projector=projector)
    with caplog.at_level(logging.INFO, "trak"):
        runs.featurize(traker, (x, y), model.state_dict(), size=4)
    assert caplog.text.count("changed in place") == 1
    rows = reference.gradient_rows(same, (x, y))
    expected = reference.projected_rows(rows, traker.projector, 0)
    traker.saver.load_current_store(0)
    found = torch.tensor(traker.saver.current_store["grads"][:])
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-9, atol=1e-9)


def test_inputs_that_change_in_place_are_noticed(caplog):
    batch = (images(6), torch.tensor([0, 2, 1, 1]))
    model, same = InPlace().double(), OutOfPlace().double()
    same.load_state_dict(model.state_dict())
    with caplog.at_level(logging.INFO, "trak"):
        computer = hooked(model)
        computer._check = lambda samples: None  # autograd itself fails on this model
        found = computer.compute_per_sample_grad(batch)
    assert "changed in place" in caplog.text
    for name, rows in reference.gradient_rows(same, batch).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


class OutOfPlace(InPlace):
    def forward(self, x):
        h = self.first(x)
        return self.second(h) + 3.0 * h[:, :3]


class SharedElsewhere(nn.Module):
    """Uses a layer's weight outside the layer too."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.layer(x)) @ self.layer.weight)


class Mixing(nn.Module):
    """The output of one sample depends on the others."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return self.head(h - h.mean(0) + x.sum())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x)[0].mean(1))


class Own(nn.Linear):
    """A subclass that computes something else than its parent."""

    def forward(self, x):
        return super().forward(x) ** 2


class OneByOne(nn.Module):
    """Layers that get samples without a batch axis."""

    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(4, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.stack([self.layer(one) for one in x]).mean(-1))


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (SharedElsewhere, (6,)),
        (lambda: OneByOne(nn.Conv1d), (4, 6)),
        (lambda: OneByOne(nn.ConvTranspose1d), (4, 6)),
        (Attention, (4, 6)),
        (lambda: nn.Sequential(Own(6, 6), nn.Linear(6, 3)), (6,)),
    ],
)
def test_what_no_rule_covers_is_exact_all_the_same_and_said_once(build, shape, caplog):
    torch.manual_seed(1)
    model = build().double().eval()
    batch = (images(*shape), torch.tensor([0, 2, 1, 1]))
    with caplog.at_level(logging.INFO, "trak"):
        computer = check(model, batch)
        computer.compute_per_sample_grad(batch)
    assert sum("covered by layer rules" in r.getMessage() for r in caplog.records) == 1


def test_a_model_that_mixes_samples_is_left_to_the_exact_computer():
    torch.manual_seed(1)
    model = Mixing().double().eval()
    batch = (images(6), torch.tensor([0, 2, 1, 1]))
    computer = hooked(model)
    exact = FunctionalGradientComputer(model, ImageClassificationModelOutput())
    found = computer.compute_per_sample_grad(batch)
    for name, rows in exact.compute_per_sample_grad(batch).items():
        torch.testing.assert_close(found[name], rows)


def test_the_model_is_left_as_it_was_even_after_an_exception():
    model, batch = cases.make("cnn", 4)
    model[0].bias.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    attributes = {name: set(vars(m)) for name, m in model.named_modules()}
    computer = hooked(model)
    computer.compute_per_sample_grad(batch)

    def stop(block):
        raise KeyboardInterrupt

    for broken in ((batch[0], batch[1][:0]), batch):
        with pytest.raises((InputError, KeyboardInterrupt)):
            computer.run(broken, stop, {})
    assert flags == [p.requires_grad for p in model.parameters()]
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_selected_parameters_only():
    model, batch = cases.make("mlp", 4)
    check(model, batch, names=["0.bias", "3.weight"])


def test_weight_gradients_are_never_formed():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    batch = (torch.randn(32, 64), torch.zeros(32, dtype=torch.int64))
    computer = hooked(model)
    computer.run(batch, lambda _: None, {})
    with FlopCounterMode(display=False) as ours:
        computer.run(batch, lambda _: None, {})
    with FlopCounterMode(display=False) as step:
        model(batch[0]).sum().backward()
    # forward, and backward to activations; the first layer needs none
    assert ours.get_total_flops() <= 0.7 * step.get_total_flops()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_hugging_face_models_in_their_default_attention(kind):
    torch.manual_seed(0)
    small = {"vocab_size": 40, "num_labels": 2, "pad_token_id": 0}
    if kind == "bert":
        config = transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=24, max_position_embeddings=16, **small,
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=16,
            bos_token_id=1, eos_token_id=2, **small,
        )  # fmt: skip
        model = transformers.GPT2ForSequenceClassification(config)
    model.double().eval()
    mask = (torch.arange(10) < torch.tensor([[10], [6], [3]])).long()
    batch = {
        "input_ids": torch.randint(3, 40, (3, 10)) * mask,
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 1]),
    }
    task = TextClassificationModelOutput()
    computer = hooked(model, task=task)
    exact = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    found = computer.compute_per_sample_grad(batch)
    for name, rows in exact.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-8, atol=1e-10)
    assert not computer._told


class NoBatch(AbstractModelOutput):
    get_output = staticmethod(ImageClassificationModelOutput.get_output)
    get_out_to_loss_grad = ImageClassificationModelOutput.get_out_to_loss_grad


class Changed(ImageClassificationModelOutput):
    @staticmethod
    def get_output(model, weights, buffers, image, label=None):
        return 2 * ImageClassificationModelOutput.get_output(
            model, weights, buffers, image, label
        )


@pytest.mark.parametrize("task", [NoBatch, Changed])
def test_tasks_without_a_batched_output_of_their_own_are_refused(task):
    model, _ = cases.make("mlp", 1)
    with pytest.raises(InputError, match="get_batch_output"):
        hooked(model, task=task())


def test_rules_are_registered_once_and_not_for_changed_subclasses():
    class Plain(nn.Linear):
        pass

    assert rule_for(Plain(2, 2)) is rule_for(nn.Linear(2, 2))
    assert rule_for(Own(2, 2)) is None
    with pytest.raises(ValueError, match="has a rule already"):
        register(nn.Linear)(lambda call: iter(()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["cnn", "encoder", "tied", "reused"])
def test_whole_runs_give_the_oracles_scores(name, count, tmp_path):
    model, train, targets = runs.data(name, 30, 5)
    states = cases.checkpoints(name, count)
    traker = runs.make_traker(model, 30, tmp_path, gradient_computer=HookGradientComputer)
    found = runs.whole_run(traker, train, targets, states)
    expected = reference.trak_scores(
        runs.oracle(model, train, targets, states, traker.projector)
    )
    assert abs(found - expected).max() < 1e-6 * abs(expected).max()
