"""Secrets: which names, where values are found, and that nothing shows them."""

import json
import time
from urllib.parse import quote

import pytest

from flash.errors import SpecError
from flash.spec.credentials import looks_like_secret, looks_random, secret_name
from flash.spec.secrets import Redactor, SecretFinder, values_in_spec
from flash.testing.host import make_host

CANARY = 'kanarie/4711+"geheim" ü'


@pytest.fixture
def places(tmp_path):
    config, cwd = tmp_path / "config", tmp_path / "cwd"
    config.mkdir()
    cwd.mkdir()
    return config, cwd


def finder(places, host, **environ):
    return SecretFinder(host, places, environ)


def test_values_come_from_plugins_then_the_process_then_env_local_then_env(places, host):
    config, cwd = places
    (cwd / ".env").write_text("A=cwd env\nB=cwd env\nC=cwd env\nD=cwd env\nE=cwd env\nF=cwd env\n")
    (config / ".env").write_text("A=env\nB=env\nC=env\nD=env\nE=env\n")
    (cwd / ".env.local").write_text("A=cwd local\nB=cwd local\nC=cwd local\nD=cwd local\n")
    (config / ".env.local").write_text("A=local\nB=local\nC=local\n")
    vault = make_host(flash_find_secret=lambda name: "vault" if name == "A" else None)

    found = finder(places, vault, A="process", B="process")

    assert [found.find(name) for name in "ABCDEFG"] == [
        "vault",
        "process",
        "local",
        "cwd local",
        "env",
        "cwd env",
        None,
    ]


def test_env_files_are_read_as_people_write_them(places, host):
    config, _ = places
    (config / ".env").write_text(
        "# comment\nexport QUOTED=\"a b\"\nSINGLE='$HOME'\nPLAIN=x=y # note\nEMPTY=\n\nNAKED\n"
    )

    found = finder(places, host)

    values = [found.find(name) for name in ("QUOTED", "SINGLE", "PLAIN", "EMPTY", "NAKED")]
    assert values == ["a b", "$HOME", "x=y", None, None]


def test_an_empty_value_counts_as_missing(places, host):
    (places[0] / ".env").write_text("KEY=from-file\n")

    assert finder(places, host, KEY="").find("KEY") == "from-file"


def test_every_missing_secret_is_listed_with_where_it_was_looked_for(places, host):
    with pytest.raises(SpecError) as caught:
        finder(places, host, THERE="x").require(["FIRST", "THERE", "SECOND"], ["OPTIONAL"])

    said = [str(problem) for problem in caught.value.problems]
    assert [line.split(";")[0] for line in said] == [
        "environment.secrets: FIRST has no value",
        "environment.secrets: SECOND has no value",
    ]
    assert str(places[0]) in said[0]
    assert str(places[1]) in said[0]


@pytest.mark.parametrize("value", ["not\udcffutf8", "a\x00b"])
def test_a_value_that_no_worker_could_be_given_is_refused_by_name(places, host, value):
    with pytest.raises(SpecError, match="the value of KEY is not UTF-8 text") as caught:
        finder(places, host, KEY=value).find("KEY")

    assert value not in str(caught.value)


def test_only_what_has_a_value_is_returned(places, host):
    found = finder(places, host, A="1", B="2").require(["A"], ["B", "C"])

    assert found == {"A": "1", "B": "2"}


def test_a_broken_env_file_is_named_and_never_quoted(places, host):
    (places[0] / ".env.local").write_bytes(b"KEY=kanarie\xff\n")

    with pytest.raises(SpecError, match="is not UTF-8") as caught:
        finder(places, host).find("KEY")

    assert "kanarie" not in str(caught.value)
    assert ".env.local" in str(caught.value)


def test_a_value_in_the_spec_is_found_wherever_it_stands():
    spec = {
        "environment": {"params": {"url": f"https://x/?k={CANARY}", "list": [1, CANARY]}},
        "worker_env": {CANARY: "x"},
        "model": "short",
    }

    found = list(values_in_spec(spec, {"KEY": CANARY, "SHORT": "short"}))

    assert [problem.path for problem in found] == [
        "environment.params.url",
        "environment.params.list[1]",
        "worker_env",
    ]
    assert CANARY not in "".join(map(str, found))


@pytest.mark.parametrize(
    "written",
    [
        CANARY,
        json.dumps({"key": CANARY}),
        json.dumps({"key": CANARY}, ensure_ascii=False),
        repr(f"it's {CANARY}"),
        f"https://x/?key={quote(CANARY, safe='')}",
        f"https://x/{quote(CANARY)}",
    ],
)
def test_a_value_is_masked_however_it_is_written(written):
    masked = Redactor([CANARY]).redact(f"before {written} after")

    assert masked.startswith("before ")
    assert masked.endswith(" after")
    assert "***" in masked
    assert "kanarie" not in masked
    assert "geheim" not in masked


def test_each_line_of_a_value_is_masked_the_longest_first_and_short_ones_are_left():
    key = "-----BEGIN KEY-----\nabcdefgh\n-----END KEY-----\n"
    redact = Redactor([key, "abc", "abcdefghij", ""]).redact

    assert redact("line abcdefgh end") == "line *** end"
    assert redact("abcdefghij") == "***"
    assert redact("abc abd") == "abc abd"
    assert Redactor([]).redact("anything") == "anything"


SECRETS = [
    "hf_" + "aB3" * 12,
    "sk-proj-" + "aB3_" * 10,
    "sk-ant-api03-" + "x1Y" * 20,
    "sk-or-v1-" + "0a" * 32,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "11AAAAAAA0" * 5,
    "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "AKIAIOSFODNN7EXAMPLE",
    "AIza" + "a1B2c" * 7,
    "xoxb-1234567890-abcdef",
    "rpa_" + "A1B2" * 10,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abc_DEF-123",
    "-----BEGIN RSA PRIVATE KEY-----",
    "-----BEGIN PRIVATE KEY-----",
    "postgres://user:hunter2@db.example.org/x",
    "Authorization: Bearer hf_" + "aB3" * 12,
]
HARMLESS = [
    "",
    "hf_dataset",
    "org/task-specific-instructions-1-for-the-model",
    "risk-assessment-2024-with-a-long-name",
    "sk-learn-like-name",
    "https://example.org:8080/path@v1",
    "https://example.org/a:b@c",
    "git@github.com:owner/repo.git",
    "AKIA",
    "-----BEGIN CERTIFICATE-----",
    "eyJ",
    "a" * 200,
]


@pytest.mark.parametrize("text", SECRETS)
def test_credentials_of_known_shapes_are_seen(text):
    assert looks_like_secret(text)


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_resembles_a_credential_is_not_seen_as_one(text):
    assert not looks_like_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "p7Xq2VbN9sKd4Rf8Wm3Zt6Yh1Jc5Lg0Qe",
        "Zm9vYmFyMTIzNDU2Nzg5MGFiY2RlZkdISUpLTE1O",
    ],
)
def test_text_as_random_as_a_key_is_seen(text):
    assert looks_random(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8192",
        "true",
        "max_split_size_mb:128,garbage_collection_threshold:0.6",
        "/home/User1/projects/Flash/experiments/run12/output",
        "550e8400-e29b-41d4-a716-446655440000",
        "0123456789abcdef" * 4,
        "AVeryLongNameOfSomeClassInSomeModule2",
        "the quick brown fox jumps over the lazy dog 42",
        "expandable_segments:True",
        "A" * 64,
    ],
)
def test_settings_paths_ids_and_words_are_not_random(text):
    assert not looks_random(text)


@pytest.mark.parametrize(
    "name", ["API_KEY", "openai_api_key", "MY_TOKEN", "DB_PASSWORD", "SSH_KEY", "AWS_SECRET", "PAT"]
)
def test_names_that_announce_a_secret(name):
    assert secret_name(name)


@pytest.mark.parametrize(
    "name", ["SORT_KEY", "RL_MAX_BATCHED_TOKENS", "KEYBOARD", "PATH", "TOKENIZERS_X", "OMP_THREADS"]
)
def test_names_that_do_not(name):
    assert not secret_name(name)


@pytest.mark.parametrize(
    "text",
    ["a" * 10**6, "eyJ" * 300_000, "sk-" * 300_000, "://" * 300_000, "-----BEGIN A " * 80_000],
)
def test_a_hostile_megabyte_is_searched_at_once(text):
    started = time.process_time()
    looks_like_secret(text)

    assert time.process_time() - started < 2.0
