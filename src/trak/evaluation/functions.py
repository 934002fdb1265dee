"""The user's functions, and names by which another process finds them."""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from functools import cache, reduce
from pathlib import Path
from typing import Any

from trak.errors import InputError, InputTypeError

_SCRIPT = "__mp_main__"  # what multiprocessing calls a script that is not the main program


def check_functions(train: Any, evaluate: Any, progress: Any) -> None:
    """Refuses what cannot be called, before hours of work.

    Args:
        train: the user's.
        evaluate: the user's.
        progress: the user's, or None.

    Raises:
        InputTypeError: if one is no function.
    """
    forms = {
        "train": (train, "train(indices, seed)"),
        "evaluate": (evaluate, "evaluate(model)"),
        "progress": (progress, "progress(done, total)"),
    }
    for name, (value, form) in forms.items():
        if not callable(value) and (name != "progress" or value is not None):
            raise InputTypeError(
                f"{name} must be a function, called as {form}, got {value!r:.80}."
            )


def name_of(argument: str, function: Callable[..., Any]) -> dict[str, str]:
    """Finds how a worker process can import a function.

    Args:
        argument: what the function is, for the message.
        function: the function.

    Returns:
        `module` or `file`, and `name`.

    Raises:
        InputError: if it cannot be imported by a name.
    """
    module = getattr(function, "__module__", None) or ""
    name = getattr(function, "__qualname__", "")
    if not name or not _is_there(module, name, function):
        raise InputError(
            f"With several workers, {argument} must be a function at the top level of a "
            f"module or script, which each worker imports; {function!r} cannot be "
            "imported by a name (a lambda, a function inside another, a partial, a "
            "method?). Move it to a file, with the data it needs, or use workers=1."
        )
    if module != "__main__":
        return {"module": module, "name": name}
    main = sys.modules[module]
    spec = getattr(main, "__spec__", None)
    if spec is not None:  # python -m package.module
        return {"module": spec.name, "name": name}
    file = getattr(main, "__file__", None)
    if file is None or not Path(file).is_file():
        raise InputError(
            f"With several workers, {argument} must be in a file; this session has none (a "
            "notebook or a prompt). Move it to a module, or use workers=1."
        )
    return {"file": str(Path(file).resolve()), "name": name}


def find(named: dict[str, str]) -> Callable[..., Any]:
    """Imports a function.

    Args:
        named: what `name_of` gave.

    Returns:
        The function.

    Raises:
        InputError: if the module does not define it.
    """
    file, name = named.get("file"), named["name"]
    module = _script(file) if file else importlib.import_module(named["module"])
    try:
        return _attribute(module, name)
    except AttributeError as error:
        raise InputError(
            f"{file or named['module']} does not define {name} where a worker imports it. "
            'What is under `if __name__ == "__main__":` is not there: move the function, '
            "and the data it needs, above that line, and leave only the call of build_bank "
            "below it; or use workers=1."
        ) from error


@cache
def _script(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(_SCRIPT, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    # as multiprocessing does it, whose processes then find what training hands them
    module.__spec__ = None
    sys.modules["__main__"] = sys.modules[_SCRIPT] = module
    spec.loader.exec_module(module)
    return module


def _is_there(module: str, name: str, function: Any) -> bool:
    try:
        return _attribute(sys.modules[module], name) is function
    except (KeyError, AttributeError):
        return False


def _attribute(module: Any, name: str) -> Any:
    return reduce(getattr, name.split("."), module)
