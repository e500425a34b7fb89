"""`flash env preview` shows what a run would train on, token for token."""

import pytest

from flash.cli.env import JSON_KEYS

pytestmark = pytest.mark.slow


def test_the_trained_tokens_are_marked_where_there_is_no_colour(project):
    done = project.flash("env", "preview", "run.toml", "-n", "1")

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("row ")
    assert "⟦word 0<|im_end|>⟧" in done.stdout
    assert "⟦say" not in done.stdout


def test_the_pieces_add_up_to_the_text_the_model_sees(project):
    shown = project.json("env", "preview", "run.toml", "-n", "2")

    assert [row["row"].startswith("row ") for row in shown] == [True, True]
    for number, row in enumerate(shown):
        assert list(row) == list(JSON_KEYS)
        text = "".join(piece for piece, _ in row["pieces"])
        assert text == (
            f"<|im_start|>user\nsay {number}<|im_end|>\n"
            f"<|im_start|>assistant\nword {number}<|im_end|>"
        )
        trained = [piece for piece, is_trained in row["pieces"] if is_trained]
        assert trained == [f"word {number}<|im_end|>"]


def test_what_the_plan_warns_of_is_said_and_the_rows_are_those_of_the_overlay(project):
    project.write("over.toml", '[environment]\nsplit = "eval"\n[train]\nmax_context_tokens = 64\n')

    done = project.flash("env", "preview", "run.toml", "--config", "over.toml", "-n", "9")

    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" trained\n") == 4
    assert "warning: train.max_context_tokens: is the old spelling of `max_length`" in done.stderr


def test_a_row_without_target_is_refused_by_name(project):
    project.write("dataset/train.jsonl", '{"input": "a", "output": "b"}\n{"input": "c"}\n')
    source = (project.folder / "environment.py").read_text()
    project.write(
        "environment.py",
        source.replace(
            "    def score_response",
            "    def sft_completion(self, example):\n"
            "        return None if example.output is None else super().sft_completion(example)\n\n"
            "    def score_response",
        ),
    )
    done = project.flash("env", "preview", "run.toml")

    assert done.returncode == 2
    assert "1 of 2 rows have no target" in done.stderr
