"""Which training pairs made a BERT classifier answer the way it did?

A pair is a question and a sentence; the label says whether the sentence holds the
answer (the QNLI task). This script fine-tunes a BERT on 5,000 pairs (twice: TRAK
averages over checkpoints), computes TRAK scores of all of them for 10 pairs that the
model never saw, and prints the training pairs that helped and harmed each of the ten
predictions most.

    python examples/qnli.py

needs no network: model and data lie in examples/data. The same code runs the original
task with the model of your choice, fine-tuned here or elsewhere:

    python examples/qnli.py --model bert-base-cased --dataset glue/qnli --ckpt FILE

A second run with the same settings picks up where the first one stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from qnli_data import Split, embedded_pairs, glue_pairs, make_loader
from qnli_report import Stopwatch, make_report, print_report, print_times
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    default_data_collator,
)

from trak import TRAKer
from trak.modelout_functions import TextClassificationModelOutput

EMBEDDED_MODEL = Path(__file__).resolve().parent / "data" / "bert-tiny"


class SequenceClassificationModel(nn.Module):
    """A Hugging Face sequence classifier that takes tensors and returns logits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=2
        ).float()

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Returns the logits, one row a pair."""
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


def process_batch(batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Turns a batch of the loader into the tuple that the model output expects."""
    return (
        batch["input_ids"],
        batch["token_type_ids"],
        batch["attention_mask"],
        batch["labels"],
    )


def trim(batch: dict[str, Tensor], device: str) -> tuple[Tensor, ...]:
    """A batch on the device, without the columns that are padding in every row."""
    *inputs, labels = process_batch(batch)
    longest = int(batch["attention_mask"].sum(1).max())
    return *(x[:, :longest].to(device) for x in inputs), labels.to(device)


def fine_tune(
    model: nn.Module, loader: DataLoader[Any], epochs: int, lr: float, device: str
) -> None:
    """Trains with AdamW, warm-up and linear decay, on batches of similar lengths."""
    rows, size = loader.dataset, 32
    lengths = torch.tensor([sum(row["attention_mask"]) for row in rows])
    total = epochs * -(-len(lengths) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        lr,
        total_steps=total,
        pct_start=0.1,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    model.train()
    with tqdm(total=total, desc="Fine-tuning", unit="step") as bar:
        for _ in range(epochs):
            noisy = lengths + 10 * torch.rand(len(lengths))
            batches = [chunk.tolist() for chunk in noisy.argsort().split(size)]
            random.shuffle(batches)
            for batch in DataLoader(
                rows, batch_sampler=batches, collate_fn=default_data_collator
            ):
                *inputs, labels = trim(batch, device)
                loss = nn.functional.cross_entropy(model(*inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader[Any], device: str) -> np.ndarray:
    """The probability of each label, one row a pair."""
    model.eval()
    rows = [model(*trim(batch, device)[:-1]).softmax(-1).cpu() for batch in loader]
    return torch.cat(rows).numpy()


def load_weights(model: SequenceClassificationModel, file: Path) -> None:
    """Loads a state dict; raises RuntimeError where it does not fit the model."""
    if file.suffix == ".safetensors":
        state = load_file(file)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
    # a buffer that transformers stored before 4.31
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    model.model.load_state_dict(state)


def save_weights(model: SequenceClassificationModel, file: Path) -> None:
    """Writes the state dict, whole or not at all."""
    part = file.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in model.model.state_dict().items()}, part)
    part.replace(file)


def attribute(
    model: nn.Module,
    checkpoints: list[dict[str, Tensor]],
    loader_train: DataLoader[Any],
    loader_val: DataLoader[Any],
    args: argparse.Namespace,
    watch: Stopwatch,
) -> TRAKer:
    """Computes and stores TRAK scores: one row a training pair, one column a target."""
    traker = TRAKer(
        model=model,
        task=TextClassificationModelOutput,
        train_set_size=args.train_size,
        save_dir=args.save_dir,
        device=args.device,
        proj_dim=args.proj_dim,
    )

    with watch.phase("featurize"):
        for model_id, checkpoint in enumerate(checkpoints):
            traker.load_checkpoint(checkpoint, model_id=model_id)
            title = f"Featurizing, checkpoint {model_id + 1} of {len(checkpoints)}"
            for batch in tqdm(loader_train, desc=title, unit="batch"):
                tensors = [x.to(args.device) for x in process_batch(batch)]
                traker.featurize(batch=tensors, num_samples=tensors[0].shape[0])

    with watch.phase("finalize"):
        traker.finalize_features()

    with watch.phase("score"):
        for model_id, checkpoint in enumerate(checkpoints):
            traker.start_scoring_checkpoint(
                exp_name="qnli",
                checkpoint=checkpoint,
                model_id=model_id,
                num_targets=args.val_size,
            )
            for batch in tqdm(loader_val, desc="Scoring", unit="batch"):
                tensors = [x.to(args.device) for x in process_batch(batch)]
                traker.score(batch=tensors, num_samples=tensors[0].shape[0])
        traker.finalize_scores(exp_name="qnli")
    return traker


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="embedded", help="hub name or folder (the embedded BERT)")
    add("--dataset", default="embedded", choices=["embedded", "glue/qnli"])
    add("--ckpt", type=Path, nargs="+", help="fine-tuned state dicts; no fine-tuning")
    add("--checkpoints", type=int, default=2, help="models to fine-tune (2)")
    add("--train-size", type=int, default=5_000, help="training pairs (5000)")
    add("--val-size", type=int, default=10, help="pairs to explain (10)")
    add("--proj-dim", type=int, default=1024, help="projected dimension (1024)")
    add("--batch-size", type=int, default=64, help="pairs a TRAK batch (64)")
    add("--epochs", type=int, default=1, help="of fine-tuning (1)")
    add("--lr", type=float, help="of fine-tuning (2e-4 embedded model, 3e-5 others)")
    add("--save-dir", type=Path, default=Path("trak_results/qnli"))
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    args = parser.parse_args()
    for file in args.ckpt or ():
        if not file.is_file():
            parser.error(f"--ckpt {file}: no such file")
    if args.lr is None:
        args.lr = 2e-4 if args.model == "embedded" else 3e-5
    return args


def claim_save_dir(args: argparse.Namespace) -> None:
    """Writes the settings into the folder, or exits if it holds another run's."""
    path = args.save_dir / "settings.json"
    settings = {
        name: value if isinstance(value, int | float | str) else repr(value)
        for name, value in vars(args).items()
        if name not in {"save_dir", "device", "batch_size"}
    }
    if not path.exists():
        args.save_dir.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return
    stored = json.loads(path.read_text(encoding="utf-8"))
    changed = [
        f"{name} {stored.get(name)!r} (now {value!r})"
        for name, value in settings.items()
        if stored.get(name) != value
    ]
    if changed:
        sys.exit(
            f"{args.save_dir} holds a run with {', '.join(changed)}. "
            "Choose another --save-dir, or delete this one."
        )


def load_all(
    args: argparse.Namespace,
) -> tuple[Split, SequenceClassificationModel, Any]:
    """Loads the pairs, the untrained model and its tokenizer."""
    embedded = args.dataset == "embedded"
    name = str(EMBEDDED_MODEL) if args.model == "embedded" else args.model
    try:
        split = embedded_pairs(args.seed) if embedded else glue_pairs()
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = SequenceClassificationModel(name)
    except (OSError, ValueError) as error:
        sys.exit(
            f"Cannot load model {args.model} or dataset {args.dataset} (a hub name "
            f"needs a network, the defaults do not): {str(error).splitlines()[0]}"
        )
    if len(split.train) < args.train_size or len(split.targets) < args.val_size:
        sys.exit(
            f"Only {len(split.train)} training pairs, {len(split.targets)} targets exist."
        )
    split = split._replace(
        train=split.train[: args.train_size], targets=split.targets[: args.val_size]
    )
    return split, model.to(args.device), tokenizer


def make_checkpoints(
    model: SequenceClassificationModel, loader: DataLoader[Any], args: argparse.Namespace
) -> list[dict[str, Tensor]]:
    """Fine-tunes each model from the same start, or loads it where that was done."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    own = [args.save_dir / f"model-{c}.safetensors" for c in range(args.checkpoints)]
    checkpoints = []
    for number, file in enumerate(args.ckpt or own):
        if file.exists():
            print(f"Weights from {file}")
            load_weights(model, file)
        else:
            random.seed(args.seed + number)
            torch.manual_seed(args.seed + number)
            model.load_state_dict(start)
            fine_tune(model, loader, args.epochs, args.lr, args.device)
            save_weights(model, file)
        checkpoints.append({k: v.clone() for k, v in model.state_dict().items()})
    return checkpoints


def predict_all(
    model: nn.Module,
    checkpoints: list[dict[str, Tensor]],
    loader: DataLoader[Any],
    device: str,
) -> np.ndarray:
    """The mean over checkpoints of each label's probability, one row a pair."""
    total = []
    for checkpoint in checkpoints:
        model.load_state_dict(checkpoint)
        total.append(predict(model, loader, device))
    return np.mean(total, axis=0)


def main() -> None:
    """Fine-tunes, attributes, reports."""
    args = parse_args()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(args.seed)
    watch = Stopwatch()

    with watch.phase("load"):
        split, model, tokenizer = load_all(args)
        claim_save_dir(args)
        loader_train = make_loader(split.train, tokenizer, batch_size=args.batch_size)
        loader_val = make_loader(split.targets, tokenizer, batch_size=args.batch_size)
        loader_held_out = make_loader(split.held_out[:2000], tokenizer, batch_size=64)

    with watch.phase("fine-tune"):
        checkpoints = make_checkpoints(model, loader_train, args)

    with watch.phase("evaluate"):
        labels = [pair["label"] for pair in split.held_out[:2000]]
        probs = predict_all(model, checkpoints, loader_held_out, args.device)
        accuracy = float((probs.argmax(1) == labels).mean())
        probs = predict_all(model, checkpoints, loader_val, args.device)

    traker = attribute(model, checkpoints, loader_train, loader_val, args, watch)
    report = make_report(split.targets, split.train, probs, traker)
    np.save(args.save_dir / "qnli_scores.npy", traker.scores("qnli"))
    report_file = args.save_dir / "qnli_report.json"
    summary = {"held_out_accuracy": accuracy, "seconds": watch.seconds}
    report_file.write_text(
        json.dumps({**summary, "targets": report}, indent=1, ensure_ascii=False),
        encoding="utf-8",
    )

    print_report(report, width=min(shutil.get_terminal_size((88, 24)).columns, 100))
    print(
        f"\n{'=' * 40}\nAccuracy on {len(labels)} pairs of other articles: {accuracy:.1%}"
    )
    print_times(watch.seconds)
    print(f"\nScores {traker.scores('qnli').shape} in {args.save_dir / 'qnli_scores.npy'}")
    print(f"Report in {report_file}")


if __name__ == "__main__":
    main()
