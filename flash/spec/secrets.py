"""
Secrets: named in the TOML, never written in it.

Which names may be asked for, where values are found, and how they are kept out of everything that
is printed or written.
"""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, quote_plus

from flash.errors import SpecError
from flash.spec.credentials import looks_like_secret, looks_random
from flash.spec.paths import dotted
from flash.values import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from flash.plugins import PluginHost

RESERVED: Final = frozenset(
    {
        "FREESOLO_API_KEY",
        "FREESOLO_INTERNAL_KEY",
        "GITHUB_TOKEN",
        "GIT_ASKPASS",
        "HF_REPO",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "MODAL_TOKEN_ID",
        "MODAL_TOKEN_SECRET",
        "PARASAIL_API_KEY",
        "PATH",
        "PYTHONHOME",
        "PYTHONPATH",
        "RUNPOD_API_KEY",
        "RUN_ID",
        "SEED",
    }
)
"""Names that are Flash's or the machine's own: user code gets no value for them from a spec."""

RESERVED_PREFIX: Final = "FLASH_"

# A value shorter than this is too common a text to be masked or searched for.
_SHORTEST_VALUE = 6
_LARGEST_FILE = 1 << 20
_FILES = (".env.local", ".env")
_SETTING = "environment.secrets"


def wrong_name(name: str, taken: Iterable[str] = ()) -> str | None:
    """
    Return what is wrong with the name of a secret, or None.

    `taken` are names that installed providers and model plugins use for their own credentials.
    The message never repeats what may be a value.
    """
    if "=" in name:
        return "must be a name only, without a value"
    if not name or re.search(r"[\s,\x00]", name):
        return "must be a name without spaces, commas or NUL"
    if looks_like_secret(name) or looks_random(name):
        return "looks like a value; write the name of the variable that holds it"
    folded = name.upper()
    if folded in RESERVED or folded.startswith(RESERVED_PREFIX):
        return f"{name} is reserved: Flash and the machine use it themselves"
    if folded in {other.upper() for other in taken}:
        return f"{name} is reserved: it is a plugin's own credential"
    return None


class SecretFinder:
    """
    Finds values: plugins first, then the process environment, then `.env.local`, then `.env`.

    The files are looked for in each of `folders` in order: next to the config, and the working
    directory.
    """

    def __init__(
        self,
        host: PluginHost,
        folders: Sequence[Path],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._host = host
        self._environ = os.environ if environ is None else environ
        unique = list(dict.fromkeys(folder.absolute() for folder in folders))
        self._files = [folder / name for name in _FILES for folder in unique]
        self._read: dict[Path, Mapping[str, str | None]] = {}

    @classmethod
    def beside(cls, folder: Path, host: PluginHost) -> SecretFinder:
        """Return the finder for a config in `folder`: there, then in the working directory."""
        return cls(host, [folder, Path.cwd()])

    def find(self, name: str) -> str | None:
        """
        Return the value, or None; an empty one counts as missing.

        Raises `SpecError` for a file that cannot be read or a value that no worker could be given,
        and `PluginError` for a plugin that fails.
        """
        value = next(filter(None, self._candidates(name)), None)
        if value and not _is_plain_text(value):
            message = f"the value of {name} is not UTF-8 text, or contains a NUL character"
            raise SpecError([Problem(_SETTING, message, "write it again")])
        return value

    def _candidates(self, name: str) -> Iterator[str | None]:
        """Yield what each place has under this name, the first place first."""
        yield self._host.find_secret(name)
        yield self._environ.get(name)
        for path in self._files:
            if path not in self._read:
                self._read[path] = _read_env_file(path)
            yield self._read[path].get(name)

    def require(self, names: Sequence[str], optional: Iterable[str] = ()) -> dict[str, str]:
        """
        Return the values of `names` and what there is of `optional`.

        Raises `SpecError` that lists every missing one.
        """
        found = {name: self.find(name) for name in [*names, *optional]}
        missing = [
            Problem(_SETTING, f"{name} has no value", self._hint())
            for name in names
            if not found[name]
        ]
        if missing:
            raise SpecError(missing)
        return {name: value for name, value in found.items() if value}

    def _hint(self) -> str:
        folders = " and ".join(str(path.parent) for path in self._files if path.name == ".env")
        return f"export it, or write it into .env.local or .env in {folders}"


def _read_env_file(path: Path) -> Mapping[str, str | None]:
    """Read `NAME=value` lines; a missing file is empty. Messages never quote the content."""
    from dotenv import dotenv_values

    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE)
        return dotenv_values(stream=io.StringIO(content.decode("utf-8-sig")), interpolate=False)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UnicodeDecodeError:
        problem = Problem(str(path), "is not UTF-8 text", "save it as UTF-8")
    except OSError as error:
        problem = Problem(str(path), f"cannot be read: {error.strerror or error}")
    raise SpecError([problem])


def _is_plain_text(value: str) -> bool:
    """Say whether a process can be given the value; undecodable bytes arrive as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\x00" not in value


def values_in_spec(spec: Mapping[str, Any], secrets: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each text of the spec that contains a secret's value; never the value."""
    for path, text in texts(spec):
        for name, value in secrets.items():
            if len(value) >= _SHORTEST_VALUE and value in text:
                yield Problem(
                    dotted(path),
                    f"contains the value of the secret {name}",
                    f'take it out; code of the environment reads it as os.environ["{name}"]',
                )


def texts(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, str]]:
    """Yield every string of plain data with its path; a key has the path of its table."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield path, key
            yield from texts(item, (*path, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from texts(item, (*path, index))


class Redactor:
    """Replaces secret values, also as JSON, a URL or Python's repr would write them, by `***`."""

    MASK: Final = "***"

    def __init__(self, values: Iterable[str]) -> None:
        forms = {form for value in values for form in _forms(value)}
        ordered = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._longest = max(map(len, ordered), default=1)

    def redact(self, text: str) -> str:
        """Return the text with every value masked."""
        return self._pattern.sub(self.MASK, text) if self._pattern else text

    def settle(self, text: str) -> tuple[str, str]:
        """
        Mask what no later text can change; return it, and the rest to put before that text.

        The rest is shorter than the longest form of a value.
        """
        cut = max(0, len(text) - self._longest + 1)
        for match in self._pattern.finditer(text) if self._pattern else ():
            if match.start() >= cut:
                break
            cut = max(cut, match.end())
        return self.redact(text[:cut]), text[cut:]


def _forms(value: str) -> Iterator[str]:
    """Yield the ways one value may be written; of several lines, each line counts as well."""
    for part in {value, value.strip(), *value.splitlines()}:
        if len(part) < _SHORTEST_VALUE:
            continue
        yield part
        yield json.dumps(part)[1:-1]
        yield json.dumps(part, ensure_ascii=False)[1:-1]
        yield repr(part)[1:-1]
        yield quote(part, safe="")
        yield quote(part)
        yield quote_plus(part)
