"""The documented upstream script over small cases, for whichever `trak` is installed.

Run by the reference implementation's interpreter as a script, and imported by the tests
for this library: one script, both libraries. Imports torch, numpy and trak only.

    python run_cases.py FOLDER       # writes FOLDER/{case}.npz
"""

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

import trak
from trak import modelout_functions, projectors, score_computers
from trak.gradient_computers import FunctionalGradientComputer, IterativeGradientComputer

N, M, BATCH = 60, 6, 15


class Encoder(nn.Module):
    """A transformer encoder that takes token tensors by name, and returns logits."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.types = nn.Embedding(2, 8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids, token_type_ids, attention_mask):
        x = self.embed(input_ids) + self.types(token_type_ids)
        weights = self.query(x) @ self.key(x).transpose(1, 2) / 8**0.5
        weights = weights.masked_fill(attention_mask[:, None] == 0, -1e9).softmax(-1)
        x = self.norm(x + weights @ self.value(x))
        x = x + self.down(torch.nn.functional.gelu(self.up(x)))
        mask = attention_mask[..., None].to(x)
        return self.head((x * mask).sum(1) / mask.sum(1))


def mlp():
    return nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def vectors():
    return (torch.randn(N + M, 10), torch.randint(0, 4, (N + M,)))


def images():
    return (torch.randn(N + M, 1, 8, 8), torch.randint(0, 4, (N + M,)))


def tokens():
    length = torch.randint(3, 8, (N + M, 1))
    mask = (torch.arange(7) < length).long()
    ids = torch.randint(1, 20, (N + M, 7)) * mask
    types = (torch.arange(7) > 3).long() * mask
    return (ids, types, mask, torch.randint(0, 3, (N + M,)))


# name: (model, data, task, number of checkpoints, what else)
CASES = {
    "mlp-1": (mlp, vectors, "image_classification", 1, {}),
    "mlp-3": (mlp, vectors, "image_classification", 3, {}),
    "cnn-1": (cnn, images, "image_classification", 1, {}),
    "cnn-3": (cnn, images, "image_classification", 3, {}),
    "encoder-1": (Encoder, tokens, "text_classification", 1, {}),
    "encoder-3": (Encoder, tokens, "text_classification", 3, {}),
    "temperature": (mlp, vectors, "image_classification", 1, {"temperature": 2.0}),
    "grad_wrt": (
        mlp,
        vectors,
        "image_classification",
        1,
        {"grad_wrt": ["0.weight", "2.bias"]},
    ),
    "inds": (mlp, vectors, "image_classification", 1, {"shuffled": True}),
    "iterative": (mlp, vectors, "iterative_image_classification", 1, {}),
}


def trained(build, data, seed):
    """A model after a few steps of SGD, so that statistics and margins are not trivial."""
    torch.manual_seed(seed)
    model = build().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    *inputs, labels = (part[:N] for part in data)
    for _ in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*inputs), labels).backward()
        optimizer.step()
    return model.eval()


def run(case, folder):
    """Runs one case; returns scores and the store's arrays of the first checkpoint."""
    build, make_data, task, count, extra = CASES[case]
    torch.manual_seed(7)
    data = make_data()
    models = [trained(build, data, seed) for seed in range(count)]
    if "temperature" in extra:
        cls = modelout_functions.ImageClassificationModelOutput
        task = cls(temperature=extra["temperature"])
    iterative = task == "iterative_image_classification"
    traker = trak.TRAKer(
        model=build().eval(),
        task=task,
        train_set_size=N,
        save_dir=str(folder),
        device="cpu",
        gradient_computer=IterativeGradientComputer
        if iterative
        else FunctionalGradientComputer,
        projector=projectors.NoOpProjector(device="cpu"),
        score_computer=score_computers.BasicScoreComputer,
        use_half_precision=False,
        grad_wrt=extra.get("grad_wrt"),
        lambda_reg=0.05,
        logging_level=100,
    )
    order = np.random.default_rng(3).permutation(N) if "shuffled" in extra else np.arange(N)
    for model_id, model in enumerate(models):
        traker.load_checkpoint(model.state_dict(), model_id=model_id)
        for rows in order.reshape(-1, BATCH):
            batch = [part[:N][torch.from_numpy(rows)] for part in data]
            if "shuffled" in extra:
                traker.featurize(batch=batch, inds=rows)
            else:
                traker.featurize(batch=batch, num_samples=BATCH)
    traker.finalize_features()
    for model_id, model in enumerate(models):
        traker.start_scoring_checkpoint(
            exp_name="parity",
            checkpoint=model.state_dict(),
            model_id=model_id,
            num_targets=M,
        )
        traker.score(batch=[part[N:] for part in data], num_samples=M)
    scores = traker.finalize_scores(exp_name="parity")
    traker.saver.load_current_store(0)
    store = traker.saver.current_store
    kept = {name: np.array(store[name]) for name in ("grads", "out_to_loss", "features")}
    return {"scores": np.array(scores), **kept}


def main():
    folder = Path(sys.argv[1])
    (folder / "version").write_text(version("traker"))
    for case in CASES:
        with tempfile.TemporaryDirectory() as store:
            np.savez(folder / f"{case}.npz", **run(case, store))


if __name__ == "__main__":
    main()
