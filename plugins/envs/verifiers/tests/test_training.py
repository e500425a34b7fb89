"""A verifiers environment is trained on: loaded as a worker loads it, practised for a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from flash_env_verifiers.loader import VerifiersLoader

from flash.testing.models import make_tiny_model
from flash.testing.worker import Checkpoints, Context

HERE = Path(__file__).parent / "environments"


@pytest.mark.slow
def test_grpo_practises_on_a_multi_turn_environment(python, tmp_path):
    from flash_algorithm_grpo.config import GrpoConfig
    from flash_algorithm_grpo.train import run

    folder = tmp_path / "talk"
    folder.mkdir()
    (folder / "talk.py").write_text((HERE / "talk.py").read_text())
    (folder / "verifiers.toml").write_text('id = "talk"\n')
    params = {"python": str(python), "splits": {"train": {"limit": 4}, "test": {"skip": 4}}}
    environment = VerifiersLoader(None).load(folder, params=params, split="train")
    context = Context(
        config=GrpoConfig(
            lora_rank=4,
            lora_alpha=8.0,
            learning_rate=1e-2,
            steps=3,
            batch_size=2,
            group_size=4,
            max_tokens=12,
            max_length=256,
            eval_every=3,
        ),
        environment=environment,
        model=make_tiny_model(tmp_path / "model"),
        workdir=tmp_path / "work",
        checkpoints=Checkpoints(tmp_path / "store"),
    )
    try:
        run(context)
    finally:
        environment._process.close()

    steps, kept = context.reporter.steps, context.rollouts.by_step
    assert [one["grad_norm"] > 0 for one in steps] == [True, True, True]
    assert [one["unscored"] for one in steps] == [0, 0, 0]
    assert {one["step"] for one in context.reporter.evaluations} == {0, 3}
    episodes = [episode for step in kept.values() for episode in step]
    assert len(episodes) == 24
    assert {(one.turns, one.metrics["turns"]) for one in episodes} == {(2, 2.0)}
    assert all(one.messages[2]["content"] == "go on" for one in episodes)
    assert len({one.score for one in episodes}) > 4
    assert (context.checkpoints.final / "adapter_model.safetensors").is_file()
