"""What is wanted is brought about step by step, and nothing is served that is not proved."""

import attrs
import pytest
from deploy_bench import BARE, BASE, PROMPT, settled

from flash.errors import ModelUnavailable, StoreError, UsageError
from flash.gateway.servers import FIRST_TRIES
from flash.plane.copies import adapter_folder
from flash.values import Address


def test_a_deployment_is_checked_loaded_proved_and_then_routed(bench):
    bench.deploy("blue-1", stop=("END",), thinking=True)
    server = bench.server()
    rows = server._rows()

    server.step(rows)
    assert bench.world.calls == []
    assert "ask again soon" in bench.parts.routes.why_away("blue-1")
    bench.steps(server)

    assert bench.states() == {"blue-1": "ready"}
    assert bench.routes == ["blue-1", BASE]
    route = bench.parts.routes.find("blue-1")
    assert (route.adapter, route.thinking, route.stop) == (True, True, ("END",))
    assert not route.streams_tools  # as its backend's record says
    assert [name for name, *_ in bench.world.calls] == [
        "start", "load", "tokens", "log_probs", "log_probs", "smoke", "health",
    ]  # fmt: skip


def test_the_report_has_the_figures_the_first_answer_and_the_seconds_of_each_step(bench):
    bench.deploy("blue-1")
    bench.steps(bench.server())

    report = bench.deployments.get("blue-1").report
    assert report["golden"]
    assert report["parity"]["mean"] == 0.0
    assert report["parity"]["proves_identity"]
    assert report["smoke"] == {"tokens": 2, "compared": 2, "agreeing": 2}
    assert set(report["seconds"]) == {"start", "load", "template", "parity", "smoke"}


def test_without_a_golden_set_the_first_answer_decides_and_the_report_says_so(bench):
    bench.deploy("old-1", golden=False)
    bench.steps(bench.server())

    row = bench.deployments.get("old-1")
    assert row.state == "ready"
    assert (row.report["golden"], row.report["parity"]) == (False, None)
    assert bench.world.names("tokens") == []


def test_of_a_file_that_changed_nothing_is_loaded(bench):
    bench.deploy("blue-1")
    (adapter_folder(bench.home, "blue-1") / "adapter_config.json").write_text('{"r": 8}')

    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "adapter_config.json is not what was deployed" in row.error
    assert bench.world.calls == []


def test_for_an_adapter_of_another_model_no_server_is_started(bench):
    bench.deploy("blue-1", size=16)
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "q_proj as [16, 16]" in row.error
    assert bench.world.calls == []


def test_another_chat_template_is_refused_where_the_tokens_differ(bench):
    bench.deploy("blue-1")
    bench.world.tokens = [*PROMPT[:-1], 77]
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "chat template is not that of training" in row.error
    assert "differ from token 3 on" in row.error


def test_over_the_limit_nothing_is_served_and_the_figures_are_told(bench):
    bench.deploy("blue-1")
    bench.world.log_probs["blue-1"] = BARE
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "off by 2.3 nats on average" in row.error
    assert "--allow-drift" in row.hint
    assert row.report["parity"]["mean"] == pytest.approx(2.35)
    assert not row.report["parity"]["holds"]
    assert bench.parts.routes.find("blue-1") is None
    assert bench.world.names("unload") == ["blue-1"]


def test_what_the_backend_refuses_fails_alone(bench):
    server = settled(bench)
    bench.world.faults["load"] = [UsageError("rank 512 is over max_lora_rank", hint="set it")]
    bench.deploy("wide-3", rank=512)
    bench.steps(server)

    assert bench.states() == {"blue-1": "ready", "red-2/step-10": "ready", "wide-3": "failed"}
    row = bench.deployments.get("wide-3")
    assert (row.error, row.hint) == ("rank 512 is over max_lora_rank", "set it")
    assert bench.world.names("start") == []


def test_a_server_that_never_answers_fails_with_its_last_words(bench):
    bench.deploy("blue-1")
    said = ModelUnavailable("it ended with code 1 as it started\n  Error: no weights", hint="log")
    bench.world.faults["start"] = [said] * FIRST_TRIES
    bench.steps(bench.server())

    row = bench.deployments.get("blue-1")
    assert row.state == "failed"
    assert "Error: no weights" in row.error
    assert len(bench.world.names("start")) == FIRST_TRIES


def test_undeployed_is_first_out_of_reach_then_unloaded_then_removed(bench):
    server = settled(bench)
    route = bench.parts.routes.find("blue-1")
    bench.deployments.ask_gone("blue-1")
    with bench.parts.routes.using(route):
        bench.steps(server)
        assert bench.parts.routes.find("blue-1") is None
        assert bench.world.names("unload") == []
        assert bench.states()["blue-1"] == "undeploying"
    bench.steps(server)

    assert bench.world.names("unload") == ["blue-1"]
    assert bench.states() == {"blue-1": "undeployed", "red-2/step-10": "ready"}
    assert not adapter_folder(bench.home, "blue-1").exists()
    assert bench.routes == ["red-2/step-10", BASE]


def test_what_is_deployed_anew_is_loaded_and_proved_anew(bench):
    server = settled(bench)
    bench.deployments.ask_gone("blue-1")
    bench.deploy("blue-1", allow_drift=True)
    bench.steps(server)

    assert bench.states() == {"blue-1": "ready", "red-2/step-10": "ready"}
    assert bench.world.names("unload") == ["blue-1"]
    assert bench.world.names("load") == ["blue-1"]


def test_a_proof_that_comes_late_serves_nothing_that_is_not_wanted_any_more(bench):
    bench.deploy("blue-1")
    bench.deploy("red-2")
    bench.world.faults["log_probs"] = [lambda: bench.deployments.ask_gone("blue-1")]
    bench.steps(bench.server())

    assert bench.states() == {"blue-1": "undeployed", "red-2": "ready"}
    assert bench.routes == ["red-2", BASE]


def test_who_reads_that_it_is_ready_is_answered_at_once(bench, monkeypatch):
    bench.deploy("blue-1")
    open_then, moved = {}, bench.deployments.moved

    def look(row, state, **said):
        open_then[state] = row.id in bench.routes
        return moved(row, state, **said)

    monkeypatch.setattr(bench.deployments, "moved", look)
    bench.steps(bench.server())
    assert open_then == {"ready": True}


def test_what_could_not_be_said_to_be_ready_is_not_served_before_it_was_proved_again(
    bench, monkeypatch
):
    bench.deploy("blue-1")
    server = bench.server()

    def fail(*_, **__):
        raise StoreError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(bench.deployments, "moved", fail)
        with pytest.raises(StoreError):
            bench.steps(server)
    assert bench.routes == []
    bench.steps(server)
    assert (bench.states(), bench.routes) == ({"blue-1": "ready"}, ["blue-1", BASE])
    assert bench.world.names("load") == ["blue-1", "blue-1"]


def test_a_proof_that_comes_late_leaves_the_route_of_the_server_that_was_faster(bench):
    bench.deploy("blue-1")
    server = bench.server()

    def moves():
        bench.deployments.ask_gone("blue-1")
        other = Address("http://127.0.0.1:1/v1", "another")
        bench.parts.routes.set(attrs.evolve(server._live.route(None), name="blue-1", address=other))

    bench.world.faults["log_probs"] = [moves]
    while not bench.world.names("log_probs"):
        server.step(server._rows())
    assert bench.parts.routes.find("blue-1").address.key == "another"
