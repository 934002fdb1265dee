"""What holds outputs at rest, and their growth above all, told from all examples."""

import pytest
import torch
from tests import reference, runs
from tests.test_leading import CASES, rows_of, world
from tests.test_linearized_training import logistic
from tests.test_unwhitened import unwhitened

import trak
from trak import preparation, strength
from trak.loaders import rest_of, some_of
from trak.projectors import NoOpProjector
from trak.score_computers import auto_ridge, ridge_sample, stationarity
from trak.score_computers import freedom as freedom_of_growth
from trak.score_computers import unwhitened as unwhitened_examples
from trak.score_computers.auto_ridge import choice
from trak.score_computers.curvature import roots, weighted
from trak.score_computers.freedom import freedom, may_grow_freely
from trak.score_computers.pulls import Stationarity
from trak.score_computers.ridge_sample import Situation, stationarity_of_all
from trak.score_computers.unwhitened import Chosen

RIDGE = 5.0


def expected_growth(rows, q, counts=1.0):
    """By explicit matrices, of rows that are not whitened."""
    outputs = ((1 - q) / q).log()
    pull = rows @ (rows.T @ (counts * q))
    steep = (counts * q * (1 - q)).mean() * rows.square().sum(1).mean()
    return float(outputs @ pull / (outputs @ outputs) / steep)


def whitened(n=150):
    """Rows, Q, what whitening multiplied columns by, and what is known without it."""
    rows, q = logistic(n=n, ridge=RIDGE)
    scales = torch.linspace(0.2, 4, rows.shape[1], dtype=torch.float64)
    return rows, q, scales, [unwhitened(rows[:50], q[:50], 50)]


def situation(q, scales, known, **other):
    options = {"strength": 0.4, "logistic": True, "loss": q, "unwhitened": known}
    return Situation(**{**options, "plain": lambda rows: rows / scales.to(rows), **other})


@pytest.mark.parametrize("how", ["plain", "curved", "signed", "counted"])
def test_growth_is_that_of_all_examples_without_whitening(how):
    rows, q, scales, known = whitened()
    given, loss, other = rows * scales, q, {}
    counts = torch.linspace(0.5, 2, len(q), dtype=torch.float64)
    if how == "curved":
        given, other = weighted(given, roots(q)), {"curvature": True}
    if how == "signed":
        signs = torch.where(torch.arange(len(q)) % 3 == 0, -1.0, 1.0)
        given, loss = given * signs[:, None], q * signs
    if how == "counted":
        given, loss = given * counts[:, None].sqrt(), q * counts
        other = {"counts": counts}
    found = stationarity_of_all(given, situation(loss, scales, known, **other))
    expected = expected_growth(rows, q, counts if how == "counted" else 1.0)
    assert found.growing == pytest.approx(expected, rel=1e-3)
    if how != "counted":  # which is not how these were trained
        steep = (q * (1 - q)).mean() * rows.square().sum(1).mean()
        assert found.ridge == pytest.approx(float(RIDGE / steep), rel=1e-3)
        assert found.explained == pytest.approx(1, abs=1e-4)
    part = expected_growth(rows[:50], q[:50])
    assert abs(part / expected - 1) > 0.1  # so that the part that is known says otherwise


@pytest.mark.parametrize(
    "other",
    [{"plain": None}, {"unwhitened": ()}, {"logistic": False}],
)
def test_rows_that_cannot_tell(other):
    rows, q, scales, known = whitened()
    assert stationarity_of_all(rows * scales, situation(q, scales, known, **other)) is None


def test_nothing_is_to_be_told_where_all_examples_are_known():
    rows, q, scales, _ = whitened()
    every = [unwhitened(rows[:70], q[:70], 70), unwhitened(rows[70:], q[70:], 80)]
    assert stationarity_of_all(rows * scales, situation(q, scales, every)) is None
    sizes = situation(1 + q, scales, every[:1], logistic=None)
    assert stationarity_of_all(rows * scales, sizes) is None  # no probabilities


def test_what_is_known_takes_the_place_of_what_the_sample_says():
    rows, q = logistic(n=80, ridge=RIDGE)
    kernel = rows @ rows.T
    unit = kernel.diagonal().mean()
    kernel /= unit
    pull, steep = kernel @ q, float((q * (1 - q)).mean())
    own = Stationarity(expected_growth(rows, q), float(RIDGE / unit) / steep, 1.0)

    def training(known=None):
        return stationarity.training_of(kernel, pull, q, logistic=True, known=known)

    usual, same = training(), training(own)
    assert same.ridge == pytest.approx(usual.ridge)
    assert same.stiffness == pytest.approx(usual.stiffness)
    held = training(own._replace(growing=50 * own.growing))
    assert held.stiffness > 2 * usual.stiffness
    stronger = training(own._replace(ridge=2 * own.ridge))
    assert stronger.ridge == pytest.approx(2 * usual.ridge)


def test_the_ridge_is_played_with_the_stationarity_of_all(monkeypatch):
    rows, q, scales, known = whitened()
    given, real = [], auto_ridge.training_of

    def training_of(*args, known=None, **options):
        given.append(known)
        return real(*args, known=known, **options)

    monkeypatch.setattr(auto_ridge, "training_of", training_of)
    now = situation(q, scales, known)
    choice(rows * scales, now)
    assert given == [stationarity_of_all(rows * scales, now)]


def test_wide_rows_are_looked_at_in_part(monkeypatch):
    rows, q, scales, known = whitened()
    whole = stationarity_of_all(rows * scales, situation(q, scales, known))
    monkeypatch.setattr(ridge_sample, "_SAMPLE_BYTES", 4 * rows.shape[1] * 60)
    part = stationarity_of_all(rows * scales, situation(q, scales, known))
    assert part.ridge != whole.ridge
    assert part.ridge == pytest.approx(whole.ridge, rel=0.2)
    assert part.growing == pytest.approx(whole.growing, rel=0.2)


@pytest.mark.parametrize("kind", [NoOpProjector(), "leading"])
@pytest.mark.parametrize("name", CASES)
def test_whitening_is_taken_off_rows_again(name, kind, tmp_path):
    model, train, _, _ = world(name)
    every = sum(p.numel() for p in model.parameters())
    options = {"projector": kind}
    if kind == "leading":
        options["proj_dim"] = every + 7  # and columns beyond all coordinates
    traker, rows = rows_of(name, tmp_path, **options)
    plain = traker.pipeline.whitener.plain(0)(rows)
    gradients = reference.flat_rows(reference.gradient_rows(model, train)).double()
    expected = gradients @ gradients.T
    torch.testing.assert_close(
        plain @ plain.T, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )


def test_whitening_of_sketches_cannot_be_taken_off(tmp_path):
    traker, _ = rows_of("mlp", tmp_path, proj_dim=16, projector="rademacher")
    assert traker.pipeline.whitener.plain(0) is None
    model, _, _, _ = world("mlp")
    options = {"projector": NoOpProjector(), "whitening": None}
    traker = runs.make_traker(model, 24, tmp_path / "none", **options)
    assert traker.pipeline.whitener.plain(0) is None


@pytest.mark.parametrize("narrow", [False, True])
def test_the_fits_sample_does_not_decide(narrow, tmp_path, monkeypatch):
    n = 120
    model, train, targets = runs.data("mlp", n, 4)
    states = [{k: v.clone() for k, v in model.state_dict().items()}]
    if narrow:
        monkeypatch.setattr(preparation, "WHOLE", 0)
        monkeypatch.setattr("trak.width._STEP", 1)
    told, real = [], auto_ridge.training_of

    def training_of(*args, known=None, **options):
        told.append(known.growing)
        return real(*args, known=known, **options)

    monkeypatch.setattr(auto_ridge, "training_of", training_of)
    for fitted in (40, 80):
        monkeypatch.setattr(preparation, "FITTED", fitted)
        trak.attribute(
            model,
            task="image_classification",
            train=runs.split(train, 10),
            targets=runs.split(targets, 4),
            checkpoints=states,
            save_dir=tmp_path / str(fitted),
            whitening=0.5,
            progress=False,
            device="cpu",
        )
    gradients = reference.flat_rows(reference.gradient_rows(model, train)).double()
    q = reference.loss_weights(model, train).double().flatten()
    expected = expected_growth(gradients, q)
    assert told == pytest.approx([expected] * 2, rel=0.1 if narrow else 0.01)


def test_examples_that_are_looked_at_only_pull():
    rows, q = logistic(n=90)
    kept = Chosen()
    kept.add(rows[:50], q[:50, None])
    before = kept.found()
    for part in (slice(50, 70), slice(70, 90)):
        kept.add_to_sum(rows[part], q[part, None])
    found = kept.found()
    torch.testing.assert_close(found.kernel, before.kernel)
    torch.testing.assert_close(found.pull, rows[:50] @ (rows.T @ q) / 90)


def test_inner_products_are_made_again_only_for_other_examples(monkeypatch):
    calls, own = [], unwhitened_examples.inner_products
    monkeypatch.setattr(
        unwhitened_examples, "inner_products", lambda rows: calls.append(1) or own(rows)
    )
    rows, q = logistic(n=90)
    kept = Chosen()
    kept.add(rows[:50], q[:50, None])
    kept.found()
    kept.add_to_sum(rows[:50], q[:50, None])
    kept.found()
    assert len(calls) == 1
    kept.add(rows[50:], q[50:, None])
    torch.testing.assert_close(kept.found().kernel, (rows @ rows.T).float())
    assert len(calls) == 2


@pytest.mark.parametrize("freely", [False, True])
def test_where_growth_may_be_free_all_examples_tell_it(freely, tmp_path, monkeypatch):
    model, (x, _), _ = runs.data("mlp", 120, 4)
    with torch.no_grad():  # a model that is sure of its labels
        for parameter in model.parameters():
            parameter *= 4
        train = x, model(x).argmax(1)
    monkeypatch.setattr(strength, "may_grow_freely", lambda *_: freely)
    seen = []
    monkeypatch.setattr(strength, "freedom", lambda *a, **_: seen.append(a[0]) or 1.0)
    traker = runs.make_traker(
        model, 120, tmp_path, whitening="auto", projector=NoOpProjector()
    )
    batches = runs.split(train, 10)
    own, others = batches[::2], batches[1::2]
    strength.choose_strength(
        traker.pipeline,
        [model.state_dict()],
        batches,
        lambda _: own,
        120,
        others=others,
    )
    [found] = seen
    gradients = reference.flat_rows(reference.gradient_rows(model, train)).double()
    q = reference.loss_weights(model, train).double().flatten()
    fitted = torch.arange(120) // 10 % 2 == 0
    taking_part = torch.ones_like(fitted) if freely else fitted
    pull = gradients[taking_part].T @ q[taking_part] / taking_part.sum()
    expected = len(gradients.T) * gradients[fitted] @ pull  # rows hold a root of it
    torch.testing.assert_close(found.pull, expected, rtol=1e-4, atol=1e-4 * expected.std())
    torch.testing.assert_close(found.loss, q[fitted])


def test_growth_that_is_a_small_part_of_rows_is_not_free(monkeypatch):
    rows, q = logistic(n=120)
    known = unwhitened(rows, q, 120)
    assert may_grow_freely(known, 900, True)
    signs = torch.where(torch.arange(len(q)) % 2 == 0, -1.0, 1.0)
    signed = unwhitened(rows * signs[:, None], q * signs, 120)
    assert may_grow_freely(signed, 900, True)
    assert not may_grow_freely(signed, 900, None)  # numbers below 0 are no probabilities
    outputs = ((1 - q) / q).log()[:, None]
    apart = torch.eye(120, dtype=torch.float64) * rows.norm(dim=1).mean()
    other = unwhitened(torch.cat([0.1 * outputs / outputs.norm(), apart], 1), q, 120)
    assert not may_grow_freely(other, 900, True)
    assert not may_grow_freely(unwhitened(0 * rows, q, 120), 900, True)
    monkeypatch.setattr(freedom_of_growth, "growth_stiffness", lambda *_, **__: 0.3)
    assert freedom(known, 900, True) == 0.3
    assert freedom(other, 900, True) == 1


def test_growth_that_is_held_back_beyond_doubt_is_not_free(monkeypatch):
    outputs = torch.linspace(1, 3, 120, dtype=torch.float64)
    q = torch.sigmoid(-outputs)
    uneven = 0.2 + 9.0 * (torch.arange(120) % 12 == 0)
    rows = (outputs / q * uneven)[:, None]  # some examples hold growth back, most hardly
    held, growth = unwhitened(rows, q, 120), expected_growth(rows, q)
    monkeypatch.setattr(freedom_of_growth, "growth_stiffness", lambda *_, **__: 0.3)
    monkeypatch.setattr(freedom_of_growth, "HELD", 1.1 * growth)
    assert may_grow_freely(held, 120, True)
    assert freedom(held, 120, True) == 0.3
    monkeypatch.setattr(freedom_of_growth, "HELD", 0.9 * growth)
    assert not may_grow_freely(held, 120, True)
    assert freedom(held, 120, True) == 1
    monkeypatch.setattr(freedom_of_growth, "HELD", 0.9 * growth * 9000 / 120)
    assert may_grow_freely(held, 9000, True)  # of which 120 are few


def test_the_rest_of_some_batches():
    batches = runs.split((torch.arange(95), torch.arange(95)), 10)
    for wanted in (1, 30, 50, 95, 200):
        some = [b[0][0].item() for b in some_of(batches, 95, wanted)]
        rest = [b[0][0].item() for b in rest_of(batches, 95, wanted)]
        assert sorted(some + rest) == list(range(0, 95, 10))
        assert rest == sorted(rest)
