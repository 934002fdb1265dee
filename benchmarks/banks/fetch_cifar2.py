"""Fetches the images of the bank `cifar2`: CIFAR-10's cats and dogs, 2,000 in all.

They are part of the source package of `bigbench`, 358 MB, which pip downloads into a
temporary folder. The licence of the images is not stated, so this repository has none of
them: what is written is ignored by git. Needs Pillow and a network.

    python -m benchmarks.banks.fetch_cifar2 [--sdist bigbench-1.0.0.tar.gz]
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.banks.bank import FOLDER, MissingDataError

PATH = FOLDER / "data" / "cifar2.npz"
COMMAND = "python -m benchmarks.banks.fetch_cifar2"
PACKAGE = "bigbench==1.0.0"
PACKAGE_DIGEST = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
CLASSES = ("cat", "dog")
# of images and labels
DIGEST = "00862cfaab8606a92af4148c22c142d369bbf45ed278edfd8541cfd82fd1903a"

Images = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def read(path: Path = PATH) -> Images:
    """The images that were fetched.

    Args:
        path: the file.

    Returns:
        Images, `[2000, 32, 32, 3]`, and labels: 0 for cats, 1 for dogs.

    Raises:
        MissingDataError: if they were not fetched.
    """
    if not path.exists():
        raise MissingDataError(
            f"{path.name} is not in {path.parent}: its licence is not stated, so the "
            f"repository does not hold it. Fetch it (358 MB, needs Pillow): {COMMAND}"
        )
    with np.load(path, allow_pickle=False) as found:
        return check((found["images"], found["labels"]))


def check(found: Images) -> Images:
    """Refuses other images than the bank was built with.

    Args:
        found: images and labels.

    Returns:
        The same.

    Raises:
        ValueError: if they are others.
    """
    digest = hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest()
    if digest != DIGEST:
        raise ValueError(
            f"Images and labels have the SHA-256 {digest}, expected {DIGEST}. "
            f"Fetch them again: {COMMAND}"
        )
    return found


def images_of(task: dict[str, Any]) -> Images:
    """Cats and dogs of a task file.

    Args:
        task: examples with a PNG file in base64 and a score for each class.

    Returns:
        Images and labels, in the file's order.
    """
    from PIL import Image  # noqa: PLC0415 - needed here only

    images, labels = [], []
    for example in task["examples"]:
        scores = example["target_scores"]
        name = max(scores, key=scores.get)
        if name in CLASSES:
            content = base64.b64decode(example["input"])
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                images.append(np.asarray(image.convert("RGB")))
            labels.append(CLASSES.index(name))
    return np.stack(images), np.array(labels, dtype=np.uint8)


def download(folder: Path) -> Path:
    """Has pip download the package, which checks its hash before it opens it.

    Args:
        folder: where to.

    Returns:
        The archive.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_DIGEST}", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
    command += ["--no-build-isolation", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "-r", str(wanted)], check=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def fetch(archive: Path, path: Path = PATH) -> None:
    """Writes the images of an archive.

    Args:
        archive: of the package.
        path: where to.
    """
    with tarfile.open(archive) as package:
        member = package.extractfile(MEMBER)
        assert member is not None
        found = images_of(json.load(member))
    images, labels = check(found)
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(partial, images=images, labels=labels)
    partial.replace(path)


def main() -> None:
    """Fetches."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sdist", type=Path, help="an archive that is there already")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fetch(given.sdist or download(Path(folder)))
    print(f"{PATH.relative_to(FOLDER)} is there")


if __name__ == "__main__":
    main()
