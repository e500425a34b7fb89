"""A host of small plugins and a way to resolve text, for the tests of the spec."""

import attrs
import pytest

from flash.api import (
    AlgorithmPlan,
    AlgorithmPlugin,
    ModelCard,
    ModelPlugin,
    Need,
    ProviderPlugin,
    Recipe,
    RewardPlugin,
    SinkPlugin,
    setting,
)
from flash.spec import resolve
from flash.testing.host import make_host


@attrs.frozen(kw_only=True)
class Warmup:
    share: float = setting(0.03, doc="Share of the steps.", ge=0, le=1)
    shape: str = setting("linear", doc="How it rises.", choices=("linear", "cosine"))


@attrs.frozen(kw_only=True)
class Sft:
    lora_rank: int = setting(32, doc="Rank.", ge=1)
    learning_rate: float | None = setting(None, doc="Step size.", gt=0, recipe=True)
    batch_size: int = setting(16, doc="Rows a step.", ge=1)
    max_length: int = setting(1024, doc="Tokens a row.", ge=8, aliases=("max_context_tokens",))
    epochs: float = setting(2.0, doc="Passes.", gt=0)
    save_at_steps: tuple[int, ...] = setting((), doc="Extra saves.")
    init_from_adapter: str | None = setting(None, doc="Where to start.", non_empty=True)
    target_modules: str | tuple[str, ...] = setting("all-linear", doc="What gets an adapter.")
    warmup: Warmup = setting(factory=Warmup, doc="The warm-up.")


@attrs.frozen(kw_only=True)
class Grpo:
    group_size: int = setting(8, doc="Completions a prompt.", choices=(2, 4, 8, 16))
    prompts: int = setting(64, doc="Prompts a step.", ge=1, aliases=("prompts_per_step",))


@attrs.frozen(kw_only=True)
class Wandb:
    project: str = setting("flash", doc="Project.", non_empty=True)
    run_name: str | None = setting(None, doc="Name.", non_empty=True)


@attrs.frozen(kw_only=True)
class Place:
    region: str | None = setting(None, doc="Where.")


def _algorithm(name, config, recipe):
    return AlgorithmPlugin(
        name=name,
        summary=f"The algorithm {name}.",
        config=config,
        recipe=lambda facts: recipe,
        plan=lambda facts: AlgorithmPlan(need=Need(1.0, {"weights": 1.0}, steps=7)),
        worker=f"{name}.train:run",
    )


def records():
    card = ModelCard("org/tiny", 1000, 512, 8, 1, 8, 100)
    places = [
        ProviderPlugin(name=name, summary=name, make=lambda ctx, config: None, config=Place, **more)
        for name, more in (("local", {}), ("cloud", {"secrets": ("CLOUD_API_KEY",)}))
    ]
    return [
        _algorithm("sft", Sft, {"learning_rate": Recipe(1e-4, "a small model", "docs")}),
        _algorithm("grpo", Grpo, {}),
        ModelPlugin(name="zoo", summary="Models.", make=lambda ctx: None, cards=(card,)),
        SinkPlugin(name="wandb", summary="W&B.", make=lambda c, s: None, config=Wandb),
        RewardPlugin(name="judge", summary="Judge.", make=lambda c, s: None, config=Place),
        *places,
    ]


@pytest.fixture(scope="session")
def host():
    return make_host(*records())


@pytest.fixture
def resolve_text(host, tmp_path):
    """Resolve text as `run.toml`, with other files written beside it first."""

    def run(text, *, sets=(), overlays=(), **files):
        folder = tmp_path / "project"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / f"{name}.toml").write_text(content)
        path = folder / "run.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        paths = [folder / f"{name}.toml" for name in overlays]
        return resolve(path, overlays=paths, sets=sets, host=host)

    return run
