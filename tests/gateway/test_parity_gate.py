"""The gate around the real embedded backend: what is not what was trained is caught, by name."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from deploy_bench import BASE, QUICK, DeployBench
from safetensors.numpy import load_file, save_file

from flash.adapters import read_adapter
from flash.errors import FlashError
from flash.foreground import call
from flash.gateway.bases import Bases
from flash.home import FlashHome
from flash.parity import Golden, GoldenSet
from flash.plugins import PluginHost
from flash.values import ServedAdapter, ServedBase

pytestmark = pytest.mark.slow  # a real server

ASKED = ("Hello", "What is the capital of France?", "Count to ten.")
TOKENS = 12


class Trained:
    """A tiny base model, two adapters with their golden sets, and a server of the model."""

    def __init__(self, folder, template):
        from flash_serving_transformers import FIELDS
        from flash_serving_transformers.backend import TransformersBackend
        from flash_serving_transformers.config import TransformersConfig

        from flash.testing.served import Reference, make_adapter, make_served_model

        self.folder, self.template, self.fields = folder, template, FIELDS
        self.base = make_served_model(folder / "base")
        as_sure_as_real_ones(self.base)
        self.server = TransformersBackend(TransformersConfig(threads=1))
        log = folder / "log"
        served = ServedBase(id=BASE, folder=self.base, context_tokens=None, max_rank=8, log=log)
        self.address = self.server.start(served)
        self.adapters = {
            name: make_adapter(self.base, folder / name, seed=seed, strength=0.2)
            for seed, name in enumerate(("blue", "red"))
        }
        self.reference = Reference(self.base, self.adapters)
        for name, adapter in self.adapters.items():
            (adapter / "golden.json").write_bytes(golden_set(self.reference, name).to_json())

    def merged(self):
        """Return the log-probabilities of a model with the blue adapter in its bfloat16 weights."""
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.base)
        merged = PeftModel.from_pretrained(model, self.adapters["blue"]).merge_and_unload()
        merged.to(torch.bfloat16).float()

        def log_probs(prompt, completion):
            with torch.inference_mode():
                found = merged(torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
            return [float(found[len(prompt) - 1 + at, one]) for at, one in enumerate(completion)]

        return log_probs

    def changed(self, change):
        """Return a copy of the blue adapter whose tensors `change` has its way with."""
        folder = self.folder / change.__name__
        shutil.copytree(self.adapters["blue"], folder)
        tensors, config = load_file(folder / "adapter_model.safetensors"), folder / CONFIG
        said = json.loads(config.read_text())
        save_file(change(tensors, said), folder / "adapter_model.safetensors")
        config.write_text(json.dumps(said))
        return folder

    def bench(self, folder, backend):
        """Return a bench whose one backend is this one."""
        return DeployBench(
            folder, self.template, QUICK, base=self.base, backend=backend, fields=self.fields
        )

    def deployed(self, folder, backend, name="blue"):
        """Return the row once the deploy has come to its end."""
        bench = self.bench(folder, backend)
        bench.deploy(f"{name}-1", adapter=self.adapters[name])
        bench.steps(bench.server())
        row = bench.deployments.get(f"{name}-1")
        bench.close()
        return row


CONFIG = "adapter_config.json"


def as_sure_as_real_ones(base):
    """Give the model logits as large as those of real models, so that rounding matters as there."""
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] *= 10
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def golden_set(reference, name):
    prompts = []
    for text in ASKED:
        messages = [{"role": "user", "content": text}]
        prompt = reference.prompt(messages, thinking=False)
        completion = reference.greedy(name, prompt, TOKENS)
        prompts.append(
            Golden(
                messages=messages,
                tools=None,
                prompt=prompt,
                completion=completion,
                log_probs=reference.log_probs(name, prompt, completion),
                base_log_probs=reference.log_probs(None, prompt, completion),
            )
        )
    return GoldenSet(thinking=False, stop_sequences=(), dtype="float32", prompts=prompts)


class Shared:
    """The real backend on a server that is there already; tests make it misbehave."""

    def __init__(self, trained):
        self.trained = trained
        self.real = trained.server

    def start(self, base):
        return self.trained.address

    def __getattr__(self, name):
        return getattr(self.real, name)

    def stop(self):
        pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory, template):
    trained = Trained(tmp_path_factory.mktemp("trained"), template)
    yield trained
    trained.server.stop()


@pytest.mark.parametrize("name", ["blue", "red"])
def test_what_was_trained_is_served_and_its_identity_proved(trained, tmp_path, name):
    row = trained.deployed(tmp_path, Shared(trained), name)

    assert (row.state, row.error) == ("ready", None)
    assert row.report["parity"]["proves_identity"]
    assert row.report["parity"]["mean"] < 1e-4
    assert row.report["smoke"] == {"tokens": TOKENS, "compared": TOKENS, "agreeing": TOKENS}


def test_the_gateway_finds_and_checks_what_it_serves_without_what_loads_models(trained, tmp_path):
    home = {"FLASH_HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    asked = [str(trained.base), str(trained.adapters["blue"])]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *asked],
        env=home,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, "1024\n"), done.stderr


WITHOUT_TORCH = """
import sys
from pathlib import Path
import flash.gateway.process
from flash.adapters import check_fits, read_adapter
from flash.gateway.bases import Bases
from flash.home import FlashHome
from flash.plugins import PluginHost
from flash_serving_transformers.backend import TransformersBackend

home = FlashHome.from_environment()
base = Bases(home, PluginHost.default(home), lambda _: None, None).open("hub", sys.argv[1])
check_fits(read_adapter(Path(sys.argv[2])), base.folder)
assert not {"torch", "transformers"} & set(sys.modules)
print(base.context_tokens)
"""


def test_a_base_model_that_is_not_here_is_fetched_by_a_child(trained, tmp_path):
    home = FlashHome(tmp_path)
    bases = Bases(home, PluginHost.default(home), lambda _: None, None)

    with pytest.raises(FlashError, match="there is no such folder"):
        bases.open("hub", str(tmp_path / "none"))
    asked = {"model": {"id": str(trained.base), "plugin": "hub"}}
    assert call("fetch", asked, home=home, secrets={}) == {"folder": str(trained.base)}


class Loading(Shared):
    """Loads another folder than the one that it is told."""

    def __init__(self, trained, folder):
        super().__init__(trained)
        self.folder = folder

    def load(self, adapter):
        rank = read_adapter(self.folder).rank
        self.real.load(ServedAdapter(name=adapter.name, folder=self.folder, rank=rank))


def refused(row):
    """The figures of a deployment that failed because they are over the limit."""
    assert row.state == "failed", row.report
    assert "what is served is not what was trained" in row.error
    parity = row.report["parity"]
    assert not parity["holds"]
    assert not parity["proves_identity"]
    return parity


def test_adapters_come_and_go_on_a_live_server_while_an_answer_streams_on(trained, tmp_path):
    from flash.testing.served import Client

    bench = trained.bench(tmp_path, Shared(trained))
    bench.deploy("blue-1", adapter=trained.adapters["blue"])
    server = bench.server()
    bench.steps(server)
    assert bench.parts.routes.find("blue-1").opens is True
    client = Client(trained.address)
    chunks = client.stream("blue-1", max_tokens=200)
    said = [next(chunks)]
    for number in range(4):
        bench.deploy(f"red-{number}", adapter=trained.adapters["red"])
        bench.steps(server)
        said.append(next(chunks))
        bench.deployments.ask_gone(f"red-{number}")
        bench.steps(server)
        said.append(next(chunks))
    bench.close()

    assert bench.states()["red-3"] == "undeployed"
    said += chunks
    parts = [one["choices"][0]["delta"].get("content") or "" for one in said if one["choices"]]
    assert "".join(parts) == client.chat("blue-1", max_tokens=200).text
    assert said[-1]["usage"]["completion_tokens"] > 100


def test_the_wrong_adapter_is_caught(trained, tmp_path):
    row = trained.deployed(tmp_path, Loading(trained, trained.adapters["red"]))

    parity = refused(row)
    assert parity["mean"] > 100 * parity["limit_mean"]


def test_a_half_loaded_adapter_is_caught(trained, tmp_path):
    def half_loaded(tensors, _):
        return {
            name: np.zeros_like(one) if ".layers.1." in name else one
            for name, one in tensors.items()
        }

    refused(trained.deployed(tmp_path, Loading(trained, trained.changed(half_loaded))))


def test_a_wrong_rank_is_caught(trained, tmp_path):
    def wrong_rank(tensors, config):
        config["lora_alpha"] /= 2  # so that the scale is as it was
        config["r"] //= 2
        return {
            name: np.ascontiguousarray(
                one[: config["r"]] if "lora_A" in name else one[:, : config["r"]]
            )
            for name, one in tensors.items()
        }

    refused(trained.deployed(tmp_path, Loading(trained, trained.changed(wrong_rank))))


def test_a_wrong_scale_is_caught(trained, tmp_path):
    def wrong_scale(tensors, config):
        config["lora_alpha"] *= 1.1
        return tensors

    refused(trained.deployed(tmp_path, Loading(trained, trained.changed(wrong_scale))))


def test_an_adapter_that_is_not_loaded_at_all_is_caught(trained, tmp_path):
    class Ignoring(Shared):
        def load(self, adapter):
            pass

        def tokens(self, model, *arguments, **options):
            return self.real.tokens(BASE, *arguments, **options)

        def log_probs(self, model, *arguments):
            return self.real.log_probs(BASE, *arguments)

    parity = refused(trained.deployed(tmp_path, Ignoring(trained)))
    assert parity["mean"] == pytest.approx(parity["change_mean"], rel=0.01)


def test_a_wrong_chat_template_is_caught(trained, tmp_path):
    class OtherTemplate(Shared):
        def tokens(self, model, messages, **options):
            system = {"role": "system", "content": "You are a helpful assistant."}
            return self.real.tokens(model, [system, *messages], **options)

    row = trained.deployed(tmp_path, OtherTemplate(trained))

    assert row.state == "failed"
    assert "chat template is not that of training" in row.error
    assert row.report["parity"] is None


def test_an_adapter_that_was_merged_in_lower_precision_is_caught(trained, tmp_path):
    merged = trained.merged()

    class Merged(Shared):
        def log_probs(self, model, *arguments):
            return self.real.log_probs(model, *arguments) if model == BASE else merged(*arguments)

    parity = refused(trained.deployed(tmp_path, Merged(trained)))
    assert parity["mean"] < parity["change_mean"]
