"""`docs/how-to/run-failed.md`: every outcome is there, and what it shows is what is printed."""

import re
import shlex
import tomllib
from pathlib import Path

import attrs
import pytest
from test_documents import shape_of

from flash.cli import root
from flash.spec.limits import RetryTable
from flash.values import Outcome

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "run-failed.md").read_text("utf-8")
BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
MOMENT = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")

# A worker of the page's story: killed once, then out of memory for good.
WORKER = """
from flash.worker.checkpoints import CheckpointStore

first, last, saved = {1: (1, 5, 4)}.get(attempt, (5, 7, 6))
say("phase", name="train")
for step in range(first, last + 1):
    say("metric", step=step, total=10, loss=4.0 / step)
CheckpointStore(store).save(saved, lambda to: (to / "w").write_text("w"), metrics={})
if attempt == 1:
    os.kill(os.getpid(), signal.SIGKILL)
print("step 7: allocating", flush=True)
hint = "lower train.max_length or train.batch_size, or take a smaller model"
message = "out of memory: the step needs 3 GiB more"
say("error", kind="out_of_memory", message=message, hint=hint)
sys.exit(11)
"""


def transcripts():
    """Return (command, what it prints) of the page's `flash` lines; those of a project left out."""
    for block in BLOCK.findall(PAGE):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, expected = entry.partition("\n")
            if "env test" not in command:
                yield command, expected.strip()


def test_every_way_to_end_badly_has_its_section():
    headings = set(re.findall(r"^## `(\w+)`$", PAGE, re.MULTILINE))

    assert headings == set(Outcome.__args__) - {"finished"}


def test_the_defaults_on_the_page_are_those_of_the_code():
    [shown] = [
        block
        for block in re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        if "retry" in block
    ]

    assert tomllib.loads(shown) == {"retry": attrs.asdict(RetryTable())}


@pytest.mark.slow  # four attempts
def test_every_command_of_the_page_runs_and_the_story_is_what_is_printed(
    bench, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    monkeypatch.setenv("HOME", str(tmp_path))
    run = bench.submit(WORKER, max_hours=2)
    for command, expected in transcripts():
        bench.wait(run)
        capsys.readouterr()
        code = root.run(shlex.split(command.removeprefix("flash ")))
        said = capsys.readouterr().out.replace(str(bench.home.root), "/home/you/.flash")
        shape = shape_of(MOMENT.sub("2026-07-05 12:00:00", expected))

        assert code == 0, command
        if expected:
            assert shape.fullmatch(MOMENT.sub("2026-07-05 12:00:00", said)), f"{said}\n{expected}"
    bench.wait(run)
    assert bench.outcomes(run) == ["lost"] + ["out_of_memory"] * 3
