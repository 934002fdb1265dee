"""The rules of the house that a linter does not know."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import trak

SOURCE = Path(trak.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


def functions():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_files_and_functions_stay_small():
    long_files = [p.name for p in FILES if len(p.read_text().splitlines()) > 500]
    assert not long_files
    lengths = {f"{p.name}:{n.name}": n.end_lineno - n.lineno + 1 for p, n in functions()}
    too_long = {name: length for name, length in lengths.items() if length > 60}
    # a constructor whose twenty documented arguments are upstream's
    assert set(too_long) <= {"traker.py:__init__"}, too_long
    ordered = sorted(lengths.values())
    assert ordered[int(0.95 * len(ordered))] <= 60


def test_importing_the_library_loads_no_optional_dependency():
    code = (
        "import sys, torch, torch.utils.data, numpy, jaxtyping; before = set(sys.modules);"
        "import trak, trak.installation;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['trak']"


def test_importing_the_library_configures_no_logging():
    code = "import logging, trak; print(logging.root.handlers, logging.root.level)"
    run = [sys.executable, "-c", code]
    out = subprocess.run(run, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[] 30"


@pytest.mark.parametrize(
    "name", [m.name for m in pkgutil.walk_packages(trak.__path__, "trak.")]
)
def test_public_names_exist_and_modules_say_what_they_are_for(name):
    module = importlib.import_module(name)
    assert module.__doc__
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public)


def test_nothing_is_pickled_or_read_from_outside_the_repository():
    for path in FILES:
        text = path.read_text()
        assert "pickle" not in text.replace("allow_pickle=False", "").replace(
            "No pickle", ""
        )
        assert "/work" not in text


def test_the_version_is_said_once():
    text = (SOURCE.parent.parent / "pyproject.toml").read_text()
    assert f'version = "{trak.__version__}"' in text
