"""What can be known of an environment without running any of it."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from flash.api import Problem
from flash_env_freesolo.rows import find_splits, in_order, names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

FACTORY = "load_environment"
_ROWS_IN_CODE = {"dataset", "examples"}


def check(
    folder: Path, *, split: str, params: Mapping[str, Any], dataset: Path | None = None
) -> Sequence[Problem]:
    """
    Return the problems of `environment.py` and of the split's file.

    A split without a file is a problem where other splits have one, unless the params or the
    code bring rows of their own; those are looked at when the environment is loaded. `dataset`
    is the folder that the params name for all splits.
    """
    path = folder / "environment.py"
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        hint = "an environment is a folder with environment.py"
        return [Problem(str(path), f"cannot be read: {reason}", hint)]
    except SyntaxError as error:
        return [Problem(f"{path}:{error.lineno or 1}", error.msg, "correct the syntax")]
    except (ValueError, RecursionError) as error:  # a NUL byte; an expression nested too deep
        return [Problem(str(path), f"is not Python: {error}")]
    problems = list(_factory_problems(tree, path))
    found = find_splits(folder, dataset)
    missing = split not in found.files
    if dataset is None:
        own_rows = {"records", "dataset_path"} & set(params) or _has_rows_in_code(folder)
        missing = missing and bool(found.files) and not own_rows
    if missing:
        place = found.folder.relative_to(folder)
        problems.append(
            Problem(
                str(folder),
                f'there is no split "{split}"; there is {names(in_order(found.files))}',
                f"add {place}/{split}.jsonl, or name another split in environment.split",
            )
        )
    return problems


def _factory_problems(tree: ast.Module, path: Path) -> Iterator[Problem]:
    bound = dict(_bound_at_top(tree))
    node = bound.get(FACTORY)
    if node is None and "*" not in bound:
        yield Problem(
            str(path),
            f"defines no function {FACTORY}",
            f"define {FACTORY}(**params) returning the environment",
        )
    if isinstance(node, ast.AsyncFunctionDef):
        yield Problem(
            f"{path}:{node.lineno}", f"{FACTORY} is async", "make it an ordinary function"
        )


def _bound_at_top(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Give the names that the module binds, also below `if` and `try`."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node
        else:
            pending += ast.iter_child_nodes(node)


def _has_rows_in_code(folder: Path) -> bool:
    """Say whether a module of the folder binds a `dataset` or `examples`, on whatever object."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue  # environment.py is reported above; a broken helper when it is imported
        if any(_bound_name(node) in _ROWS_IN_CODE for node in ast.walk(tree)):
            return True
    return False


def _bound_name(node: ast.AST) -> str | None:
    if isinstance(node, ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        return node.attr
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        return node.id
    return None
