"""Plans: what would run and everything that stands in its way; jobs; what a dry run says."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

from flash.api import (
    AlgorithmPlan,
    AlgorithmPlugin,
    AuthFailed,
    EnvironmentFault,
    EnvironmentPlugin,
    ModelCard,
    ModelPlugin,
    ModelUnavailable,
    Need,
    Offer,
    Problem,
    ProviderCapabilities,
    ProviderPlugin,
    Recipe,
    RewardPlugin,
    SinkPlugin,
    setting,
)
from flash.dry_run import JSON_KEYS, dry_run_json, dry_run_rows
from flash.environments import folder_digest
from flash.errors import SpecError, StoreError, UsageError
from flash.home import FlashHome
from flash.job import Job, make_job, read_job
from flash.plan import make_plan
from flash.spec import resolve, spec_from_dict
from flash.testing.host import make_host

CANARY = "kanarie-4711-geheim"
LORA = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/tiny",
    "r": 8,
    "lora_alpha": 24,
    "target_modules": ["v_proj", "q_proj"],
    "use_rslora": False,
    "rank_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
}


@attrs.frozen(kw_only=True)
class Sft:
    lora_rank: int = setting(32, doc="Rank.", ge=1)
    lora_alpha: int | None = setting(None, doc="Scale.", ge=1, recipe=True)
    learning_rate: float | None = setting(None, doc="Step size.", gt=0, recipe=True)
    batch_size: int = setting(16, doc="Rows a step.", ge=1)
    max_length: int = setting(1024, doc="Tokens a row.", ge=8)
    target_modules: str | tuple[str, ...] = setting("all-linear", doc="What is adapted.")
    init_from_adapter: str | None = setting(None, doc="Where to start.")


@attrs.frozen(kw_only=True)
class NoSettings:
    pass


def recipe(facts):
    size = facts.card.parameters if facts.card else 10**9
    return {
        "lora_alpha": Recipe(2 * facts.train.get("lora_rank", 32), "twice the rank", "the paper"),
        "learning_rate": Recipe(1e-3 if size < 10**9 else 1e-4, "by the model's size", "docs"),
    }


def plan(facts):
    weights = facts.card.parameters / 1e9 if facts.card else 1.0
    need = Need(weights + 1, {"weights": weights, "activations": 1.0}, steps=facts.rows)
    found = [Problem("train.batch_size", "is odd")] if facts.train.batch_size % 2 else []
    return AlgorithmPlan(need=need, problems=found)


class Source:
    def __init__(self, asked):
        self.asked = asked

    def card(self, model):
        return ModelCard(model, 5, 1, 1, 1, 1, 1) if model.startswith("/") else None

    def on_disk(self, model):
        return Path(model) if (Path(model) / "weights.bin").exists() else None

    def look_up(self, model):
        self.asked.append(model)
        if "unknown" in model:
            raise ModelUnavailable(f"there is no {model}", hint="check the spelling")
        return ModelCard(model, 7 * 10**9, 1, 1, 1, 1, 1)

    def fetch_adapter(self, reference, folder):
        self.asked.append(reference)
        if "unknown" in reference:
            raise ModelUnavailable(f"there is no adapter {reference}", hint="check the spelling")
        fetched = folder / "fetched"
        fetched.mkdir()
        (fetched / "adapter_config.json").write_text(json.dumps(LORA))
        (fetched / "adapter_model.safetensors").touch()
        return fetched, "c0ffee"


class Loader:
    def check(self, folder, *, split, params):
        missing = Problem(str(folder), f'there is no split "{split}"')
        return [] if (folder / f"{split}.txt").exists() else [missing]

    def rows(self, folder, *, split, params):
        rows = (folder / f"{split}.txt").read_text().splitlines()
        if "bad" in rows:
            raise EnvironmentFault(f"{split}.txt:{rows.index('bad') + 1}: a bad row")
        return len(rows)

    def fetch(self, reference, destination):
        (destination / "environment.py").touch()
        (destination / "train.txt").write_text("a\n")
        return "commit"


class Place:
    def __init__(self, name, memory_gib, error=None):
        self.name, self.memory_gib, self.error = name, memory_gib, error

    def offers(self, need):
        if self.error:
            raise self.error
        fits = self.memory_gib >= need.memory_gib
        return [Offer(self.name, "cpu", self.memory_gib)] if fits else []


def place(name, memory_gib, *, offline=True, error=None, secrets=()):
    def make(ctx, config):
        for secret in secrets:
            assert ctx.secret(secret) is not None
        return Place(name, memory_gib, error)

    return ProviderPlugin(
        name=name,
        summary=name,
        make=make,
        config=NoSettings,
        capabilities=ProviderCapabilities(offline=offline),
        secrets=secrets,
    )


def algorithm(**changes):
    fields = {
        "name": "sft",
        "summary": "Copies.",
        "config": Sft,
        "recipe": recipe,
        "plan": plan,
        "worker": "copies.train:run",
    }
    return AlgorithmPlugin(**(fields | changes))


class Setup:
    """A project folder, a host of small plugins and a home."""

    def __init__(self, folder):
        self.folder = folder / "project"
        self.home = FlashHome(folder / "home")
        self.asked = []
        self.algorithm = algorithm()
        self.places = [place("local", 16), place("small", 0.5), place("far", 99, offline=False)]
        self.hooks = {}
        (self.folder / "env").mkdir(parents=True)
        (self.folder / "env" / "environment.py").touch()
        self.rows("train", "a", "b", "c")

    def rows(self, split, *rows):
        (self.folder / "env" / f"{split}.txt").write_text("\n".join(rows))

    @property
    def host(self):
        cards = [
            ModelCard("org/tiny", 10**6, 1, 1, 1, 1, 1),
            ModelCard("org/giant", 10**12, 1, 1, 1, 1, 1),
            ModelCard("org/thinker", 10**6, 1, 1, 1, 1, 1, thinking="always"),
        ]
        return make_host(
            self.algorithm,
            ModelPlugin(
                name="zoo", summary="Z", make=lambda ctx: Source(self.asked), cards=tuple(cards)
            ),
            ModelPlugin(
                name="hub",
                summary="H",
                make=lambda ctx: Source(self.asked),
                claims=lambda model: "/" in model,
                claims_adapter=lambda reference: reference.count("/") == 1,
                secrets=("HUB_TOKEN",),
            ),
            EnvironmentPlugin(
                name="plain",
                summary="P",
                detect=lambda folder: (folder / "environment.py").exists(),
                make=lambda ctx: Loader(),
                schemes=("github",),
            ),
            SinkPlugin(
                name="wandb",
                summary="W",
                make=lambda ctx, config: None,
                config=NoSettings,
                secrets=("WANDB_API_KEY",),
            ),
            RewardPlugin(
                name="judge",
                summary="J",
                make=lambda ctx, config: None,
                config=NoSettings,
                secrets=("JUDGE_API_KEY",),
            ),
            *self.places,
            **self.hooks,
        )

    def plan(self, text="", *, model="org/tiny", environment='path = "env"', **more):
        path = self.folder / "run.toml"
        path.write_text(f'model = "{model}"\nenvironment = {{ {environment} }}\n{text}')
        host = self.host
        sets = more.pop("sets", ())
        return make_plan(resolve(path, sets=sets, host=host), host, self.home, **more)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("JUDGE_API_KEY", "WANDB_API_KEY", "HUB_TOKEN", "KEY"):
        monkeypatch.delenv(name, raising=False)
    return Setup(tmp_path)


def said(plan):
    return [str(problem) for problem in plan.problems]


def test_a_plan_decides_everything_and_says_why(setup):
    plan = setup.plan("[train]\nlora_rank = 4\n")

    assert said(plan) == []
    assert plan.check() is plan.spec
    assert plan.spec.train == Sft(lora_rank=4, lora_alpha=8, learning_rate=1e-3)
    assert plan.sources["train.lora_alpha"] == "recipe"
    assert plan.sources["train.lora_rank"] == "run.toml"
    assert plan.sources["train.batch_size"] == "default"
    assert plan.reasons["train.lora_alpha"].reason == "twice the rank"
    assert plan.reasons["train.lora_alpha"].source == "the paper"
    assert (plan.model.plugin, plan.model.card.parameters, plan.rows) == ("zoo", 10**6, 3)
    assert (plan.environment.plugin, plan.environment.folder) == ("plain", setup.folder / "env")
    assert (plan.offer.provider, plan.offer.memory_gib, plan.need.steps) == ("local", 16, 3)


def test_what_the_user_set_stays(setup):
    plan = setup.plan("[train]\nlora_alpha = 5\n")

    assert plan.spec.train.lora_alpha == 5
    assert plan.sources["train.lora_alpha"] == "run.toml"
    assert list(plan.reasons) == ["train.learning_rate"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"learning_rate": Recipe(1, "", "")}, "wrong about lora_alpha"),
        (
            {**{k: Recipe(1, "", "") for k in ("lora_alpha", "learning_rate", "epochs")}},
            "wrong about epochs",
        ),
        (
            {"lora_alpha": Recipe(0, "", ""), "learning_rate": Recipe(1, "", "")},
            "train.lora_alpha: must be at least 1, got 0",
        ),
    ],
)
def test_a_recipe_that_is_wrong_is_the_plugins_fault(setup, answer, expected):
    setup.algorithm = algorithm(recipe=lambda facts: answer)

    plan = setup.plan()

    assert expected in said(plan)[0]
    with pytest.raises(SpecError) as caught:
        plan.check()
    assert caught.value.exit_code == 3


def test_a_plugin_that_raises_is_named_and_the_rest_is_still_checked(setup):
    setup.algorithm = algorithm(plan=lambda facts: 1 / 0)

    plan = setup.plan(environment='path = "nowhere"')

    assert "no such folder" in said(plan)[0]
    assert "train: plugin sft: plan raised ZeroDivisionError" in said(plan)[1]
    assert [problem.fault for problem in plan.problems] == ["spec", "plugin"]


def test_spec_and_plan_problems_come_together_sorted(setup):
    setup.rows("train", "fine", "bad")

    plan = setup.plan(
        "seed = -1\n[train]\nbatch_size = 3\n[provider.small]\n", model="zoo:org/unknown"
    )

    assert plan.spec is None
    assert [problem.path for problem in plan.problems] == ["environment", "model", "seed"]


def test_the_algorithms_own_problems_are_the_plans(setup):
    assert said(setup.plan("[train]\nbatch_size = 3\n")) == ["train.batch_size: is odd"]


class TestModels:
    def test_a_card_comes_before_a_claim_and_a_prefix_before_both(self, setup):
        assert setup.plan().model.plugin == "zoo"
        forced = setup.plan(model="hub:org/tiny")
        assert (forced.model.plugin, forced.model.id) == ("hub", "org/tiny")

    def test_facts_are_looked_up_at_the_submit_and_not_in_a_dry_run(self, setup):
        dry = setup.plan(model="org/other", offline=True)

        assert setup.asked == []
        assert dry.errors == []
        assert [(p.path, p.severity) for p in dry.problems] == [("model", "warning")]
        assert setup.plan(model="org/other").model.card.parameters == 7 * 10**9
        assert setup.asked == ["org/other"]

    def test_a_model_that_nobody_has_is_a_problem(self, setup):
        assert said(setup.plan(model="org/unknown")) == [
            "model: there is no org/unknown; check the spelling"
        ]
        (line,) = said(setup.plan(model="tiny"))
        assert 'unknown model "tiny"' in line
        assert 'to ask a plugin for this id: "hub:tiny" or "zoo:tiny"' in line

    def test_a_folder_starts_at_the_file_that_names_it(self, setup, monkeypatch):
        (setup.folder / "weights").mkdir()
        (setup.folder / "weights" / "weights.bin").touch()

        plan = setup.plan(model="./weights")

        assert said(plan) == []
        assert plan.model.id == str(setup.folder / "weights")
        assert "no such model folder" in said(setup.plan(model="./weihgts"))[0]

    def test_a_folder_that_is_not_a_whole_model_is_a_problem_and_planned_for(self, setup):
        (setup.folder / "weights").mkdir()

        plan = setup.plan(model="./weights")

        assert "weights cannot be loaded: files are missing" in said(plan)[0]
        assert plan.need is not None

    def test_thinking_must_be_what_the_model_can(self, setup):
        assert said(setup.plan("thinking = true\n")) == [
            "thinking: org/tiny has no reasoning mode; leave thinking out"
        ]
        assert said(setup.plan(model="org/thinker")) == [
            "thinking: org/thinker always reasons; set thinking = true"
        ]


class TestEnvironments:
    def test_hub_ids_say_that_there_is_no_hub_yet(self, setup):
        (problem,) = setup.plan(environment='id = "org/name@1"').problems

        assert problem.path == "environment.id"
        assert "there is no hub to ask yet" in problem.message

    def test_what_the_loader_finds_is_the_plans(self, setup):
        plan = setup.plan(environment='path = "env", split = "eval"')

        assert 'there is no split "eval"' in said(plan)[0]
        assert plan.rows is None

    def test_a_row_that_cannot_be_read_is_a_problem(self, setup):
        setup.rows("train", "fine", "bad")

        assert said(setup.plan()) == ["environment: train.txt:2: a bad row"]

    def test_a_remote_one_is_fetched_at_the_submit_and_not_in_a_dry_run(self, setup):
        dry = setup.plan(environment='id = "github:owner/repo"', offline=True)
        plan = setup.plan(environment='id = "github:owner/repo"')

        assert (dry.environment.folder, dry.rows, dry.errors) == (None, None, [])
        assert (plan.environment.revision, plan.rows) == ("commit", 1)


class TestProviders:
    def test_the_first_that_has_room_is_taken(self, setup):
        plan = setup.plan("[provider.small]\n[provider.far]\n[provider.local]\n")

        assert plan.providers == ("small", "far", "local")
        assert plan.offer.provider == "far"

    def test_a_dry_run_asks_only_those_that_need_no_network(self, setup):
        both = setup.plan("[provider.far]\n[provider.local]\n", offline=True)
        assert both.offer.provider == "local"
        far = setup.plan("[provider.far]\n", offline=True)
        assert (far.offer, said(far)) == (None, [])

    def test_a_run_that_fits_nowhere_is_refused_with_the_numbers(self, setup):
        plan = setup.plan("[provider.small]\n[provider.local]\n", model="org/giant")

        assert said(plan) == [
            (
                "train: needs 1001.0 GiB of memory (weights 1000.0, activations 1.0); small offers "
                "0.5 GiB; local offers 16.0 GiB; lower train.max_length or train.batch_size or "
                "train.lora_rank, or choose a smaller model"
            )
        ]

    def test_what_a_provider_answers_is_a_problem(self, setup):
        setup.places = [place("local", 1, error=AuthFailed("wrong key", hint="log in"))]
        assert said(setup.plan()) == ["provider: wrong key; log in"]

        setup.places = [place("local", 1, error=KeyError("x"))]
        (problem,) = setup.plan().problems
        assert problem.fault == "plugin"
        assert "plugin local: offers raised KeyError" in problem.message

    def test_a_provider_gets_its_own_secrets(self, setup, monkeypatch):
        monkeypatch.setenv("CLOUD_KEY", "x")
        setup.places = [place("local", 16, secrets=("CLOUD_KEY",))]

        assert setup.plan().offer.provider == "local"

    def test_without_a_default_provider_the_plan_says_so(self, setup):
        setup.places = []

        (problem,) = setup.plan().problems

        assert problem.path == "provider"
        assert "pip install flash-provider-local" in problem.hint


class TestSecrets:
    TABLE = 'path = "env", secrets = ["KEY", "OTHER"]'

    def test_missing_ones_are_all_listed(self, setup):
        plan = setup.plan(environment=self.TABLE)

        assert [line.partition(";")[0] for line in said(plan)] == [
            "environment.secrets: KEY has no value",
            "environment.secrets: OTHER has no value",
        ]

    def test_a_refused_name_is_not_said_to_miss_a_value_and_none_is_named_twice(self, setup):
        names = '["A B", "X", "X", "path"]'

        plan = setup.plan(environment=f'path = "env", secrets = {names}')

        assert [line.partition(";")[0] for line in said(plan)] == [
            "environment.secrets: X has no value",
            "environment.secrets[0]: must be a name without spaces, commas or NUL",
            "environment.secrets[3]: path is reserved: Flash and the machine use it themselves",
        ]

    def test_names_of_what_is_there_and_no_values_are_in_plan_and_job(self, setup, monkeypatch):
        monkeypatch.setenv("KEY", CANARY)
        (setup.folder / ".env").write_text(f"OTHER={CANARY}\nWANDB_API_KEY={CANARY}\n")
        (setup.folder / "env" / ".env").write_text(f"X={CANARY}")

        monkeypatch.setenv("JUDGE_API_KEY", CANARY)

        rewards = "[reward.judge]\n[reward.environment]\n"
        plan = setup.plan(f"[wandb]\n{rewards}", environment=self.TABLE)
        job = make_job(plan, setup.host, run="0123456ab", digest="sha256:0")

        assert plan.secrets == ("JUDGE_API_KEY", "KEY", "OTHER", "WANDB_API_KEY")
        assert job.secrets == ("JUDGE_API_KEY", "KEY", "OTHER", "WANDB_API_KEY")
        assert job.plugins["reward/judge"] == {"distribution": "flash-kit", "version": "1.0"}
        for surface in (repr(plan), json.dumps(dry_run_json(plan)), job.to_json().decode()):
            assert CANARY not in surface

    def test_a_value_that_stands_in_the_spec_is_refused_by_path(self, setup, monkeypatch):
        monkeypatch.setenv("KEY", CANARY)
        monkeypatch.setenv("OTHER", "something else")

        plan = setup.plan(environment=f'{self.TABLE}, params = {{ url = "x?k={CANARY}" }}')

        (line,) = said(plan)
        assert line.startswith("environment.params.url: contains the value of the secret KEY")
        assert CANARY not in line

    @pytest.mark.parametrize(
        "leak",
        [
            f"model={CANARY}",
            f"model=hub:org/{CANARY}",
            f"algorithm={CANARY}",
            f"environment.path={CANARY}",
            f"environment.split={CANARY}",
            f"environment.params.key={CANARY}",
            f"environment.params.{CANARY}=1",
            f"environment.pip=['{CANARY} x']",
            f"worker_env.A={CANARY}",
            f"train.lora_rank={CANARY}",
            f"train.lora_rank={CANARY}{'x' * 60}",
            f"train.init_from_adapter={CANARY}",
            f"train.{CANARY}=1",
            f"provider.{CANARY}.x=1",
            f"{CANARY}=1",
        ],
    )
    @pytest.mark.parametrize("broken", ["", "seed=-1", "environment.id=5"])
    def test_a_secrets_value_is_shown_by_no_plan_and_looked_up_nowhere(
        self, setup, monkeypatch, leak, broken
    ):
        monkeypatch.setenv("KEY", CANARY + "x" * 60 * leak.endswith("x"))
        table = 'path = "env", secrets = ["KEY"]'

        plan = setup.plan(environment=table, sets=[leak, *filter(None, [broken])])

        assert plan.errors
        with pytest.raises(SpecError) as caught:
            plan.check()
        for surface in (json.dumps(dry_run_json(plan)), str(caught.value), str(setup.asked)):
            assert CANARY[:12] not in surface

    @pytest.mark.parametrize(
        "name", ["model", "algorithm", "environment.path", "environment.split"]
    )
    def test_what_looks_like_a_secret_is_only_said_to_be_one(self, setup, name):
        value = "hf_" + "aB3" * 12

        plan = setup.plan(sets=[f"{name}={value}"])

        (line,) = said(plan)
        assert line.startswith(f"{name}: looks like a secret's value; take it out")
        assert setup.asked == []
        assert value[:12] not in json.dumps(dry_run_json(plan)) + line


class TestWarmStart:
    def adapter(self, setup, name="adapter", **changes):
        folder = setup.folder / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
        (folder / "adapter_model.safetensors").touch()
        return folder

    def test_rank_alpha_and_modules_come_from_the_adapter(self, setup):
        folder = self.adapter(setup)

        plan = setup.plan('[train]\ninit_from_adapter = "adapter"\n')

        assert said(plan) == []
        assert (plan.spec.train.lora_rank, plan.spec.train.lora_alpha) == (8, 24)
        assert plan.spec.train.target_modules == ("q_proj", "v_proj")
        assert plan.sources["train.lora_rank"] == "train.init_from_adapter"
        assert plan.reasons["train.lora_rank"].source == "adapter"
        assert plan.warm_start.folder == folder

    def test_another_base_rank_alpha_or_modules_are_refused(self, setup):
        self.adapter(setup, base_model_name_or_path="org/other")

        plan = setup.plan(
            '[train]\ninit_from_adapter = "./adapter"\nlora_rank = 4\nlora_alpha = 24\n'
            'target_modules = ["q_proj", "k_proj"]\n'
        )

        assert said(plan) == [
            (
                "train.init_from_adapter: ./adapter is an adapter of org/other, not of org/tiny; "
                "an adapter only fits the model it was trained on"
            ),
            (
                "train.lora_rank: is 4, but ./adapter has 8; "
                "leave lora_rank out; it is taken from the adapter"
            ),
            (
                "train.target_modules: is q_proj, k_proj, but ./adapter has q_proj, v_proj; "
                "leave target_modules out; they are taken from the adapter"
            ),
        ]

    @pytest.mark.parametrize("asked", ['["v_proj", "q_proj"]', '"all-linear"'])
    def test_modules_that_may_be_the_adapters_are_left_to_the_worker(self, setup, asked):
        self.adapter(setup)

        plan = setup.plan(f'[train]\ninit_from_adapter = "adapter"\ntarget_modules = {asked}\n')

        assert said(plan) == []

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("use_rslora", True),
            ("alpha_pattern", {"q_proj": 4}),
            ("rank_pattern", {"q_proj": 4}),
            ("use_dora", True),
            ("modules_to_save", ["embed_tokens"]),
            ("bias", "lora_only"),
            ("init_lora_weights", "pissa_niter_4"),
        ],
    )
    def test_an_adapter_of_another_scale_or_kind_is_refused_by_key_and_file(
        self, setup, key, value
    ):
        folder = self.adapter(setup, **{key: value})

        (line,) = said(setup.plan('[train]\ninit_from_adapter = "adapter"\n'))

        assert f"{folder / 'adapter_config.json'}: {key} is {json.dumps(value)}" in line

    def test_an_adapter_without_safetensors_is_refused(self, setup):
        weights = self.adapter(setup) / "adapter_model.safetensors"
        weights.rename(weights.with_name("adapter_model.bin"))

        (line,) = said(setup.plan('[train]\ninit_from_adapter = "adapter"\n'))

        assert "there is no adapter_model.safetensors" in line

    def test_a_home_folder_of_nobody_is_a_problem(self, setup):
        (line,) = said(setup.plan('[train]\ninit_from_adapter = "~nosuchuser/x"\n'))

        assert line.startswith('train.init_from_adapter: the folder "~nosuchuser/x" cannot be')

    def test_a_base_that_is_the_same_folder_fits(self, setup):
        weights = setup.folder / "weights"
        weights.mkdir()
        (weights / "weights.bin").touch()
        self.adapter(setup, base_model_name_or_path=f"{weights}/../weights")

        plan = setup.plan('[train]\ninit_from_adapter = "adapter"\n', model="./weights")

        assert said(plan) == []

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"peft_type": "IA3"}, "describes no LoRA adapter: peft_type is 'IA3'"),
            ({"r": "8"}, "does not say base_model_name_or_path, r and lora_alpha"),
            ({"r": True}, "does not say"),
            ({"base_model_name_or_path": None}, "does not say"),
            ({"target_modules": None}, "does not say target_modules"),
            ({"target_modules": [1]}, "does not say target_modules"),
        ],
    )
    def test_a_damaged_adapter_is_refused(self, setup, changes, expected):
        self.adapter(setup, **changes)

        (line,) = said(setup.plan('[train]\ninit_from_adapter = "adapter"\n'))

        assert line.startswith("train.init_from_adapter: ")
        assert expected in line

    @pytest.mark.parametrize("content", [b"", b"[", b"[" * 100_000, b"\xff", b"[]"])
    def test_an_adapter_whose_config_is_not_one_is_refused(self, setup, content):
        (self.adapter(setup) / "adapter_config.json").write_bytes(content)

        (line,) = said(setup.plan('[train]\ninit_from_adapter = "adapter"\n'))

        assert "adapter_config.json" in line

    def test_a_run_is_asked_for_where_no_folder_is_named(self, setup):
        folder = self.adapter(setup, "elsewhere")
        asked = []

        def find_run(reference):
            asked.append(reference)
            return folder

        plan = setup.plan('[train]\ninit_from_adapter = "0123456ab/step-50"\n', find_run=find_run)

        assert (asked, plan.warm_start.folder) == (["0123456ab/step-50"], folder)

    def test_an_adapter_that_lives_elsewhere_is_fetched_below_the_home_and_pinned(self, setup):
        plan = setup.plan('[train]\ninit_from_adapter = "org/lora@main"\n')

        assert said(plan) == []
        assert setup.asked == ["org/lora@main"]
        assert (plan.spec.train.lora_rank, plan.spec.train.lora_alpha) == (8, 24)
        job = make_job(
            plan, setup.host, run="0123456ab", digest=folder_digest(plan.environment.folder)
        )
        assert job.warm_start == {
            "ref": "org/lora@main",
            "folder": str(setup.home.root / "adapters" / "hub" / "fetched"),
            "revision": "c0ffee",
        }

    def test_one_that_was_fetched_must_fit_as_any_other(self, setup):
        lines = said(setup.plan('[train]\ninit_from_adapter = "org/lora"\n', model="org/giant"))

        assert any("org/lora is an adapter of org/tiny, not of org/giant" in line for line in lines)

    def test_one_that_cannot_be_fetched_is_a_problem(self, setup):
        assert said(setup.plan('[train]\ninit_from_adapter = "org/unknown"\n')) == [
            "train.init_from_adapter: there is no adapter org/unknown; check the spelling"
        ]

    def test_a_dry_run_fetches_no_adapter_and_says_so(self, setup):
        plan = setup.plan('[train]\ninit_from_adapter = "org/lora"\n', offline=True)

        (problem,) = plan.problems
        assert (problem.path, problem.severity) == ("train.init_from_adapter", "warning")
        assert "org/lora is fetched when the run is submitted" in problem.message
        assert (setup.asked, plan.warm_start, plan.errors) == ([], None, [])

    def test_a_folder_comes_before_a_run_and_a_run_before_what_lives_elsewhere(self, setup):
        (setup.folder / "org").mkdir()
        folder = self.adapter(setup, "org/step-1")
        text = '[train]\ninit_from_adapter = "org/step-1"\n'

        assert setup.plan(text).warm_start.folder == folder
        shutil.rmtree(folder)
        assert "no such folder, and no such run" in said(setup.plan(text))[0]
        assert setup.asked == []

    def test_a_run_that_is_not_there_is_a_problem(self, setup):
        def find_run(reference):
            raise UsageError(f'no run "{reference}"')

        text = '[train]\ninit_from_adapter = "0123456ab"\n'
        assert said(setup.plan(text, find_run=find_run)) == [
            'train.init_from_adapter: no run "0123456ab"'
        ]
        assert "names no adapter" in said(setup.plan(text))[0]
        assert "holds no adapter" in said(setup.plan(text.replace("0123456ab", "./env")))[0]


class TestReview:
    def test_policies_add_problems_and_see_the_finished_plan(self, setup):
        seen = []

        def review(plan):
            seen.append((plan.spec.train.learning_rate, plan.offer.provider))
            return [
                Problem("budget.max_hours", "is required here"),
                Problem("seed", "is a nice one", severity="warning"),
            ]

        setup.hooks = {"flash_review_plan": review}
        plan = setup.plan()

        assert seen == [(1e-3, "local")]
        assert said(plan) == ["budget.max_hours: is required here", "seed: is a nice one"]
        with pytest.raises(SpecError, match="is required here") as caught:
            plan.check()
        assert len(caught.value.problems) == 1

    def test_no_policy_is_asked_about_a_spec_that_is_not_whole(self, setup):
        setup.hooks = {"flash_review_plan": lambda plan: plan.spec.model and []}

        assert [p.path for p in setup.plan("seed = -1\n").problems] == ["seed"]


class TestJobs:
    def job(self, setup, text="[wandb]\n", **more):
        plan = setup.plan(text, **more)
        digest = folder_digest(plan.environment.folder)
        return make_job(plan, setup.host, run="0123456ab", digest=digest), plan

    def test_a_job_names_everything_that_takes_part(self, setup):
        job, plan = self.job(setup)

        kit = {"distribution": "flash-kit", "version": "1.0"}
        assert job.plugins == dict.fromkeys(
            ("algorithm/sft", "environment/plain", "model/zoo", "provider/local", "sink/wandb"), kit
        )
        assert job.algorithm == "copies.train:run"
        assert job.environment["digest"].startswith("sha256:")
        assert job.environment["reference"] == "env"
        assert job.model == {"id": "org/tiny", "plugin": "zoo"}
        assert (job.provider, job.sinks, job.steps) == (("local",), ("wandb",), 3)
        assert job.warm_start is None
        assert spec_from_dict(job.spec, setup.host) == plan.spec

    def test_a_job_comes_back_from_its_file(self, setup):
        job, _ = self.job(setup)

        assert Job.from_dict(json.loads(job.to_json())) == job
        assert job.to_json() == self.job(setup)[0].to_json()

    def test_the_order_of_providers_and_tables_survives(self, setup):
        job, _ = self.job(setup, "[provider.small]\n[provider.local]\n[provider.far]\n")

        again = Job.from_dict(json.loads(job.to_json()))
        assert list(again.provider) == list(again.spec["provider"]) == ["small", "local", "far"]

    def test_a_newer_format_is_refused_and_so_is_what_is_unknown_or_missing(self, setup):
        data = json.loads(self.job(setup)[0].to_json())

        with pytest.raises(StoreError, match="written by a newer Flash") as newer:
            Job.from_dict(data | {"format": 3, "flash": "9.9", "whatever": 1})
        with pytest.raises(StoreError, match="whatever: unknown key"):
            Job.from_dict(data | {"whatever": 1})
        with pytest.raises(StoreError, match="run: required"):
            Job.from_dict({key: value for key, value in data.items() if key != "run"})
        assert "9.9" in str(newer.value)

    @pytest.mark.parametrize(
        "edit",
        [
            lambda data: data["spec"].update(seed=4),
            lambda data: data.update(algorithm="mine:run"),
            lambda data: data.pop("digest"),
            lambda data: data.update(digest=3),
        ],
    )
    def test_a_file_that_was_edited_by_hand_is_refused(self, setup, tmp_path, edit):
        path = tmp_path / "job.json"
        path.write_bytes(self.job(setup)[0].to_json())
        assert Job.from_dict(read_job(path)) == self.job(setup)[0]
        data = json.loads(path.read_text())
        edit(data)
        path.write_text(json.dumps(data))

        with pytest.raises(StoreError, match="not what was submitted") as raised:
            read_job(path)

        assert "change the TOML instead" in raised.value.hint

    @pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000, "\0"])
    def test_a_file_that_is_no_job_is_a_sentence(self, tmp_path, content):
        (tmp_path / "job.json").write_text(content)

        with pytest.raises(StoreError, match=r"job\.json is damaged"):
            read_job(tmp_path / "job.json")

    def test_a_job_of_before_digests_is_read(self, setup, tmp_path):
        data = json.loads(self.job(setup)[0].to_json()) | {"format": 1}
        del data["digest"]
        (tmp_path / "job.json").write_text(json.dumps(data))

        assert read_job(tmp_path / "job.json") == data

    def test_a_plan_with_errors_makes_no_job(self, setup):
        with pytest.raises(SpecError):
            make_job(setup.plan("seed = -1\n"), setup.host, run="0123456ab", digest="x")


class TestDryRun:
    def test_json_has_the_spec_its_sources_and_problems(self, setup):
        said = dry_run_json(setup.plan("[train]\nlora_rank = 4\n"))

        assert json.loads(json.dumps(said)) == said
        assert list(said) == list(JSON_KEYS)
        assert said["spec"]["train"]["lora_alpha"] == 8
        assert said["spec"]["environment"]["path"] == "env"
        assert said["sources"]["train.lora_alpha"] == "recipe"
        assert said["problems"] == []
        assert said["reasons"]["train.lora_alpha"] == {
            "label": "recipe",
            "reason": "twice the rank",
            "source": "the paper",
        }

    def test_json_of_a_broken_spec_has_the_problems(self, setup):
        said = dry_run_json(setup.plan("seed = -1\n"))

        assert said["spec"] is None
        assert said["problems"] == [
            {
                "path": "seed",
                "message": "must be at least 0, got -1",
                "hint": None,
                "severity": "error",
                "fault": "spec",
            }
        ]

    def test_rows_are_for_eyes_and_leave_out_what_is_unset(self, setup):
        rows = {row.path: row for row in dry_run_rows(setup.plan())}

        assert (rows["model"].value, rows["model"].source) == ('"org/tiny"', "run.toml")
        assert rows["train.lora_alpha"].reason == "twice the rank (the paper)"
        assert "environment.id" not in rows
        assert "worker_env" not in rows
        assert dry_run_rows(setup.plan("seed = -1\n")) == []


def test_planning_imports_nothing_heavy():
    code = (
        "import sys, flash.plan, flash.job, flash.dry_run, flash.spec.schema\n"
        "heavy = set('torch transformers requests sqlalchemy datasets rich dotenv'.split())\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
