"""
Models by id and by folder: cache, network, refusals and facts.

The client library is the real one; what stands in for huggingface.co is in `conftest.py`. No test
leaves this machine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from flash_model_hub import flash_register_models
from flash_model_hub.folder import ModelFolder
from flash_model_hub.source import HubSource

from flash.api import FlashError, ModelSource, ModelUnavailable, StoreError
from flash.testing.models import make_tiny_model

SHA = "0123456789abcdef0123456789abcdef01234567"
ID = "org/tiny"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model of random weights, as `save_pretrained` writes it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of it that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "folder")


@pytest.fixture
def cache(folder, tmp_path):
    """A Hugging Face cache with the model in it, laid out as huggingface_hub does."""
    repository = tmp_path / "cache" / "models--org--tiny"
    snapshot = repository / "snapshots" / SHA
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    for path in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(blob)
    return tmp_path / "cache"


@pytest.fixture
def hub(serve, folder):
    return serve(ID, SHA, {path.name: path.read_bytes() for path in folder.iterdir()})


@pytest.fixture
def source(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    return HubSource(token="hf_canary", cache=tmp_path / "empty", endpoint=hub.url)


def unavailable(call, *arguments):
    with pytest.raises(ModelUnavailable) as caught:
        call(*arguments)
    return caught.value


@pytest.mark.parametrize("model", [ID, "Qwen/Qwen3-0.6B", "/data/mine", "./mine", "../m", "~/m"])
def test_ids_and_paths_are_claimed(model):
    (record,) = flash_register_models()

    assert record.claims(model)


@pytest.mark.parametrize("model", ["gpt2", "a/b/c", "", "org/", "org/../x", "a b/c"])
def test_other_words_are_not(model):
    (record,) = flash_register_models()

    assert not record.claims(model)


def test_the_record_declares_the_token_and_makes_a_source():
    (record,) = flash_register_models()
    asked = []

    class Context:
        @staticmethod
        def secret(name):
            asked.append(name)

    assert isinstance(record.make(Context()), ModelSource)
    assert tuple(asked) == record.secrets == ("HF_TOKEN",)


def test_registering_and_reading_facts_load_no_heavy_library(folder):
    code = (
        "import sys; from flash_model_hub import flash_register_models\n"
        "from flash_model_hub.source import HubSource; flash_register_models()\n"
        f"assert HubSource().card({str(folder)!r}) and HubSource().on_disk({str(folder)!r})\n"
        "print(sorted({'torch', 'transformers', 'requests', 'httpx2'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_local_folder_is_used_where_it_is(folder):
    source = HubSource()

    assert source.on_disk(str(folder)) == folder
    assert source.fetch(str(folder), print) == folder


def test_a_cached_model_needs_no_network(cache):
    source = HubSource(cache=cache, endpoint="http://127.0.0.1:9")
    path = source.fetch(ID, pytest.fail)

    assert path == source.on_disk(ID) == cache / "models--org--tiny" / "snapshots" / SHA
    assert source.downloaded() == [ID]


def test_the_facts_come_from_the_files(cache):
    card = HubSource(cache=cache).card(ID)

    assert (card.id, card.layers, card.hidden_size, card.intermediate_size) == (ID, 2, 32, 64)
    assert (card.context_tokens, card.summary) == (512, "llama")
    assert (card.thinking, card.licence) == ("none", "unknown")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_parameters_are_counted_and_before_that_estimated_closely(tmp_path, architecture):
    from transformers import AutoModelForCausalLM

    path = make_tiny_model(tmp_path, architecture=architecture)
    exact = AutoModelForCausalLM.from_pretrained(path).num_parameters()
    counted = HubSource().card(str(path)).parameters
    (path / "model.safetensors").unlink()
    estimated = HubSource().card(str(path)).parameters

    assert counted == exact
    assert estimated == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("template", "thinking"),
    [("{% if enable_thinking %}<think>{% endif %}", "hybrid"), ("<think>\n", "always")],
)
def test_thinking_is_read_off_the_chat_template(folder, template, thinking):
    (folder / "chat_template.jinja").write_text(template)

    assert HubSource().card(str(folder)).thinking == thinking


def test_the_licence_is_read_off_the_page(folder):
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\nlicense: no\n")

    assert HubSource().card(str(folder)).licence == "apache-2.0"


def test_sizes_of_a_multimodal_model_are_those_of_its_text_part(folder):
    config = json.loads((folder / "config.json").read_text())
    wrapped = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 9}}
    (folder / "config.json").write_text(json.dumps(wrapped))

    assert HubSource().card(str(folder)).hidden_size == 32


def test_sharded_weights_are_whole_when_every_shard_is(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    source = HubSource()

    assert len(shards) > 1
    assert source.on_disk(str(folder)) == folder
    assert source.card(str(folder)).parameters == model.num_parameters()
    shards[0].unlink()
    assert source.on_disk(str(folder)) is None
    assert "1 of its" in unavailable(source.fetch, str(folder), print).message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "it has no config.json"),
        (lambda f: (f / "model.safetensors").unlink(), "it has no model.safetensors"),
        (lambda f: (f / "tokenizer.json").unlink(), "it has no tokenizer"),
        (lambda f: (f / "model.safetensors").write_bytes(b"<html>"), "cut short or damaged"),
        (lambda f: (f / "model.safetensors").open("r+b").truncate(9999), "cut short or damaged"),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "its weights are pickled (pytorch_model.bin)",
        ),
        (lambda f: (f / "model.safetensors").rename(f / "q.gguf"), "its weights are GGUF"),
    ],
)
def test_a_folder_that_cannot_be_loaded_is_refused_with_the_reason(folder, damage, message):
    damage(folder)

    assert HubSource().on_disk(str(folder)) is None
    assert message in unavailable(HubSource().fetch, str(folder), print).message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"model_type": "llama", "text_config": 3}', "does not say hidden_size"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(folder, config, message):
    (folder / "config.json").write_text(config)

    assert message in unavailable(HubSource().card, str(folder)).message


def test_a_folder_that_does_not_exist(tmp_path):
    assert (
        "there is no such folder"
        in unavailable(HubSource().fetch, str(tmp_path / "x"), print).message
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "theirs", "auto_map": {"AutoModel": "m.M"}}, "code from its own reposit"),
        ({"model_type": "theirs"}, 'is a "theirs", which transformers'),
        ({"model_type": "t5"}, "not a causal language model"),
        ({"quantization_config": {"quant_method": "awq"}}, "is stored quantised (awq)"),
    ],
)
def test_what_transformers_cannot_load_by_itself_is_refused(folder, change, message):
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))

    assert message in unavailable(HubSource().fetch, str(folder), print).message


def test_quantised_weights_are_refused_before_anything_is_planned_or_downloaded(source, hub):
    config = json.loads(hub.files["config.json"]) | {"quantization_config": {"bits": 4}}
    hub.files["config.json"] = json.dumps(config).encode()

    assert "is stored quantised" in unavailable(source.look_up, ID).message
    assert "is stored quantised" in unavailable(source.fetch, ID, print).message
    assert not any(name.endswith(".safetensors") for name in hub.served)


def test_remote_code_beside_a_native_class_is_not_needed_and_not_run(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text("raise SystemExit")

    assert HubSource().fetch(str(folder), print) == folder


def test_a_download_takes_what_loading_needs_and_no_more(source, hub):
    extra = {"pytorch_model.bin": b"p", "onnx/model.onnx": b"o", "onnx/a.json": b"{}", "m.py": b""}
    hub.files |= extra | {"consolidated.safetensors": b"c"}
    reports = []
    path = source.fetch(ID, reports.append)

    assert {item.name for item in path.iterdir()} == set(hub.files) - extra.keys() - {
        "consolidated.safetensors"
    }
    assert not set(hub.served) & extra.keys()
    assert reports == ["downloading org/tiny (0.0 GB)"]
    assert source.on_disk(ID) == path
    assert source.downloaded() == [ID]


def test_the_token_goes_to_the_hub_only_as_a_header(source, hub, capfd):
    reports = []
    source.fetch(ID, reports.append)

    assert {authorization for _, authorization in hub.asked} == {"Bearer hf_canary"}
    assert not any("hf_canary" in path for path, _ in hub.asked)
    assert "hf_canary" not in "".join([*reports, *capfd.readouterr()])


def test_a_cached_copy_is_not_refreshed(source, hub):
    path = source.fetch(ID, print)
    hub.asked.clear()

    assert source.fetch(ID, print) == path
    assert hub.asked == []


def test_a_download_that_was_cut_off_is_completed(source, hub):
    path = source.fetch(ID, print)
    (path / "model.safetensors").unlink()

    assert source.on_disk(ID) is None
    assert source.fetch(ID, print) == path
    assert ModelFolder(path, ID).missing() is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"p"}, "its weights are pickled"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"a"}, "it is an adapter"),
        ({"q4.gguf": b"g"}, "its weights are GGUF"),
        ({"train.csv": b""}, "it has no model.safetensors"),
    ],
)
def test_a_repository_without_safe_weights_is_refused_before_any_download(
    source, hub, files, message
):
    hub.commits[SHA] = {"config.json": hub.files["config.json"], **files}

    assert message in unavailable(source.fetch, ID, print).message
    assert hub.served == []


def test_foreign_code_is_refused_before_the_weights_are_downloaded(source, hub):
    hub.files["config.json"] = b'{"model_type": "theirs", "auto_map": {}}'

    assert "code from its own repository" in unavailable(source.fetch, ID, print).message
    assert set(hub.served) == {"config.json"}


def test_looking_up_a_model_downloads_its_facts_and_no_weights(source, hub):
    assert source.card(ID) is None
    card = source.look_up(ID)

    assert (card.hidden_size, card.parameters) == (32, 777)
    assert set(hub.served) <= {"config.json", "tokenizer_config.json", "chat_template.jinja"}
    assert source.card(ID).hidden_size == 32
    assert source.on_disk(ID) is None


def test_looking_up_what_is_here_asks_nobody(cache):
    source = HubSource(cache=cache, endpoint="http://127.0.0.1:9")

    assert source.look_up(ID) == source.card(ID)


def test_looking_up_refuses_what_could_not_be_loaded(source, hub, tmp_path):
    hub.files["config.json"] = b'{"model_type": "theirs", "auto_map": {}}'

    assert "code from its own repository" in unavailable(source.look_up, ID).message
    assert "no model org/unknown" in unavailable(source.look_up, "org/unknown").message
    assert "no config.json" in unavailable(source.look_up, str(tmp_path)).message


def test_an_unknown_id(source):
    error = unavailable(source.fetch, "org/unknown", print)

    assert "no model org/unknown" in error.message
    assert "HF_TOKEN" in error.hint
    assert source.card("org/unknown") is None


def test_a_gated_model_says_where_to_accept(source, hub):
    hub.refusal = (403, "GatedRepo")
    error = unavailable(source.fetch, ID, print)

    assert "is gated" in error.message
    assert "https://huggingface.co/org/tiny" in error.hint


def test_an_outage_of_the_hub_is_not_the_users_mistake(source, hub):
    hub.refusal = (500, None)

    with pytest.raises(FlashError, match="HTTP 500") as caught:
        source.fetch(ID, print)
    assert not isinstance(caught.value, ModelUnavailable)


def test_without_network_the_error_says_what_to_do(tmp_path):
    source = HubSource(cache=tmp_path, endpoint="http://127.0.0.1:9")
    error = unavailable(source.fetch, ID, print)

    assert "not in the Hugging Face cache" in error.message
    assert "hf download org/tiny" in error.hint


def test_switched_offline_nothing_is_asked(hub, tmp_path):
    code = (
        "import sys; from pathlib import Path; from flash_model_hub.source import HubSource\n"
        f"HubSource(cache=Path({str(tmp_path)!r}), endpoint={hub.url!r}).fetch({ID!r}, print)"
    )
    environ = {"HF_HUB_OFFLINE": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environ, check=False
    )

    assert "the network is switched off (HF_HUB_OFFLINE)" in done.stderr
    assert hub.asked == []


def test_a_full_disk_is_found_before_the_download(source, hub, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))

    with pytest.raises(StoreError, match=r"needs 0\.1 GB"):
        source.fetch(ID, print)
