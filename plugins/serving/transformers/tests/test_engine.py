"""What the engine says is what the model with that adapter alone says, whatever goes on beside."""

import json
import random
import threading

import pytest
import torch
from flash_serving_transformers.engine import Engine
from flash_serving_transformers.requests import Request

from flash.errors import FlashError, UsageError
from flash.testing.models import make_tiny_model
from flash.training.loading import attach_lora, load_base, save_adapter

pytestmark = pytest.mark.slow

ADAPTERS = {
    "all": {"rank": 4, "targets": "all-linear"},
    "wide": {"rank": 8, "targets": "all-linear"},
    "few": {"rank": 2, "targets": ["q_proj", "v_proj"]},
    "mlp": {"rank": 3, "targets": ["up_proj", "down_proj"]},
}


class World:
    """A tiny model, adapters of different ranks and targets, and what each says alone."""

    def __init__(self, folder, architecture="llama", **config):
        self.folder = make_tiny_model(folder / "model", architecture=architecture)
        if config:
            path = self.folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        self.alone = {None: load_base(self.folder)[0].eval()}
        for seed, (name, how) in enumerate(ADAPTERS.items()):
            self.alone[name] = self.train(folder / name, seed, **how)
        self.adapters = {name: folder / name for name in ADAPTERS}

    def train(self, folder, seed, *, rank, targets):
        """Save an adapter that says something of its own; return PEFT's model of it."""
        base, _ = load_base(self.folder)
        model = attach_lora(base, rank=rank, alpha=8, targets=targets, base="tiny", seed=seed)
        torch.manual_seed(seed)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(0, 0.3)
        save_adapter(model, folder)
        return model.eval()

    @torch.inference_mode()
    def log_probs(self, adapter, prompt, completion):
        """Return log-probabilities over the words before each token of `completion`."""
        tokens = torch.tensor([[*prompt, *completion]])
        logits = self.alone[adapter](tokens).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)

    def engine(self, **settings):
        """Start an engine with all adapters."""
        settings = {"context_tokens": 512, "cache_tokens": 4096, "max_rows": 16} | settings
        engine = Engine(load_base(self.folder)[0], **settings)
        for name, folder in self.adapters.items():
            engine.add_adapter(name, folder)
        return engine


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def served(world):
    engine = world.engine()
    yield engine
    engine.close()


class Asked:
    """A request under way, with all that came of it."""

    def __init__(self, engine, adapter, prompt, *, on_token=lambda _: False, **settings):
        self.prompt, self.adapter = prompt, adapter
        self.tokens, self.ends = [], []
        self._ended = threading.Event()
        self._on_token = on_token
        settings = {"max_tokens": 8, "temperature": 0} | settings
        request = Request(tokens=prompt, adapter=adapter, **settings)
        self.handle = engine.submit(request, self._take, self._end)

    def _take(self, token):
        self.tokens.append(token)
        return self._on_token(self)

    def _end(self, how):
        self.ends.append(how)
        self._ended.set()

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    def end(self):
        """Wait for the end and return it."""
        assert self._ended.wait(60)
        return self.ends[0]


def prompt_of(length, seed=0):
    rng = random.Random(seed)
    return [rng.randrange(250) for _ in range(length)]


def assert_as_alone(world, asked):
    """Assert that the answer is the greedy one, with log-probabilities, of the adapter alone."""
    expected = world.log_probs(asked.adapter, asked.prompt, asked.ids)
    assert asked.ids == expected.argmax(-1).tolist()
    for row, token in zip(expected, asked.tokens, strict=True):
        assert token.log_prob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [word for word, _ in token.top] == row.topk(3).indices.tolist()


def play(engine, seed):
    """Submit requests at random moments, some from within another's token; cancel some."""
    rng = random.Random(seed)
    asked, lock = [], threading.Lock()

    def on_token(one):
        if rng.random() < 0.15 and len(asked) < 16:
            submit()
        return False

    def submit():
        cancel_at = rng.randrange(1, 20) if rng.random() < 0.25 else None

        def step(one):
            if cancel_at == len(one.tokens):
                engine.cancel(one.handle)
            return on_token(one)

        adapter = rng.choice([None, *ADAPTERS])
        settings = {"max_tokens": rng.randrange(1, 48), "top_logprobs": 3}
        prompt = prompt_of(rng.choice([1, 2, 30, 64, 65, 140]), rng.random())
        with lock:
            asked.append(Asked(engine, adapter, prompt, on_token=step, **settings))

    for _ in range(9):
        submit()
    for one in asked:  # grows while it is read
        one.end()
    return asked


ARCHITECTURES = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": 12},
    "gemma3_text": {"sliding_window": 12},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_row_says_what_its_adapter_says_alone(architecture, tmp_path):
    world = World(tmp_path, architecture, **ARCHITECTURES[architecture])
    engine = world.engine(max_rows=7)
    asked = play(engine, 1)
    engine.close()

    assert {str(one.end()) for one in asked} == {"length", "cancelled"}
    for one in asked:
        assert len(one.ends) == 1
        assert_as_alone(world, one)


def test_rows_that_give_their_room_up_go_on_as_if_they_had_not(world):
    model, _ = load_base(world.folder)
    engine = Engine(model, context_tokens=512, cache_tokens=448, max_rows=16)
    engine.add_adapter("all", world.adapters["all"])
    read = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, arguments: read.append(arguments[0].numel())
    )
    asked = [
        Asked(engine, adapter, prompt_of(20, seed), max_tokens=190, top_logprobs=3)
        for seed, adapter in enumerate([None, "all", "all"])
    ]
    scored = engine.log_probs("all", prompt_of(20), prompt_of(300, 1))

    assert [one.end() for one in asked] == ["length"] * len(asked)
    for one in asked:
        assert_as_alone(world, one)
    expected = world.log_probs("all", prompt_of(20), prompt_of(300, 1))
    expected = expected.gather(-1, torch.tensor(prompt_of(300, 1))[:, None])[:, 0]
    assert scored == pytest.approx(expected.tolist(), abs=1e-4)
    assert sum(read) > 3 * (20 + 190 - 1) + 20 + 300 - 1, "nothing was read twice"
    assert (engine.stats().running, engine.stats().cache_tokens_used) == (0, 0)
    engine.close()


def test_an_answer_goes_on_while_a_long_prompt_is_read(world, served):
    heard, long = [], []

    def on_token(one):
        heard.append(len(long[0].tokens) if long else None)
        if len(one.tokens) == 2:
            long.append(Asked(served, "few", prompt_of(450), top_logprobs=3))
        return False

    running = Asked(served, "all", prompt_of(9), on_token=on_token, max_tokens=30)
    assert running.end() == "length"
    assert long[0].end() == "length"

    assert heard.count(0) >= 450 // 128
    assert_as_alone(world, long[0])


def test_what_a_prompt_shares_with_another_is_not_computed_again(world):
    engine = world.engine()
    system, first, second = prompt_of(100), prompt_of(30, 1), prompt_of(30, 2)
    ask = {"max_tokens": 6, "top_logprobs": 3}

    def turn(adapter, prompt):
        one = Asked(engine, adapter, prompt, **ask)
        one.end()
        return one

    fresh = turn("all", system + first)
    goes_on = turn("all", system + first + fresh.ids + second)
    begins_as = turn("all", system + second)
    of_another = turn("few", system + second)
    several = [Asked(engine, "mlp", system + first, **ask) for _ in range(3)]
    for one in several:
        one.end()
    engine.add_adapter("all", world.adapters["all"])
    of_other_weights = turn("all", system + first)

    turns = [fresh, goes_on, begins_as, of_another, *several, of_other_weights]
    for one in turns:
        assert_as_alone(world, one)
    # Of an answer, the last token was never read; of a prompt, the last always is.
    assert [one.handle.cached_tokens for one in turns] == [0, 135, 100, 0, 0, 129, 129, 0]
    assert (engine.stats().running, engine.stats().cache_tokens_used) == (0, 0)
    engine.close()


def test_what_another_is_still_saying_is_shared_as_far_as_it_is_computed(world, served):
    prompt, followers = prompt_of(40, 3), []

    def on_token(one):
        if len(one.tokens) == 3:
            longer = prompt + one.ids + prompt_of(9, 4)
            followers.append(Asked(served, "few", longer, top_logprobs=3))
        return False

    assert Asked(served, "few", prompt, on_token=on_token, max_tokens=20).end() == "length"
    (follower,) = followers

    assert follower.end() == "length"
    assert follower.handle.cached_tokens == 40 + 2
    assert_as_alone(world, follower)


def test_a_seed_draws_the_same_whatever_is_beside(world, served):
    def ask():
        return Asked(served, "all", prompt_of(20), temperature=1.0, seed=7, max_tokens=30)

    alone = ask()
    alone.end()
    beside = [
        Asked(served, name, prompt_of(33, 1), temperature=1.3, max_tokens=40) for name in ADAPTERS
    ]
    again = ask()
    again.end()
    for one in beside:
        one.end()

    assert again.ids == alone.ids
    assert beside[0].ids != beside[1].ids


def test_an_answer_ends_at_a_stop_token_or_where_its_taker_says(served):
    whole = Asked(served, "all", prompt_of(9))
    assert whole.end() == "length"
    stop = Asked(served, "all", prompt_of(9), stops=frozenset([whole.ids[3]]))
    said = Asked(served, "all", prompt_of(9), on_token=lambda one: len(one.tokens) == 2)

    assert (stop.end(), said.end()) == ("stop", "stop")
    assert stop.ids == whole.ids[: whole.ids.index(whole.ids[3]) + 1]
    assert said.ids == whole.ids[:2]


def test_adapters_come_are_replaced_and_go_while_others_answer(world, tmp_path):
    engine = world.engine()
    seen = threading.Event()

    def on_token(one):
        seen.set()
        return False

    running = Asked(engine, "all", prompt_of(9), on_token=on_token, max_tokens=300, top_logprobs=3)
    assert seen.wait(60)
    world.alone["new"] = world.train(tmp_path / "new", 9, rank=5, targets="all-linear")
    engine.add_adapter("new", tmp_path / "new")
    new = Asked(engine, "new", prompt_of(9), top_logprobs=3)
    engine.add_adapter("all", tmp_path / "new")
    replaced = Asked(engine, "all", prompt_of(9), top_logprobs=3)
    engine.remove_adapter("new")
    engine.remove_adapter("new")
    with pytest.raises(UsageError, match="no adapter new on this server; there are: all, few"):
        Asked(engine, "new", prompt_of(9))

    assert [one.end() for one in (new, replaced, running)] == ["length"] * 3
    assert_as_alone(world, new)
    assert replaced.ids == new.ids
    assert_as_alone(world, running)
    engine.close()


def test_what_is_scored_may_give_its_room_up_in_the_middle(world):
    engine = world.engine(cache_tokens=448)
    completion, found = prompt_of(230, 1), []
    scoring = threading.Thread(
        target=lambda: found.extend(engine.log_probs("wide", prompt_of(20), completion))
    )

    def on_token(one):
        if len(one.tokens) == 172:  # one step more fits beside, and then this one must grow
            scoring.start()
            while engine.stats().waiting == 0:
                threading.Event().wait(0.001)
        return False

    running = Asked(engine, "all", prompt_of(20), on_token=on_token, max_tokens=190, top_logprobs=3)
    assert running.end() == "length"
    scoring.join(60)

    assert_as_alone(world, running)
    expected = world.log_probs("wide", prompt_of(20), completion)
    expected = expected.gather(-1, torch.tensor(completion)[:, None])[:, 0]
    assert found == pytest.approx(expected.tolist(), abs=1e-4)
    engine.close()


def test_it_computes_on_as_many_threads_as_it_is_given(world):
    before = torch.get_num_threads()
    engine = world.engine(threads=before + 1)
    seen = set()
    try:
        asked = Asked(
            engine, None, prompt_of(9), on_token=lambda _: seen.add(torch.get_num_threads())
        )
        assert asked.end() == "length"
        assert (seen, torch.get_num_threads()) == ({before + 1}, before)
    finally:
        engine.close()
        torch.set_num_threads(before)


def test_a_cache_of_one_short_request_serves_one_at_a_time(world):
    engine = world.engine(cache_tokens=24, context_tokens=24)
    asked = [Asked(engine, name, prompt_of(9), top_logprobs=3) for name in ADAPTERS]
    for one in asked:
        assert one.end() == "length"
        assert_as_alone(world, one)
    with pytest.raises(UsageError, match="together they are more than the 24"):
        Asked(engine, None, prompt_of(9), max_tokens=16)
    engine.close()


def test_what_can_never_be_served_is_refused_with_a_sentence(world, served):
    ask = {"adapter": None, "max_tokens": 4}
    for wrong, sentence in {
        (): "the prompt is empty",
        (1, 5000): "there is no token 5000",
        tuple(range(200)) * 3: "600 tokens and may be continued by 4: .* more than the 512",
    }.items():
        with pytest.raises(UsageError, match=sentence):
            served.submit(Request(tokens=wrong, **ask), None, None)


class Picky:
    """A constraint that allows one word after the other, and raises where it is told to."""

    def __init__(self, words, *, fails_at=None):
        self.words, self.fails_at, self.at = words, fails_at, 0

    def mask(self, logits_V):
        if self.at == self.fails_at:
            raise ValueError("the grammar is stuck")
        kept = logits_V[self.words[self.at]].clone()
        logits_V.fill_(-torch.inf)
        logits_V[self.words[self.at]] = kept

    def accept(self, token):
        assert token == self.words[self.at]
        self.at += 1


def test_a_constraint_decides_and_the_log_probabilities_stay_the_models_own(world, served):
    asked = Asked(
        served, "few", prompt_of(9), max_tokens=3, constraint=Picky([5, 6, 7]), top_logprobs=0
    )

    assert (asked.end(), asked.ids) == ("length", [5, 6, 7])
    expected = world.log_probs("few", asked.prompt, [5, 6, 7])
    for row, token in zip(expected, asked.tokens, strict=True):
        assert token.log_prob == pytest.approx(float(row[token.id]), abs=1e-4)


def raising(one):
    raise ValueError("the text side broke")


def test_what_a_request_itself_throws_ends_it_alone(world, served):
    prompt = prompt_of(9)
    bad = {
        "broke": Asked(served, "all", prompt, on_token=raising),
        "stuck": Asked(served, "all", prompt, constraint=Picky([5, 6, 7], fails_at=1)),
        "no token may come": Asked(
            served, None, prompt, constraint=Picky([0]), logit_bias={0: -float("inf")}
        ),
    }
    good = Asked(served, "all", prompt, top_logprobs=3, max_tokens=40)

    assert good.end() == "length"
    assert_as_alone(world, good)
    for said, one in bad.items():
        assert said in str(one.end())
        assert len(one.ends) == 1


@pytest.fixture
def faulty(world):
    """Start an engine whose model raises what `fault` returns for a step's tokens."""

    class Faulty:
        def fault(self, tokens):
            return None

    faulty = Faulty()
    model, _ = load_base(world.folder)
    faulty.engine = Engine(model, context_tokens=512, cache_tokens=1024, max_rows=8)
    for name, folder in world.adapters.items():
        faulty.engine.add_adapter(name, folder)

    def hook(_module, arguments):
        error = faulty.fault(arguments[0][0].tolist())
        if error is not None:
            raise error

    model.get_input_embeddings().register_forward_pre_hook(hook)
    yield faulty
    faulty.engine.close()


def test_a_model_that_fails_for_one_row_goes_on_for_the_others(world, faulty):
    faulty.fault = lambda tokens: RuntimeError("kernel gave up") if 251 in tokens else None
    good = Asked(faulty.engine, "all", prompt_of(9), max_tokens=40, top_logprobs=3)
    bad = Asked(faulty.engine, "few", [1, 2, 251, 3])

    assert str(bad.end()) == "kernel gave up"
    assert good.end() == "length"
    assert_as_alone(world, good)


def test_memory_that_ends_costs_no_request_that_fits_alone(world, faulty):
    faulty.fault = lambda tokens: torch.OutOfMemoryError("full") if len(tokens) > 40 else None
    fits = [
        Asked(faulty.engine, name, prompt_of(30), max_tokens=20, top_logprobs=3)
        for name in ADAPTERS
    ]
    large = Asked(faulty.engine, "all", prompt_of(450, 5))

    assert str(large.end()) == "full"
    assert [one.end() for one in fits] == ["length"] * 4
    for one in fits:
        assert_as_alone(world, one)


def test_an_end_that_nobody_can_take_hurts_nobody(served):
    ended = threading.Event()

    def end(_how):
        ended.set()
        raise ValueError("the connection is gone")

    served.submit(Request(tokens=[1, 2], adapter=None, max_tokens=2), lambda _: False, end)

    assert ended.wait(60)
    assert Asked(served, None, [1, 2]).end() == "length"


def test_closing_ends_every_request_once(world):
    engine = world.engine(max_rows=2)
    asked = [Asked(engine, "all", prompt_of(9), max_tokens=400) for _ in range(6)]
    waits = [one for one in asked if not one.tokens][-1]
    engine.cancel(waits.handle)
    engine.close()
    engine.close()

    assert [one.ends for one in asked] == [["cancelled"]] * 6
    with pytest.raises(FlashError, match="the engine is closed"):
        Asked(engine, "all", prompt_of(9))


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss", "mamba", "llama4_text"])
def test_a_family_that_is_not_plain_attention_is_refused(architecture, tmp_path):
    model, _ = load_base(make_tiny_model(tmp_path, architecture=architecture))

    with pytest.raises(UsageError, match=f"{architecture} cannot be served by") as refused:
        Engine(model, context_tokens=64, cache_tokens=256, max_rows=2)
    assert refused.value.hint == "deploy it with --backend vllm"
