"""Mistakes in a call of `attribute` are told before its work, and do not stay."""

import logging

import numpy as np
import pytest
import torch
from tests import cases, runs
from torch.utils.data import DataLoader, TensorDataset

import trak
from trak.digests import example_digests
from trak.errors import (
    InputError,
    InputTypeError,
    NotEnoughMemoryError,
    NumericalError,
    PhaseError,
)
from trak.modelout_functions import CLIPModelOutput, ImageClassificationModelOutput
from trak.pipeline.project import RowMaker
from trak.savers.arrays import RowFile
from trak.score_computers.ridge_sample import drawn

N, M = 60, 6
TASK = "image_classification"


@pytest.fixture
def world():
    model, train, targets = runs.data("mlp", N, M)
    return model, train, targets, cases.checkpoints("mlp", 2)


def call(world, folder, **options):
    model, train, targets, states = world
    defaults = {
        "task": TASK,
        "checkpoints": states,
        "train": runs.split(train, 9),
        "targets": runs.split(targets, 4),
        "progress": False,
        "whitening": 0.5,
    }
    return trak.attribute(model, save_dir=folder, **(defaults | options))


def test_a_single_training_example_warns_of_nothing(world, tmp_path):
    _, (x, y), *_ = world
    options = {"train": [(x[:1], y[:1])], "whitening": "auto", "checkpoints": None}
    assert call(world, tmp_path, **options).shape == (1, M)


@pytest.fixture
def no_rows(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("training examples were worked on")

    for name in ("moments_and_rows", "making"):
        monkeypatch.setattr(RowMaker, name, refuse)


WRONG_TARGETS = {
    "one batch": lambda x, y: [x, y],
    "one batch of arrays": lambda x, y: [x.numpy(), y.numpy()],
    "wrong width": lambda x, y: [(x[:, :-1], y)],
    "labels of no class": lambda x, y: [(x, y + 50)],
    "a part too many": lambda x, y: [(x[:0], y[:0]), (x, y, y)],
}


@pytest.mark.parametrize("whitening", [0.5, "auto"])
@pytest.mark.parametrize("wrong", WRONG_TARGETS)
def test_wrong_targets_are_told_first_and_do_not_stay(
    wrong, whitening, world, tmp_path, monkeypatch, request
):
    targets = WRONG_TARGETS[wrong](*world[2])
    with monkeypatch.context():
        request.getfixturevalue("no_rows")
        with pytest.raises(InputError, match=r"targets.*targets=\[batch\]"):
            call(world, tmp_path / "a", targets=targets, whitening=whitening)
    monkeypatch.undo()
    found = call(world, tmp_path / "a")
    np.testing.assert_array_equal(found, call(world, tmp_path / "b"))


def test_one_batch_of_training_examples_leaves_no_store_for_twice_as_many(world, tmp_path):
    with pytest.raises(InputError, match=r"train=\[batch\]"):
        call(world, tmp_path / "a", train=list(world[1]))
    assert call(world, tmp_path / "a").shape == (N, M)


@pytest.mark.parametrize("name", ["a/b", "x" * 300, "ä" * 120])
@pytest.mark.usefixtures("no_rows")
def test_names_that_files_cannot_have_are_told_first(name, world, tmp_path):
    with pytest.raises(InputError, match="exp_name"):
        call(world, tmp_path, exp_name=name)


def test_the_longest_name_will_do(world, tmp_path):
    assert call(world, tmp_path, exp_name="x" * 214).shape == (N, M)


@pytest.mark.parametrize("parts", [tuple, lambda found: found[0]])
def test_arrays_that_are_one_batch(parts, world, tmp_path):
    targets = parts([part.numpy() for part in world[2]])
    with pytest.raises(InputTypeError, match=r"targets=\[batch\]"):
        call(world, tmp_path, targets=targets)


def test_errors_of_another_kind_keep_it(world, tmp_path):
    class Unready(ImageClassificationModelOutput):
        def get_batch_output(self, model, batch):
            raise PhaseError("Embeddings are missing.")

    with pytest.raises(PhaseError, match=r"^Embeddings are missing"):
        call(world, tmp_path, task=Unready)


def test_memory_that_runs_out_in_the_first_look_is_no_mistake(world, tmp_path):
    class Large(ImageClassificationModelOutput):
        refused = 0

        def get_batch_output(self, model, batch):
            if not torch.is_grad_enabled() and not Large.refused:
                Large.refused += 1
                raise RuntimeError("CUDA error: out of memory")
            return super().get_batch_output(model, batch)

    found = call(world, tmp_path / "a", task=Large)
    assert Large.refused
    np.testing.assert_array_equal(found, call(world, tmp_path / "b"))


def test_a_misspelt_option_is_named_with_what_was_meant(world, tmp_path):
    with pytest.raises(InputTypeError, match=r"attribute.*'lamda_reg'.*lambda_reg"):
        call(world, tmp_path, lamda_reg=1.0)
    with pytest.raises(InputTypeError, match=r"'zzz', nor has TRAKer[^?]*$"):
        call(world, tmp_path, zzz=1.0)


def test_loaders_of_targets_are_looked_at_too(world, tmp_path):
    x, y = world[2]
    loader = DataLoader(TensorDataset(x[:, :-1], y), batch_size=4)
    with pytest.raises(InputError, match="outputs for the first batch of targets"):
        call(world, tmp_path, targets=loader)


class Tens:
    """A sampler of batches that does not know how many there are."""

    def __iter__(self):
        return (list(range(start, start + 10)) for start in range(0, N, 10))


def test_a_sampler_of_batches_needs_no_length(world, tmp_path):
    loader = DataLoader(TensorDataset(*world[1]), batch_sampler=Tens())
    for whitening in 0.5, "auto":
        found = call(world, tmp_path / "a", train=loader, whitening=whitening)
    batches = runs.split(world[1], 10)
    np.testing.assert_array_equal(found, call(world, tmp_path / "b", train=batches))


@pytest.mark.parametrize(("name", "gave"), [("train", "54 of the 60"), ("targets", "5 of")])
def test_a_loader_that_drops_examples_is_told_how_many(name, gave, world, tmp_path):
    def all_but_one(samples):
        return tuple(torch.stack(part) for part in zip(*samples[:-1], strict=True))

    data = TensorDataset(*world[1 if name == "train" else 2])
    loader = DataLoader(data, batch_size=10, collate_fn=all_but_one)
    with pytest.raises(InputError, match=f"{gave}.*collate_fn"):
        call(world, tmp_path / "a", **{name: loader})


def test_a_data_set_is_to_be_put_into_a_loader(world, tmp_path):
    with pytest.raises(InputTypeError, match=r"got TensorDataset\. Use DataLoader\(train"):
        call(world, tmp_path, train=TensorDataset(*world[1]))


def test_checkpoints_of_a_model_before_torch_compile_and_after(world, tmp_path):
    model, *_, states = world
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(InputError, match=r"model\._orig_mod"):
        call((compiled, *world[1:]), tmp_path / "a")
    of_compiled = [{f"_orig_mod.{n}": v for n, v in state.items()} for state in states]
    with pytest.raises(InputError, match=r"name\.replace\('_orig_mod\.', ''\)"):
        call(world, tmp_path / "b", checkpoints=of_compiled)
    with pytest.raises(InputError, match=r"differences\)(?!.*_orig_mod)"):
        call(world, tmp_path / "c", checkpoints=[{"other": torch.ones(2)}])


def test_an_example_that_is_not_finite_leaves_no_strength_behind(learned, tmp_path):
    x, y = learned[1]
    broken = x.clone()
    broken[17, 2] = torch.nan
    options = {"whitening": "auto"}
    expected = np.array(call(learned, tmp_path / "a", **options))
    with pytest.raises(NumericalError, match=r"sample 8 of batch 1 \(of 7"):
        call(learned, tmp_path / "b", train=runs.split((broken, y), 9), **options)
    found = call(learned, tmp_path / "b", **options)
    np.testing.assert_array_equal(found, expected)


WRAPPED = {
    "a trainer's module": (
        lambda state: {f"module.{name}": value for name, value in state.items()},
        r"removeprefix\('module\.'\)",
    ),
    "two wrappers": (
        lambda state: {f"model.net.{name}": value for name, value in state.items()},
        r"removeprefix\('model\.net\.'\)",
    ),
    "a file with an epoch": (
        lambda state: {"epoch": 3, "state_dict": state},
        r"pass checkpoint\['state_dict'\]",
    ),
    "a file of a trainer's module": (
        lambda state: {"epoch": 3, "state_dict": WRAPPED["two wrappers"][0](state)},
        r"removeprefix\('model\.net\.'\).*in checkpoint\['state_dict'\]\.items",
    ),
    "a part of a trainer's module": (
        lambda state: {f"module.{n}": v for n, v in list(state.items())[:1]},
        r"a part of the model's weights, with 'module\.' before.*strict=False",
    ),
    "a part": (
        lambda state: dict(list(state.items())[:1]),
        r"a part of the model's weights.*strict=False",
    ),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_checkpoints_in_other_forms_are_told_how_to_be_passed(kind, world, tmp_path):
    wrapped, message = WRAPPED[kind]
    states = [wrapped(state) for state in world[-1]]
    with pytest.raises(InputError, match=message):
        call(world, tmp_path, checkpoints=states)


def test_checkpoints_of_the_module_inside_the_model_are_told_apart(world, tmp_path):
    model, *rest = world
    outer = torch.nn.Sequential(model)
    with pytest.raises(InputError, match=r"begin with '0\.' and the checkpoint's do not"):
        call((outer, *rest), tmp_path)


def test_files_of_adapters_are_told_how_to_be_loaded(world, tmp_path):
    inner = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})
    model = torch.nn.Module()
    model.base, model.lora_A = world[0], inner
    part = {"lora_A.weight": torch.ones(2, 2), "lora_A.bias": torch.ones(2)}
    with pytest.raises(InputError, match="set_peft_model_state_dict"):
        call((model, *world[1:]), tmp_path, checkpoints=[part])


def test_progress_is_true_or_false(world, tmp_path):
    with pytest.raises(InputTypeError, match="progress must be True or False"):
        call(world, tmp_path, progress="no")


@pytest.mark.parametrize("level", ["verbose", True, 2.5, None])
def test_levels_of_logging_that_there_are_not(level, world, tmp_path):
    before = logging.getLogger("trak").level
    with pytest.raises(InputError, match=r"logging_level must be .*, got"):
        call(world, tmp_path, logging_level=level)
    assert logging.getLogger("trak").level == before


def test_levels_of_logging_by_name(world, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("trak"), "level", logging.INFO)
    call(world, tmp_path, logging_level="warning")
    assert logging.getLogger("trak").level == logging.WARNING


def test_a_checkpoint_of_untied_weights_does_not_fit_a_model_that_ties_them(tmp_path):
    model, train, targets = runs.data("tied", N, M)
    world = (model, train, targets, cases.checkpoints("tied", 1))
    assert call(world, tmp_path / "a").shape == (N, M)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["head.weight"] += 1
    before = model.head.weight.detach().clone()
    message = r"head\.weight: other numbers than embed\.weight, with which the model shares"
    with pytest.raises(InputError, match=message):
        call(world, tmp_path / "b", checkpoints=[state])
    torch.testing.assert_close(model.head.weight.detach(), before, rtol=0, atol=0)


WRONG_OUTPUTS = {
    "list": lambda output: [output],
    "nothing": lambda _: None,
    "array": lambda output: output.detach().numpy(),
    "decision": lambda output: output > 0,
    "complex": lambda output: output * 1j,
    "whole numbers": lambda output: output.long(),
}


@pytest.mark.parametrize("method", ["get_output", "get_batch_output"])
@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
def test_outputs_that_have_no_gradients(method, kind, world, tmp_path):
    model, train, _, states = world
    usual = getattr(ImageClassificationModelOutput, method)

    def changed(*args):
        return WRONG_OUTPUTS[kind](usual(*args[method == "get_output" :]))

    task = type("Odd", (ImageClassificationModelOutput,), {method: changed})
    traker = trak.TRAKer(model, task, N, save_dir=tmp_path, proj_dim=4)
    traker.load_checkpoint(states[0], model_id=0)
    with pytest.raises(InputTypeError, match=rf"{method} of Odd.*real numbers.*Return"):
        traker.featurize(train, num_samples=N)


@pytest.mark.parametrize("kind", ["complex", "decision", "whole numbers"])
@pytest.mark.parametrize("task", [TASK, ImageClassificationModelOutput])
def test_models_whose_logits_are_no_real_numbers(kind, task, world, tmp_path):
    model, train, _, states = world
    model.register_forward_hook(lambda _m, _x, output: WRONG_OUTPUTS[kind](output))
    traker = trak.TRAKer(model, task, N, save_dir=tmp_path, proj_dim=4)
    traker.load_checkpoint(states[0], model_id=0)
    with pytest.raises(InputTypeError, match="logits as a tensor of real numbers"):
        traker.featurize(train, num_samples=N)


def test_loss_weights_that_are_complex(world, tmp_path):
    class Odd(ImageClassificationModelOutput):
        def get_out_to_loss_grad(self, *args):
            return super().get_out_to_loss_grad(*args) * 1j

    model, train, _, states = world
    traker = trak.TRAKer(model, Odd, N, save_dir=tmp_path, proj_dim=4)
    traker.load_checkpoint(states[0], model_id=0)
    with pytest.raises(InputTypeError, match=r"real number a sample.*complex"):
        traker.featurize(train, num_samples=N)


@pytest.mark.parametrize("output", [None, {"image": 1}, [1, 2, 3], (torch.ones(2, 2),)])
def test_clip_models_that_return_something_else(output):
    task = CLIPModelOutput(simulated_batch_size=2)
    model = torch.nn.Linear(2, 2)
    model.forward = lambda *_, **__: output
    batches = [(torch.ones(4, 2), torch.ones(4, 2))]
    with pytest.raises(InputTypeError, match="image embeddings, text embeddings"):
        task.get_embeddings(model, batches, batch_size=4, embedding_dim=2)


META = torch.empty((), device="meta")
ABSURD = [
    ({"train_set_size": 10**30}, InputError),
    ({"train_set_size": 1 << 63}, InputError),
    ({"train_set_size": META}, InputError),
    ({"proj_dim": 10**30}, InputError),
    ({"lambda_reg": META}, InputError),
    ({"lambda_reg": float}, InputError),
    ({"lambda_reg": 10**400}, InputError),
    ({"whitening": META}, InputError),
    ({"check_examples": META}, InputTypeError),
    ({"device": 10**30}, InputError),
    ({"row_dtype": torch.ones(2)}, InputError),
]


@pytest.mark.parametrize(("options", "kind"), ABSURD, ids=str)
def test_absurd_arguments(options, kind, world, tmp_path):
    options = {"train_set_size": N, "save_dir": tmp_path, "device": "cpu"} | options
    with pytest.raises(kind, match=r"must be|train_set_size|row_dtype"):
        trak.TRAKer(world[0], TASK, **options)


def test_files_that_no_file_system_holds_are_an_error_of_the_disk(tmp_path):
    with pytest.raises(OSError, match=r"too large for 12089258196146291747\d+ bytes"):
        RowFile(tmp_path / "grads.mmap", (1 << 40, 1 << 38), np.float32)
    assert not list(tmp_path.iterdir())


def test_numbers_of_examples_that_no_memory_holds():
    with pytest.raises(NotEnoughMemoryError, match="train_set_size"):
        drawn(1 << 50)


X = torch.eye(6)
PARTS = {
    "sparse": (X.to_sparse, r"to_dense\(\)"),
    "rows": (X.to_sparse_csr, r"to_dense\(\)"),
    "nested": (lambda: torch.nested.nested_tensor(list(X)), "to_padded_tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor(list(X), layout=torch.jagged),
        "to_padded_tensor",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        "dequantize",
    ),
    "meta": (lambda: X.to("meta"), "with numbers"),
}


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:.*beta state")
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("kind", PARTS)
def test_parts_of_batches_that_are_not_plain_numbers(kind, world, tmp_path):
    part, remedy = PARTS[kind]
    batch = (part(), torch.arange(6) % 3)
    with pytest.raises(InputTypeError, match=rf"batch\[0\] must be.*{remedy}"):
        call(world, tmp_path, train=[batch])
    traker = trak.TRAKer(world[0], TASK, 6, save_dir=tmp_path / "steps")
    traker.load_checkpoint(world[0].state_dict(), model_id=0)
    with pytest.raises(InputTypeError, match=rf"batch\[0\] must be.*{remedy}"):
        traker.featurize(batch, num_samples=6)


def test_complex_inputs_with_a_conjugate_bit_have_hashes():
    x = torch.tensor([[1 + 2j], [3 - 1j]])
    conjugate, resolved = x.conj(), x.conj().resolve_conj()
    assert conjugate.is_conj()
    found = [example_digests((part,)).tolist() for part in (conjugate, resolved, x)]
    assert found[0] == found[1] != found[2]
