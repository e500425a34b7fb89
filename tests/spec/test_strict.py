"""Reading plain data into config classes as plugins may write them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import attrs
import pytest

from flash.fields import SettingError, setting
from flash.spec.strict import Reader


@attrs.frozen(kw_only=True)
class Inner:
    name: str
    size: int = setting(1, doc="", ge=1)


@attrs.frozen(kw_only=True)
class Outer:
    mode: Literal["fast", "slow"] = "fast"
    number: float | int = 0
    either: str | list[int] = ""
    pair: tuple[int, str] = (1, "a")
    inner: Inner | None = None
    inners: Sequence[Inner] = ()
    by_name: Mapping[str, Inner] = attrs.field(factory=dict)
    anything: Any = None
    derived: int = attrs.field(init=False, default=3)


def problems(data, cls=Outer):
    value, found = Reader().read(cls, data, ("train",))
    assert (value is None) is bool(found)
    return [str(problem) for problem in found]


def test_every_shape_comes_in_and_goes_out():
    data = {
        "mode": "slow",
        "number": 2,
        "either": [1, 2],
        "pair": [3, "x"],
        "inner": {"name": "a", "size": 4},
        "inners": [{"name": "b"}],
        "by_name": {"c": {"name": "c", "size": 2}},
        "anything": [{"deep": None}],
    }
    reader = Reader()

    value, found = reader.read(Outer, data, ())

    assert found == []
    assert value.number == 2
    assert isinstance(value.number, int)
    assert value.inners[0] == Inner(name="b")
    assert value.by_name["c"] == Inner(name="c", size=2)
    plain = reader.plain(value)
    assert plain["pair"] == [3, "x"]
    again, _ = reader.read(Outer, {k: v for k, v in plain.items() if k != "derived"}, ())
    assert again == value


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"mode": "medium"}, 'train.mode: expected one of "fast", "slow", got the string "medium"'),
        ({"number": "2"}, 'train.number: expected a number or an integer, got the string "2"'),
        ({"number": True}, "train.number: expected a number or an integer, got the boolean true"),
        ({"either": 3}, "train.either: expected a string or an array, got an integer 3"),
        ({"either": ["x"]}, 'train.either[0]: expected an integer, got the string "x"'),
        ({"pair": [1]}, "train.pair: expected an array of 2 values, got 1"),
        ({"pair": [1, 2]}, "train.pair[1]: expected a string, got an integer 2"),
        ({"inner": {}}, "train.inner.name: required, but nothing sets it"),
        ({"inner": {"name": "a", "size": 0}}, "train.inner.size: must be at least 1, got 0"),
        ({"inners": [{"name": "a"}, 3]}, "train.inners[1]: expected a table, got an integer 3"),
        ({"by_name": {"a b": {}}}, 'train.by_name."a b".name: required, but nothing sets it'),
        ({"by_name": []}, "train.by_name: expected a table, got an array"),
        ({"derived": 3}, "train.derived: unknown key; allowed: anything, by_name, either, inner"),
        (None, "train: expected a table, got nothing"),
    ],
)
def test_what_does_not_fit_is_named_with_its_path(data, expected):
    (line,) = problems(data)

    assert line.startswith(expected)


@pytest.mark.parametrize("value", [2.5, 1e300, -(2.0**60), float("nan"), float("inf"), "2", True])
def test_what_is_no_integer(value):
    assert Reader().read(int, value, ("x",))[1]


def test_whole_floats_are_integers_and_integers_are_numbers():
    assert Reader().read(int, 2.0, ()) == (2, [])
    assert Reader().read(float, 2, ()) == (2.0, [])


def test_a_value_that_looks_like_a_secret_is_not_repeated():
    ((line,)) = problems({"mode": "sk-hunter2hunter2hunter2hunter2"})

    assert "hunter2" not in line


def test_long_text_is_cut():
    (line,) = problems({"mode": "x" * 1000})

    assert len(line) < 150


def test_the_field_that_a_validator_names_ends_the_path():
    def check(instance, attribute, value):
        if value > 3:
            raise SettingError("too big", "number")

    def odd(self):
        if self.number == 2:
            raise ValueError("two is no good")

    @attrs.frozen
    class Checked:
        number: int = attrs.field(default=0, validator=[check, attrs.validators.in_(range(5))])
        word: str = attrs.field(default="a", validator=attrs.validators.matches_re("[a-z]"))
        __attrs_post_init__ = odd

    assert problems({"number": 4}, Checked) == ["train.number: too big"]
    assert problems({"number": 2}, Checked) == ["train: two is no good"]
    assert problems({"word": "1"}, Checked)[0].startswith("train.word: ")


def test_a_config_class_that_cannot_be_read_is_the_plugins_fault():
    @attrs.frozen
    class Unresolved:
        value: "NoSuchName"  # noqa: F821 - the point of the test

    @attrs.frozen
    class Raises:
        value: int = 0

        def __attrs_post_init__(self):
            raise RuntimeError("boom")

    value, (problem,) = Reader().read(Unresolved, {"value": 1}, ("train",))
    assert (value, problem.fault, problem.path) == (None, "plugin", "train")
    assert "NoSuchName" in problem.message
    assert problems({}, Raises) == ["train: boom"]
