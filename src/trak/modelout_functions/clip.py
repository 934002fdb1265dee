"""Contrastive image-text models (CLIP)."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trak.arguments import as_integer, as_number
from trak.digests import state_digest
from trak.errors import InputError, InputTypeError, PhaseError
from trak.modelout_functions.abstract import AbstractModelOutput
from trak.modelout_functions.margin import call
from trak.modes import evaluation_mode

logger = logging.getLogger(__name__)


class CLIPModelOutput(AbstractModelOutput):
    """The two margins of a matching pair against a simulated batch.

    Park et al. 2023, Sec. 5.1: with image embedding `u`, text embedding `v` and the
    other pairs `j` of a simulated batch,
    `f = -log sum_j exp(u.v_j - u.v) - log sum_j exp(u_j.v - u.v)`.

    The simulated batch is drawn once, uniformly and by `seed`, from the embeddings that
    `get_embeddings` computes; the pair itself is left out of its own batch. Embeddings
    belong to one checkpoint. For the next one they are computed anew, from the same loader,
    if it can be gone through again; call `get_embeddings` again if it cannot.

    The model takes `image=` and `text=` and returns (image embeddings, text embeddings,
    logit scale), as `open_clip` models do.

    Args:
        temperature: multiplies the similarities inside Q; the model's logit scale if
            None.
        simulated_batch_size: number of pairs in the simulated batch.
        seed: seed of the draw.
    """

    loss_is_logistic: bool | None = True  # Q is the mean of two that are

    def __init__(
        self,
        temperature: float | None = None,
        simulated_batch_size: int = 300,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.temperature = (
            None
            if temperature is None
            else as_number("temperature", temperature, zero=False)
        )
        self.sim_batch_size = as_integer(
            "simulated_batch_size", simulated_batch_size, least=1
        )
        self.seed = as_integer("seed", seed)
        self.num_computed_embeddings = 0
        self.image_embeddings: Tensor | None = None
        self.text_embeddings: Tensor | None = None
        self._drawn: tuple[Tensor, Tensor] | None = None
        self._digest: str | None = None
        self._again: Callable[[Any], None] | None = None

    def settings(self) -> dict[str, Any]:
        """What the gradients depend on, for the store's fingerprint.

        Returns:
            JSON values.
        """
        return {
            "temperature": self.temperature,
            "simulated_batch_size": self.sim_batch_size,
            "seed": self.seed,
        }

    def get_embeddings(
        self,
        model: Any,
        loader: Iterable[Any],
        batch_size: int,
        embedding_dim: int,
        size: int = 50_000,
        preprocess_fn_img: Callable[[Any], Tensor] | None = None,
        preprocess_fn_txt: Callable[[Any], Tensor] | None = None,
    ) -> None:
        """Computes the embeddings from which the simulated batch is drawn.

        Args:
            model: the model, with the weights of the checkpoint to be attributed.
            loader: yields (images, texts), and is kept for the next checkpoint unless it
                is an iterator.
            batch_size: accepted as upstream's name; batches are taken as they come.
            embedding_dim: width of the embeddings.
            size: how many pairs to embed at most.
            preprocess_fn_img: applied to the images of a batch.
            preprocess_fn_txt: applied to the texts of a batch.
        """
        self._again = None
        if not isinstance(loader, Iterator):
            self._again = partial(
                self.get_embeddings,
                loader=loader,
                batch_size=batch_size,
                embedding_dim=embedding_dim,
                size=size,
                preprocess_fn_img=preprocess_fn_img,
                preprocess_fn_txt=preprocess_fn_txt,
            )
        images: list[Tensor] = []
        texts: list[Tensor] = []
        done = 0
        with evaluation_mode(model), torch.no_grad():
            for image, text in loader:
                u, v, _ = _three(
                    model(
                        preprocess_fn_img(image) if preprocess_fn_img else image,
                        preprocess_fn_txt(text) if preprocess_fn_txt else text,
                    )
                )
                images.append(u[: size - done].detach())
                texts.append(v[: size - done].detach())
                done += len(images[-1])
                if done >= size:
                    break
            self._check_embeddings(images, done, embedding_dim)
            self.image_embeddings, self.text_embeddings = map(torch.cat, (images, texts))
            self._drawn = self._draw(self.image_embeddings, self.text_embeddings)
        self.num_computed_embeddings = done
        self._digest = state_digest(model.state_dict())

    def _draw(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        # not in get_output: under vmap every sample would draw a batch of its own
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(images), generator=generator, device="cpu")
        chosen = order[: self.sim_batch_size].to(images.device)
        return images[chosen], texts[chosen]

    def _check_embeddings(self, parts: list[Tensor], done: int, width: int) -> None:
        if done < self.sim_batch_size:
            raise InputError(
                f"The loader held {done} pairs, fewer than the simulated batch of "
                f"{self.sim_batch_size}. Pass simulated_batch_size={done} or less."
            )
        if parts[0].shape[1] != width:
            raise InputError(
                f"embedding_dim is {width}, but embeddings are {parts[0].shape[1]} wide."
            )

    def prepare_checkpoint(self, model: Any, digest: str) -> None:
        """Computes embeddings anew where they are of other weights.

        Args:
            model: the model, with the checkpoint's weights.
            digest: content hash of these.
        """
        if self._again is not None and self._digest not in {None, digest}:
            logger.info("The embeddings for the simulated batch are computed anew.")
            self._again(model)

    def check_ready(self, digest: str) -> None:
        """Refuses to go on with embeddings of other weights.

        Args:
            digest: content hash of the checkpoint that is loaded.

        Raises:
            PhaseError: if `get_embeddings` was not called with these weights.
        """
        if self._digest != digest:
            state = "are missing" if self._digest is None else "are of other weights"
            raise PhaseError(
                f"The embeddings for the simulated batch {state}. Call the task's "
                "get_embeddings(model, loader, ...) with the weights of the checkpoint "
                "first. A loader that can be gone through again, such as a DataLoader or "
                "a list, serves later checkpoints, too."
            )

    def get_output(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any, weights: Any, buffers: Any, image: Any, label: Any = None
    ) -> Tensor:
        """The two margins of one pair.

        Args:
            model: the model.
            weights: parameters by name.
            buffers: buffers by name.
            image: the image without the batch axis, or a dict with `image` and `text`.
            label: the text, without the batch axis.

        Returns:
            A scalar.
        """
        image, text = _pair(image, label)
        inputs = {"image": image.unsqueeze(0), "text": text.unsqueeze(0)}
        u, v, _ = _three(call(model, (weights, buffers), (), inputs))
        image_margin, text_margin = self._margins(u, v, 1.0)
        return (image_margin + text_margin).sum()

    def get_batch_output(self, model: Any, batch: Any) -> Tensor:
        """The two margins of every pair, by the model's own weights.

        Args:
            model: the model.
            batch: (images, texts).

        Returns:
            `[b]`.
        """
        image, text = _pair(*((batch,) if isinstance(batch, Mapping) else batch))
        u, v, _ = _three(call(model, (None, None), (), {"image": image, "text": text}))
        image_margin, text_margin = self._margins(u, v, 1.0)
        return image_margin + text_margin

    def get_out_to_loss_grad(
        self, model: Any, weights: Any, buffers: Any, batch: Any
    ) -> Tensor:
        """One minus the mean probability of the match, over the simulated batch.

        Args:
            model: the model.
            weights: parameters by name.
            buffers: buffers by name.
            batch: (images, texts).

        Returns:
            `[b, 1]`.
        """
        image, text = _pair(*((batch,) if isinstance(batch, Mapping) else batch))
        inputs = {"image": image, "text": text}
        u, v, scale = _three(call(model, (weights, buffers), (), inputs))
        temperature = scale if self.temperature is None else self.temperature
        image_margin, text_margin = self._margins(u, v, temperature)
        q = (torch.sigmoid(-image_margin) + torch.sigmoid(-text_margin)) / 2
        return q.detach().unsqueeze(-1)

    def _margins(self, u: Tensor, v: Tensor, scale: Any) -> tuple[Tensor, Tensor]:
        # of each image among texts, and of each text among images, both [b]
        images, texts = self._simulated_batch()
        images, texts = images.to(u), texts.to(v)
        own = _equal(u, images) & _equal(v, texts)  # [b, simulated]
        match = (u * v).sum(-1)
        among_texts = (scale * (u @ texts.T)).masked_fill(own, -torch.inf)
        among_images = (scale * (v @ images.T)).masked_fill(own, -torch.inf)
        return (
            scale * match - among_texts.logsumexp(-1),
            scale * match - among_images.logsumexp(-1),
        )

    def _simulated_batch(self) -> tuple[Tensor, Tensor]:
        if self._drawn is None:
            raise PhaseError("Run traker.task.get_embeddings before featurizing.")
        return self._drawn


def _equal(some: Tensor, others: Tensor) -> Tensor:
    # torch.isclose would do, but has no batching rule
    tolerance = 1e-5 * others.abs().amax()
    return ((some.detach()[:, None] - others).abs() <= tolerance).all(-1)


def _three(output: Any) -> tuple[Tensor, Tensor, Any]:
    three = isinstance(output, tuple | list) and len(output) == 3
    if not three or not all(isinstance(part, Tensor) for part in output[:2]):
        raise InputTypeError(
            "Expected the model to return (image embeddings, text embeddings, logit scale)"
            f"; got {type(output).__name__}. Wrap the model in one whose forward(image, "
            "text) returns them."
        )
    return output[0], output[1], output[2]


def _pair(image: Any, text: Any = None) -> tuple[Tensor, Tensor]:
    if isinstance(image, Mapping):
        if not {"image", "text"} <= set(image):
            raise InputError(
                f"A dict batch needs 'image' and 'text'; this one has {sorted(image)}."
            )
        return image["image"], image["text"]
    if text is None:
        raise InputError("Expected a batch of two parts, (images, texts).")
    return image, text
