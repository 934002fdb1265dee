"""traker 0.3.2: `TRAKer.featurize` with `BasicProjector`, its projector for CPUs."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn

from benchmarks.peers import problem as work
from trak import TRAKer
from trak.modelout_functions import TextClassificationModelOutput
from trak.projectors import BasicProjector, NoOpProjector, ProjectionType

PARTS = ("input_ids", "token_type_ids", "attention_mask", "labels")


class Logits(nn.Module):
    """What traker's text task expects: tensors in, a tensor out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, token_type_ids: Any, attention_mask: Any) -> Any:
        """Logits."""
        return self.model(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            attention_mask=attention_mask,
        ).logits


def main() -> None:
    """Checks or times."""
    problem, mode = work.read()
    # its vmap cannot follow the other kinds of attention
    model = Logits(problem.model(attn_implementation="eager")).eval()
    width = sum(p.numel() for p in model.parameters())
    options: dict[str, Any] = {"grad_dim": width, "seed": 0, "device": "cpu"}
    if mode == "check":
        kind = ProjectionType.normal
        projector = NoOpProjector(proj_dim=width, proj_type=kind, **options)
    else:
        projector = BasicProjector(
            proj_dim=problem.proj_dim, proj_type=ProjectionType.rademacher, **options
        )
    batches = problem.batches()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task=TextClassificationModelOutput(),
            train_set_size=problem.batch_size * len(batches),
            save_dir=folder,
            device="cpu",
            projector=projector,
            proj_dim=projector.proj_dim,
            use_half_precision=False,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        for batch in batches:
            start = problem.clock()
            parts = tuple(batch[name] for name in PARTS)
            traker.featurize(batch=parts, num_samples=problem.batch_size)
            seconds.append(problem.clock() - start)
        rows = torch.tensor(traker.saver.current_store["grads"][:])
    if mode == "check":
        rows *= width**0.5
        work.save_gram(problem, rows @ rows.T)
    covered = [name.removeprefix("model.") for name, _ in model.named_parameters()]
    ran = f"TRAKer.featurize, BasicProjector, k = {problem.proj_dim}"
    work.report("traker", seconds[problem.warmup :], covered=covered, ran=ran)


if __name__ == "__main__":
    main()
