"""CLIP: a seeded simulated batch, embeddings of the right checkpoint, Q that is not 0."""

import numpy as np
import pytest
import torch
from torch import nn

import trak
from trak import TRAKer
from trak.digests import state_digest
from trak.errors import InputError, PhaseError
from trak.modelout_functions import CLIPModelOutput
from trak.projectors import NoOpProjector


class Towers(nn.Module):
    """Image and text towers that return what open_clip models do."""

    def __init__(self):
        super().__init__()
        self.image_tower = nn.Linear(6, 4, bias=False)
        self.text_tower = nn.Embedding(9, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.1))

    def forward(self, image, text):
        u = nn.functional.normalize(self.image_tower(image), dim=-1)
        v = nn.functional.normalize(self.text_tower(text).mean(1), dim=-1)
        return u, v, self.logit_scale.exp()


@pytest.fixture
def world():
    torch.manual_seed(0)
    model = Towers().double()
    images, texts = torch.randn(16, 6).double(), torch.randint(0, 9, (16, 3))
    return model, images, texts


def ready(model, images, texts, size=5, **options):
    task = CLIPModelOutput(simulated_batch_size=size, **options)
    loader = zip(images.split(4), texts.split(4), strict=True)
    task.get_embeddings(model, loader, batch_size=4, embedding_dim=4, size=12)
    return task


def once(images, texts):
    """A loader that cannot be gone through again."""
    return iter([(images, texts)])


def shifted(model, by):
    return {name: value + by for name, value in model.state_dict().items()}


def chosen(seed=0, size=5):
    return torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:size]


def by_hand(model, images, texts, j, negatives, scale=1.0):
    """Both margins of pair j against the negatives other than itself."""
    u, v, _ = model(images, texts)
    others = torch.tensor([i for i in negatives.tolist() if i != j])
    fixed_u, fixed_v = u.detach()[others], v.detach()[others]
    match = scale * (u[j] @ v[j])
    return (
        match - torch.logsumexp(scale * (u[j] @ fixed_v.T), 0),
        match - torch.logsumexp(scale * (v[j] @ fixed_u.T), 0),
    )


@pytest.mark.parametrize("size", [1, 4])
def test_scores_and_loss_weights_equal_the_formula(world, size, tmp_path):
    model, images, texts = world
    task = ready(model, images, texts)
    traker = TRAKer(
        model=model,
        task=task,
        train_set_size=12,
        save_dir=tmp_path,
        device="cpu",
        projector=NoOpProjector(device="cpu"),
        use_half_precision=False,
        grad_wrt=["image_tower.weight", "text_tower.weight"],
    )
    traker.load_checkpoint(model.state_dict(), model_id=0)
    for i in range(0, 12, size):
        traker.featurize((images[i : i + size], texts[i : i + size]), num_samples=size)
    rows, weights = [], []
    parameters = [model.image_tower.weight, model.text_tower.weight]
    scale = model.logit_scale.exp().item()
    for j in range(12):
        output = sum(by_hand(model, images, texts, j, chosen()))
        grads = torch.autograd.grad(output, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]) / 60**0.5)
        margins = by_hand(model, images, texts, j, chosen(), scale)
        weights.append(sum(torch.sigmoid(-m) for m in margins).item() / 2)
    store = traker.saver.current_store
    np.testing.assert_allclose(store["grads"], torch.stack(rows), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(store["out_to_loss"][:, 0], weights, rtol=1e-7)
    assert min(weights) > 0.05
    traker.finalize_features()
    traker.start_scoring_checkpoint("e", model.state_dict(), 0, num_targets=4)
    traker.score((images[12:], texts[12:]), num_samples=4)
    assert np.abs(traker.finalize_scores("e")).min() > 0


def gradient(task, model, images, texts):
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    output = task.get_output(model, weights, buffers, images[0], texts[0])
    return torch.autograd.grad(output, model.image_tower.weight)[0]


def test_the_draw_is_seeded_and_instances_do_not_share_it(world):
    model, images, texts = world
    first, again = ready(model, images, texts), ready(model, images, texts)
    other = ready(model, images, texts, seed=5)
    untouched = CLIPModelOutput()
    assert torch.equal(*(gradient(t, model, images, texts) for t in (first, again)))
    assert not torch.equal(*(gradient(t, model, images, texts) for t in (first, other)))
    with pytest.raises(PhaseError, match="get_embeddings"):
        gradient(untouched, model, images, texts)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_embeddings_may_be_computed_under_any_grad_mode(world, mode):
    model, images, texts = world
    with mode():
        inside = ready(model, images, texts)
    expected = gradient(ready(model, images, texts), model, images, texts)
    assert torch.equal(gradient(inside, model, images, texts), expected)


def test_stored_rows_are_held_against_embeddings_of_their_own_weights(
    world, tmp_path, caplog
):
    model, images, texts = world
    first, second = shifted(model, 0), shifted(model, 0.5)
    batch = images[:8], texts[:8]
    for _ in range(2):  # the second time all rows are there
        model.load_state_dict(first)
        task = CLIPModelOutput(simulated_batch_size=5)
        task.get_embeddings(model, [(images, texts)], 16, embedding_dim=4)
        traker = TRAKer(model, task, 8, tmp_path, device="cpu", proj_dim=8)
        traker.load_checkpoint(second, model_id=0)
        traker.featurize(batch, num_samples=8)
    assert "has the code of the model or the task changed" not in caplog.text


def test_embeddings_of_another_checkpoint_are_refused(world, tmp_path):
    model, images, texts = world
    traker = TRAKer(
        model=model, task=CLIPModelOutput(simulated_batch_size=5), train_set_size=4,
        save_dir=tmp_path, device="cpu", proj_dim=8,
    )  # fmt: skip
    batch = (images[:4], texts[:4])
    traker.load_checkpoint(model.state_dict(), model_id=0)
    with pytest.raises(PhaseError, match=r"are missing.*get_embeddings"):
        traker.featurize(batch, num_samples=4)
    traker.task.get_embeddings(model, once(images, texts), 16, 4)
    traker.featurize(batch, num_samples=4)
    other = {name: value + 0.5 for name, value in model.state_dict().items()}
    traker.load_checkpoint(other, model_id=1)
    with pytest.raises(PhaseError, match="of other weights"):
        traker.featurize(batch, num_samples=4)
    traker.task.get_embeddings(model, once(images, texts), 16, 4)
    traker.featurize(batch, num_samples=4)


def test_embeddings_of_another_checkpoint_do_not_whiten_either(world, tmp_path):
    model, images, texts = world
    traker = TRAKer(
        model=model, task=ready(model, images, texts), train_set_size=16,
        save_dir=tmp_path, device="cpu", proj_dim=8, whitening=0.5,
    )  # fmt: skip
    traker.load_checkpoint(shifted(model, 0.5), model_id=0)
    with pytest.raises(PhaseError, match="of other weights"):
        traker.fit_whitening(batch=(images, texts))


def test_the_one_call_embeds_anew_for_every_checkpoint(world, tmp_path):
    model, images, texts = world
    pairs, states = [(images, texts)], [shifted(model, by) for by in (0.0, 0.5)]
    options = {"proj_dim": 8, "device": "cpu", "lambda_reg": 0.1, "projector_seed": 3}
    task = CLIPModelOutput(simulated_batch_size=5)
    task.get_embeddings(model, pairs, batch_size=16, embedding_dim=4)
    found = trak.attribute(
        model, task=task, train=pairs, targets=pairs, checkpoints=states,
        save_dir=tmp_path / "one", whitening=0, curvature=False, progress=False, **options,
    )  # fmt: skip
    traker = TRAKer(
        model=model, task=CLIPModelOutput(simulated_batch_size=5), train_set_size=16,
        save_dir=tmp_path / "steps", **options,
    )  # fmt: skip
    for number, state in enumerate(states):
        traker.load_checkpoint(state, model_id=number)
        traker.task.get_embeddings(model, once(images, texts), 16, 4)
        traker.featurize((images, texts), num_samples=16)
    traker.finalize_features()
    for number, state in enumerate(states):
        traker.start_scoring_checkpoint("pairs", state, number, num_targets=16)
        traker.task.get_embeddings(model, once(images, texts), 16, 4)
        traker.score((images, texts), num_samples=16)
    np.testing.assert_array_equal(found, traker.finalize_scores("pairs"))


def test_the_strength_is_tried_with_each_checkpoints_embeddings(world, tmp_path):
    model, images, texts = world
    more = [(images.repeat(4, 1) + torch.randn(64, 6).double() / 9, texts.repeat(4, 1))]
    states = [shifted(model, by) for by in (0.0, 0.5)]
    seen = []

    class Watching(CLIPModelOutput):
        def get_batch_output(self, model, batch):
            seen.append((state_digest(model.state_dict()), self._digest))
            return super().get_batch_output(model, batch)

    task = Watching(simulated_batch_size=5)
    task.get_embeddings(model, [(images, texts)], batch_size=16, embedding_dim=4)
    trak.attribute(
        model, task=task, train=more, targets=more, checkpoints=states,
        save_dir=tmp_path, progress=False,
    )  # fmt: skip
    assert len({weights for weights, _ in seen}) == 2
    assert all(weights == embedded for weights, embedded in seen)


def test_modules_keep_their_own_modes(world):
    model, images, texts = world
    model.image_tower.eval()
    ready(model, images, texts)
    assert model.training
    assert not model.image_tower.training


def test_preprocessing_modes_and_limits(world):
    model, images, texts = world
    model.train()
    task = CLIPModelOutput(simulated_batch_size=3)
    task.get_embeddings(
        model,
        [(images + 1, texts)],
        batch_size=16,
        embedding_dim=4,
        size=7,
        preprocess_fn_img=lambda x: x - 1,
        preprocess_fn_txt=lambda x: x.flip(1),
    )
    assert model.training
    assert task.num_computed_embeddings == 7
    with torch.no_grad():
        u, v, _ = model(images[:7], texts[:7])
    torch.testing.assert_close(task.image_embeddings, u)
    torch.testing.assert_close(task.text_embeddings, v)
    with pytest.raises(InputError, match="16 pairs, fewer than"):
        CLIPModelOutput().get_embeddings(model, [(images, texts)], 16, 4)
    with pytest.raises(InputError, match="embeddings are 4 wide"):
        task.get_embeddings(model, [(images, texts)], 16, 5)
