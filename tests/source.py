"""The project's own source files, read without running them: which modules there are and what they import."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# Folder in the checkout -> package once installed.
FOLDERS = {"optjax": "optjax", "sharding": "optjax.sharding", "train": "optjax.train"}


@dataclass(frozen=True)
class Module:
    """A source file under its installed name, `optjax.train.pretrain` for train/pretrain.py."""

    name: str
    path: Path

    @property
    def package(self) -> str:
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Import:
    """One imported module, `name` None for `import module`; lazy: inside a function, or for type checkers only."""

    module: str
    name: str | None
    lazy: bool
    line: int

    @property
    def top(self) -> str:
        return self.module.split(".")[0]


def modules() -> list[Module]:
    """All modules of the three folders."""
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = path.relative_to(REPOSITORY / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.append(Module(".".join([package, *parts]), path))
    return found


def imports(text: str, package: str = "") -> Iterator[Import]:
    """What a file's text imports; relative imports are resolved against `package`."""
    yield from _walk(ast.parse(text), package, lazy=False)


def _walk(node: ast.AST, package: str, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, None, lazy, child.lineno)
        elif isinstance(child, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            module = ".".join([*base, *([child.module] if child.module else [])])
            for alias in child.names:
                yield Import(module, alias.name, lazy, child.lineno)
        else:
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _walk(child, package, lazy or function or typing)


def is_third_party(top: str) -> bool:
    return top not in sys.stdlib_module_names and top not in ("optjax", "__future__")
