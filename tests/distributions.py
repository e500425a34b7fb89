"""Small real distributions for tests: wheels written by hand and installed by pip."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import textwrap
import zipfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Distribution:
    """A plugin's distribution; `modules` are the files of its package, by name."""

    name: str
    entry_point: str
    modules: dict[str, str] = field(default_factory=dict)
    version: str = "1.0"
    requires: tuple[str, ...] = ("flash-core~=0.1.0",)

    @property
    def package(self) -> str:
        return self.name.replace("-", "_")


def plugin(name: str, code: str, *, entry_point: str | None = None, **more) -> Distribution:
    """Return the distribution `flash-<name>` whose top module is `code`."""
    modules = {"__init__": code, **more.pop("modules", {})}
    return Distribution(f"flash-{name}", entry_point or name, modules, **more)


def build_wheel(distribution: Distribution, folder: Path) -> Path:
    """Write the distribution's wheel into `folder`."""
    info = f"{distribution.package}-{distribution.version}.dist-info"
    requires = "".join(f"Requires-Dist: {line}\n" for line in distribution.requires)
    files = {
        f"{distribution.package}/{name}.py": textwrap.dedent(code)
        for name, code in distribution.modules.items()
    }
    files[f"{info}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {distribution.name}\n"
        f"Version: {distribution.version}\n{requires}"
    )
    files[f"{info}/WHEEL"] = (
        "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    files[f"{info}/entry_points.txt"] = (
        f"[flash]\n{distribution.entry_point} = {distribution.package}\n"
    )
    files[f"{info}/RECORD"] = "".join(
        f"{path},sha256={_digest(content)},{len(content.encode())}\n"
        for path, content in files.items()
    )
    wheel = folder / f"{distribution.package}-{distribution.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    return wheel


def _digest(content: str) -> str:
    raw = hashlib.sha256(content.encode()).digest()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def install(distributions: list[Distribution], folder: Path) -> Path:
    """Build and pip-install the distributions; returns the folder to put on the path."""
    wheels, site = folder / "wheels", folder / "site"
    wheels.mkdir(parents=True)
    built = [str(build_wheel(distribution, wheels)) for distribution in distributions]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(site)]
    subprocess.run([*pip, *options, *built], check=True, timeout=120)
    return site


@dataclass(frozen=True)
class Shell:
    """Runs `flash` in a process of its own, with `site` on its path and a home of its own."""

    home: Path
    site: Path | None = None
    variables: dict[str, str] = field(default_factory=dict)

    def environ(self, **more: str) -> dict[str, str]:
        """Return a minimal environment: nothing of the caller's shell reaches Flash."""
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.home)}
        environ["FLASH_HOME"] = str(self.home / ".flash")
        if self.site is not None:
            environ["PYTHONPATH"] = str(self.site)
        return environ | self.variables | more

    def flash(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run `flash` with the arguments and extra environment variables."""
        return self.python("-m", "flash", *arguments, **environ)

    def python(self, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run this interpreter in the same surroundings."""
        return subprocess.run(
            [sys.executable, *arguments],
            env=self.environ(**environ),
            cwd=self.home,
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def write_config(self, text: str) -> None:
        """Write the user's config.toml."""
        folder = self.home / ".flash"
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_text(text)
