"""A check that the library works on this machine."""

import tempfile

import torch

from trak.errors import InputError
from trak.traker import TRAKer


def test_install(use_fast_jl: bool = True) -> None:
    """Attributes five predictions to twenty random examples, and prints that it worked.

    Nothing needs compiling here. Upstream's flag of this name asked for its CUDA
    extension; it now asks for a CUDA device.

    Args:
        use_fast_jl: run on the GPU.

    Raises:
        InputError: if a GPU was asked for and there is none.
    """
    if use_fast_jl and not torch.cuda.is_available():
        raise InputError(
            "test_install(use_fast_jl=True) checks the GPU path, and torch sees no CUDA "
            "device here. Use test_install(use_fast_jl=False) to check the CPU path."
        )
    device = "cuda" if use_fast_jl else "cpu"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(25, 256, generator=generator, device="cpu").to(device)
    labels = torch.randint(2, (25,), generator=generator).to(device)
    model = torch.nn.Linear(256, 2, bias=False).to(device)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=model,
            task="image_classification",
            train_set_size=20,
            save_dir=folder,
            device=device,
            proj_dim=512,
        )
        traker.load_checkpoint(model.state_dict(), model_id=0)
        traker.featurize((images[:20], labels[:20]), num_samples=20)
        traker.finalize_features()
        traker.start_scoring_checkpoint("check", model.state_dict(), 0, num_targets=5)
        traker.score((images[20:], labels[20:]), num_samples=5)
        traker.finalize_scores("check")
    print(f"TRAK is installed correctly! (checked on {device})")  # noqa: T201


test_install.__test__ = False  # type: ignore[attr-defined]  # not a pytest test
