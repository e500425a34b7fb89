"""Layers: who wins, where each value came from, and files that cannot be read."""

import os

import attrs
import pytest

from flash.spec import resolve
from flash.spec.layers import Layer

MINIMAL = 'model = "org/tiny"\nenvironment.path = "."\n'


def errors(resolved):
    return [str(problem) for problem in resolved.problems if problem.severity == "error"]


def test_later_layers_win_and_every_value_knows_its_layer(resolve_text):
    resolved = resolve_text(
        MINIMAL + "[train]\nbatch_size = 2\nmax_length = 20\nlora_rank = 2\n",
        flash="seed = 1\n[train]\nbatch_size = 1\nepochs = 1\n",
        first="[train]\nmax_length = 30\nlora_rank = 3\n",
        second="[train]\nlora_rank = 4\n",
        overlays=["first", "second"],
        sets=["train.target_modules=q_proj"],
    )

    train = resolved.spec.train
    assert (resolved.spec.seed, train.epochs) == (1, 1.0)
    assert (train.batch_size, train.max_length, train.lora_rank) == (2, 30, 4)
    assert {
        path: resolved.sources[path]
        for path in ("seed", "train.epochs", "train.batch_size", "train.max_length")
    } == {
        "seed": "flash.toml",
        "train.epochs": "flash.toml",
        "train.batch_size": "run.toml",
        "train.max_length": "first.toml",
    }
    assert resolved.sources["train.lora_rank"] == "second.toml"
    assert resolved.sources["train.target_modules"] == "--set"
    assert resolved.sources["train.save_at_steps"] == "default"
    assert resolved.sources["algorithm"] == "default"


def test_the_nearest_project_file_above_is_used_and_no_other(host, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "flash.toml").write_text("seed = 1\n")
    (tmp_path / "a" / "flash.toml").write_text("seed = 2\n")
    config = tmp_path / "a" / "b" / "run.toml"
    config.write_text(MINIMAL)

    assert resolve(config, host=host).spec.seed == 2


def test_a_config_that_is_itself_called_flash_toml_is_no_layer_below_itself(host, tmp_path):
    config = tmp_path / "flash.toml"
    config.write_text(MINIMAL + "seed = 5\n")

    resolved = resolve(config, host=host)

    assert resolved.sources["seed"] == "flash.toml"
    assert len(resolved.folders) == 1


def test_the_users_own_layer_is_below_every_other_and_known_by_its_file(host, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(MINIMAL + "[budget]\nmax_hours = 2\n")
    own = Layer("/home/config.toml", tmp_path, {"budget": {"max_hours": 12, "max_usd": 20}})

    resolved = resolve(config, defaults=own, host=host)

    budget = resolved.spec.budget
    assert (budget.max_hours, budget.max_usd, budget.warn_at) == (2, 20, 0.8)
    assert {name: resolved.sources[f"budget.{name}"] for name in attrs.asdict(budget)} == {
        "max_hours": "run.toml",
        "max_usd": "/home/config.toml",
        "warn_at": "default",
    }


def test_tables_merge_deeply_and_arrays_replace(resolve_text):
    resolved = resolve_text(
        MINIMAL + "[environment.params]\na = { x = 1 }\nlist = [1, 2]\n[provider.cloud]\n",
        over="[environment.params]\na = { y = 2 }\nlist = [3]\n[provider.local]\n",
        overlays=["over"],
    )

    assert resolved.spec.environment.params == {"a": {"x": 1, "y": 2}, "list": [3]}
    assert list(resolved.spec.provider) == ["cloud", "local"]
    assert resolved.sources["environment.params.a.x"] == "run.toml"
    assert resolved.sources["environment.params.a.y"] == "over.toml"


def test_a_layer_that_says_where_the_environment_is_replaces_what_lower_ones_say(resolve_text):
    resolved = resolve_text(
        'model = "org/tiny"\nenvironment.path = "here"\n',
        flash='environment = { id = "org/name", split = "small" }\n',
    )

    assert (resolved.spec.environment.id, resolved.spec.environment.path) == (None, "here")
    assert resolved.spec.environment.split == "small"


def test_relative_paths_start_at_the_layer_that_says_them(host, tmp_path, monkeypatch):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "configs").mkdir(parents=True)
    elsewhere.mkdir()
    (project / "flash.toml").write_text('environment.path = "env"\n')
    config = project / "configs" / "run.toml"
    config.write_text('model = "org/tiny"\n')
    monkeypatch.chdir(elsewhere)

    from_project = resolve(config, host=host)
    from_set = resolve(config, sets=["environment.path=env"], host=host)

    assert from_project.base_of("environment.path") == project
    assert from_set.base_of("environment.path") == elsewhere
    assert from_project.base == config.parent


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("seed=7", 7),
        ("seed = 7 ", 7),
        ("seed=0x10", 16),
        ("seed=7.0", 7),
    ],
)
def test_set_reads_its_value_as_toml(resolve_text, text, value):
    assert resolve_text(MINIMAL, sets=[text]).spec.seed == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("bare words", "bare words"),
        ("", ""),
        ("a=b", "a=b"),
        ('"quoted"', "quoted"),
        ("1\nmodel=1", "1\nmodel=1"),
        ("[1, 'x']", [1, "x"]),
        ("{a = 1}", {"a": 1}),
        ("true", True),
        ("1e-4", 1e-4),
    ],
)
def test_set_takes_bare_words_as_text(resolve_text, written, value):
    resolved = resolve_text(MINIMAL, sets=[f"environment.params.x={written}"])

    assert resolved.spec.environment.params == {"x": value}


def test_set_takes_quoted_keys(resolve_text):
    resolved = resolve_text(MINIMAL, sets=['environment.params."a.b".c=1'])

    assert resolved.spec.environment.params == {"a.b": {"c": 1}}
    assert resolved.sources['environment.params."a.b".c'] == "--set"


@pytest.mark.parametrize("text", ["", "seed", "=1", "a..b=1", "a b=1", "x\ny=1", "[a]=1"])
def test_set_that_is_no_assignment_is_a_problem_that_does_not_echo_it(resolve_text, text):
    resolved = resolve_text(MINIMAL, sets=[text])

    assert errors(resolved) == ["--set: is not of the form key=value; write --set train.epochs=3"]


def test_set_below_a_single_value_is_a_problem(resolve_text):
    resolved = resolve_text(MINIMAL, sets=["model.name=x", "train.epochs=1", "train.epochs.x=1"])

    assert errors(resolved) == [
        "model: is a single value, so --set cannot set a key below it",
        "train.epochs: is a single value, so --set cannot set a key below it",
    ]


def test_a_problem_names_the_layer_where_that_is_not_the_config(resolve_text):
    resolved = resolve_text(
        MINIMAL + "seed = -1\n",
        over="[train]\nepochs = 0\n[zoo.cage]\nsize = 1\n",
        overlays=["over"],
        sets=["sink.wandb.run_name=5", "train.lora_rnk=5"],
    )

    assert errors(resolved)[:3] == [
        "seed: must be at least 0, got -1",
        (
            "sink.wandb.run_name: expected a string, got an integer 5; "
            "quote it: --set 'sink.wandb.run_name=\"…\"' (set by --set)"
        ),
        "train.epochs: must be greater than 0, got 0.0 (set by over.toml)",
    ]
    assert errors(resolved)[3].startswith(
        'train.lora_rnk: unknown key; did you mean "lora_rank"? allowed: '
    )
    assert errors(resolved)[3].endswith(" (set by --set)")
    assert errors(resolved)[4].startswith("zoo: unknown key; allowed: ")
    assert errors(resolved)[4].endswith(" (set by over.toml)")


def test_old_spellings_are_taken_with_one_notice_each(resolve_text):
    resolved = resolve_text(
        MINIMAL + "train.max_context_tokens = 64\n",
        over="[train]\nmax_length = 128\n",
        overlays=["over"],
    )

    assert resolved.spec.train.max_length == 128
    assert [(p.severity, str(p)) for p in resolved.problems] == [
        (
            "warning",
            "train.max_context_tokens: is the old spelling of `max_length`; write max_length",
        )
    ]


def test_short_tables_are_the_sinks_own(resolve_text):
    resolved = resolve_text(
        MINIMAL + '[wandb]\nproject = "p"\n',
        over='[sink.wandb]\nrun_name = "r"\n',
        overlays=["over"],
    )

    assert (resolved.spec.sink["wandb"].project, resolved.spec.sink["wandb"].run_name) == ("p", "r")
    assert resolved.sources["sink.wandb.project"] == "run.toml"
    assert resolved.problems == []


def test_windows_line_ends_and_a_byte_order_mark_are_fine(resolve_text):
    text = b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode()

    assert resolve_text(text).spec.model == "org/tiny"


UNREADABLE = {
    "latin-1": (b'model = "a"\nx = "\xe9"\n', "is not UTF-8: byte 17 (line 2); save it as UTF-8"),
    "utf-16": ('model = "a"'.encode("utf-16"), "is not UTF-8: byte 0 (line 1); it looks like UTF"),
    "syntax": (b'model = "a"\n[environment\n', "line 2, column 13: not valid TOML: "),
    "twice": (b'model = "a"\nmodel = "b"\n', "line 2, column 12: not valid TOML: "),
    "lone surrogate": (b'model = "\\uD800"\n', "not valid TOML"),
    "endless number": (b"seed = " + b"9" * 10_000 + b"\n", "Exceeds the limit"),
    "endless nesting": (b"x = " + b"[" * 100_000, "nested more than"),
    "endless key": (b".".join([b"a"] * 100_000) + b" = 1\n", "more than the allowed"),
    "10 MB": (b"# " + b"x" * 10_000_000 + b"\n", "is larger than 1 MiB"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(resolve_text, name):
    content, expected = UNREADABLE[name]

    resolved = resolve_text(content)

    assert resolved.spec is None
    (problem,) = resolved.problems
    assert problem.path.endswith("project/run.toml")
    assert expected in str(problem)


def test_a_missing_file_says_which_one_was_meant(host, tmp_path):
    (tmp_path / "sft.toml").write_text(MINIMAL)

    (problem,) = resolve(tmp_path / "sfft.toml", host=host).problems

    assert str(problem) == f'{tmp_path}/sfft.toml: no such file; did you mean "sft.toml"?'


def test_a_folder_a_pipe_and_a_device_are_not_read(host, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    said = [str(resolve(path, host=host).problems[0]) for path in (tmp_path, pipe)]

    assert said == [f"{tmp_path}: is a folder, not a file", f"{pipe}: is not a file"]


def test_a_folder_name_without_end_is_a_problem_of_the_config(host, tmp_path):
    (problem,) = resolve(tmp_path / ("x" * 300) / "run.toml", host=host).problems

    assert problem.message == "cannot be read: File name too long"


def test_every_unreadable_file_and_option_is_reported(resolve_text):
    resolved = resolve_text("x =\n", over="y =\n", overlays=["over", "missing"], sets=["z"])

    assert [problem.path.rpartition("/")[2] for problem in resolved.problems] == [
        "run.toml",
        "over.toml",
        "missing.toml",
        "--set",
    ]


def test_thousands_of_unknown_keys_are_counted_not_listed(resolve_text):
    keys = "".join(f"key{n} = 1\n" for n in range(20_000))

    said = errors(resolve_text(MINIMAL + "[train]\n" + keys))

    assert len(said) == 21
    assert said[0] == "train: 19980 more unknown keys"
