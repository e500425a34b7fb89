"""
Importing an environment's modules without giving their names to the rest of the process.

`environment.py` says `import helpers`, at its top or inside a scorer that runs in a thread hours
later, and two environments may each mean their own. Swapping `sys.modules` around calls cannot
serve two threads, so the modules live in a package with a private name, and every one of them gets
builtins of its own whose `__import__` looks beside `environment.py` first. Functions take their
builtins from the module they were defined in: whoever calls them, whenever, imports right.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import uuid
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class PrivatePackage:
    """
    The modules of one folder, importable under `name` only.

    A module or package beside `environment.py` wins over an installed one of the same name, as it
    would on `sys.path`; a folder without `__init__.py` does not, so `datasets/` with rows in it
    never hides the library. Paths inside the folder that its code puts on `sys.path` are searched
    for it too, and taken off, because the rest of the process would search them as well.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = f"_flash_env_{uuid.uuid4().hex[:12]}"
        self._roots = [str(self.folder)]
        self._paths_before = set(sys.path)
        self._builtins = {**vars(builtins), "__import__": self._import}
        self._importlib = _Importlib(self)
        package = ModuleType(self.name)
        package.__path__ = self._roots
        package.__spec__ = ModuleSpec(self.name, None, is_package=True)
        package.__spec__.submodule_search_locations = self._roots
        importlib.invalidate_caches()
        sys.modules[self.name] = package
        sys.meta_path.insert(0, self)

    def load(self, module: str) -> ModuleType:
        """Import `module` of the folder; whatever its code raises passes."""
        try:
            return importlib.import_module(f"{self.name}.{module}")
        finally:
            self._adopt_paths()

    def discard(self) -> None:
        """Take everything back, after a load that failed."""
        sys.meta_path.remove(self)
        for name in [name for name in sys.modules if name.partition(".")[0] == self.name]:
            del sys.modules[name]

    def plain(self, text: str) -> str:
        """Return `text` with modules named as their author wrote them."""
        return text.replace(f"{self.name}.", "")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the package's own modules; part of the import protocol."""
        if path is None or fullname.partition(".")[0] != self.name:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path, self._builtins)
        return spec

    def find_local(self, name: str) -> str | None:
        """Return the private name of what the folder's code calls `name`, if the folder has it."""
        top = name.partition(".")[0]
        private = f"{self.name}.{top}"
        if private not in sys.modules:
            self._adopt_paths()
            spec = PathFinder.find_spec(private, self._roots)
            if spec is None or (spec.loader is None and _is_installed(top)):
                return None
        return f"{self.name}.{name}"

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002 - the signature of __import__
        locals: Mapping[str, object] | None = None,  # noqa: A002 - the signature of __import__
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """Stand in for `__import__` in the folder's modules."""
        if level == 0:
            private = self.find_local(name)
            if private is not None:
                module = builtins.__import__(private, globals, locals, fromlist or (), 0)
                top = f"{self.name}.{name.partition('.')[0]}"
                return module if fromlist else sys.modules[top]
        module = builtins.__import__(name, globals, locals, fromlist or (), level)
        return self._importlib if module is importlib else module

    def _adopt_paths(self) -> None:
        for entry in [entry for entry in sys.path if entry not in self._paths_before]:
            if Path(entry).resolve().is_relative_to(self.folder):
                sys.path.remove(entry)
                if entry not in self._roots:
                    self._roots.append(entry)


class _Loader(SourceFileLoader):
    """Runs a module with the package's builtins and leaves no bytecode in the user's folder."""

    def __init__(self, fullname: str, path: str, its_builtins: Mapping[str, object]) -> None:
        super().__init__(fullname, path)
        self._builtins = its_builtins

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__builtins__"] = self._builtins
        super().exec_module(module)

    def set_data(self, path: str, data: Any, *, _mode: int = 0o666) -> None:
        pass


class _Importlib(ModuleType):
    """`importlib` as the folder's code sees it: `import_module` finds its own modules."""

    def __init__(self, package: PrivatePackage) -> None:
        super().__init__("importlib", importlib.__doc__)
        self._package = package

    def import_module(self, name: str, package: str | None = None) -> ModuleType:
        """Import as `importlib.import_module` does, looking beside `environment.py` first."""
        private = None if name.startswith(".") else self._package.find_local(name)
        return importlib.import_module(private or name, package)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib, name)


def _is_installed(top: str) -> bool:
    """Say whether a real module of this name exists outside the environment."""
    if top in sys.modules or top in sys.builtin_module_names:
        return True
    spec = PathFinder.find_spec(top)
    return spec is not None and spec.loader is not None
