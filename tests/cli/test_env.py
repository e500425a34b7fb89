"""`flash env preview` plans as `flash train` does: overlays, runs to start from, every problem."""

import pytest

from flash.cli import root

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def preview(bench, tmp_path, monkeypatch, capsys):
    """Return a function that previews a config with more text in it: exit code and stderr."""
    monkeypatch.setenv("FLASH_HOME", str(bench.home.root))
    (tmp_path / "environment.py").write_text("def load_environment(): ...\n")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text('{"input": "a", "output": "b"}\n')

    def run(train, *words):
        path = tmp_path / "run.toml"
        path.write_text(f'model = "{MODEL}"\nenvironment.path = "."\n[train]\n{train}')
        code = root.run(["env", "preview", str(path), *words])
        return code, capsys.readouterr().err

    return run


def test_a_run_to_start_from_is_looked_for_among_the_runs(bench, preview):
    run = bench.submit("", memory_gib=1e6)

    code, said = preview(f'init_from_adapter = "{run}"\n')

    assert code == 2
    assert f"train.init_from_adapter: the run {run} is queued and has no final adapter" in said


def test_overlays_lie_over_the_config(preview, tmp_path):
    (tmp_path / "more.toml").write_text("[train]\nbatch_size = 0\n")

    code, said = preview("batch_size = 2\n", "--config", str(tmp_path / "more.toml"))

    assert code == 2
    assert said == "error: train.batch_size: must be at least 1, got 0 (set by more.toml)\n"
