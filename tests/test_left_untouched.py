"""A user's model and process after gradients were computed, or failed to be."""

import copy
import logging

import pytest
import torch
from tests import cases, reference, runs
from tests.cases import Attending
from tests.test_hook_parameters import Free, Patches
from tests.test_hook_tables import Tokens
from tests.test_hooks import images
from torch import nn
from torch.utils import checkpoint

from trak.errors import UnsupportedModuleError
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import ImageClassificationModelOutput

LABELS = torch.tensor([0, 2, 1, 1])


def _free(shape, use):
    model = Free(shape, use)
    model(torch.randn(4, 5, 4))
    return model


def _random():
    return nn.Sequential(nn.Linear(6, 6), Noise(), nn.Linear(6, 3))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn(x.shape, dtype=x.dtype)


MODELS = {
    "cnn": (lambda: cases.make("cnn", 1)[0], images(2, 6, 6)),
    "tokens": (
        lambda: Patches((1, 1, 4), lambda t, b: t.expand(b, -1, -1)),
        images(5, 4),
    ),
    "exact": (lambda: _free((4, 4), lambda x, p: x @ (p * p).t()), images(5, 4)),
    "attention": (lambda: Attending(True, "memory"), images(5, 6)),
    "positions": (
        lambda: Tokens(lambda t: torch.arange(t.shape[1])),
        torch.randint(0, 9, (4, 5)),
    ),
    "random": (_random, images(6)),
}


def picture(model):
    """Everything that should not change; compared by equality."""
    modules = dict(model.named_modules())
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": [(p.requires_grad, p.grad, id(p)) for p in model.parameters()],
        "attributes": {
            name: {k: id(v) for k, v in vars(module).items() if k != "training"}
            for name, module in modules.items()
        },
        "tables": {
            name: {k: list(v) for k, v in vars(module).items() if isinstance(v, dict)}
            for name, module in modules.items()
        },
        "modes": {name: module.training for name, module in modules.items()},
        "random": torch.get_rng_state(),
        "switches": (
            torch.backends.mha.get_fastpath_enabled(),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.overrides._is_torch_function_mode_enabled(),
            checkpoint.CheckpointFunction,
            checkpoint._checkpoint_without_reentrant_generator,
            torch._dynamo.eval_frame._stance.stance,
        ),
    }


def same(before, after):
    for key in before:
        if key == "state":
            assert all(torch.equal(v, after[key][k]) for k, v in before[key].items())
        elif key == "random":
            assert torch.equal(before[key], after[key])
        else:
            assert before[key] == after[key], key


class StopError(Exception):
    pass


class StopBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise StopError


class Task(ImageClassificationModelOutput):
    where = None

    def get_batch_output(self, model, batch):
        outputs = super().get_batch_output(model, batch)
        if self.where == "forward":
            raise StopError
        return StopBackward.apply(outputs) if self.where == "backward" else outputs

    def get_output(self, model, weights, buffers, image, label=None):
        if self.where == "exact":
            raise StopError
        return ImageClassificationModelOutput.get_output(
            model, weights, buffers, image, label
        )


def run(computer, batch, where):
    computer.modelout_fn.where = where
    seen = []

    def sink(block):
        seen.append(block.name)
        if where == "sink" and len(seen) == 2:
            raise StopError

    sizes = {n: p.numel() for n, p in computer.model.named_parameters()}
    computer.run(batch, sink, sizes)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("where", [None, "forward", "backward", "sink", "exact"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
def test_nothing_is_left_behind(kind, name, where, warm):
    build, inputs = MODELS[name]
    model = build().double().eval()
    next(model.parameters()).requires_grad_(False)
    list(model.modules())[-1].training = True
    batch = (inputs, LABELS)
    computer = kind(model, Task(), grad_wrt=[n for n, _ in model.named_parameters()])
    if warm:
        run(computer, batch, None)
    before = picture(model)
    try:
        run(computer, batch, where)
    except StopError:
        assert where is not None
    same(before, picture(model))
    run(computer, batch, None)  # and it still works
    same(before, picture(model))


@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
def test_other_autograd_work_is_not_disturbed(kind):
    model, batch = cases.make("cnn", 4)
    model(batch[0]).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    loss = model(batch[0]).square().sum()
    kind(model, ImageClassificationModelOutput()).compute_per_sample_grad(batch)
    assert all(
        torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True)
    )
    loss.backward()


@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, affine=True, track_running_stats=True)],
)
def test_batch_statistics_in_training_mode_are_refused(kind, layer):
    model = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 3)).double()
    computer = kind(model, ImageClassificationModelOutput())
    batch = (images(6), LABELS)
    before = picture(model)
    with pytest.raises(UnsupportedModuleError, match=r"'1' .*training mode.*eval"):
        computer.compute_per_sample_grad(batch)
    with pytest.raises(UnsupportedModuleError, match=r"'1' .*training mode.*eval"):
        computer.compute_loss_grad(batch)
    same(before, picture(model))


def test_noise_is_drawn_anew_by_nobody_but_the_user():
    torch.manual_seed(3)
    model = _random().double()
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    state = torch.get_rng_state()
    first = computer.compute_per_sample_grad((images(6), LABELS))
    del first
    torch.set_rng_state(state)
    wanted = torch.rand(3)
    torch.set_rng_state(state)
    computer.compute_per_sample_grad((torch.ones(4, 6).double(), LABELS))
    assert torch.equal(torch.rand(3), wanted)


def test_fused_attention_is_not_taken(caplog):
    model, batch = cases.make("encoder", 5)
    with caplog.at_level(logging.INFO, "trak"):
        computer = HookGradientComputer(model, ImageClassificationModelOutput())
        found = computer.compute_per_sample_grad(batch)
    assert computer.coverage().names_exactly == ()
    for name, rows in reference.gradient_rows(model, batch).items():
        torch.testing.assert_close(found[name].flatten(1), rows)


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
def test_grad_modes_around_do_not_matter(kind, around):
    model, batch = cases.make("cnn", 4)
    expected = reference.gradient_rows(model, batch)
    with around():
        computer = kind(model, ImageClassificationModelOutput())
        found = computer.compute_per_sample_grad(batch)
        weights = computer.compute_loss_grad(batch)
        assert not torch.is_grad_enabled()
    assert not weights.requires_grad
    for name, rows in expected.items():
        torch.testing.assert_close(found[name].flatten(1), rows)


class Table(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        torch.manual_seed(0)
        self.table = kind(7, 5, max_norm=0.5, **options)
        self.head = nn.Linear(5, 3)

    def forward(self, tokens):
        found = self.table(tokens)
        return self.head(found if found.ndim == 2 else found.mean(1))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_that_a_forward_pass_changes_are_refused_and_the_remedy_works(
    kind, tmp_path
):
    model = Table(kind)
    before = copy.deepcopy(model.state_dict())
    batch = torch.randint(0, 7, (12, 4)), torch.randint(0, 3, (12,))
    with pytest.raises(UnsupportedModuleError, match=r"'table' is an .*max_norm=0\.5"):
        runs.make_traker(model, 12, tmp_path)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    expected = copy.deepcopy(model)(batch[0])
    layer = model.table
    nn.functional.embedding(
        torch.arange(len(layer.weight)),
        layer.weight,
        max_norm=layer.max_norm,
        norm_type=layer.norm_type,
    )
    state = copy.deepcopy(model.state_dict())
    layer.max_norm = None
    torch.testing.assert_close(model(batch[0]), expected)
    traker = runs.make_traker(model, 12, tmp_path)
    assert runs.whole_run(traker, batch, batch, [state]).shape == (12, 12)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
