"""Whatever fails at whatever step: the rest is served, and what fails says why."""

import threading

import attrs
import pytest
from deploy_bench import BARE, BASE, settled

from flash.errors import FlashError, ModelUnavailable, UsageError
from flash.gateway import servers
from flash.gateway.live import Abandoned
from flash.gateway.servers import FIRST_TRIES, RESTARTS
from flash.plane.copies import adapter_folder

pytestmark = pytest.mark.slow  # many servers

OUT_OF_MEMORY = "the server ended with code 1\n  torch.OutOfMemoryError: CUDA out of memory."


def test_deployments_of_one_base_backend_and_settings_share_a_server(bench):
    settled(bench)

    assert len(bench.world.live) == 1
    assert bench.routes == ["blue-1", "red-2/step-10", BASE]


def test_a_server_is_started_for_the_highest_rank_that_is_wanted(bench):
    bench.deploy("blue-1", rank=4)
    bench.deploy("red-2", rank=64)
    bench.steps(bench.server())

    assert bench.world.names("start") == [64]


def test_a_manifest_that_was_written_anew_is_not_the_one_that_was_deployed(bench):
    bench.deploy("blue-1", digest="0" * 64)
    bench.steps(bench.server())

    assert "manifest.json is not what was deployed" in bench.deployments.get("blue-1").error


def test_another_base_model_is_no_noise(bench):
    bench.deploy("blue-1")
    bench.world.log_probs[BASE] = [-2.9, -2.9]
    bench.world.log_probs["blue-1"] = [-0.9, -0.9]
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.report["parity"]["mean"] < row.report["parity"]["limit_mean"]
    assert row.state == "failed"
    assert "the base model is not that of training" in row.error


def test_drift_that_was_allowed_is_served_and_stays_in_the_report(bench):
    bench.deploy("blue-1", allow_drift=True)
    bench.world.log_probs["blue-1"] = BARE
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "ready"
    assert row.report["drift_allowed"]
    assert not row.report["parity"]["holds"]


def test_what_is_no_number_is_no_drift_that_can_be_allowed(bench):
    bench.deploy("blue-1", allow_drift=True)
    bench.world.log_probs["blue-1"] = [float("nan"), -0.2]
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "finite" in row.error
    assert row.report["parity"]["mean"] is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"usage": {"completion_tokens": 0}}, "has no token"),
        ({"choices": []}, "no chat completion"),
        ({"status": 500, "error": {"message": "it broke"}}, "an error: 500 it broke"),
        (
            {"choices": [{"logprobs": {"content": [{"logprob": float("nan")}]}}]},
            "log-probabilities that are no numbers",
        ),
    ],
)
def test_a_first_answer_that_is_none_is_a_failure(bench, answer, said):
    bench.deploy("blue-1")
    bench.world.smoke = answer
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert said in row.error


def test_a_rank_that_no_server_starts_with_takes_no_other_adapter_down(bench):
    bench.deploy("blue-1", rank=8)
    bench.deploy("wide-3", rank=512)
    bench.world.faults["start"] = [UsageError("rank 512 is over max_lora_rank")]
    bench.steps(bench.server())

    assert bench.states() == {"blue-1": "ready", "wide-3": "failed"}


def test_a_server_without_room_at_the_moment_is_asked_again(bench):
    bench.deploy("blue-1")
    bench.world.smoke = {"status": 503}
    bench.world.faults["smoke"] = [bench.world.smoke.clear]
    bench.steps(bench.server())

    assert bench.states() == {"blue-1": "ready"}
    assert bench.world.names("smoke") == ["blue-1"] * 2


@pytest.mark.parametrize("call", ["load", "tokens", "log_probs"])
def test_an_adapter_that_the_server_cannot_take_fails_alone(bench, call):
    server = settled(bench)
    bench.world.faults[call] = [RuntimeError("no such layer")]
    bench.deploy("odd-3")
    bench.steps(server)

    assert bench.states() == {"blue-1": "ready", "odd-3": "failed", "red-2/step-10": "ready"}
    assert "RuntimeError: no such layer" in bench.deployments.get("odd-3").error
    assert bench.world.names("start") == []


@pytest.mark.parametrize("call", ["load", "tokens", "log_probs", "health", "unload"])
@pytest.mark.parametrize("kind", ["dies", "hangs"])
def test_a_server_that_breaks_down_at_any_call_is_started_anew_with_all_it_had(
    make_bench, hang, call, kind
):
    bench = make_bench(**LIMITS)
    server = settled(bench)
    if call == "unload":
        bench.deployments.ask_gone("red-2/step-10")
    elif call != "health":
        bench.deploy("new-3")
    bench.world.faults[call] = [bench.world.dies if kind == "dies" else hang]
    if call == "health":
        bench.world.faults[call] *= 3
    for _ in range(3):
        bench.steps(server)

    gone = {"red-2/step-10": "undeployed"} if call == "unload" else {"red-2/step-10": "ready"}
    new = {"new-3": "ready"} if call not in {"unload", "health"} else {}
    assert bench.states() == {"blue-1": "ready"} | gone | new
    anew = (call, kind) != ("unload", "hangs")
    assert len(bench.world.names("start")) == int(anew)
    assert len(bench.world.live) == 1


LIMITS = {"load_s": 0.05, "prove_s": 0.05, "unload_s": 0.05, "health_s": 0.05}


def test_an_adapter_at_which_the_server_breaks_down_again_is_given_up(bench):
    server = settled(bench)
    bench.deploy("bad-3")
    bench.world.faults["load"] = [bench.world.dies] * 2
    bench.steps(server)

    assert bench.states() == {"bad-3": "failed", "blue-1": "ready", "red-2/step-10": "ready"}


def test_meanwhile_the_table_says_what_is_wrong(bench):
    bench.deploy("blue-1")
    bench.world.faults["start"] = [ModelUnavailable("no weights")]
    server = bench.server()
    for _ in range(3):
        server.step(server._rows())

    row = bench.deployments.get("blue-1")
    assert (row.state, row.error) == ("deploying", "no weights")
    assert "started anew" in bench.parts.routes.why_away("blue-1")


def test_a_server_that_breaks_down_again_and_again_is_given_up(bench):
    server = settled(bench)
    for _ in range(RESTARTS + 1):
        bench.world.faults["health"] = [FlashError("it ended\n  Error: too hot")] * 3
        for _ in range(3):
            bench.steps(server)

    assert set(bench.states().values()) == {"failed"}
    assert "too hot" in bench.deployments.get("blue-1").error
    assert len(bench.world.names("start")) == RESTARTS
    assert bench.world.live == []
    assert bench.routes == []


def test_while_a_server_that_hangs_is_stopped_those_who_ask_are_told(bench):
    server = settled(bench)
    told = []
    bench.world.faults["health"] = [FlashError("it hangs")] * 3
    bench.world.faults["stop"] = [
        lambda: told.append((bench.parts.routes.why_away("blue-1"), bench.states()["blue-1"]))
    ]
    for _ in range(3):
        bench.steps(server)

    assert told == [("the server of blue-1 broke down; it is started anew", "deploying")]
    assert bench.states() == {"blue-1": "ready", "red-2/step-10": "ready"}


def test_each_restart_waits_twice_as_long(make_bench):
    bench = make_bench(pause_s=1000.0)
    bench.deploy("blue-1")
    bench.world.faults["start"] = [ModelUnavailable("no weights")]
    server = bench.server()
    bench.steps(server)

    assert len(bench.world.names("start")) == 1
    assert bench.states() == {"blue-1": "deploying"}


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (OUT_OF_MEMORY, "memory ran out: the server"),
        ("the server ended with code 9", "it was killed, as the system does where memory runs out"),
    ],
)
def test_memory_that_ran_out_is_said(bench, said, what):
    bench.deploy("blue-1")
    bench.world.faults["start"] = [ModelUnavailable(said)] * FIRST_TRIES
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.error.startswith(what)
    assert row.error.count("the server") == 1
    assert "smaller" in row.hint


def test_a_start_that_nobody_wants_any_more_is_given_up_at_once(bench, hang):
    def nobody_wants():
        bench.deployments.ask_gone("blue-1")
        hang()

    bench.deploy("blue-1")
    bench.world.faults["start"] = [nobody_wants]
    server = bench.server()
    server.step(server._rows())
    server.step(server._rows())
    with pytest.raises(Abandoned):
        server.step(server._rows())
    bench.steps(server)

    assert bench.states() == {"blue-1": "undeployed"}


def test_a_start_that_hangs_is_given_up_and_stopped_when_it_answers_in_the_end(make_bench):
    bench = make_bench(start_s=0.05)
    bench.deploy("blue-1")
    late = threading.Event()
    bench.world.faults["start"] = [late.wait]
    server = bench.server()
    for _ in range(3):
        server.step(server._rows())
    bench.deployments.ask_gone("blue-1")
    late.set()
    bench.steps(server)

    assert bench.states() == {"blue-1": "undeployed"}
    for thread in threading.enumerate():
        if thread.name == "flash-provider-call":
            thread.join()
    assert bench.world.live == []


def test_a_request_without_end_does_not_hold_up_an_undeploy_for_ever(make_bench):
    bench = make_bench(drain_s=0.0)
    server = settled(bench)
    bench.deployments.ask_gone("blue-1")
    with bench.parts.routes.using(bench.parts.routes.find("blue-1")):
        bench.steps(server)

    assert bench.states()["blue-1"] == "undeployed"


def test_the_last_one_stops_the_server(bench):
    server = settled(bench)
    for name in ("blue-1", "red-2/step-10"):
        bench.deployments.ask_gone(name)
    bench.steps(server)

    assert set(bench.states().values()) == {"undeployed"}
    assert bench.world.live == []
    assert bench.routes == []


def test_with_other_settings_it_moves_to_a_server_of_its_own(bench):
    first = settled(bench)
    bench.deploy("blue-1", settings={"context_tokens": 64})
    second = bench.server()
    assert second._key != first._key
    bench.steps(second)
    bench.steps(first)

    assert bench.states() == {"blue-1": "ready", "red-2/step-10": "ready"}
    assert len(bench.world.live) == 2
    assert bench.parts.routes.find("blue-1").context_tokens == 64
    assert bench.routes == ["blue-1", "red-2/step-10", BASE]


def test_settings_that_the_backend_does_not_know_fail(bench):
    bench.deploy("blue-1", settings={"contxt_tokens": 64})
    bench.steps(bench.server())

    assert "contxt_tokens: unknown key" in bench.deployments.get("blue-1").error


@pytest.mark.parametrize("after", range(12))
def test_a_gateway_that_ends_after_any_step_is_followed_by_one_that_goes_on(bench, after):
    bench.deploy("blue-1")
    bench.deploy("red-2")
    first = bench.server()
    for _ in range(after):
        first.step(first._rows())
        if after > 8:
            bench.deployments.ask_gone("red-2")
    for backend in list(bench.world.live):
        backend.stop()
    routes = type(bench.parts.routes)()
    bench.parts = attrs.evolve(bench.parts, routes=routes)
    second = bench.server()
    bench.steps(second)

    gone = "undeployed" if after > 8 else "ready"
    assert bench.states() == {"blue-1": "ready", "red-2": gone}
    assert routes.find("blue-1").address.url.endswith(
        f"{bench.world.live[0].server.server_port}/v1"
    )
    assert adapter_folder(bench.home, "red-2").exists() == (gone == "ready")


def test_the_log_of_a_server_keeps_its_end_while_the_server_writes_on(bench, monkeypatch):
    monkeypatch.setattr(servers, "LOG_BYTES", 1000)
    server = settled(bench)
    path = server._starter.log
    with path.open("ab", buffering=0) as log:
        for number in range(200):
            log.write(b"line %03d\n" % number)
        server._look_after(server._rows())
        log.write(b"line 200\n")

    lines = path.read_text().splitlines()
    assert lines == [f"line {number:03d}" for number in range(201 - len(lines), 201)]
    assert 500 - 9 <= path.stat().st_size <= 500 + 9
