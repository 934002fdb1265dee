"""The tutorial page "Text Classification using BERT", run as written on a small BERT.

transformers' default attention, which `vmap` cannot follow.
"""

import numpy as np
import pytest
import torch
from tests import reference
from torch import nn
from torch.utils.data import DataLoader

from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput, TextClassificationModelOutput

transformers = pytest.importorskip(
    "transformers", reason="the [hf] extra; make test has it"
)
ch = torch
TRAIN_SET_SIZE, VAL_SET_SIZE = 20, 4


class SequenceClassificationModel(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=16,
            num_labels=2,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = transformers.BertForSequenceClassification(self.config)
        self.model.to(dtype).eval()

    def forward(self, input_ids, token_type_ids, attention_mask):
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


class PageTask(AbstractModelOutput):
    """The page's two methods and nothing else."""

    @staticmethod
    def get_output(model, weights, buffers, input_id, token_type_id, attention_mask, label):
        kw_inputs = {
            "input_ids": input_id.unsqueeze(0),
            "token_type_ids": token_type_id.unsqueeze(0),
            "attention_mask": attention_mask.unsqueeze(0),
        }

        logits = ch.func.functional_call(
            model, (weights, buffers), args=(), kwargs=kw_inputs
        )
        bindex = ch.arange(logits.shape[0]).to(logits.device, non_blocking=False)
        logits_correct = logits[bindex, label.unsqueeze(0)]

        cloned_logits = logits.clone()
        cloned_logits[bindex, label.unsqueeze(0)] = ch.tensor(
            -ch.inf, device=logits.device, dtype=logits.dtype
        )

        margins = logits_correct - cloned_logits.logsumexp(dim=-1)
        return margins.sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        input_ids, token_type_ids, attention_mask, labels = batch
        kw_inputs = {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
        }
        logits = ch.func.functional_call(
            model, (weights, buffers), args=(), kwargs=kw_inputs
        )
        ps = self.softmax(logits / self.loss_temperature)[ch.arange(logits.size(0)), labels]
        return (1 - ps).clone().detach().unsqueeze(-1)


class PastedTask(AbstractModelOutput):
    """The methods as the page prints them, without @staticmethod."""

    get_output = PageTask.__dict__["get_output"].__func__
    get_out_to_loss_grad = PageTask.get_out_to_loss_grad


class ForeignTask:
    """Not derived from anything."""

    softmax = nn.Softmax(-1)
    loss_temperature = 1.0
    get_output = PageTask.__dict__["get_output"]
    get_out_to_loss_grad = PageTask.get_out_to_loss_grad


TASKS = {
    "class": TextClassificationModelOutput,
    "instance": TextClassificationModelOutput(temperature=1.0),
    "string": "text_classification",
    "user's class": PageTask,
    "user's instance": PageTask(),
    "pasted": PastedTask,
    "foreign": ForeignTask,
}


def examples(count, seed):
    rng = torch.Generator().manual_seed(seed)
    length = torch.randint(4, 13, (count, 1), generator=rng)
    mask = (torch.arange(12) < length).long()
    return [
        {
            "input_ids": ids * keep,
            "token_type_ids": (torch.arange(12) > 5).long() * keep,
            "attention_mask": keep,
            "labels": label,
        }
        for ids, keep, label in zip(
            torch.randint(1, 50, (count, 12), generator=rng),
            mask,
            torch.randint(0, 2, (count,), generator=rng),
            strict=True,
        )
    ]


def process_batch(batch):
    return (
        batch["input_ids"],
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["labels"],
    )


def loaders():
    collate = transformers.default_data_collator
    return [
        DataLoader(examples(n, seed), batch_size=8, shuffle=False, collate_fn=collate)
        for n, seed in [(TRAIN_SET_SIZE, 0), (VAL_SET_SIZE, 1)]
    ]


def run_page(model, task, folder, process=process_batch, **options):
    loader_train, loader_val = loaders()
    traker = TRAKer(
        model=model,
        task=task,
        train_set_size=TRAIN_SET_SIZE,
        save_dir=folder,
        device="cpu",
        **({"proj_dim": 1024, "lambda_reg": "1x"} | options),
    )

    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in loader_train:
        batch = process(batch)
        batch = [x.to("cpu") for x in batch] if isinstance(batch, tuple) else batch
        size = len(batch["labels"]) if not isinstance(batch, list) else batch[0].shape[0]
        traker.featurize(batch=batch, num_samples=size)

    traker.finalize_features()

    traker.start_scoring_checkpoint(
        exp_name="qnli", checkpoint=model.state_dict(), model_id=0, num_targets=VAL_SET_SIZE
    )
    for batch in loader_val:
        batch = process(batch)
        size = len(batch["labels"]) if not isinstance(batch, tuple) else batch[0].shape[0]
        traker.score(batch=batch, num_samples=size)

    return traker, traker.finalize_scores(exp_name="qnli")


def oracle_scores(model, projector):
    train, targets = (
        [
            torch.cat(parts)
            for parts in zip(*(process_batch(b) for b in loader), strict=True)
        ]
        for loader in loaders()
    )
    gradients = [reference.gradient_rows(model, batch) for batch in (train, targets)]
    rows = [reference.projected_rows(g, projector, 0) for g in gradients]
    return reference.trak_scores([(*rows, reference.loss_weights(model, train))])


@pytest.mark.parametrize("kind", TASKS)
def test_the_page_runs_as_written_and_is_right(kind, tmp_path):
    model = SequenceClassificationModel()
    traker, scores = run_page(model, TASKS[kind], tmp_path, use_half_precision=False)
    assert scores.shape == (TRAIN_SET_SIZE, VAL_SET_SIZE)
    expected = oracle_scores(model, traker.projector)
    np.testing.assert_allclose(
        scores, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max()
    )


def test_the_page_with_every_default_ranks_like_the_oracle(tmp_path):
    model = SequenceClassificationModel(torch.float32)
    traker, scores = run_page(model, TextClassificationModelOutput, tmp_path)
    expected = oracle_scores(model, traker.projector)
    assert np.load(tmp_path / "scores" / "qnli.mmap").shape == scores.shape
    for j in range(VAL_SET_SIZE):
        assert np.corrcoef(scores[:, j], expected[:, j])[0, 1] > 0.999


@pytest.mark.parametrize("form", [dict, transformers.BatchEncoding])
@pytest.mark.parametrize("token_types", [True, False])
def test_dict_batches_and_models_that_return_output_objects(form, token_types, tmp_path):
    wrapper = SequenceClassificationModel()
    model = wrapper.model  # returns a SequenceClassifierOutput

    def process(batch):
        left_out = () if token_types else ("token_type_ids",)
        return form({k: v for k, v in batch.items() if k not in left_out})

    traker, scores = run_page(model, TextClassificationModelOutput, tmp_path, process)
    assert np.isfinite(scores).all()
    batch = next(iter(loaders()[0]))
    found = traker.gradient_computer.compute_per_sample_grad(process(batch))
    if not token_types:  # segment 0 everywhere is what BERT assumes then
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    expected = reference.gradient_rows(wrapper, process_batch(batch))
    assert [f"model.{name}" for name in found] == list(expected)
    for rows, oracle in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(rows.flatten(1), oracle, rtol=1e-9, atol=1e-11)


def test_three_part_tuples_leave_out_token_types():
    model = SequenceClassificationModel().model
    batch = next(iter(loaders()[0]))
    parts = (batch["input_ids"], batch["attention_mask"], batch["labels"])
    named = {k: batch[k] for k in ("input_ids", "attention_mask", "labels")}
    task = TextClassificationModelOutput()
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    one = task.get_output(model, weights, buffers, *(p[0] for p in parts))
    other = task.get_output(model, weights, buffers, {k: v[0] for k, v in named.items()})
    assert torch.equal(one, other)
    assert torch.equal(
        task.get_out_to_loss_grad(model, weights, buffers, parts),
        task.get_out_to_loss_grad(model, weights, buffers, named),
    )
