"""`json-schema`: the completion is JSON, and the schema allows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from flash.api import EnvironmentFault, Reward
from flash_reward_standard.bounded import BoundedCheck
from flash_reward_standard.common import file_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.api import Episode, Task
    from flash_reward_standard.config import JsonSchemaConfig

_FENCE: Final = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_SHOWN: Final = 200
CHECK_S: Final = 5.0
"""Seconds for one completion: a schema's pattern can take time exponential in its length."""


class JsonSchema:
    """1 where the completion's JSON is valid; nothing of the schema is fetched from a network."""

    def __init__(
        self, config: JsonSchemaConfig, folder: Path | None, *, limit_s: float = CHECK_S
    ) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for

        place, schema = "[reward.json-schema] schema", config.schema
        if config.path is not None:
            path = file_in(folder, config.path, "[reward.json-schema] path")
            place, schema = str(path), _read(path)
        try:
            validator_for(schema).check_schema(schema)
        except SchemaError as error:
            raise EnvironmentFault(f"{place}: not a JSON Schema: {error.message:.200}") from None
        self._schema = schema
        self._fenced = config.fenced
        self._check = BoundedCheck("schemas", limit_s, doing="checking the JSON by its schema")

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:  # noqa: ARG002 - the contract's
        """Return 1 or 0 for each; the metric `parsed` says whether it was JSON at all."""
        return [self._one(episode.completion) for episode in episodes]

    def _one(self, completion: str) -> Reward:
        text = completion.strip()
        fence = _FENCE.fullmatch(text) if self._fenced else None
        text = fence[1] if fence else text
        try:
            parse_json(text)
        except ValueError as error:
            return Reward(0.0, metrics={"parsed": 0.0}, reason=f"not JSON: {error}"[:_SHOWN])
        answer = self._check.ask(schema=self._schema, text=text)
        if "error" in answer:
            return Reward(None, error=answer["error"])
        success = answer["wrong"] is None
        reason = answer["wrong"]
        return Reward(float(success), success=success, metrics={"parsed": 1.0}, reason=reason)


def parse_json(text: str) -> Any:
    """Return the value; raises `ValueError` for what is no JSON, NaN and Infinity among it."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read(path: Path) -> Any:
    try:
        schema = parse_json(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise EnvironmentFault(f"{path}: a JSON Schema is an object")
    return schema
