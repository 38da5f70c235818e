"""Config dataclasses as their source declares them, without all that their modules import: torch alone takes seconds.

A *skeleton* has a class's docstring, bases and fields, and no method: it says which flags a command has, and checks no values.
Of modules only what the fields name is taken, wherever it is defined.
"""

import ast
import builtins
import importlib
import sys
from functools import cache
from pathlib import Path
from typing import Any

_PACKAGE = __name__.partition(".")[0]
_ROOT = Path(__file__).resolve().parent


def config_skeleton(function: str) -> type | None:
    """The config of a function that takes one, such as a job's ``main``.

    Args:
        function: ``module:name``, as in an entry point.

    Returns:
        Its skeleton; None if the function is of another package, or its source says more than this module understands.
    """
    module, _, name = function.partition(":")
    try:
        node = _definitions(module)[name]
        if not isinstance(node, ast.FunctionDef):
            return None
        annotation = node.args.args[0].annotation
        return _resolve(module, annotation.id) if isinstance(annotation, ast.Name) else None
    except (LookupError, OSError):
        return None


def first_line_of(function: str) -> str:
    """The first line of the docstring of one of this package's functions, ``module:name``."""
    module, _, name = function.partition(":")
    node = _definitions(module)[name]
    assert isinstance(node, ast.FunctionDef)
    return (ast.get_docstring(node) or "").partition("\n")[0]


@cache
def _resolve(module: str, name: str) -> Any:
    """What ``name`` means in ``module``.

    Raises:
        LookupError: if that takes more than classes, constants, functions without arguments and the standard library.
    """
    if module.partition(".")[0] in sys.stdlib_module_names:
        return getattr(importlib.import_module(module), name)
    node = _definitions(module)[name]
    if isinstance(node, ast.ImportFrom):
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        return _resolve(node.module or "", original)
    if isinstance(node, ast.ClassDef):
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign) or _is_docstring(part)]
        skeleton = ast.ClassDef(name, node.bases, node.keywords, fields or [ast.Pass()], node.decorator_list)
        if sys.version_info >= (3, 12):
            skeleton.type_params = []
        return _run(module, skeleton)[name]
    if isinstance(node, ast.Assign):
        return _run(module, node)[name]
    if isinstance(node, ast.FunctionDef) and not node.args.args:  # makes a default
        factory = ast.FunctionDef(name, node.args, node.body, [])
        if sys.version_info >= (3, 12):
            factory.type_params = []
        return _run(module, factory)[name]
    raise LookupError(f"{module}.{name}")


def _run(module: str, statement: ast.stmt) -> dict[str, Any]:
    """The names that a statement of ``module`` defines."""
    used = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    names = {name: _resolve(module, name) for name in used if name in _definitions(module)}
    if missing := [name for name in used - names.keys() if not hasattr(builtins, name)]:
        raise LookupError(f"{module}: {', '.join(missing)}")
    names["__name__"] = "skeletons"  # of no module: jsonargparse would import it
    code = compile(ast.fix_missing_locations(ast.Module([statement], [])), module, "exec")
    exec(code, names)  # noqa: S102 - statements of this package's own files, as importing them would run
    return names


@cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """The statement that defines each name of one of our modules.

    Raises:
        LookupError: if the module is not ours.
    """
    if module.partition(".")[0] != _PACKAGE:
        raise LookupError(module)
    path = _ROOT.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {
                name.id: node for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)
            }
    return found


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
