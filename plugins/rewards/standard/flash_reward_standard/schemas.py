"""`json-schema`: the completion is JSON, and the schema allows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final, NoReturn

from flash.api import EnvironmentFault, Reward
from flash_reward_standard.common import file_in

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from flash.api import Episode, Task
    from flash_reward_standard.config import JsonSchemaConfig

_FENCE: Final = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL | re.IGNORECASE)
_SHOWN: Final = 200


class JsonSchema:
    """1 where the completion's JSON is valid; nothing of the schema is fetched from a network."""

    def __init__(self, config: JsonSchemaConfig, folder: Path | None) -> None:
        from jsonschema.exceptions import SchemaError
        from jsonschema.validators import validator_for
        from referencing.jsonschema import EMPTY_REGISTRY

        place, schema = "[reward.json-schema] schema", config.schema
        if config.path is not None:
            path = file_in(folder, config.path, "[reward.json-schema] path")
            place, schema = str(path), _read(path)
        validator = validator_for(schema)
        try:
            validator.check_schema(schema)
        except SchemaError as error:
            raise EnvironmentFault(f"{place}: not a JSON Schema: {error.message:.200}") from None
        # Of its own accord, jsonschema fetches what a schema refers to.
        self._validator: Any = validator(schema, registry=EMPTY_REGISTRY)
        self._fenced = config.fenced

    def score(self, task: Task, episodes: Sequence[Episode]) -> list[Reward | None]:  # noqa: ARG002 - the contract's
        """Return 1 or 0 for each; the metric `parsed` says whether it was JSON at all."""
        return [self._one(episode.completion) for episode in episodes]

    def _one(self, completion: str) -> Reward:
        from jsonschema.exceptions import best_match
        from referencing.exceptions import Unresolvable

        text = completion.strip()
        fence = _FENCE.fullmatch(text) if self._fenced else None
        try:
            value = parse_json(fence[1] if fence else text)
        except ValueError as error:
            return Reward(0.0, metrics={"parsed": 0.0}, reason=f"not JSON: {error}"[:_SHOWN])
        try:
            wrong = best_match(self._validator.iter_errors(value))
        except Unresolvable as error:
            return Reward(None, error=f"the schema refers to what is not in it: {error.ref}")
        except RecursionError:
            return Reward(0.0, metrics={"parsed": 1.0}, reason="nested too deeply")
        reason = f"{wrong.json_path}: {wrong.message}"[:_SHOWN] if wrong else None
        success = wrong is None
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
