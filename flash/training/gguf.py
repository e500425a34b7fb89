"""
A merged model as one GGUF file, and llama.cpp's own word on whether it is what was trained.

The converter is llama.cpp's: no distribution of its own has it, the source of llama-cpp-python
carries it, and is taken by its digest. The library is that of xllamacpp, which comes compiled. Both
go into a folder of Flash's home, once. Neither meets the trainer's packages; each runs in a process
of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flash.errors import FlashError
from flash.files import write_atomic
from flash.parity import GoldenSet, other_from
from flash.plane.lock import locked
from flash.training import export, llama_cpp_child
from flash.training.chat import ChatRenderer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from flash.parity import LogProbs

_VERSION: Final = "0.3.36"
_SHA256: Final = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
_CONVERTER: Final = "convert_hf_to_gguf.py"
_PARTS: Final = (_CONVERTER, "conversion", "gguf-py")
_READERS: Final = "readers"
_OF_CONVERTER: Final = ("sentencepiece==0.2.3", "protobuf==7.36.2")
"""What the converter reads tokenizers with, whichever kind the model's is."""

_SITE: Final = "site"
_LIBRARY: Final = "xllamacpp==2026.10.11549"

_LOG_LINES: Final = 12


def export_gguf(
    adapter: Path,
    base: Path,
    target: Path,
    report: Callable[[str], None],
    *,
    tools: Path,
    allow_drift: bool,
) -> dict[str, Any]:
    """
    Write the merged model to the file `target`; the tools are in `tools`, or put there.

    What it takes on the way, twice the model and more, is beside `target`: whoever kills this finds
    all of it there.

    Returns what the parity gate says, see `flash.training.export.gate`. Raises `FlashError`.
    """
    made = LlamaCpp.made_in(tools, report)
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as scratch:
        merged, bare = Path(scratch, "merged"), Path(scratch, "base.gguf")
        export.merge(adapter, base, merged, report)
        report("converting it to GGUF")
        made.convert(merged, target)
        golden = GoldenSet.read(adapter)
        if golden is not None:
            report("converting the bare base model too, to compare both with what was trained")
            made.convert(base, bare)
            _check_tokens(made, golden, target, merged)

        def replays() -> tuple[LogProbs, LogProbs]:
            assert golden is not None  # noqa: S101 - else nothing is replayed
            return made.replay(target, golden), made.replay(bare, golden)

        return export.gate(adapter, merged, replays, allow_drift=allow_drift)


class LlamaCpp:
    """llama.cpp's converter and library, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._source = folder / "llama.cpp"
        self._library = folder / _SITE
        self._beside_converter = f"{self._source / 'gguf-py'}{os.pathsep}{folder / _READERS}"

    @classmethod
    def made_in(cls, tools: Path, report: Callable[[str], None]) -> LlamaCpp:
        """Return those in `tools`, made where they are not there yet; raises `FlashError`."""
        folder = tools / "llama-cpp"
        stamp, wanted = folder / "made", f"{_SHA256} {_LIBRARY}".encode()
        tools.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(tools / "llama-cpp.lock"):
            if not stamp.exists() or stamp.read_bytes() != wanted:
                report(f"putting llama.cpp and its converter into {folder}, once: 110 MB")
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, mode=0o700)
                _make(folder)
                write_atomic(stamp, wanted)
        return cls(folder)

    def convert(self, model: Path, target: Path) -> None:
        """Write the GGUF file of a model's folder, in the 16-bit type nearest to its own."""
        _run(
            [self._source / _CONVERTER, model, "--outfile", target, "--outtype", "auto"],
            {"PYTHONPATH": self._beside_converter, "HF_HUB_OFFLINE": "1"},
            "llama.cpp cannot convert the model",
        )

    def replay(self, model: Path, golden: GoldenSet) -> LogProbs:
        """Return llama.cpp's log-probabilities of a golden set."""
        pairs = [(list(one.prompt), list(one.completion)) for one in golden.prompts]
        said = self.ask(model, {"replay": pairs})["log_probs"]
        found = {_key(*pair): log_probs for pair, log_probs in zip(pairs, said, strict=True)}
        return lambda prompt, completion: found[_key(prompt, completion)]

    def ask(self, model: Path, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return what `flash.training.llama_cpp_child` answers of a model file."""
        asked = json.dumps({"model": str(model), **request})
        said = _run(
            [Path(llama_cpp_child.__file__)],
            {"PYTHONPATH": str(self._library)},
            "llama.cpp cannot answer from the file",
            given=asked,
        )
        answer: dict[str, Any] = json.loads(said)
        return answer


def _make(folder: Path) -> None:
    """Fetch the archive and take the converter out of it; install the library."""
    pip = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
    wanted = folder / "requirements.txt"
    wanted.write_text(f"llama-cpp-python=={_VERSION} --hash=sha256:{_SHA256}\n")
    own = ["--no-binary", "llama-cpp-python", "--no-deps", "--requirement", str(wanted)]
    failed = f"llama-cpp-python {_VERSION} cannot be had"
    _run([*pip, "download", *own, "--dest", str(folder)], {}, failed)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    _unpack(archive, folder / "llama.cpp")
    archive.unlink()
    for site, packages in ((_READERS, _OF_CONVERTER), (_SITE, (_LIBRARY,))):
        words = ["install", "--only-binary", ":all:", "--no-deps", "--target", str(folder / site)]
        _run([*pip, *words, *packages], {}, f"{' and '.join(packages)} cannot be had")


def _unpack(archive: Path, folder: Path) -> None:
    """Write the converter's files; early releases of Python 3.11 can name or filter no member."""
    with tarfile.open(archive) as packed:
        prefix = f"{packed.getnames()[0].split('/')[0]}/vendor/llama.cpp/"
        for member in packed.getmembers():
            name = member.name.removeprefix(prefix)
            content = packed.extractfile(member) if member.isfile() else None
            if content and name != member.name and name.split("/")[0] in _PARTS:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content.read())


def _check_tokens(made: LlamaCpp, golden: GoldenSet, model: Path, tokenizer: Path) -> None:
    """Raise `FlashError` where the file's own vocabulary reads a golden prompt otherwise."""
    from transformers import AutoTokenizer

    read = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
    renderer = ChatRenderer(read, frozenset(), golden.thinking)
    texts = [renderer.prompt(one.messages, one.tools) for one in golden.prompts]
    for one, tokens in zip(
        golden.prompts, made.ask(model, {"texts": texts})["tokens"], strict=True
    ):
        if other_from(one, tokens) is not None:
            raise FlashError(
                "llama.cpp reads a golden prompt as other tokens than training did",
                hint="its converter does not know this model's tokenizer well; export --format "
                "merged instead",
            )


def _run(
    words: Sequence[str | Path], environ: Mapping[str, str], failed: str, *, given: str = ""
) -> str:
    """Run this interpreter; return what it prints. Raises `FlashError` with its last lines."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        input=given,
        capture_output=True,
        text=True,
        env=os.environ | environ,
        check=False,
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-_LOG_LINES:])
        raise FlashError(failed, hint=f"its last lines:\n{tail}")
    return done.stdout


def _key(prompt: Sequence[int], completion: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    return tuple(prompt), tuple(completion)


def main() -> None:
    """`python -m flash.training.gguf FOLDER`: make the tools there."""
    LlamaCpp.made_in(Path(sys.argv[1]), lambda text: print(text, file=sys.stderr))  # noqa: T201 - for people


if __name__ == "__main__":
    main()
