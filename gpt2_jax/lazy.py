"""Modules that are imported when one of their names is first asked for (PEP 562)."""

import ast
import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any


def homes_in(package: str) -> dict[str, str]:
    """Returns the module of each name that the imports of a package's `__init__.pyi` name."""
    # By the loader, as a package may lie in a zip file.
    stub = pkgutil.get_data(package, "__init__.pyi")
    assert stub is not None, f"{package} is installed without its __init__.pyi"
    homes = {}
    for statement in ast.parse(stub).body:
        if isinstance(statement, ast.ImportFrom) and statement.module:
            homes |= dict.fromkeys((alias.name for alias in statement.names), statement.module)
    return homes


def names_of(package: ModuleType, homes: dict[str, str]) -> Callable[[str], Any]:
    """Returns a package's `__getattr__`, which finds the names that have a home, and modules."""
    module_of = modules_of(package.__name__)

    def find(name: str) -> Any:
        home = homes.get(name)
        if home is None:
            return module_of(name)
        value = getattr(importlib.import_module(home), name)
        setattr(package, name, value)  # from now on it is found without this function
        return value

    return find


def modules_of(package: str) -> Callable[[str], ModuleType]:
    """Returns a package's `__getattr__`, which finds the modules in it as if all were imported."""

    def find(name: str) -> ModuleType:
        module = f"{package}.{name}"
        try:
            # No module's name begins so, and Python asks for many attributes that do.
            if not name.startswith("_"):
                return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise  # it is there, and lacks something
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find
