"""What happens to runs, posted to an address of the user's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flash.api import Problem, SinkPlugin, hookimpl
from flash_sink_webhook.config import KEY_NAME, URL_NAME, WebhookConfig

if TYPE_CHECKING:
    from flash.api import NoticeSink, PluginContext
    from flash.plan import Plan

NAME = "webhook"


def _notices(ctx: PluginContext, config: WebhookConfig) -> NoticeSink:
    from flash_sink_webhook.sink import make_webhook

    return make_webhook(ctx, config)


@hookimpl
def flash_register_sinks() -> list[SinkPlugin]:
    """Return the one sink of this plugin; it has no part in the worker."""
    return [
        SinkPlugin(
            name=NAME,
            summary="Posts starts, ends, failures and budget warnings to an address of yours.",
            notices=_notices,
            config=WebhookConfig,
            secrets=(URL_NAME, KEY_NAME),
        )
    ]


@hookimpl
def flash_review_plan(plan: Plan) -> list[Problem]:
    """Refuse a webhook without an address before it is needed."""
    config = None if plan.spec is None else plan.spec.sink.get(NAME)
    if config is None or config.url is not None or URL_NAME in plan.secrets:
        return []
    return [
        Problem(
            f"sink.{NAME}.url",
            f"is not set, and neither is the secret {URL_NAME}",
            f"set one of them; {URL_NAME} is read from the environment and from .env",
        )
    ]
