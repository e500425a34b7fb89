"""`[reward.*]` tables: the adapter's own settings and the core's `weight`, side by side."""

import attrs
import pytest

from flash.api import RewardPlugin, setting
from flash.spec.model import spec_from_dict, spec_to_dict
from flash.spec.schema import json_schema
from flash.testing.host import make_host

HEAD = 'model = "org/tiny"\nenvironment.path = "."\n'


def problems(resolved):
    return [str(problem) for problem in resolved.problems]


def test_a_table_holds_the_adapters_settings_and_a_weight(resolve_text, host):
    text = f'{HEAD}[reward.judge]\nregion = "eu"\nweight = -2\n[reward.environment]\n'

    resolved = resolve_text(text)
    tables = resolved.spec.reward

    assert problems(resolved) == []
    assert isinstance(tables["judge"], host.get("reward", "judge").config)
    assert (tables["judge"].region, tables["judge"].weight) == ("eu", -2.0)
    assert tables["environment"].weight == 1.0
    assert resolved.sources["reward.judge.weight"] == "run.toml"
    assert resolved.sources["reward.environment.weight"] == "default"
    assert spec_from_dict(spec_to_dict(resolved.spec), host) == resolved.spec


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        (
            "[reward.judge]\nweight = 0\n[reward.environment]\nweight = 0.0\n",
            "reward: every weight is 0, so every reward would be; give one a weight",
        ),
        (
            '[reward.judge]\nweight = "1"\n',
            'reward.judge.weight: expected a number, got the string "1"',
        ),
        (
            "[reward.judge]\nweight = true\n",
            "reward.judge.weight: expected a number, got the boolean true",
        ),
        (
            "[reward.judge]\nwieght = 1\n",
            'reward.judge.wieght: unknown key; did you mean "weight"? allowed: region, weight',
        ),
        (
            '[reward.environment]\nregion = "eu"\n',
            "reward.environment.region: unknown key; allowed: weight",
        ),
        ("[reward]\njudge = 1\n", "reward.judge: expected a table, got an integer 1"),
        (
            "[reward.judgee]\n",
            'reward.judgee: unknown reward "judgee"; did you mean "judge"?; installed: judge',
        ),
        (
            "[reward.enviroment]\n",
            (
                'reward.enviroment: unknown reward "enviroment"; the environment\'s own score is '
                "[reward.environment]"
            ),
        ),
        (
            "[reward.math]\n",
            (
                'reward.math: unknown reward "math"; pip install flash-reward-standard; '
                "installed: judge"
            ),
        ),
    ],
)
def test_a_table_that_is_wrong_is_a_problem_at_its_key(resolve_text, tables, expected):
    assert problems(resolve_text(HEAD + tables)) == [expected]


def test_the_schema_has_every_reward_with_its_weight_and_the_environments_own(host):
    schema = json_schema(host)
    tables = schema["properties"]["reward"]["properties"]

    assert sorted(tables) == ["environment", "judge"]
    assert schema["$defs"]["reward.judge"]["properties"]["weight"]["default"] == 1.0
    assert [*schema["$defs"]["reward.environment"]["properties"]] == ["weight"]


@attrs.define
class Heavy:
    weight: int = setting(1, doc="In kg.")


@attrs.define
class Loose:
    tries: int = setting(1, doc="How often.")


def record(name="mine", config=Loose):
    return RewardPlugin(name=name, summary="Mine.", make=lambda c, s: None, config=config)


def test_an_adapter_cannot_take_the_cores_words():
    with pytest.raises(ValueError, match="is the environment's own score; choose another name"):
        record(name="environment")
    with pytest.raises(ValueError, match="Heavy has a setting `weight`, which the core adds"):
        record(config=Heavy)


def test_settings_that_may_change_stay_so_beside_the_weight(resolve_text):
    table = make_host(record()).get("reward", "mine").table(tries=2, weight=3.0)

    assert (table.tries, table.weight) == (2, 3.0)
    table.tries = 4
    assert table.tries == 4
