"""bergson: an on-disk index of projected gradients, as `bergson build` makes it.

It covers the projections inside a decoder's blocks, without biases. Each gets the same
share of k, to the nearest square.
"""

from __future__ import annotations

import tempfile

import torch
from bergson import GradientProcessor, IndexConfig, collect_gradients, load_gradients
from bergson.gradients import LayerAdapter
from datasets import Dataset

from benchmarks.peers import problem as work


def main() -> None:
    """Checks or times."""
    problem, mode = work.read()
    model = problem.model()
    watch = work.Stopwatch(model, problem)
    base = model.base_model
    layers = [
        name
        for name, layer in base.named_modules()
        if isinstance(layer, LayerAdapter.supported_modules)
    ]
    each = round((problem.proj_dim / len(layers)) ** 0.5) if mode == "time" else 0
    tokens = problem.data()["input_ids"]
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    numbers = list(range(len(tokens)))
    batches = [
        numbers[start : start + problem.batch_size]
        for start in range(0, len(numbers), problem.batch_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = IndexConfig(
            run_path=f"{folder}/index",
            projection_dim=each,
            loss_fn="log_odds",
            loss_reduction="mean",
            drop_columns=False,
        )
        config.partial_run_path.mkdir(parents=True)
        processor = GradientProcessor(projection_dim=each or None)
        collect_gradients(model, data, processor, config, batches=batches)
        rows = torch.tensor(load_gradients(config.partial_run_path)[:].copy())
    seconds = None
    if mode == "time":
        seconds = watch.seconds(len(batches), problem.warmup)
    else:
        work.save_gram(problem, rows.double() @ rows.double().T)
    prefix = f"{model.base_model_prefix}."
    ran = f"collect_gradients, {each} x {each} a layer, k = {each**2 * len(layers)}"
    covered = [f"{prefix}{name}.weight" for name in layers]
    work.report("bergson", seconds, covered=covered, ran=ran)


if __name__ == "__main__":
    main()
