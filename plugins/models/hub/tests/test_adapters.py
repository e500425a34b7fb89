"""LoRA adapters of the hub: what is fetched, pinned, kept and refused."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from flash_model_hub import flash_register_models
from flash_model_hub.adapters import MOST_BYTES
from flash_model_hub.source import HubSource

from flash.api import FlashError, HasAdapters, ModelUnavailable, StoreError

ID = "org/lora"
FIRST, SECOND = "1" * 40, "2" * 40
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def hub(serve):
    """A repository with an adapter, and beside it what nobody asked for."""
    files = {
        CONFIG: json.dumps({"peft_type": "LORA"}).encode(),
        WEIGHTS: b"first" * 1000,
        "README.md": b"# LoRA",
        "training_args.bin": b"pickled",
        "checkpoint-5/adapter_model.safetensors": b"older",
    }
    return serve(ID, FIRST, files)


@pytest.fixture
def push(hub):
    """Return a function that makes a new commit the head of `main`."""

    def push(**changes):
        hub.commits[SECOND] = hub.commits[FIRST] | changes
        hub.branches["main"] = SECOND

    return push


@pytest.fixture
def source(hub, tmp_path):
    return HubSource(token="hf_canary", cache=tmp_path / "models", endpoint=hub.url)


@pytest.fixture
def kept(tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


def refused(source, reference, kept):
    with pytest.raises(ModelUnavailable) as caught:
        source.fetch_adapter(reference, kept)
    return caught.value


@pytest.mark.parametrize("reference", [ID, "org/lora@main", "o/n@v1.0", "o/n@refs/pr/1"])
def test_ids_with_and_without_a_revision_are_claimed(reference):
    (record,) = flash_register_models()

    assert record.claims_adapter(reference)


@pytest.mark.parametrize("reference", ["lora", "a/b/c", "org/", "org/x@", "./x/y", "org/x@../y"])
def test_other_words_are_not(reference):
    (record,) = flash_register_models()

    assert not record.claims_adapter(reference)


def test_the_two_files_are_taken_and_nothing_else(source, hub, kept):
    folder, commit = source.fetch_adapter(ID, kept)

    assert isinstance(source, HasAdapters)
    assert (folder, commit) == (kept / "org--lora" / FIRST, FIRST)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS}
    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert set(hub.served) == {CONFIG, WEIGHTS}
    assert {path.name for path in folder.parent.iterdir()} == {FIRST, "lock"}
    assert {authorization for _, authorization in hub.asked} == {"Bearer hf_canary"}


def test_what_was_fetched_once_is_not_downloaded_again(source, hub, kept):
    first = source.fetch_adapter(ID, kept)
    hub.served.clear()

    assert source.fetch_adapter(ID, kept) == first
    assert hub.served == []


def test_a_new_commit_leaves_the_adapter_of_an_earlier_run_as_it_is(source, push, hub, kept):
    before, _ = source.fetch_adapter(ID, kept)
    push(**{WEIGHTS: b"second"})
    after, commit = source.fetch_adapter(ID, kept)

    assert commit == SECOND
    assert (before / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert (after / WEIGHTS).read_bytes() == b"second"


def test_a_revision_names_the_commit(source, push, kept):
    push(**{WEIGHTS: b"second"})

    assert source.fetch_adapter(f"{ID}@{FIRST}", kept)[1] == FIRST
    assert source.fetch_adapter(f"{ID}@main", kept)[1] == SECOND


def test_a_commit_that_is_here_needs_no_network(source, kept):
    folder, commit = source.fetch_adapter(ID, kept)
    cut_off = HubSource(cache=kept, endpoint="http://127.0.0.1:9")

    assert cut_off.fetch_adapter(f"{ID}@{commit}", kept) == (folder, commit)
    error = refused(cut_off, ID, kept)
    assert (
        error.message == "the adapter org/lora cannot be fetched: the network fails: ConnectError"
    )
    assert "hf download org/lora" in error.hint


def test_several_processes_may_ask_at_once(source, hub, kept):
    with ThreadPoolExecutor(4) as pool:
        found = {*pool.map(lambda _: source.fetch_adapter(ID, kept), range(4))}

    assert found == {(kept / "org--lora" / FIRST, FIRST)}
    assert hub.served.count(WEIGHTS) <= 2  # facts and content, once


def test_a_download_that_was_cut_off_is_completed(source, hub, kept):
    partial = kept / "org--lora" / f"{FIRST}.partial"
    partial.mkdir(parents=True)
    (partial / WEIGHTS).write_bytes(b"fir")

    folder, _ = source.fetch_adapter(ID, kept)

    assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_bytes_that_are_not_what_the_hub_says_are_not_kept(source, hub, kept):
    hub.lies[WEIGHTS] = {"lfs": {"sha256": "0" * 64, "size": 5000, "pointerSize": 134}}

    with pytest.raises(FlashError, match=f"{WEIGHTS} of org/lora came damaged"):
        source.fetch_adapter(ID, kept)
    assert [path.name for path in (kept / "org--lora").iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "model.safetensors": b"m"}, "it is a model, not an adapter"),
        ({CONFIG: b"{}", "adapter_model.bin": b"p"}, "its weights are pickled (adapter_model.bin)"),
        ({CONFIG: b"{}"}, f"it has no {WEIGHTS}"),
        ({WEIGHTS: b"w"}, f"it has no {CONFIG}"),
    ],
)
def test_a_repository_without_a_safe_adapter_is_refused_before_any_download(
    source, hub, kept, files, message
):
    hub.commits[FIRST] = files

    assert message in refused(source, ID, kept).message
    assert hub.served == []


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_is_too_large_is_refused_before_any_download(source, hub, kept, name):
    hub.lies[name] = {"size": MOST_BYTES[name] + 1}

    assert f"its {name} has {MOST_BYTES[name] + 1} bytes" in refused(source, ID, kept).message
    assert hub.served == []


def test_a_commit_that_is_no_commit_names_no_folder(source, hub, kept):
    hub.commits["../../x"] = hub.commits[FIRST]
    hub.branches["main"] = "../../x"

    with pytest.raises(FlashError, match="does not say which commit"):
        source.fetch_adapter(ID, kept)
    assert list(kept.iterdir()) == []


def test_unknown_and_gated_adapters_say_what_to_do(source, hub, kept):
    assert "no adapter org/unknown that is" in refused(source, "org/unknown", kept).message
    assert "no such revision" in refused(source, f"{ID}@v9", kept).message
    hub.refusal = (403, "GatedRepo")
    assert "https://huggingface.co/org/lora" in refused(source, ID, kept).hint


def test_a_full_disk_is_found_before_the_download(source, hub, kept, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))

    with pytest.raises(StoreError, match=r"needs 0\.1 GB") as caught:
        source.fetch_adapter(ID, kept)
    assert "FLASH_HOME" in caught.value.hint
    assert hub.served == []
