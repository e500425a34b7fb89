"""No secret value appears on any surface: files, database, events, logs, errors, process lists."""

import json

import psutil
import pytest

pytestmark = pytest.mark.slow

CANARY = "kanarienvogel-4711-geheim"
OTHER = "never-declared-0815-hidden"

TELLTALE = """
import os, subprocess, sys

VALUE = os.environ["SERVICE_KEY"]
print("import says", VALUE, flush=True)
sys.stderr.write(f"stderr says {VALUE}\\n")
subprocess.run(["sh", "-c", "echo child says $SERVICE_KEY"], check=True)
assert "UNDECLARED_KEY" not in os.environ, "the worker sees what it was not promised"
"""


def tell(project, *, fail):
    source = (project.folder / "environment.py").read_text()
    if fail:
        source = source.replace(
            "    def build_prompt_messages(self, example, prompt_text):\n"
            '        return [{"role": "user", "content": example.input}]\n',
            "    calls = 0\n"
            "    def build_prompt_messages(self, example, prompt_text):\n"
            "        Echo.calls += 1\n"
            "        if Echo.calls > 2:\n"
            "            raise ValueError('the service refused ' + VALUE)\n"
            '        return [{"role": "user", "content": example.input}]\n',
        )
    project.write("environment.py", TELLTALE + source)
    config = (project.folder / "run.toml").read_text()
    project.write("run.toml", config.replace('path = "."', 'path = "."\nsecrets = ["SERVICE_KEY"]'))


def surfaces(project, value):
    """Return the files under the user's home that hold `value`, but for the live secrets file."""
    return [
        path.relative_to(project.home)
        for path in project.home.rglob("*")
        if path.is_file() and "secrets" not in path.parts and value.encode() in path.read_bytes()
    ]


def command_lines():
    lines = []
    for process in psutil.process_iter():
        try:
            lines.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return lines


@pytest.mark.parametrize("fail", [False, True], ids=["run-done", "run-failed"])
def test_a_secret_reaches_the_environment_and_no_surface(project, fail):
    tell(project, fail=fail)
    secrets = {"SERVICE_KEY": CANARY, "UNDECLARED_KEY": OTHER}
    run = project.submit(**secrets)
    seen_lines, leaks = [], []

    def look(_):
        seen_lines.extend(command_lines())
        leaks.extend(surfaces(project, CANARY))
        return False

    status = project.wait(run, look)

    assert status["state"] == ("failed" if fail else "done")
    assert leaks + surfaces(project, CANARY) == []
    assert not [line for line in seen_lines if CANARY in line]
    assert not list((project.store / "secrets").iterdir())
    for words in (("status", run), ("status", run, "--logs"), ("runs",), ("status", run, "--json")):
        shown = project.flash(*words, **secrets)
        assert CANARY not in shown.stdout + shown.stderr
    log = (project.store / "runs" / run / "attempts" / "1" / "worker.log").read_text()
    assert "child says" in log
    if fail:
        assert "the service refused" in status["error"]


def test_a_dry_run_a_check_and_a_preview_do_not_say_it_either(project):
    tell(project, fail=False)
    for words in (
        ("train", "run.toml", "--dry-run"),
        ("train", "run.toml", "--dry-run", "--json"),
        ("env", "preview", "run.toml"),
    ):
        shown = project.flash(*words, SERVICE_KEY=CANARY)
        assert shown.returncode == 0, shown.stderr
        assert CANARY not in shown.stdout + shown.stderr


def test_a_file_env_local_is_read_before_env_and_after_the_process(project):
    tell(project, fail=False)
    project.write(".env", "SERVICE_KEY=from-dot-env-000111")
    project.write(".env.local", f"SERVICE_KEY={CANARY}")
    run = project.submit()

    assert project.wait(run)["state"] == "done"
    assert surfaces(project, CANARY) == []
    snapshot = project.store / "runs" / run / "environment"
    assert not list(snapshot.glob(".env*"))


def test_missing_secrets_stop_the_submit_and_are_all_listed(project):
    config = (project.folder / "run.toml").read_text()
    project.write(
        "run.toml",
        config.replace('path = "."', 'path = "."\nsecrets = ["FIRST_KEY", "SECOND_KEY"]'),
    )
    done = project.flash("train", "run.toml")

    assert done.returncode == 2
    assert "FIRST_KEY" in done.stderr
    assert "SECOND_KEY" in done.stderr
    assert project.json("runs") == []


def test_a_secret_written_into_the_spec_is_refused(project):
    config = (project.folder / "run.toml").read_text()
    project.write(
        "run.toml",
        config.replace(
            'path = "."', f'path = "."\nsecrets = ["SERVICE_KEY"]\nparams = {{ key = "{CANARY}" }}'
        ),
    )
    done = project.flash("train", "run.toml", SERVICE_KEY=CANARY)

    assert done.returncode == 2
    assert "environment.params.key" in done.stderr
    assert CANARY not in done.stderr
    assert json.loads(project.flash("runs", "--json").stdout) == []
