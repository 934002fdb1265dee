"""Banks of retrained models: their files, how they are trained, and the LDS."""

import base64
import dataclasses
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from benchmarks.banks import bank as banks
from benchmarks.banks import (
    build,
    drawn,
    evaluate,
    fetch_cifar2,
    objectives,
    recipes,
    variants,
)
from benchmarks.banks.bank import Bank, MissingDataError, load, save
from benchmarks.banks.differences import restore, shrink
from benchmarks.banks.recipes import cifar2
from benchmarks.common import ROOT
from benchmarks.lds import lds, over_subsets, over_targets
from benchmarks.quality_table import exchange
from torch import nn

from trak.evaluation import group_scores, noise_ceiling
from trak.modelout_functions import output_function, resolve_task


@pytest.fixture(name="recipe")
def make_recipe():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 6, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return recipes.Recipe(
        train=(x[:20], y[:20]),
        targets=(x[20:], y[20:]),
        make_model=lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)),
        epochs=3,
        batch_size=4,
        learning_rate=0.1,
        weight_decay=0.01,
        subsets=4,
        seeds=2,
        checkpoints=2,
        together=3,
    )


@pytest.fixture(name="bank")
def make_bank(recipe):
    rng = np.random.default_rng(0)
    models = [recipes.train(recipe, torch.arange(20), seed) for seed in (0, 1)]
    return Bank(
        masks=build.masks_of(recipe),
        outputs=rng.standard_normal((4, 2, 10)).astype(np.float16),
        checkpoints=[dict(model.state_dict()) for model in models],
        manifest=build.description("small", recipe),
    )


def test_a_bank_is_read_as_it_was_written(bank, tmp_path):
    save(bank, tmp_path)
    back = load("small", tmp_path)
    assert (back.masks == bank.masks).all()
    assert back.masks.dtype == bool
    assert (back.outputs == bank.outputs).all()
    assert back.manifest["n"] == 20
    assert len(back.checkpoints) == 2
    for one, other in zip(back.checkpoints, bank.checkpoints, strict=True):
        assert list(one) == sorted(other)
        assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("file", ["truth.npz", "checkpoints.safetensors"])
def test_a_changed_file_is_refused(bank, tmp_path, file):
    save(bank, tmp_path)
    content = bytearray((tmp_path / file).read_bytes())
    content[-1] ^= 1
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=file):
        load("small", tmp_path)


def test_another_version_is_refused(bank, tmp_path):
    save(bank, tmp_path)
    manifest = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**manifest, "version": 2}))
    with pytest.raises(ValueError, match="version 2"):
        load("small", tmp_path)


def recipe_of(name):
    try:
        return recipes.recipe(name)
    except MissingDataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", recipes.NAMES)
def test_the_banks_hold_what_they_say(name):
    # needs no data
    bank = load(name)
    says = bank.manifest
    assert says["name"] == name
    assert (bank.masks == build.draw_halves(says["subsets"], says["n"])).all()
    assert (bank.masks.sum(1) == says["subset_size"]).all()
    assert bank.outputs.shape == (says["subsets"], says["seeds"], says["targets"])
    assert np.isfinite(bank.outputs).all()
    assert len(bank.checkpoints) == len(says["losses"]) == says["checkpoints"]
    assert noise_ceiling(bank.outputs) > 0.75


@pytest.mark.parametrize("name", recipes.NAMES)
def test_the_banks_fit_their_recipes(name):
    made, bank = recipe_of(name), load(name)
    for about in (expected := build.description(name, made), bank.manifest):
        about["recipe"].pop("model")  # torch's words, which may change
    assert {key: bank.manifest[key] for key in expected} == expected
    assert (bank.masks == build.masks_of(made)).all()
    losses = bank.manifest["losses"]
    assert made.loss(bank.checkpoints[-1]) == pytest.approx(losses[-1], rel=1e-3)


def test_the_checkpoints_of_cifar2_fit_its_model():
    torch.manual_seed(0)
    images, found = torch.randn(8, 3, 32, 32), []
    for state in load("cifar2").checkpoints:
        model = cifar2.make_model()
        model.load_state_dict(state)
        with torch.no_grad():
            found.append(model.eval()(images))
    assert torch.stack(found).isfinite().all()
    assert torch.stack(found).std(0).min() > 0  # no two are the same


def test_data_that_was_not_fetched_is_said_to_be_missing(tmp_path):
    with pytest.raises(MissingDataError, match=fetch_cifar2.COMMAND):
        fetch_cifar2.read(tmp_path / "cifar2.npz")


def test_benchmarks_go_on_without_a_bank_whose_data_is_missing(monkeypatch, capsys):
    def recipe(name):
        if name == "cifar2":
            raise MissingDataError("Fetch it.")

    monkeypatch.setattr(recipes, "recipe", recipe)
    assert recipes.with_data(["digits", "cifar2", "a variant"]) == ["digits", "a variant"]
    assert capsys.readouterr().out == "The bank cifar2 is left out. Fetch it.\n"
    with pytest.raises(MissingDataError):
        recipes.with_data(["cifar2"])


def task_of(images, names):
    image = pytest.importorskip("PIL.Image", reason="Pillow, which only fetching needs")
    examples = []
    for pixels, name in zip(images, names, strict=True):
        image.fromarray(pixels).save(file := io.BytesIO(), "png")
        text = base64.b64encode(file.getvalue()).decode()
        scores = {key: int(key == name) for key in ("airplane", "cat", "dog")}
        examples.append({"input": text, "target_scores": scores})
    return {"examples": examples}


def test_cats_and_dogs_are_taken_from_an_archive(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    content = json.dumps(task_of(images, ["dog", "airplane", "cat", "dog"])).encode()
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as package:
        member = tarfile.TarInfo(fetch_cifar2.MEMBER)
        member.size = len(content)
        package.addfile(member, io.BytesIO(content))
    path = tmp_path / "cifar2.npz"
    with pytest.raises(ValueError, match="SHA-256"):
        fetch_cifar2.fetch(tmp_path / "a.tar.gz", path)
    assert not path.exists()
    monkeypatch.setattr(fetch_cifar2, "check", lambda found: found)
    fetch_cifar2.fetch(tmp_path / "a.tar.gz", path)
    found, labels = fetch_cifar2.read(path)
    assert (found == images[[0, 2, 3]]).all()
    assert labels.tolist() == [1, 0, 1]


def problem_of(name, folder):
    # a problem with few examples and fresh weights, written for another environment
    if name == "cifar2":
        objective, model = (
            objectives.OBJECTIVES["image_classification"],
            cifar2.make_model(),
        )
        parts = torch.randn(6, 3, 32, 32), torch.randint(2, (6,))
    else:
        made = recipes.recipe(name)
        objective, model = made.objective, made.make_model()
        parts = tuple(part[:6] for part in made.targets)
    exchange.write(
        folder,
        model,
        [dict(model.state_dict())],
        tuple(part.clone() for part in parts),
        parts,
        regression=name == "diabetes",
        outputs=objective.output,
    )
    return objective, model, parts


@pytest.mark.parametrize("name", recipes.NAMES)
def test_other_environments_have_the_same_models_and_outputs(name, tmp_path):
    torch.manual_seed(0)
    objective, model, parts = problem_of(name, tmp_path)
    problem, task = exchange.Problem(tmp_path), resolve_task(objective.task)
    problem.check()
    again = problem.model()
    assert str(again) == str(model) or name == "qnli"  # attention of another kind
    *inputs, labels = parts
    predictions = again(*inputs)
    expected = objective.output(predictions, labels)
    torch.testing.assert_close(problem.outputs(predictions, labels), expected)
    losses = problem.losses(predictions, labels)
    assert losses.shape == expected.shape
    torch.testing.assert_close(losses.mean(), objective.loss(predictions, labels))
    weights, buffers = dict(again.named_parameters()), dict(again.named_buffers())
    q = task.get_out_to_loss_grad(again, weights, buffers, parts).flatten()
    found = problem.slopes(0)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found.float(), q.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["language", "cifar2"])
def test_models_are_built_where_this_library_is_not(name, tmp_path):
    problem_of(name, tmp_path)
    script = (
        "import sys, pathlib; sys.modules['trak'] = None; "
        "from benchmarks.quality_table.exchange import Problem; "
        "Problem(pathlib.Path(sys.argv[1])).check()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True)


@pytest.mark.parametrize("optimizer", recipes.OPTIMIZERS)
def test_training_together_is_training_one_by_one(optimizer, recipe):
    recipe = dataclasses.replace(recipe, optimizer=optimizer, weight_decay=0.1)
    masks = build.masks_of(recipe)
    subsets = [torch.as_tensor(np.flatnonzero(mask)) for mask in masks]
    together = recipes.train_together(recipe, subsets, seeds=[5, 6, 7, 8])
    for model, subset, seed in zip(together, subsets, [5, 6, 7, 8], strict=True):
        alone = recipes.train(recipe, subset, seed).state_dict()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)


def test_trainings_drawn_by_lot_are_always_the_same():
    found, again = drawn.drawn(4, 7), drawn.drawn(4, 7)
    assert list(found) == list(again)
    assert len(found) == 4
    assert list(found) != list(drawn.drawn(4, 8))
    normal = drawn.drawn(4, 7, normalized=True)
    for (name, variant), other in zip(found.items(), normal.values(), strict=True):
        kind = "adamw" if " adamw " in name.rpartition(", decay")[0] else "sgd"
        assert variant.optimizer == kind
        assert f"{variant.epochs} epochs" in name
        count = [
            sum(isinstance(m, torch.nn.LayerNorm) for m in variants._mlp(v).modules())
            for v in (variant, other)
        ]
        assert count == [0, len(variant.widths) - 2]
        (x, y), _ = variant.data()
        assert variants._mlp(other)(x[:2]).shape == (2, variant.widths[-1])
        assert len(x) == len(y)


def test_training_sees_nothing_but_the_subset(recipe):
    subset = torch.arange(0, 20, 2)
    x, y = recipe.train
    others = torch.ones(20, dtype=torch.bool)
    others[subset] = False
    blind = dataclasses.replace(recipe, train=(x.masked_fill(others[:, None], 9.0), y))
    first, second = (recipes.train(made, subset, 0) for made in (recipe, blind))
    assert torch.equal(first[0].weight, second[0].weight)


def test_building_goes_on_where_it_stopped(recipe, tmp_path):
    build.work(recipe, tmp_path, worker=0, workers=1)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 8
    before = {file: np.load(file) for file in files}
    files[3].unlink()
    files[0].write_bytes(kept := b"is left alone")
    build.work(recipe, tmp_path, worker=0, workers=2)
    build.work(recipe, tmp_path, worker=1, workers=2)
    assert files[0].read_bytes() == kept
    np.testing.assert_allclose(np.load(files[3]), before[files[3]], atol=1e-5)


@pytest.mark.parametrize("change", [{}, {"epochs": 4}, {"seeds": 3}, {"task": "other"}])
def test_another_recipe_is_another_build(recipe, change):
    changed = dataclasses.replace(recipe, **change)
    same = build.description("a", recipe) == build.description("a", changed)
    assert same is not bool(change)


@pytest.mark.parametrize(("kind", "proj_dim"), [("default", 8), ("normal", 32)])
def test_reused_gradients_give_what_traker_gives(recipe, bank, kind, proj_dim):
    # one k below and one above n = 20: the primal and the dual system
    dims, ridges = [8, 32], (0.1, 1.0)
    found = evaluate.by_pieces(recipe, bank, [kind], dims, seeds=2, ridges=ridges)
    assert len(found) == 4
    ours = found[evaluate.Setting(kind, proj_dim, 1.0)][1]
    theirs = evaluate.by_traker(recipe, bank, kind, proj_dim, seed=1, half=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.std())


@pytest.mark.parametrize("proj_dim", [8, 4000])
def test_drawn_rows_have_the_inner_products_of_gradients(recipe, bank, proj_dim):
    gradients = evaluate.gradients_of(recipe, bank, 1)
    whole = torch.cat(list(gradients.by_name.values()), dim=1)
    kernel = whole @ whole.T
    shapes = evaluate.shapes_of(recipe)
    root = gradients.rows(shapes, evaluate.EXACT, 0, seed=0)
    torch.testing.assert_close(root @ root.T, kernel, rtol=1e-3, atol=1e-3)
    seeds = range(4000 // proj_dim)
    rows = [gradients.rows(shapes, evaluate.DRAWN, proj_dim, seed) for seed in seeds]
    assert rows[0].shape == (30, proj_dim)
    mean = sum(r @ r.T for r in rows) / (proj_dim * len(rows))
    scale = kernel.diagonal().sqrt()
    apart = (mean - kernel) / scale[:, None] / scale
    assert apart.abs().max() < 6 * (2 / 4000) ** 0.5


def test_a_rank_can_be_named():
    projector = evaluate.projector_of("factored:24", {"weight": (64, 200)}, 32, seed=0)
    assert projector.settings()["rank"] == 24


def test_differences_are_stored_in_a_byte_each():
    torch.manual_seed(0)
    pretrained = {"a": torch.randn(4, 3, 2), "b": torch.randn(5), "frozen": torch.ones(9)}
    change = {"a": torch.randn(4, 3, 2), "b": torch.randn(5), "frozen": torch.zeros(9)}
    change["a"][1] = 0  # a row that stayed as it was
    state = {name: pretrained[name] + change[name] for name in pretrained}
    stored = shrink(state, pretrained)
    assert sorted(stored) == ["a", "a/scale", "b", "b/scale"]
    assert stored["a"].dtype == torch.int8
    back = restore(stored, pretrained)
    assert torch.equal(back["frozen"], pretrained["frozen"])
    for name in ("a", "b"):
        torch.testing.assert_close(back[name], state[name], rtol=0, atol=4 / 254)
    again = restore(shrink(back, pretrained), pretrained)
    torch.testing.assert_close(again, back)  # rounded models stay as they are
    assert shrink(state, None) is state
    assert restore(state, None) is state


@pytest.mark.parametrize("name", ["regression", "language_modelling"])
def test_tasks_attribute_the_outputs_that_are_the_truth(name):
    # one position a text, where the mean margin's Q is exact
    torch.manual_seed(0)
    texts = name == "language_modelling"
    objective, model = objectives.OBJECTIVES[name], nn.Linear(5, 3 if texts else 1)
    x = torch.randn(6, 1, 5) if texts else torch.randn(6, 5)
    y = torch.randint(3, (6, 1)) if texts else torch.randn(6)
    truth, task = objective.output(model(x), y), resolve_task(objective.task)
    weights = dict(model.named_parameters())
    samples = zip(x, y, strict=True)
    each = [output_function(task)(model, weights, {}, *sample) for sample in samples]
    torch.testing.assert_close(torch.stack(each).flatten(), truth)
    torch.testing.assert_close(task.get_batch_output(model, (x, y)), truth)
    found = truth.detach().requires_grad_()
    loss = found.neg().exp().log1p() if texts else (found - y).square() / 2
    torch.testing.assert_close(loss.mean(), objective.loss(model(x), y))
    (slope,) = torch.autograd.grad(loss.sum(), found)
    q = task.get_out_to_loss_grad(model, weights, {}, (x, y))
    torch.testing.assert_close(q.flatten(), -slope)


def test_lds_of_the_truth_is_one_and_of_its_negative_minus_one():
    rng = np.random.default_rng(0)
    masks = rng.random((50, 20)) < 0.5
    scores = rng.standard_normal((20, 3))
    outputs = np.exp(group_scores(scores, masks))[:, None]  # monotone: ranks stay
    np.testing.assert_allclose(lds(group_scores(scores, masks), outputs), 1.0)
    np.testing.assert_allclose(lds(group_scores(-scores, masks), outputs), -1.0)


def test_intervals_hold_the_mean_and_narrow_with_what_is_drawn():
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((100, 60))
    outputs = expected[:, None] + rng.standard_normal((100, 2, 60))
    good, bad = (expected + s * rng.standard_normal((100, 60)) for s in (0.5, 2.0))
    each = lds(good, outputs)
    low, high = over_targets(each)
    assert low < each.mean() < high
    assert high - low == pytest.approx(4 * each.std() / 60**0.5, rel=0.15)
    low, high = over_subsets([good], outputs, draws=50)
    assert low < each.mean() < high
    low, high = over_subsets([good], outputs, [bad], draws=50)
    assert 0 < low < each.mean() - lds(bad, outputs).mean() < high


def test_no_bank_holds_pickled_data():
    for path in banks.FOLDER.glob("*/truth.npz"):
        with np.load(path, allow_pickle=False) as truth:
            assert sorted(truth) == ["masks", "outputs"]
            assert truth["masks"].dtype == np.uint8
