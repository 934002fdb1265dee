"""What loss weights add up to along a training, against small steps written out."""

import json

import numpy as np
import pytest
import torch
from tests import cases, runs

import trak
from trak.errors import StoreCorruptedError
from trak.modelout_functions import AbstractModelOutput
from trak.score_computers import RidgeScoreComputer, path
from trak.score_computers.auto_ridge import Choice
from trak.score_computers.loss_power import Ending, path_of
from trak.score_computers.losses import Losses
from trak.score_computers.path import of_kernel
from trak.score_computers.ridge_sample import SAMPLE, Situation, drawn

N, M = 60, 6
ONES = torch.ones(40)
CPU = torch.device("cpu")


def added_up(pull, losses, signs):
    return path.added_up(pull, losses, signs, CPU)


def of_rows(rows):
    return path.of_rows(rows, CPU)


def way_of(rows, situation):
    return path.way_of(rows, None, None, situation, CPU)


def features(count=40, width=12, seed=0):
    lots = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=lots, dtype=torch.float64)
    rows[:, 0] += 1.5  # something that all have in common
    return rows * torch.linspace(2, 0.3, width, dtype=torch.float64)


def small_steps(kernel, time, steps=4_000):
    """The oracle: `a` and `q` after gradient flow from zero, by Euler's rule."""
    weights = torch.zeros(len(kernel), dtype=torch.float64)
    for _ in range(steps):
        weights += torch.sigmoid(-kernel @ weights) * time / steps
    return weights, torch.sigmoid(-kernel @ weights)


@pytest.mark.parametrize("time", [0.02, 0.3, 3.0])
def test_a_training_that_was_stopped_is_found_again(time):
    rows = features()
    expected, loss = small_steps(rows @ rows.T, time)
    found = added_up(of_kernel(rows @ rows.T, None), Losses(loss[:, None]), ONES)
    assert found.dtype == torch.float64
    assert found.shape == (40, 1)
    expected = expected / expected.mean()
    assert float((found.flatten() - expected).abs().max()) < 0.05 * float(expected.max())
    ended = loss / loss.mean()  # Q as it is at the end is far from it, but for short ones
    off = float((ended - expected).abs().max())
    assert off > 3 * float((found.flatten() - expected).abs().max()) or time < 0.1


def test_rows_are_as_good_as_their_kernel_and_weights_are_taken_out():
    rows = features()
    _, loss = small_steps(rows @ rows.T, 0.5, 2000)
    losses = Losses(loss[:, None])
    roots = torch.linspace(0.1, 2, 40, dtype=torch.float64)[:, None]
    weighted = roots * rows
    whole = added_up(of_kernel(rows @ rows.T, None), losses, ONES)
    again = added_up(of_kernel(weighted @ weighted.T, roots), losses, ONES)
    torch.testing.assert_close(again, whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        added_up(of_rows(rows), losses, ONES), whole, rtol=1e-3, atol=1e-4
    )


def test_wide_rows_are_hashed_and_nearly_as_good():
    turned = torch.linalg.qr(
        torch.randn(6000, 12, generator=torch.Generator().manual_seed(0))
    )
    rows = features().float() @ turned.Q.T
    _, loss = small_steps((rows @ rows.T).double(), 0.5, 2000)
    losses = Losses(loss[:, None])
    whole = added_up(of_kernel(rows @ rows.T, None), losses, ONES)
    found = added_up(of_rows(rows), losses, ONES)
    assert not torch.equal(found, whole)
    assert np.corrcoef(found.flatten(), whole.flatten())[0, 1] > 0.95
    torch.testing.assert_close(found, added_up(of_rows(rows), losses, ONES))


def test_hashed_rows_have_the_inner_products_of_their_own():
    lots = torch.Generator().manual_seed(0)
    rows = torch.rand(40, 6000, generator=lots)  # nothing cancels by itself
    weights = torch.rand(40, generator=lots)
    found = of_rows(rows)(weights)
    torch.testing.assert_close(found, rows @ (rows.T @ weights), rtol=0.1, atol=0)


def test_an_example_that_counts_twice_is_two_examples():
    rows = features()
    counts = torch.ones(40, 1, dtype=torch.float64)
    counts[:5] = 2
    twice = torch.cat([rows, rows[:5]])
    _, loss = small_steps(twice @ twice.T, 0.5, 2000)
    expected = added_up(
        of_kernel(twice @ twice.T, None), Losses(loss[:, None]), torch.ones(45)
    )
    found = added_up(of_kernel(rows @ rows.T, None), Losses(loss[:40, None], counts), ONES)
    expected = expected[:40] / expected[:40].mean()
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)


def test_signs_of_q_are_those_of_labels():
    rows = features()
    signs = torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0)
    _, loss = small_steps(rows @ rows.T, 0.5, 2000)
    expected = way_of(rows, Situation(loss=loss, logistic=True))
    flipped = rows * signs[:, None]
    found = way_of(flipped, Situation(loss=loss * signs, logistic=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("kind", ["nothing", "fitted", "wrong"])
def test_nothing_breaks_it(kind):
    rows = torch.zeros(40, 3) if kind == "nothing" else features().float()
    loss = torch.full((40, 1), {"nothing": 0.3, "fitted": 0.0, "wrong": 1.0}[kind])
    found = added_up(of_rows(rows), Losses(loss.double()), ONES)
    assert bool((found > 0).all())
    assert bool(found.isfinite().all())


@pytest.mark.parametrize(
    ("share", "at_rest", "explained", "time", "expected"),
    [
        (0.02, 0.0, 0.3, 8.0, 0.5),
        (0.3, 0.0, 0.3, 8.0, 1.0),  # two classes
        (0.3, 0.0, 0.3, 2.0, 0.5),  # and little time
        (0.3, 0.0, 0.3, 2**1.5, 0.75),
        (0.095, 0.0, 0.3, 8.0, 0.75),
        (0.02, 0.3, 0.95, 8.0, 0.0),  # at rest against a decay
        (0.02, 0.05, 0.95, 8.0, 0.25),
        (0.3, 0.3, 0.95, 8.0, 1.0),
        (0.3, 0.0, 0.3, 0.06, 0.0),  # so short that there was no way
        (0.3, 0.0, 0.3, 2**-2.5, 0.25),
        (0.02, 0.0, 0.3, 0.0, 0.0),
        (0.3, 0.3, 0.95, None, 0.5),  # batch normalization
    ],
)
def test_the_share_depends_on_how_training_went(share, at_rest, explained, time, expected):
    ending = Ending(share, at_rest, explained, time)
    assert path_of(ending) == pytest.approx(expected)


@pytest.fixture(scope="module")
def world():
    model, train, targets = runs.data("mlp", N, M)
    states = [trained(model, s, train) for s in cases.checkpoints("mlp", 3)]
    return model, train, targets, states


def trained(model, state, train):
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def run(world, folder, **options):
    model, train, targets, states = world
    traker = runs.make_traker(model, N, folder, lambda_reg="2x", **options)
    return traker, np.array(runs.whole_run(traker, train, targets, states))


def factors(traker):
    # what scores at power 1 are multiplied by, from what the store says
    plain, others = [], []
    for number in range(3):
        info = traker.saver.load_factor(number)[1]
        q = np.array(traker.saver.train_rows(number).array("out_to_loss"), np.float64)
        share = info["path"]
        made = q ** (info["power"] * (1 - share)) * info["way"] ** share
        plain.append(q)
        others.append(made * q.sum() / made.sum())
    return np.mean(others, axis=0) / np.mean(plain, axis=0)


@pytest.mark.parametrize("power", [0.6, 1.0])
@pytest.mark.parametrize("options", [{}, {"curvature": True}, {"proj_dim": 512}])
def test_scores_are_multiplied_by_it(options, power, world, tmp_path, monkeypatch):
    chosen = Choice(2.0, power, 0.4)
    monkeypatch.setattr(RidgeScoreComputer, "choose", lambda *_: chosen)
    _, before = run(world, tmp_path / "a", **options)
    traker, found = run(world, tmp_path / "b", loss_power="auto", **options)
    assert traker.saver.load_factor(0)[1]["way"].std() > 0.05
    expected = before * factors(traker)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, before, rtol=0.05)
    sure = traker.scores("exp", with_error=True).scores
    np.testing.assert_allclose(sure, found, rtol=1e-5)
    swept = traker.sweep(["exp"], ["2x"])["exp", "2x"]
    np.testing.assert_allclose(swept, found, rtol=1e-5)


@pytest.mark.parametrize("curvature", [False, True])
def test_it_is_that_of_the_rows_in_either_form(curvature, world, tmp_path):
    ways = []
    for folder, width in (("a", 16), ("b", 512)):
        options = {"proj_dim": width, "curvature": curvature}
        traker, _ = run(world, tmp_path / folder, loss_power="auto", **options)
        rows = torch.from_numpy(traker.saver.train_rows(0).array("grads").copy())
        loss = torch.from_numpy(traker.saver.train_rows(0).array("out_to_loss").copy())
        expected = way_of(rows, Situation(loss=loss, logistic=True))
        ways.append(traker.saver.load_factor(0)[1]["way"])
        np.testing.assert_allclose(ways[-1], expected, rtol=1e-3)
    assert ways[0].shape == (N, 1)
    assert ways[1].std() > 0.05


def test_the_store_keeps_it(world, tmp_path):
    traker, found = run(world, tmp_path, loss_power="auto")
    again = runs.make_traker(world[0], N, tmp_path, lambda_reg="2x", loss_power="auto")
    np.testing.assert_array_equal(again.scores("exp"), found)
    np.testing.assert_array_equal(again.finalize_scores("exp"), found)
    (tmp_path / "1" / "way.npy").unlink()
    with pytest.raises(StoreCorruptedError, match=r"way\.npy is gone.*factor\.json"):
        again.finalize_scores("exp")
    (tmp_path / "1" / "factor.json").unlink()
    again.finalize_features()
    np.testing.assert_array_equal(again.finalize_scores("exp"), found)


def test_a_power_that_was_given_has_no_way(world, tmp_path):
    traker, _ = run(world, tmp_path, loss_power=0.5)
    assert not {"way", "path"} & set(traker.saver.load_factor(0)[1])
    assert not list(tmp_path.glob("*/way.npy"))


def test_one_q_that_is_no_probability_is_enough_for_no_power():
    lots = torch.Generator().manual_seed(0)
    rows = torch.randn(1000, 20, generator=lots)
    loss = torch.rand(1000, 1, generator=lots)
    computer = RidgeScoreComputer(loss_power="auto")
    chosen = computer.choose(rows, Situation(loss=loss, logistic=False))
    assert (chosen.power, chosen.path) == (0.5, 0.5)
    unseen = set(range(1000)) - set(drawn(1000, SAMPLE).tolist())
    loss[min(unseen)] = 1.5
    chosen = computer.choose(rows, Situation(loss=loss, logistic=False))
    assert (chosen.power, chosen.path) == (1, 0)


class SeveralLabels(AbstractModelOutput):
    """The mean margin of three labels."""

    loss_is_logistic = False

    @staticmethod
    def get_output(model, weights, buffers, x, y):
        found = torch.func.functional_call(model, (weights, buffers), (x[None],))
        return ((2 * y - 1) * found[0]).mean()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        x, y = batch
        found = torch.func.functional_call(model, (weights, buffers), (x,))
        return 1 - torch.sigmoid((2 * y - 1) * found).mean(dim=1, keepdim=True).detach()


class OfWords(SeveralLabels):
    loss_is_of_words = True


class AllAlike(SeveralLabels):
    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        return torch.ones(len(batch[0]), 1)


@pytest.mark.parametrize(
    ("task", "share"), [(SeveralLabels, 0.5), (OfWords, 0), (AllAlike, 0)]
)
def test_losses_that_are_not_logistic(task, share, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(N, 8)
    y = (x[:, :3] + 0.3 * torch.randn(N, 3) > 0).float()
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU())
    model.append(torch.nn.Linear(12, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()
    found = {}
    for power in (1.0, "auto"):
        scores = trak.attribute(
            model,
            task=task,
            train=[(x, y)],
            targets=[(x[:M], y[:M])],
            checkpoints=[model.state_dict()],
            save_dir=tmp_path / str(power),
            loss_power=power,
            progress=False,
        )
        found[power] = np.array(scores)
    if not share:
        assert not list(tmp_path.glob("auto/0/way.npy"))
        np.testing.assert_array_equal(found["auto"], found[1.0])
        return
    record = json.loads((tmp_path / "auto/0/factor.json").read_text("utf-8"))
    assert (record["power"], record["path"]) == (0.5, share)
    q = np.load(tmp_path / "auto/0/out_to_loss.mmap").astype(np.float64)
    made = q**0.25 * np.load(tmp_path / "auto/0/way.npy") ** 0.5
    expected = found[1.0] * (made / q) * (q.sum() / made.sum())
    np.testing.assert_allclose(found["auto"], expected, rtol=1e-4)
