"""Computers on models as people have them: adapters, checkpointing, low precision."""

import pytest
import torch
from tests import cases, reference
from tests.test_hook_parameters import Patches, natively
from tests.test_hooks import hooked, images
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import (
    ImageClassificationModelOutput,
    TextClassificationModelOutput,
)

transformers = pytest.importorskip(
    "transformers", reason="the [hf] extra; make test has it"
)
LABELS = torch.tensor([0, 2, 1, 1])
KINDS = [HookGradientComputer, FunctionalGradientComputer]


def bert(**options):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=2, **options,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).double().eval()


def tokens(size=3, length=10):
    lengths = torch.tensor([length, 6, 3, 4, 5])[:size, None]
    mask = (torch.arange(length) < lengths).long()
    return {
        "input_ids": torch.randint(3, 40, (size, length)) * mask,
        "attention_mask": mask,
        "labels": torch.arange(size) % 2,
    }


def agree(found, expected, rtol=1e-8, atol=1e-10):
    assert list(found) == list(expected)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=rtol, atol=atol, msg=name)


class Adapted(nn.Module):
    """A frozen linear layer beside a trained product of two small ones."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 6, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_adapters_on_frozen_layers():
    model = nn.Sequential(
        Adapted(nn.Linear(6, 6)),
        nn.ReLU(inplace=True),
        Adapted(nn.Linear(6, 6)),
        nn.Linear(6, 3).requires_grad_(False),
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 4
    inputs = images(5, 6)
    natively(nn.Sequential(model, Mean()), inputs, names=[f"0.{n}" for n in names])
    computer = hooked(nn.Sequential(model, Mean()))
    assert list(computer.compute_per_sample_grad((inputs, LABELS))) == [
        f"0.{n}" for n in names
    ]


class Mean(nn.Module):
    def forward(self, x):
        return x.sin().mean(1)


def test_adapters_that_begin_at_zero_are_proved_when_they_move():
    model = nn.Sequential(Adapted(nn.Linear(6, 6)), nn.Linear(6, 3)).double()
    nn.init.zeros_(model[0].up.weight)
    batch = (images(6), LABELS)
    computer = hooked(model)
    for moved in (False, True):
        if moved:
            nn.init.normal_(model[0].up.weight)
            computer.load_model_params(model)
        found = computer.compute_per_sample_grad(batch)
        expected = reference.gradient_rows(model, batch, list(found))
        agree({n: rows.flatten(1) for n, rows in found.items()}, expected)
        assert computer.coverage().names_exactly == ()
        assert computer._ways.found.plans[True]["0.down.weight"].kind == (
            "layer" if moved else "unseen"
        )


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("zero", [False, True])
def test_peft_adapters(zero):
    peft = pytest.importorskip("peft", reason="make test has it")
    config = peft.LoraConfig(
        r=2, target_modules=["query", "value"], task_type="SEQ_CLS", init_lora_weights=zero
    )
    model = peft.get_peft_model(bert(), config).double().eval()
    task = TextClassificationModelOutput()
    computer = HookGradientComputer(model, task)
    assert 4 < len(computer.selected) < 20
    batch = tokens()
    found = computer.compute_per_sample_grad(batch)
    exact = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    agree(found, exact)
    assert computer.coverage().names_exactly == ()
    batch = tokens(5)
    found = computer.compute_per_sample_grad(batch)
    exact = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    agree(found, exact)


class Checkpointed(nn.Module):
    """The first block has no input that asks for a gradient."""

    def __init__(self, reentrant):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
            for _ in range(3)
        )
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x):
        for block in self.blocks:
            x = x + checkpoint(self.run, block, x, use_reentrant=self.reentrant)
        return self.head(
            checkpoint_sequential(
                [torch.tanh, torch.sin], 2, x, use_reentrant=self.reentrant
            )
        )

    def run(self, block, x):
        return block(x) * self.scale


@pytest.mark.parametrize("subset", [None, ["blocks.1.0.weight", "head.bias"]])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_activation_checkpointing(kind, reentrant, subset):
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    batch = (images(6), LABELS)
    computer = kind(model, ImageClassificationModelOutput(), grad_wrt=subset)
    found = computer.compute_per_sample_grad(batch)
    plain = Checkpointed(False).double()
    plain.load_state_dict(model.state_dict())
    expected = reference.gradient_rows(plain, batch, computer.selected)
    agree({n: rows.flatten(1) for n, rows in found.items()}, expected)
    if kind is HookGradientComputer:
        assert computer.coverage().names_exactly == ()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_checkpointing(kind, training, reentrant):
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, plain = bert(**options), bert(**options)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train(training)
    task, batch = TextClassificationModelOutput(), tokens()
    found = kind(model, task).compute_per_sample_grad(batch)
    agree(found, FunctionalGradientComputer(plain, task).compute_per_sample_grad(batch))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        x = functional.relu_(self.norm(self.layer(x)))
        x = self.norm(self.layer(x)).mul_(2.0).relu_()
        return self.head(x)


def test_layers_that_run_twice_with_activations_in_place():
    natively(Twice(), images(6))


class Halves(ImageClassificationModelOutput):
    """A task that computes under autocast."""

    @staticmethod
    def get_output(model, weights, buffers, image, label=None):
        with torch.autocast("cpu", torch.bfloat16):
            return ImageClassificationModelOutput.get_output(
                model, weights, buffers, image, label
            )

    def get_batch_output(self, model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return super().get_batch_output(model, batch)


def models():
    return {
        "cnn": (cases.make("cnn", 1, torch.float32)[0], torch.randn(4, 2, 6, 6)),
        "encoder": (cases.make("encoder", 1, torch.float32)[0], torch.randn(4, 4, 8)),
        "tokens": (
            Patches((1, 1, 4), lambda t, b: t.expand(b, -1, -1)),
            torch.randn(4, 5, 4),
        ),
    }


def near(found, expected):
    scale = max(float(rows.norm()) for rows in expected.values())
    for name, rows in expected.items():
        error = float((found[name].double() - rows.double()).norm())
        assert error <= 0.1 * float(rows.norm()) + 0.02 * scale, name


@pytest.mark.parametrize("name", ["cnn", "encoder", "tokens"])
@pytest.mark.parametrize("how", ["bfloat16", "task", "outside"])
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision(kind, how, name):
    torch.manual_seed(0)
    model, inputs = models()[name]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.eval()
    expected = FunctionalGradientComputer(model, ImageClassificationModelOutput())
    expected = expected.compute_per_sample_grad((inputs, LABELS))
    task = Halves() if how == "task" else ImageClassificationModelOutput()
    if how == "bfloat16":
        model, inputs = model.bfloat16(), inputs.bfloat16()
    computer = kind(model, task)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "outside"):
        found = computer.compute_per_sample_grad((inputs, LABELS))
        weights = computer.compute_loss_grad((inputs, LABELS))
    near(found, expected)
    assert torch.isfinite(weights).all()
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    assert {rows.dtype for rows in found.values()} == {dtype}
    if kind is HookGradientComputer:
        assert computer.coverage().names_exactly == ()


@pytest.mark.parametrize("inside", ["model", "module", "part"])
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models(kind, inside):
    model, batch = Twice().double(), (images(6), LABELS)
    expected = reference.gradient_rows(model, batch)
    compiled, calls = model, []

    def backend(graph, examples):
        calls.append(1)
        return graph.forward

    if inside == "model":
        compiled = torch.compile(model, backend=backend)
    elif inside == "module":
        model.compile(backend=backend)
    else:
        model.forward = torch.compile(model.forward, backend=backend)
    with torch.no_grad():
        compiled(batch[0])
    assert calls
    computer = kind(compiled, ImageClassificationModelOutput())
    found = computer.compute_per_sample_grad(batch)
    assert len(calls) == 1
    found = {n.removeprefix("_orig_mod."): g.flatten(1) for n, g in found.items()}
    agree(found, expected)
    with torch.no_grad():
        compiled(batch[0])
    torch._dynamo.reset()
