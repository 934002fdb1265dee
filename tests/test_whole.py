"""Models that pick or reorder samples inside, which two samples may not show."""

import json

import numpy as np
import pytest
import torch
from tests import reference, runs
from torch import nn

from trak.errors import (
    InputTypeError,
    PhaseError,
    StoreMismatchError,
    UnsupportedModuleError,
)
from trak.gradient_computers import (
    FunctionalGradientComputer,
    HookGradientComputer,
    ways,
)
from trak.modelout_functions import ImageClassificationModelOutput
from trak.projectors import NoOpProjector

N = 40


class Sorted(nn.Module):
    """Runs its samples in the order of their first feature, and puts them back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        order = x[:, 0].argsort(stable=True)
        y = self.head(torch.tanh(self.layer(x[order])))
        return y[order.argsort()]


class Distinct(nn.Module):
    """Looks each value up once, in a table of those that are there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(30, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        values, places = torch.unique(x, return_inverse=True)
        return self.head(torch.tanh(self.table(values)))[places]


def inputs(kind):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (N,), generator=generator)
    if kind is Sorted:
        x = torch.randn(N, 6, generator=generator, dtype=torch.float64)
        x[:2, 0] = torch.tensor([-1.0, 1.0])  # the first two are in order
        return x, labels
    return torch.arange(N) % 30, labels


def hold_against_reference(model, batches, computer=None):
    computer = computer or HookGradientComputer(model, ImageClassificationModelOutput())
    for batch in batches:
        found = computer.compute_per_sample_grad(batch)
        expected = reference.gradient_rows(model, batch)
        for name, rows in found.items():
            torch.testing.assert_close(rows.flatten(1), expected[name])
    return computer


def parted(batch, *sizes):
    """Pieces of a batch, of sizes in turn."""
    ends = np.cumsum(sizes)
    return [
        tuple(p[end - size : end] for p in batch)
        for size, end in zip(sizes, ends, strict=True)
    ]


@pytest.mark.parametrize("size", [2, 7, N])
def test_samples_that_are_sorted_inside_get_their_own_gradients(size):
    model, (x, labels) = Sorted().double(), inputs(Sorted)
    if size == 2:  # of which nobody can tell anything before they are out of order
        x[:2, 0] = torch.tensor([1.0, -1.0])
    hold_against_reference(model, zip(x.split(size), labels.split(size), strict=True))


def test_exchanges_between_samples_are_seen_whichever_they_are():
    model, (x, labels) = Sorted().double(), inputs(Sorted)
    x, labels = x[:8], labels[:8]
    for j in range(1, 7):
        for other in range(j + 1, 8):  # the first two stay in order
            x[:, 0] = torch.arange(8.0, dtype=torch.float64)
            x[[j, other], 0] = x[[other, j], 0]
            hold_against_reference(model, [(x, labels)])


@pytest.mark.parametrize("sizes", [(2, 5, 9), (3, 4, 2)])
def test_more_samples_than_before_are_compared(sizes):
    model, (x, labels) = Sorted().double(), inputs(Sorted)
    x[: sizes[0], 0] = torch.arange(sizes[0]) - 9.0  # in order: nothing can be told
    hold_against_reference(model, parted((x, labels), *sizes))


class Gated(nn.Module):
    """Reads its weight a second time, for samples of a large first feature."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = torch.tanh(self.layer(x))
        again = nn.functional.linear(y, self.layer.weight.T)
        return self.head(y + again * (x[:, :1] > 5))


@pytest.mark.parametrize(("size", "place"), [(32, 9), (32, 31), (1, 2), (1, 6)])
def test_what_few_samples_do_is_seen(size, place):
    model, (x, labels) = Gated().double(), inputs(Sorted)
    x[place, 0] = 6
    hold_against_reference(model, parted((x, labels), *[size] * (32 // size)))


class Routed(nn.Module):
    """An expert for samples of a large first feature, of which there are few."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.expert = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        chosen = x[:, 0] > 5
        y = torch.zeros_like(x)
        if chosen.any():
            found = torch.tanh(self.expert(x[chosen]))
            y = y.masked_scatter(chosen[:, None], found)
        return self.head(x + y)


def test_an_expert_of_one_sample_is_not_taken_for_one_of_all():
    model, (x, labels) = Routed().double(), inputs(Sorted)
    x[[0, 25], 0] = 6
    hold_against_reference(model, parted((x, labels), 24, 3))


def test_a_layer_whose_rows_vary_is_left_to_the_exact_computer():
    model, (x, labels) = Distinct().double(), inputs(Distinct)
    x[:24], x[24:27] = x[:24] % 5, torch.tensor([7, 2, 4])  # as many values as samples
    computer = hold_against_reference(model, parted((x, labels), 24, 3))
    assert "table.weight" in computer.coverage().names_exactly


def late():
    """Values are in order until the fourth batch."""
    x, labels = inputs(Distinct)
    x[24:] = torch.tensor([3, 5, 7, 9, 4, 1, 0, 2] * 2)
    return Distinct().double(), (x, labels)


def test_what_is_found_later_voids_the_rows_before(tmp_path):
    model, train = late()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    traker = runs.make_traker(model, N, tmp_path)
    with pytest.raises(StoreMismatchError, match=r"may be wrong.*picks or reorders"):
        runs.featurize(traker, train, state, size=8)
    assert traker.saver.train_rows(0).done.sum() == 24
    again = runs.make_traker(model, N, tmp_path)
    with pytest.raises(StoreMismatchError, match=r"'table.weight'.*another save_dir"):
        runs.featurize(again, train, state, size=8)
    assert json.loads((tmp_path / "0" / "coverage.json").read_text())["disproved"]


def test_a_process_that_finds_it_at_once_refuses_the_rows_of_another(tmp_path):
    model, train = late()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    first = runs.make_traker(model, N, tmp_path)
    first.load_checkpoint(state, model_id=0)
    for start in (0, 8, 16):
        part = tuple(p[start : start + 8] for p in train)
        first.featurize(part, inds=range(start, start + 8))
    second = runs.make_traker(model, N, tmp_path)
    second.load_checkpoint(state, model_id=0)
    with pytest.raises(StoreMismatchError, match="may be wrong"):
        second.featurize(tuple(p[24:32] for p in train), inds=range(24, 32))


def test_found_at_once_it_costs_time_only(tmp_path):
    model, (x, labels) = late()
    x, labels = x.flip(0), labels.flip(0)
    expected = reference.gradient_rows(model, (x, labels))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"proj_dim": "exact", "use_half_precision": False}
    for _ in range(2):  # and again, with other batches
        traker = runs.make_traker(model, N, tmp_path, **options)
        runs.featurize(traker, (x, labels), state, size=8)
    rows = traker.saver.train_rows(0).array("grads")
    wanted = reference.flat_rows(expected).numpy()
    np.testing.assert_allclose(rows, wanted, rtol=1e-6, atol=1e-9)


class Partly(nn.Module):
    """Reads its table's first row directly where a token is dropped."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        found = self.table(x[:, 0])
        dropped = x[:, 1:2] > 0
        return self.head(torch.where(dropped, self.table.weight[0], found))


def partly():
    """The model and a batch whose fifth, eighth ... sample read the weight directly."""
    model = Partly().double()
    x = torch.stack([torch.randint(1, 9, (N,)), torch.zeros(N, dtype=torch.long)], 1)
    x[4::3, 1] = 1
    return model, (x, torch.randint(0, 3, (N,)))


def test_a_weight_that_some_samples_read_directly():
    model, batch = partly()
    # what larger batches showed holds for single samples
    alone = [tuple(p[j : j + 1] for p in batch) for j in (0, 4)]
    hold_against_reference(model, [batch, *alone])


def test_samples_that_come_one_by_one_are_looked_at_again(tmp_path):
    model, batch = partly()
    traker = runs.make_traker(model, N, tmp_path, proj_dim="exact")
    with pytest.raises(StoreMismatchError, match="reads weights around their layers"):
        runs.featurize(traker, batch, model.state_dict(), size=1)


@pytest.mark.parametrize("shape", [(8, 6), (8, 4, 5, 5)])
def test_batch_statistics_in_evaluation_mode_are_refused(shape, tmp_path):
    norm = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    model = nn.Sequential(
        norm(shape[1], track_running_stats=False), nn.Flatten(), nn.LazyLinear(3)
    ).eval()
    batch = torch.randn(shape), torch.randint(0, 3, shape[:1])
    model(batch[0])
    traker = runs.make_traker(model, 8, tmp_path)
    with pytest.raises(UnsupportedModuleError, match="'0'.*no running statistics"):
        runs.featurize(traker, batch, model.state_dict())


def test_a_buffer_that_the_forward_pass_writes_is_named(tmp_path):
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counting()
    batch = torch.randn(9, 6), torch.randint(0, 3, (9,))
    traker = runs.make_traker(model, 9, tmp_path)
    with pytest.raises(PhaseError, match=r"buffers \['calls'\].*forward pass"):
        runs.featurize(traker, batch, model.state_dict(), size=3)


class Rotating(nn.Linear):
    """Writes the same numbers into its buffers in every pass, as rotary embeddings do."""

    def __init__(self):
        super().__init__(6, 3)
        self.register_buffer("written", torch.rand(6), persistent=False)
        self.register_buffer("replaced", torch.rand(6), persistent=False)
        self.known = self.written.clone(), self.replaced.clone()

    def forward(self, x):
        self.written.copy_(self.known[0].to(x))
        self.register_buffer("replaced", self.known[1].to(x).clone(), persistent=False)
        return super().forward(x * self.written + self.replaced)


@pytest.mark.parametrize("size", [1, 3])
def test_buffers_that_are_written_with_the_same_numbers(size, tmp_path):
    model = Rotating().double().eval()
    model.known = model.written.clone(), model.replaced.clone()
    data = torch.randn(N, 6).double(), torch.randint(0, 3, (N,))
    state = model.state_dict()
    traker = runs.make_traker(model, N, tmp_path, projector=NoOpProjector())
    runs.featurize(traker, data, state, size=size)
    rows = np.array(traker.saver.train_rows(0).array("grads"))
    expected = reference.flat_rows(reference.gradient_rows(model, data)).numpy()
    np.testing.assert_allclose(rows, expected, rtol=1e-8, atol=1e-10)
    model.known[0][0] += 1
    with pytest.raises(PhaseError, match=r"buffers \['written'\]"):
        runs.featurize(traker, data, state, model_id=1, size=size)


def test_a_table_with_sparse_gradients(tmp_path):
    model = nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))
    batch = torch.randint(0, 9, (N, 2)), torch.randint(0, 3, (N,))
    dense = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    dense.load_state_dict(model.state_dict())
    expected = reference.gradient_rows(dense, batch)
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    for name, rows in computer.compute_per_sample_grad(batch).items():
        torch.testing.assert_close(
            rows.flatten(1).double(), expected[name], rtol=1e-4, atol=1e-6
        )


def test_a_wrapper_says_what_to_pass(tmp_path):
    with pytest.raises(InputTypeError, match=r"model\.module"):
        runs.make_traker(nn.DataParallel(nn.Linear(6, 3)), 4, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace"])
def test_scripted_modules_inside_a_model(how, tmp_path):
    x = torch.randn(6, 5, dtype=torch.float64)
    batch = x, torch.arange(6) % 3
    make = {"script": torch.jit.script, "trace": lambda m: torch.jit.trace(m, x)}[how]
    model = nn.Sequential(make(nn.Linear(5, 4).double()), nn.Tanh(), nn.Linear(4, 3))
    model.double()
    for kind in (HookGradientComputer, FunctionalGradientComputer):
        computer = kind(model, ImageClassificationModelOutput())
        hold_against_reference(model, [batch], computer)
    with pytest.raises(InputTypeError, match=r"torch\.jit module .*Sequential\(model\)"):
        runs.make_traker(make(nn.Linear(5, 3).double()), 6, tmp_path)


class Siamese(nn.Module):
    """Its encoder sees both halves of all samples in one call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.head = nn.Linear(8, 8), nn.Linear(16, 3)
        with torch.no_grad():
            self.head.weight[:, :8] *= 0.1

    def forward(self, x, features):
        u, v = torch.tanh(self.encoder(torch.cat([x[:, 0], x[:, 1]]))).chunk(2)
        return self.head(torch.cat([u * v, features], 1))


def test_small_gradients_are_told_apart_under_autocast():
    # a hundredth of the largest parameter's, which half precision would overlook
    model = Siamese().eval()
    batch = {
        "x": torch.randn(9, 2, 8),
        "features": 30 * torch.rand(9, 8),
        "labels": torch.randint(0, 3, (9,)),
    }
    task = ImageClassificationModelOutput()
    with torch.autocast("cpu", torch.bfloat16):
        computer = HookGradientComputer(model, task)
        found = computer.compute_per_sample_grad(batch)["encoder.weight"]
        exact = FunctionalGradientComputer(model, task).compute_per_sample_grad(batch)
    assert "encoder.weight" in computer.coverage().names_exactly
    torch.testing.assert_close(found, exact["encoder.weight"])


def test_a_model_that_runs_under_autocast_only():
    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.bfloat16())  # float32 weights

    model, x = Mixed(6, 3), torch.randn(5, 6)
    batch = x, torch.randint(0, 3, (5,))
    with torch.autocast("cpu", torch.bfloat16):
        computer = HookGradientComputer(model, ImageClassificationModelOutput())
        found = computer.compute_per_sample_grad(batch)["weight"]
    plain = nn.Linear(6, 3)
    plain.load_state_dict(model.state_dict())
    expected = reference.gradient_rows(plain, batch)["weight"].float()
    torch.testing.assert_close(found.flatten(1), expected, rtol=0.05, atol=0.05)


def test_wide_models_are_compared_on_fewer_samples_at_a_time(monkeypatch):
    monkeypatch.setattr("trak.gradient_computers.ways._COMPARED_NUMBERS", 12 * 100)
    sizes, real = [], ways.disagreeing

    def counted(anatomy, plan, outputs, samples, *args, **options):
        sizes.append(len(samples[0]))
        return real(anatomy, plan, outputs, samples, *args, **options)

    monkeypatch.setattr(ways, "disagreeing", counted)
    model, (x, labels) = Gated().double(), inputs(Sorted)  # 63 parameters
    computer = HookGradientComputer(model, ImageClassificationModelOutput())
    for _ in range(4):
        computer.compute_per_sample_grad((x, labels))
    assert sizes == [19, 13, 8]
