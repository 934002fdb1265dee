"""dattri: `LoGraAttributor.cache`, its projection for large models that runs on CPUs.

It covers linear layers. k is split evenly among them, to the nearest square, as the
library asks for.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from dattri.algorithm import BlockProjectedIFAttributor, LoGraAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn

from benchmarks.peers import problem as work

BARE: dict[str, Any] = {
    "device": "cpu",
    "proj_dim": -1,
    "proj_max_batch_size": 64,
    "proj_type": "identity",
}


def loss(kind: str, model: Any, batch: dict[str, Tensor], device: str) -> Tensor:
    """The mean of what is attributed; the library multiplies by the batch size."""
    del device
    return work.margins(kind, model(**batch).logits, batch).mean()


def main() -> None:
    """Checks or times."""
    problem, mode = work.read()
    model = problem.model()
    watch = work.Stopwatch(model, problem)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    task = AttributionTask(
        loss_func=partial(loss, problem.kind),
        model=model,
        checkpoints=model.state_dict(),
    )
    each = round((problem.proj_dim / len(layers)) ** 0.5)
    loader = torch.utils.data.DataLoader(
        work.Examples(problem.data()), batch_size=problem.batch_size
    )
    common: dict[str, Any] = {
        "task": task,
        "hessian": "Identity",
        "offload": "none",
        "cache_dir": problem.folder,
    }
    seconds = None
    if mode == "time":
        LoGraAttributor(**common, proj_dim=each**2).cache(loader)
        seconds = watch.seconds(len(loader), problem.warmup)
    else:
        attributor = BlockProjectedIFAttributor(
            **common, sparsifier_kwargs=BARE, projector_kwargs=BARE
        )
        attributor.cache(loader)
        scores = attributor.attribute(loader, loader)  # [train, test]
        # the test side is the model's own loss, whatever the task: -q times the margin's
        data = problem.data()
        with torch.no_grad():
            q = torch.sigmoid(-work.margins(problem.kind, model(**data).logits, data))
        work.save_gram(problem, scores / -q)
    names = dict(model.named_parameters())
    own = (f"{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    total = each**2 * len(layers)
    ran = f"LoGraAttributor.cache, {each} x {each} a linear layer, k = {total}"
    covered = [name for name in own if name in names]
    work.report("dattri", seconds, covered=covered, ran=ran)


if __name__ == "__main__":
    main()
