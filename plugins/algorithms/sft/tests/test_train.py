"""A run of SFT on a tiny model: what is trained, reported, saved and resumed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path  # noqa: TC003 - attrs reads the annotations
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from flash_algorithm_sft.config import SftConfig
from flash_algorithm_sft.train import run, train
from safetensors.torch import load_file, save_file

from flash.api import FlashError, SpecError, Task, TrainingDataError
from flash.parity import NAME, GoldenSet
from flash.testing.models import make_tiny_model
from flash.testing.worker import Checkpoints, Context, Reports
from flash.training.hotpath import HotPath

pytestmark = pytest.mark.slow

SETTINGS = {
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "learning_rate": 1e-2,
    "batch_size": 4,
    "max_length": 256,
    "epochs": 1,
    "eval_every": 50,
}


NO_END = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
PROMPT_LEFT_OUT = (
    "{% if add_generation_prompt %}<|im_start|>{% else %}"
    "<|im_start|>{{ messages[-1].content }}<|im_end|>{% endif %}"
)


BLANK = [{"role": "assistant", "content": " "}]


def row(number: int) -> dict[str, Any]:
    return {
        "opening": [{"role": "user", "content": f"Number {number}, please" + "!" * (number % 7)}],
        "target": [{"role": "assistant", "content": f"It is {number * number}."}],
    }


@attrs.define
class Rows:
    """An environment that is its rows."""

    by_split: dict[str, list[dict[str, Any]]]
    max_score_concurrency: int = 1

    def splits(self):
        return list(self.by_split)

    def tasks(self, split):
        return [Task(f"{split}-{n}", "", data) for n, data in enumerate(self.by_split[split])]

    def start(self, task):
        return list(task.data["opening"])

    def target(self, task):
        return task.data["target"]

    def tools(self, task):
        return task.data.get("tools")


@pytest.fixture(autouse=True)
def one_thread():
    """Threads cost small matrices more than they give, a lot more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make(tiny, tmp_path):
    """Make a context; each has a store of its own unless one is given."""
    count = 0

    def make(*, rows=None, held_out=None, store=None, settings=None, **more):
        nonlocal count
        count += 1
        splits = {"train": rows if rows is not None else [row(n) for n in range(24)]}
        if held_out is None:
            splits["eval"] = [row(n) for n in range(100, 106)]
        elif held_out:
            splits["eval"] = held_out
        return Context(
            config=SftConfig(**SETTINGS | (settings or {})),
            environment=Rows(splits),
            model=tiny,
            workdir=tmp_path / f"work-{count}",
            checkpoints=store or Checkpoints(tmp_path / f"store-{count}"),
            **more,
        )

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same_bits(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_loss_falls_and_every_step_reports_its_numbers(make):
    context = make(settings={"epochs": 8})
    run(context)
    steps = context.reporter.steps

    assert [one["step"] for one in steps] == list(range(1, 49))
    assert {one["total"] for one in steps} == {48}
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3
    assert steps[-1].keys() == {
        *("step", "total", "loss", "token_accuracy", "grad_norm", "learning_rate"),
        *("tokens_per_s", "padding_share", "memory_gib", "epoch", "eta_s"),
    }
    assert 0 < steps[-1]["token_accuracy"] <= 1
    assert steps[-1]["eta_s"] == 0
    assert context.reporter.phases[:3] == ["model", "data", "train"]
    assert context.reporter.phases[-1] == "save"


def test_the_schedule_rises_over_3_percent_of_the_steps_and_falls_towards_zero(make):
    context = make(held_out=[], settings={"max_steps": 100, "batch_size": 1, "learning_rate": 0.1})
    run(context)
    rates = [one["learning_rate"] / 0.1 for one in context.reporter.steps]

    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[-1] == pytest.approx(1 / 97)


def test_each_step_is_the_step_that_trl_takes(make, tiny, tmp_path):
    """The same adapter, rows, order and schedule in stock TRL give the same losses."""
    from datasets import Dataset
    from flash_algorithm_sft.trainer import FlashSftTrainer
    from trl import SFTConfig, SFTTrainer

    from flash.training.loading import attach_lora, load_base
    from flash.training.rows import render_tasks

    context = make(held_out=[], settings={"epochs": 2})
    run(context)

    class Stock(SFTTrainer):
        create_scheduler = FlashSftTrainer.create_scheduler

    base, tokenizer = load_base(tiny)
    model = attach_lora(base, rank=4, alpha=8, targets="all-linear", base="x", seed=3)
    tasks = context.environment.tasks("train")
    rendered = [one for (one,) in render_tasks(context.environment, tasks, renderer(tokenizer))]
    stock = Stock(
        model=model,
        args=SFTConfig(
            output_dir=str(tmp_path / "trl"),
            seed=3,
            per_device_train_batch_size=4,
            num_train_epochs=2,
            learning_rate=1e-2,
            warmup_steps=0.03,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {
                "input_ids": [one.document.tokens for one in rendered],
                "labels": [one.document.labels for one in rendered],
            }
        ),
        processing_class=tokenizer,
    )
    stock.train()
    expected = [entry for entry in stock.state.log_history if "grad_norm" in entry]
    found = context.reporter.steps

    for name in ("loss", "grad_norm", "learning_rate"):
        assert [one[name] for one in found] == pytest.approx(
            [one[name] for one in expected], rel=2e-4
        )


def renderer(tokenizer):
    from flash.training.chat import ChatRenderer, stop_tokens

    return ChatRenderer(tokenizer, stop_tokens(tokenizer, None), thinking=False)


@pytest.mark.slow
@pytest.mark.parametrize("off", ["packing", "sharing", "head", "lora"])
def test_a_run_is_the_same_without_each_shortcut(make, off):
    fast, slow = make(held_out=[]), make(held_out=[])
    run(fast)
    train(slow, HotPath(**{off: False}))

    for one, other in zip(fast.reporter.steps, slow.reporter.steps, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_the_final_adapter_loads_in_peft_and_names_the_model_by_its_id(make, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    context = make()
    run(context)
    folder = context.checkpoints.final
    config = json.loads((folder / "adapter_config.json").read_text())
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), folder)
    loaded = {k: v for k, v in model.state_dict().items() if "lora_B" in k}

    assert config["base_model_name_or_path"] == "org/tiny"
    assert config["inference_mode"] is True
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "golden.json",
    ]
    assert all(tensor.abs().sum() > 0 for tensor in loaded.values())


def test_checkpoints_come_at_the_steps_asked_for_and_at_the_end(make):
    context = make(held_out=[], settings={"save_every": 4, "save_at_steps": (1, 3)})
    run(context)

    assert [one.step for one in context.checkpoints.saved] == [1, 3, 4, 6]
    assert same_bits(context.checkpoints.final, context.checkpoints.saved[-1].folder / "adapter")


def test_held_out_loss_is_reported_and_a_new_best_is_saved(make):
    context = make(settings={"epochs": 4, "eval_every": 6})
    run(context)
    found = context.reporter.evaluations
    best = min(found, key=lambda one: one["loss"])

    assert [one["step"] for one in found] == [6, 12, 18, 24]
    assert found[0]["best"] == 1.0
    by_step = {one.step: one.metrics for one in context.checkpoints.saved}
    for one in found:
        if one["best"]:
            assert by_step[one["step"]]["eval_loss"] == one["loss"]
    assert f"of the checkpoint of step {best['step']}" in context.reporter.logs[-1]


def test_the_held_out_loss_is_a_mean_over_tokens(make):
    """Not over rows or batches: one long answer among short ones counts by its tokens."""
    short = [row(n) for n in range(3)]
    long = {**row(4), "target": [{"role": "assistant", "content": "and so on, " * 15}]}
    losses = []
    for held_out in ([*short, long], short, [long]):
        context = make(held_out=held_out, settings={"max_steps": 1, "learning_rate": 1e-9})
        run(context)
        losses.append(context.reporter.evaluations[0]["loss"])
    tokens = [len("It is 0.") + 1, len("It is 1.") + 1, len("It is 4.") + 1, 11 * 15 + 1]

    assert losses[0] == pytest.approx(
        (losses[1] * sum(tokens[:3]) + losses[2] * tokens[3]) / sum(tokens), rel=1e-4
    )


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        ([], "no held-out loss: there is no other split"),
        (
            [{**row(1), "target": None}, {**row(1), "target": BLANK}],
            "no held-out loss: on 0 of 2 rows of split 'eval' (2 without target)",
        ),
    ],
)
def test_without_held_out_targets_there_is_no_held_out_loss(make, held_out, message):
    context = make(held_out=held_out, settings={"max_steps": 1})
    run(context)

    assert context.reporter.evaluations == []
    assert message in context.reporter.logs


def test_the_log_says_which_rows_the_held_out_loss_is_of(make):
    long = {**row(1), "target": [{"role": "assistant", "content": "x" * 300}]}
    held_out = [long, {**row(1), "target": None}, row(2)]
    few = make(held_out=held_out, settings={"max_steps": 1})
    many = make(held_out=[row(n) for n in range(70)], settings={"max_steps": 1})
    run(few)
    run(many)

    assert (
        "held-out loss on 1 of 3 rows of split 'eval' (1 too long, 1 without target)"
        in few.reporter.logs
    )
    assert "held-out loss on 64 of 70 rows of split 'eval' (64 of 70 drawn)" in many.reporter.logs


def test_a_checkpoint_that_will_not_be_made_is_warned_of(make):
    """The plan counts all rows; only the worker knows which fit."""
    context = make(held_out=[], settings={"save_at_steps": (2, 7)})
    run(context)

    (warning,) = context.reporter.warnings
    assert "no checkpoint of step 7" in warning
    assert "has 6 steps" in warning


@pytest.mark.parametrize(
    "cut", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(5, marks=pytest.mark.slow)]
)
def test_a_run_resumed_from_a_checkpoint_reaches_the_same_bits(make, cut):
    settings = {"epochs": 2, "batch_size": 8, "eval_every": 2}
    straight = make(settings=settings)
    run(straight)
    first = make(settings=settings, stop_after=cut)
    run(first)
    assert not first.checkpoints.final.exists()
    second = make(settings=settings, store=first.checkpoints)
    run(second)

    assert [one["step"] for one in first.reporter.steps] == list(range(1, cut + 1))
    assert [one["step"] for one in second.reporter.steps] == list(range(cut + 1, 7))
    assert [one["loss"] for one in [*first.reporter.steps, *second.reporter.steps]] == [
        one["loss"] for one in straight.reporter.steps
    ]
    assert same_bits(straight.checkpoints.final, second.checkpoints.final)
    assert straight.reporter.logs[-1] == second.reporter.logs[-1]


def test_a_run_that_goes_on_with_another_torch_says_that_its_bits_will_differ(make):
    first = make(held_out=[], stop_after=2)
    run(first)
    path = first.checkpoints.newest().folder / "state" / "machine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch": "1.0"}))
    second = make(held_out=[], store=first.checkpoints)
    run(second)

    (warning,) = second.reporter.warnings
    assert warning.startswith("this resume is not bit-exact, because torch was 1.0 and is ")
    assert second.checkpoints.final.exists()


def test_a_resumed_run_restores_every_random_generator(make):
    settings = {"max_steps": 3}
    straight = make(settings=settings, held_out=[], reporter=Drawing())
    first = make(settings=settings, held_out=[], reporter=Drawing(), stop_after=2)
    second = make(settings=settings, held_out=[], reporter=Drawing(), store=first.checkpoints)
    for context in (straight, first, second):
        run(context)

    assert first.reporter.drawn + second.reporter.drawn == straight.reporter.drawn
    assert len(set(straight.reporter.drawn)) == 3


@attrs.define
class Drawing(Reports):
    """Draws from every global generator at each step, as dropout would."""

    drawn: list[tuple[float, ...]] = attrs.field(factory=list)

    def metrics(self, step, total, **values):
        super().metrics(step, total, **values)
        numpy = np.random.rand()  # noqa: NPY002 - the global generator is meant
        self.drawn.append((random.random(), numpy, float(torch.rand(1))))


def test_state_needs_no_pickled_code(make):
    context = make(held_out=[])
    run(context)
    state = context.checkpoints.newest().folder / "state"

    assert {path.name for path in state.iterdir()} == {
        *("optimizer.pt", "scheduler.pt", "rng.pt", "trainer_state.json", "machine.json")
    }
    for path in state.glob("*.pt"):
        torch.load(path, weights_only=True)


def test_a_run_cut_off_after_its_last_checkpoint_only_saves_its_adapter(make):
    context = make(held_out=[])
    run(context)
    store = Checkpoints(context.checkpoints.root, context.checkpoints.saved)
    context.checkpoints.final.rename(store.root / "lost")
    again = make(held_out=[], store=store)
    run(again)

    assert again.reporter.steps == []
    assert same_bits(store.final, store.root / "lost")


def test_a_stop_at_the_last_step_ends_the_run(make):
    context = make(held_out=[], settings={"max_steps": 2}, stop_after=2)
    run(context)

    assert context.checkpoints.final.exists()


def test_training_starts_from_an_adapter(make):
    first = make(held_out=[])
    run(first)
    second = make(
        held_out=[],
        init_adapter=first.checkpoints.final,
        settings={"max_steps": 1, "learning_rate": 1e-9},
    )
    run(second)
    before, after = weights(first.checkpoints.final), weights(second.checkpoints.final)

    assert second.reporter.steps[0]["loss"] < first.reporter.steps[0]["loss"]
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 8, "lora_alpha": 16.0}, {"target_modules": ("q_proj",)}]
)
def test_an_adapter_of_another_shape_is_refused(make, changes):
    first = make(held_out=[], settings={"max_steps": 1})
    run(first)

    with pytest.raises(SpecError, match=r"train.init_from_adapter: the adapter in .* does not fit"):
        run(make(init_adapter=first.checkpoints.final, settings=changes))


def test_target_modules_can_be_named_and_must_exist(make):
    context = make(held_out=[], settings={"max_steps": 1, "target_modules": ("q_proj", "v_proj")})
    run(context)

    assert {name.split(".")[-3] for name in weights(context.checkpoints.final)} == {
        "q_proj",
        "v_proj",
    }
    with pytest.raises(SpecError, match=r"train.target_modules: .*no_such"):
        run(make(settings={"target_modules": ("no_such",)}))


def test_rows_that_are_too_long_are_left_out_and_counted(make):
    long = {**row(0), "target": [{"role": "assistant", "content": "x" * 200}]}
    context = make(rows=[row(1), long, row(2)], held_out=[], settings={"max_length": 100})
    run(context)

    (warning,) = context.reporter.warnings
    assert "1 of 3 rows are longer than max_length = 100 tokens" in warning
    assert "the longest has 2" in warning
    assert len(context.reporter.steps) == 1


def test_a_row_as_long_as_max_length_is_kept(make):
    from transformers import AutoTokenizer

    from flash.training.rows import render_tasks

    context = make(rows=[row(1)], held_out=[])
    tokenizer = AutoTokenizer.from_pretrained(context.model)
    tasks = context.environment.tasks("train")
    ((rendered,),) = render_tasks(context.environment, tasks, renderer(tokenizer))
    length = len(rendered.document.tokens)
    run(make(rows=[row(1)], held_out=[], settings={"max_length": length}))

    with pytest.raises(TrainingDataError, match=f"the shortest has {length}"):
        run(make(rows=[row(1)], held_out=[], settings={"max_length": length - 1}))


def test_max_examples_draws_rows_by_the_seed(make):
    runs = [make(held_out=[], settings={"max_examples": 8}, seed=seed) for seed in (3, 3, 4)]
    for context in runs:
        run(context)

    assert [len(context.reporter.steps) for context in runs] == [2, 2, 2]
    assert same_bits(runs[0].checkpoints.final, runs[1].checkpoints.final)
    assert not same_bits(runs[0].checkpoints.final, runs[2].checkpoints.final)


def test_rows_without_target_are_refused_by_name(make):
    rows = [row(0), *({**row(1), "target": target} for target in (None, [], BLANK))]

    with pytest.raises(TrainingDataError, match="3 of 4 rows have no target to learn: train-1, t"):
        run(make(rows=rows))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_END, "never trained"),
        (PROMPT_LEFT_OUT, "every token"),
    ],
)
def test_a_template_that_trains_the_wrong_tokens_is_refused(
    make, tiny, tmp_path, template, message
):

    folder = shutil.copytree(tiny, tmp_path / "odd")
    (folder / "chat_template.jinja").write_text(template)
    context = make()
    context.model = folder

    with pytest.raises(TrainingDataError, match=message):
        run(context)
    assert context.reporter.steps == []


def test_a_loss_that_is_not_finite_ends_the_run(make):
    context = make(held_out=[], settings={"learning_rate": 0.999, "epochs": 2})
    first = make(held_out=[], settings={"max_steps": 1})
    run(first)
    path = first.checkpoints.final / "adapter_model.safetensors"
    save_file({k: v * float("nan") for k, v in weights(first.checkpoints.final).items()}, path)
    context.init_adapter = first.checkpoints.final

    with pytest.raises(FlashError, match="the loss is nan at step 1"):
        run(context)


def test_several_turns_and_tools_are_trained(make):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    target = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    rows = [{**row(n), "target": target, "tools": tools} for n in range(4)]
    context = make(rows=rows, held_out=[], settings={"epochs": 30, "learning_rate": 3e-2})
    run(context)

    assert context.reporter.steps[-1]["loss"] < context.reporter.steps[0]["loss"] - 0.2


@pytest.mark.slow
def test_every_saved_adapter_has_the_golden_set_of_its_own_step(make):
    context = make(settings={"save_at_steps": (2, 4)})
    run(context)
    folders = [one.folder / "adapter" for one in context.checkpoints.saved]
    sets = [(folder / NAME).read_bytes() for folder in folders]
    final = context.checkpoints.final / NAME

    assert [one.step for one in context.checkpoints.saved] == [2, 4, 6]
    assert len(set(sets)) == len(sets)
    assert final.read_bytes() == sets[-1]
    golden = GoldenSet.read(context.checkpoints.final)
    texts = [one.messages[0]["content"] for one in golden.prompts]
    assert texts == [row(number)["opening"][0]["content"] for number in range(4)]
    assert not context.reporter.warnings


@pytest.mark.slow
def test_the_final_adapter_has_one_where_a_stop_has_cost_that_of_its_step(make):
    first = make(held_out=[])
    run(first)
    wanted = (first.checkpoints.final / NAME).read_bytes()
    shutil.rmtree(first.checkpoints.final)
    (first.checkpoints.newest().folder / "adapter" / NAME).unlink()

    run(make(held_out=[], store=first.checkpoints))

    assert (first.checkpoints.final / NAME).read_bytes() == wanted
