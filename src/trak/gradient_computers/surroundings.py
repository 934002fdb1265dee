"""Global switches while gradients are computed, and their return to what they were."""

import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import checkpoint

from trak.errors import UnsupportedModuleError
from trak.gradient_computers.capture import asking

_T = TypeVar("_T")
_OF_BATCHES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_OF_ALL_MODELS = "transformers.modeling_utils"
_NORMALISING = (
    *_OF_BATCHES,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None]:
    """Runs a block in which models can be watched, and leaves no trace.

    Fused attention kernels, which skip the layers, are not taken; compiled models run
    uncompiled; activation checkpointing, which would run layers a second time in the
    backward pass, is off. What modules keep from one forward pass in evaluation mode to the
    next is forgotten before each. Random states are restored. A
    normalisation layer in training mode is refused. Gradients are enabled within, also
    under `torch.inference_mode`.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    refuse_batch_statistics(model)
    with (
        torch.inference_mode(False),
        _random_state(model),
        _SWITCHES.turned(),
        _forgetting(model),
    ):
        yield


def normalizes_batches(model: nn.Module) -> bool:
    """Whether a model has batch normalization, in evaluation mode or not.

    Args:
        model: the model.

    Returns:
        True also for modules that keep a `running_mean` without being one of torch's.
    """
    if any(isinstance(module, _OF_BATCHES) for module in model.modules()):
        return True
    return any(name.endswith("running_mean") for name, _ in model.named_buffers())


def without_graph(model: nn.Module, attempt: Callable[[], _T]) -> _T:
    """Runs a model whose parameters need no gradient.

    Gradients are disabled, unless the model itself takes some by its inputs, as force
    fields do.

    Args:
        model: the model.
        attempt: runs it; may be called again.

    Returns:
        What it returned.

    Raises:
        RuntimeError: what it raised.
    """
    try:
        with torch.no_grad():
            return attempt()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
    with torch.enable_grad(), asking(model.parameters()):
        return attempt()


def refuse_batch_statistics(model: nn.Module) -> None:
    """Refuses models whose samples depend on each other.

    Args:
        model: the model.

    Raises:
        UnsupportedModuleError: names the layer.
    """
    for path, module in model.named_modules():
        if isinstance(module, _OF_BATCHES) and module.running_mean is None:
            raise UnsupportedModuleError(
                f"Layer {path!r} ({type(module).__name__}) keeps no running statistics: it "
                "normalises by those of the batch also in evaluation mode, so a sample has "
                "no gradient of its own. Use a layer with running statistics, or one that "
                "normalises each sample, such as GroupNorm."
            )
        if (
            isinstance(module, _NORMALISING)
            and module.training
            and module.running_mean is not None
        ):
            raise UnsupportedModuleError(
                f"Layer {path!r} ({type(module).__name__}) is in training mode: it "
                "normalises by statistics of the batch and updates its own, so a sample "
                "has no gradient of its own. Call model.eval()."
            )


@contextmanager
def _forgetting(model: nn.Module) -> Generator[None]:
    # of what belongs to other weights, or to a graph that is gone
    if not _switching(model):
        yield
        return
    handle = model.register_forward_pre_hook(lambda module, _: forget_kept(module))
    try:
        forget_kept(model)
        yield
    finally:
        handle.remove()
        forget_kept(model)


def forget_kept(model: nn.Module) -> None:
    """Lets modules drop what they compute once in evaluation mode, from weights of then.

    Such as the attention biases of LeViT, TinyViT and EfficientFormer, which a change into
    training mode drops. Other modules have no `train` of their own, or that of all models
    of transformers, which keeps nothing, and are left alone.

    Args:
        model: the model, whose modules keep their modes.
    """
    modes = [(module, module.training) for module in model.modules()]
    for module in _switching(model):
        module.train(True)
        module.train(False)
    for module, training in modes:
        module.training = training


def _switching(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if _keeps(type(module))]


def _keeps(kind: type[nn.Module]) -> bool:
    train = getattr(kind, "train", nn.Module.train)
    usual = getattr(train, "__module__", None) == _OF_ALL_MODELS
    return train is not nn.Module.train and not usual


@contextmanager
def own_parameters(model: nn.Module) -> Generator[None]:
    """Runs a block after which the model holds the parameters that it held before.

    `functional_call` leaves tensors in place of those of a module that the model knows by
    three names.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    found = [vars(module).get("_parameters") for module in model.modules()]
    # those of scripted modules are no dictionaries, and cannot be mixed up
    tables: list[dict[str, Any]] = [table for table in found if isinstance(table, dict)]
    held = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, parameters in zip(tables, held, strict=True):
            table.update(parameters)


@contextmanager
def _random_state(model: nn.Module) -> Generator[None]:
    devices = {p.device for p in model.parameters() if p.device.type not in {"cpu", "meta"}}
    kind = next(iter(devices)).type if devices else "cuda"
    indices = [d.index or 0 for d in devices]
    with torch.random.fork_rng(devices=indices, device_type=kind):
        yield


class _Switches:
    """Turned by the first who comes, in any thread, and back by the last who goes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._stack = ExitStack()

    @contextmanager
    def turned(self) -> Generator[None]:
        """Runs a block with the switches turned.

        Yields:
            Nothing.
        """
        with self._lock:
            if not self._inside:
                with ExitStack() as stack:
                    stack.enter_context(_no_fused_attention())
                    stack.enter_context(_uncompiled())
                    stack.enter_context(_no_checkpointing())
                    self._stack = stack.pop_all()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._stack.close()


_SWITCHES = _Switches()


@contextmanager
def _no_fused_attention() -> Generator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _uncompiled() -> Generator[None]:
    if "torch._dynamo" not in sys.modules:  # then nothing was compiled
        yield
        return
    stance: Any = getattr(torch.compiler, "set_stance", None)
    if stance is None:  # before torch 2.6
        stance = sys.modules["torch._dynamo"].config.patch(disable=True)
    else:
        stance = stance("force_eager")
    with stance:
        yield


class _Direct:
    # in place of CheckpointFunction: simply calls the function
    @staticmethod
    def apply(function: Any, preserve: bool, *args: Any) -> Any:
        del preserve
        return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    # in place of the generator that surrounds a checkpointed call
    del args, kwargs
    yield


@contextmanager
def _no_checkpointing() -> Generator[None]:
    # `checkpoint` is imported by name everywhere, but looks these up when it is called
    names = {
        "CheckpointFunction": _Direct,
        "_checkpoint_without_reentrant_generator": _nothing_around,
    }
    before = {
        name: getattr(checkpoint, name) for name in names if hasattr(checkpoint, name)
    }
    try:
        for name in before:
            setattr(checkpoint, name, names[name])
        yield
    finally:
        for name, value in before.items():
            setattr(checkpoint, name, value)
