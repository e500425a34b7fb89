"""What `flash env preview` computes: the rows as training sees them, and what it would say."""

from __future__ import annotations

import json

import pytest

from flash.testing.models import make_tiny_model
from flash.training.preview import preview
from flash.values import Task

OTHER_END = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<|pad|>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class Rows:
    def tasks(self, split):
        return [Task(f"{split}-{number}", "") for number in range(3)]

    def start(self, task):
        return [{"role": "user", "content": "say it"}]

    def target(self, task):
        return [{"role": "assistant", "content": task.id}]

    def tools(self, task):
        return None


@pytest.fixture
def model(tmp_path):
    """A model whose answers end with a token that is not the tokenizer's own end."""
    folder = make_tiny_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(OTHER_END)
    return folder


def shown(model):
    return preview(Rows(), split="train", model=model, thinking=False, count=2)


def test_rows_that_training_would_refuse_are_shown_with_the_reason(model):
    (model / "generation_config.json").write_text('{"eos_token_id": 1}')
    found = shown(model)

    assert [row["row"] for row in found["rows"]] == ["row train-0", "row train-1"]
    assert "the token that ends a turn is never trained" in found["refusal"]


def test_without_a_generation_config_the_ends_are_those_of_the_models_config(model):
    from transformers import AutoTokenizer

    end = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("<|pad|>")
    (model / "generation_config.json").unlink()
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [end]}))

    assert shown(model)["refusal"] is None
