"""Padding that is left out: the same rows in the same order, and fewer tokens."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_hook_models import bert
from torch import nn

from trak import TRAKer
from trak.errors import InputError
from trak.gradient_computers import FunctionalGradientComputer, HookGradientComputer
from trak.modelout_functions import TextClassificationModelOutput
from trak.modelout_functions.abstract import describe_task
from trak.pipeline.lengths import group
from trak.projectors import KernelProjector, NoOpProjector

transformers = pytest.importorskip(
    "transformers", reason="the [hf] extra; make test has it"
)
SHORT = [3, 9, 2, 4, 10, 3, 2, 9, 10, 3, 2, 4]


def batch_of(lengths, columns=16, left=False):
    torch.manual_seed(1)
    mask = (torch.arange(columns) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    return {
        "input_ids": torch.randint(3, 40, mask.shape) * mask,
        "token_type_ids": torch.zeros_like(mask),
        "attention_mask": mask,
        "labels": torch.arange(len(lengths)) % 2,
    }


def featurized(model, batch, folder, kind=HookGradientComputer, trim=True):
    """Rows, loss weights, and the shapes of the token batches the model has seen."""
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    size = len(batch["labels"])
    traker = TRAKer(
        model=model,
        task=TextClassificationModelOutput(trim_padding=trim),
        train_set_size=size,
        save_dir=folder,
        device="cpu",
        proj_dim=16,
        use_half_precision=False,
        gradient_computer=kind,
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    traker.featurize(batch, num_samples=size)
    hook.remove()
    rows = traker.saver.train_rows(0)
    return rows.array("grads"), rows.array("out_to_loss"), shapes


def compare(model, batch, folder, kind=HookGradientComputer):
    *expected, plain = featurized(model, batch, folder / "plain", kind, trim=False)
    *found, shapes = featurized(model, batch, folder / "trimmed", kind)
    for one, other in zip(found, expected, strict=True):
        assert abs(one - other).max() <= 1e-10 * abs(other).max()
    assert {shape[1] for shape in plain} == {16}
    return {shape[1] for shape in shapes}


@pytest.mark.parametrize("kind", [HookGradientComputer, FunctionalGradientComputer])
def test_rows_are_the_same_and_in_order(kind, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trak"):
        widths = compare(bert(), batch_of(SHORT), tmp_path, kind)
    assert widths == {16, 10, 4}  # 16: compared once
    assert sum("Padding is left out" in r.getMessage() for r in caplog.records) == 1


def test_the_exact_kernel_of_batches_that_are_split(tmp_path):
    model, batch, n = bert(), batch_of(SHORT), len(SHORT)
    found = []
    for projector in (KernelProjector(n, "cpu"), NoOpProjector(device="cpu")):
        folder = tmp_path / type(projector).__name__
        traker = TRAKer(
            model,
            "text_classification",
            n,
            folder,
            device="cpu",
            projector=projector,
            row_dtype="float64",
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize(batch, num_samples=n)
        rows = traker.saver.train_rows(0)
        phi = rows.array("grads")
        found.append((phi @ phi.T, np.array(rows.array("out_to_loss"))))
    for one, other in zip(*found, strict=True):
        assert abs(one - other).max() <= 1e-8 * abs(other).max()
    with np.load(tmp_path / "KernelProjector/0/kernel/0.npz") as file:
        order = [file[f"{q}/rows"].tolist() for q in range(2)]
    assert sorted(order[0] + order[1]) == list(range(n))
    assert order[0] + order[1] != list(range(n))  # longest first


def test_batches_whose_longest_sample_is_full_are_only_split(tmp_path):
    assert compare(bert(), batch_of([16, *SHORT]), tmp_path) == {16, 4}
    assert compare(bert(), batch_of([16, 15, 14]), tmp_path / "all") == {16}


def test_padding_on_the_left_needs_positions(tmp_path):
    batch = batch_of([10, 9, 10, 9], left=True)
    assert compare(bert(), batch, tmp_path) == {16}
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    batch["position_ids"] = places
    assert compare(bert(), batch, tmp_path / "positions") == {16, 10}


class Summing(nn.Module):
    """Looks at padding, too."""

    def __init__(self):
        super().__init__()
        self.config = transformers.BertConfig()
        self.embed, self.head = nn.Embedding(40, 4), nn.Linear(4, 2)

    def forward(self, input_ids, token_type_ids, attention_mask):
        return self.head(torch.tanh(self.embed(input_ids)).sum(1))


def test_models_that_look_at_padding_keep_it(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trak"):
        compare(Summing().double(), batch_of(SHORT), tmp_path)
    assert sum("Padding is kept" in r.getMessage() for r in caplog.records) == 1


class Gated(Summing):
    """Adapters that begin at zero look at padding: no output shows it."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 2, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(self, input_ids, token_type_ids, attention_mask):
        found = self.embed(input_ids)
        real = torch.tanh(found * attention_mask.unsqueeze(-1)).sum(1)
        return self.head(real) + self.gate(found.sum(1))


class Fixed(Summing):
    """Takes sixteen tokens and no fewer."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(16))

    def forward(self, input_ids, token_type_ids, attention_mask):
        shares = (attention_mask * self.places).unsqueeze(-1)
        return self.head((self.embed(input_ids) * shares).sum(1))


class Scaled(Summing):
    """Changes its mind below nine tokens, as some rotary embeddings do."""

    def forward(self, input_ids, token_type_ids, attention_mask):
        found = torch.tanh(self.embed(input_ids) * attention_mask.unsqueeze(-1))
        return self.head(found.sum(1) * (2 if input_ids.shape[1] < 9 else 1))


@pytest.mark.parametrize(
    ("build", "said"),
    [(Gated, "outputs change by 0, gradients by"), (Fixed, "the model fails without it")],
)
def test_padding_is_kept_where_gradients_or_shapes_need_it(build, said, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "trak"):
        compare(build().double(), batch_of(SHORT), tmp_path)
    assert said in caplog.text


def test_other_lengths_are_looked_at_when_they_come(tmp_path, caplog):
    torch.manual_seed(0)
    model, found = Scaled().double(), {}
    batches = [batch_of(lengths) for lengths in ([10, 9], [12, 11], [4, 3])]
    for trim in (False, True):
        traker = TRAKer(
            model,
            TextClassificationModelOutput(trim_padding=trim),
            6,
            tmp_path / str(trim),
            device="cpu",
            projector=NoOpProjector(device="cpu"),
            row_dtype="float64",
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        with caplog.at_level(logging.INFO, "trak"):
            for batch in batches:
                traker.featurize(batch, num_samples=2)
        found[trim] = np.array(traker.saver.train_rows(0).array("grads"))
    np.testing.assert_allclose(found[True], found[False], rtol=1e-9, atol=1e-12)
    messages = [r.getMessage() for r in caplog.records]
    assert sum("Padding is left out" in m for m in messages) == 1
    assert sum("Padding is kept from now on" in m for m in messages) == 1


class Flattening(Summing):
    """Looks tokens up in one row, by a view of the batch."""

    def forward(self, input_ids, token_type_ids, attention_mask):
        found = self.embed(input_ids.view(-1)).view(*input_ids.shape, -1)
        return self.head(torch.tanh(found * attention_mask.unsqueeze(-1)).sum(1))


def test_shortened_batches_can_be_viewed_like_whole_ones(tmp_path):
    assert compare(Flattening().double(), batch_of([10, 9, 10, 9]), tmp_path) == {16, 10}


def test_a_model_that_rebuilds_itself_for_short_batches_keeps_padding(tmp_path, caplog):
    torch.manual_seed(0)
    config = transformers.BigBirdConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, num_labels=2, block_size=1, num_random_blocks=1,
        max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.BigBirdForSequenceClassification(config).double().eval()
    attention = model.bert.encoder.layer[0].attention.self
    with caplog.at_level(logging.INFO, "trak"):
        compare(model, batch_of([4, 3, 4, 4, 16, 15, 14, 16]), tmp_path)
    assert "the model rebuilds itself" in caplog.text
    assert model.bert.attention_type == "block_sparse"
    assert model.bert.encoder.layer[0].attention.self is attention


def test_other_models_and_odd_batches_are_left_alone():
    task, model = TextClassificationModelOutput(), bert()
    batch = batch_of(SHORT)
    assert task.padding_mask(model, batch) is batch["attention_mask"]
    assert task.padding_mask(nn.Linear(2, 2), batch) is None
    assert task.padding_mask(nn.Sequential(model), batch) is not None
    del batch["attention_mask"]
    assert task.padding_mask(model, batch) is None


def test_holes_in_the_mask_are_no_padding(tmp_path):
    batch = batch_of([10, 10, 10, 10])
    batch["attention_mask"][1, 4] = 0
    assert compare(bert(), batch, tmp_path) == {16}


def test_wrong_labels_are_named_by_their_place_in_the_batch(tmp_path):
    batch = batch_of(SHORT)
    model = bert()
    featurized(model, batch, tmp_path / "right")
    batch["labels"][7] = 5
    with pytest.raises(InputError, match="Sample 7 of the batch has label 5"):
        featurized(model, batch, tmp_path / "wrong")


def test_the_switch_is_no_setting_of_the_store():
    on, off = (TextClassificationModelOutput(trim_padding=t) for t in (True, False))
    assert describe_task(on) == describe_task(off)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 512), min_size=1, max_size=60))
def test_groups_hold_every_sample_once_and_never_cost_more(lengths):
    groups = group(lengths)
    assert sorted(j for rows in groups for j in rows) == list(range(len(lengths)))
    tokens = sum(len(rows) * max(lengths[j] for j in rows) for rows in groups)
    assert tokens <= len(lengths) * max(lengths)
    assert len(groups) == 1 or min(map(len, groups)) >= 4
