"""bench/fleet_sim.py: what holds for any trace, cases that are known in closed form, and published statistics."""

import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import fleet_model  # noqa: E402
import fleet_sim  # noqa: E402
import fleet_trace  # noqa: E402
from fleet_trace import Session, Turn  # noqa: E402


def simulate(sessions, *events, **changes):
    settings, _ = fleet_sim.load_settings(changes=[f"{name}={json.dumps(value)}" for name, value in changes.items()])
    fleet = fleet_model.Fleet(sessions, settings)
    for at, action, *arguments in events:
        fleet.later(at, getattr(fleet, action), *arguments)
    return fleet.run()


def coding(sessions, seed=1, **changes):
    return fleet_trace.generate(replace(fleet_trace.CODING, **changes), sessions, 3600, seed)


SMALL = {"memory_bytes": 12e9, "disk_bytes": 20e9, "workers": 2}


@pytest.mark.parametrize("tail_rows", [True, False])
def test_bytes_and_tokens_are_conserved_and_each_turn_ends_once(tail_rows):
    sessions = coding(60, shared=0)
    fleet = simulate(sessions, tail_rows=tail_rows, **SMALL)
    report = fleet_sim.report(fleet)
    turns = sum(len(session.turns) for session in sessions)
    assert report["turns"] == turns == sum(tier["turns"] for tier in report["tiers"].values())
    assert report["tiers"]["disk"]["turns"] > 0 and report["tiers"]["bucket"]["turns"] > 0, "the test tries all tiers"
    row = fleet.set.kv_bytes_per_token
    again = report["tokens"]["computed"] + report["tokens"]["reused"] - report["tokens"]["prompt"]
    assert report["tokens"]["prompt"] == sum(turn.tokens_in for session in sessions for turn in session.turns)
    assert again == 0 if tail_rows else 0 < again < 256 * report["tiers"]["bucket"]["turns"]
    # What came to disks was computed or downloaded; what came to the bucket was uploaded.
    assert sum(worker.disk.added for worker in fleet.workers) == fleet.disk_written + fleet.down_bytes
    assert fleet.bucket.added == fleet.up_bytes
    answered = sum(turn.tokens_out for session in sessions for turn in session.turns)
    assert fleet.disk_written == (report["tokens"]["computed"] + answered) * row
    for tier in [fleet.bucket, *(tier for worker in fleet.workers for tier in (worker.memory, worker.disk))]:
        assert tier.added - tier.removed == tier.level == sum(tier.entries.values()) and tier.level >= 0
    assert all(worker.memory.peak <= fleet.set.memory_bytes and not worker.busy for worker in fleet.workers)


def test_a_shared_prefix_is_computed_and_uploaded_once():
    shape = replace(fleet_trace.CODING, prefixes=1, shared=14_848)
    fleet = simulate(fleet_trace.generate(shape, 20, 1e6, 3), workers=1)
    apart = simulate(fleet_trace.generate(shape, 20, 1e6, 3), workers=20)
    prefix = 14_848 * fleet.set.kv_bytes_per_token
    for one in (fleet, apart):
        assert one.bucket.entries[("prefix", "prefix-0")] == prefix
        first = [turn for turn in one.turns if turn[0] == "new"]
        assert sum(turn[4] == 0 for turn in first) == 1 and {turn[4] for turn in first} == {0, 14_848}
        assert one.bucket.added == one.up_bytes
    workers = sum(("prefix", "prefix-0") in worker.disk.entries for worker in apart.workers)
    assert apart.down_bytes == (workers - 1) * prefix


def test_the_same_seed_is_the_same_run_and_another_is_another():
    def told(seed):
        return fleet_sim.report(simulate(coding(20, seed), **SMALL))

    assert told(1) == told(1) != told(2)


def test_waiting_for_one_prompt_after_another_is_that_of_an_m_d_1_queue():
    """Pollaczek and Khinchine: prompts of one length that arrive at random wait load x service / (2 (1 - load))."""
    chance, at, sessions = random.Random(5), 0.0, []
    for number in range(10_000):
        at += chance.expovariate(0.7)
        sessions.append(Session(f"a{number}", at, turns=[Turn(100, 0, 1)]))
    fleet = simulate(sessions, workers=1, slots=1_000_000, prefill_tokens_per_s=100, get_latency_s=0, put_latency_s=0)
    waited = sum(turn[1] for turn in fleet.turns) / len(fleet.turns)
    assert waited == pytest.approx(1 + 0.7 / (2 * (1 - 0.7)), rel=0.06)
    assert fleet.workers[0].compute.busy == pytest.approx(10_000)


def pair(gap=1_000):
    return [Session("ada", 0.0, turns=[Turn(2_048, 0, 256), Turn(3_001, 2_304, 100, gap=gap)])]


def test_the_first_token_after_a_pause_takes_latency_bytes_and_the_new_tokens():
    def second(**changes):
        fleet = simulate(pair(), sleep_after_s=60, slots=1, **changes)
        return fleet, fleet.turns[1][:2]

    fleet, (tier, waited) = second()
    row, new = fleet.set.kv_bytes_per_token, 3_001 - 2_304
    assert (tier, waited) == ("disk", pytest.approx(0.0002 + 2_304 * row / 1e9 + new / 500))
    fleet, (tier, waited) = second(disk_bytes=0)
    assert (tier, waited) == ("bucket", pytest.approx(0.15 + 2_304 * row / 117e6 + new / 500))
    assert fleet.gets == 2 + 9 + 1, "head and generation once, nine segments, the save"
    assert fleet.down_bytes == 2_304 * row
    fleet, (tier, waited) = second(archive_after_s=500)
    assert (tier, waited) == ("computed", pytest.approx(3_001 / 500))
    fleet = simulate(pair())
    assert fleet.turns[1][:2] == ("memory", pytest.approx(new / 500)), "nobody sleeps while there is memory"


def test_a_turn_of_741_tokens_makes_the_requests_and_costs_what_is_published():
    sessions = [Session("ada", 0.0, turns=[Turn(1_981, 0, 219), Turn(2_200 + 741 - 219, 2_200, 219)])]
    fleet = simulate(sessions, workers=1)
    first = simulate([replace(sessions[0], turns=sessions[0].turns[:1])])
    assert fleet.puts - first.puts == 3 + 2, "it seals three segments; the save and the head"
    assert (fleet.puts - first.puts) * fleet.set.put_price == pytest.approx(0.000025)
    report = fleet_sim.report(fleet)
    leases = 2 * int(fleet.now / (10 / 3))
    assert report["requests"]["put"] == fleet.puts + leases
    storage = fleet.bucket.area / 1e9 / (30 * 86400) * 0.023
    assert report["dollars"]["total"] == pytest.approx((fleet.puts + leases) * 5e-6 + fleet.gets * 4e-7 + storage)


def test_a_killed_workers_agents_wait_for_its_lease_and_no_turn_is_lost():
    # At the first turn's end ada is its owner's; at 100 s that one dies.
    sessions = pair(gap=96)
    alone = simulate(pair(gap=96), workers=2)
    name = next(worker.name for worker in alone.workers if worker.disk.added)
    arrival = alone.now - alone.turns[1][2]
    fleet = simulate(sessions, (arrival - 1, "kill", name), workers=2)
    row = fleet.set.kv_bytes_per_token
    tier, waited = fleet.turns[1][:2]
    takeover = 1.25 * 10 - 1
    assert (tier, waited) == ("bucket", pytest.approx(takeover + 0.3 + 0.15 + 2_304 * row / 117e6 + 697 / 500))
    assert fleet.takeovers == fleet.moved == 1 and fleet.retried == 0
    during = simulate(pair(gap=96), (arrival + 0.5, "kill", name), workers=2)
    assert len(during.turns) == 2 and during.retried == 1


def test_draining_and_joining_lose_nothing_and_move_a_share():
    sessions = coding(80, gaps=((0, 100), (1, 200)))
    fleet = simulate(sessions, (4_000, "join"), (6_000, "drain", 0), workers=3)
    assert len(fleet.turns) == sum(len(session.turns) for session in sessions)
    assert not fleet.workers[0].memory.level, "a drained worker holds nobody"
    assert 0 < fleet.forwarded <= fleet.moved and fleet.retried == fleet.takeovers == 0
    assert all(agent.owner is not fleet.workers[0] for agent in fleet.agents.values())


def test_coding_sessions_have_the_published_statistics():
    found = fleet_trace.describe(coding(1_000, seed=1))
    for name, published, within in [
            ("turns_of_session_mean", 62, 0.1), ("prompt_p50", 109_000, 0.1), ("prompt_p90", 270_000, 0.1),
            ("peak_p50", 147_000, 0.1), ("growth_p50", 741, 0.06), ("growth_mean", 3_000, 0.06), ("out_p50", 219, 0.05),
            ("rewrites", 0.024, 0.1), ("gap_p50", 9.7, 0.05), ("gap_p90", 103, 0.1), ("gap_p99", 1_980, 0.15),
            ("gaps_over_10", 0.485, 0.03), ("gaps_over_60", 0.138, 0.05), ("gaps_over_300", 0.046, 0.08),
            ("idle_in_gaps_over_60", 0.93, 0.02)]:
        assert found[name] == pytest.approx(published, rel=within), name
    assert found["seen_before"] == pytest.approx(0.964, abs=0.005)


def test_sleeping_after_a_minute_keeps_the_published_share_in_memory():
    """Of turns that wake, and of KV token-seconds in memory, when agents sleep after 10, 60 and 300 s."""
    sessions = coding(250, shared=0)
    for after, woken, kept in ((10, 0.485, 0.088), (60, 0.138, 0.146), (300, 0.046, 0.243)):
        fleet = simulate(sessions, workers=1, sleep_after_s=after, memory_bytes=1e15, disk_bytes=1e15, slots=1e6,
                         prefill_tokens_per_s=1e12, decode_tokens_per_s=1e12, put_latency_s=0, net_bytes_per_s=1e15)
        report = fleet_sim.report(fleet)
        later = report["turns"] - report["tiers"]["new"]["turns"]
        assert report["tiers"]["disk"]["turns"] / later == pytest.approx(woken, rel=0.1)
        share = report["bytes"]["memory_mean"] / report["bytes"]["memory_if_none_slept"]
        assert share == pytest.approx(kept, abs=0.05), after  # published with the seconds that answers took


def test_chats_have_the_published_statistics():
    found = fleet_trace.describe(fleet_trace.generate(fleet_trace.CHAT, 7_630, 3_600, 1))
    for name, published, within in [("turns", 12_031, 0.03), ("prompt_mean", 12_035, 0.04), ("out_mean", 343, 0.04),
                                    ("seen_before", 0.366, 0.03)]:
        assert found[name] == pytest.approx(published, rel=within), name


def test_traces_of_each_published_form_are_read(tmp_path):
    coding_file = {"block_size": 64, "tool_tokens": 50, "system_tokens": 30, "requests": [
        {"t": 5.0, "in": 200, "out": 20, "hash_ids": [1, 2, 3, 4], "api_time": 2.0},
        {"t": 8.0, "type": "subagent", "requests": [{"t": 8.0, "in": 100, "out": 5, "hash_ids": [9, 10]}]},
        {"t": 17.0, "in": 300, "out": 30, "hash_ids": [1, 2, 3, 5, 6], "api_time": 1.0},
        {"t": 30.0, "in": 250, "out": 30, "hash_ids": [1, 7, 8, 9], "api_time": 1.0}]}
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "trace_0001.json").write_text(json.dumps(coding_file))
    sub, main = fleet_trace.read(tmp_path / "traces")
    assert (main.agent, main.start, main.shared) == ("trace_0001", 5.0, ("prefix-80", 80))
    assert [(turn.tokens_in, turn.kept, turn.tokens_out, turn.gap) for turn in main.turns] == [
        (200, 0, 20, 0), (300, 220, 30, 10), (250, 64, 30, 12)]
    assert (sub.agent, sub.start, sub.shared, len(sub.turns)) == ("trace_0001.1", 8.0, ("prefix-80", 80), 1)

    lines = [{"timestamp": 1000, "input_length": 1100, "output_length": 40, "hash_ids": [1, 2, 3]},
             {"timestamp": 2000, "input_length": 600, "output_length": 10, "hash_ids": [7, 8]},
             {"timestamp": 9000, "input_length": 1700, "output_length": 50, "hash_ids": [1, 2, 4, 5]}]
    (tmp_path / "mooncake.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    one, other = fleet_trace.read(tmp_path / "mooncake.jsonl")
    assert [(turn.tokens_in, turn.kept, turn.at) for turn in one.turns] == [(1100, 0, 1.0), (1700, 1140, 9.0)]
    assert [turn.tokens_in for turn in other.turns] == [600]

    (tmp_path / "azure.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,374,44\n"
                                        "2023-11-16 18:17:05.9799600,396,109\n")
    first, second = fleet_trace.read(tmp_path / "azure.csv")
    assert (first.start, second.start, second.turns[0].tokens_out) == (0, pytest.approx(2), 109)


def test_the_program_says_that_it_is_a_simulation_and_where_its_figures_are_from(tmp_path):
    def run(*args):
        command = [sys.executable, ROOT / "bench/fleet_sim.py", "--agents", "5", "--hours", "0.1", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run().stdout.startswith("SIMULATION: no model ran")
    settings = tmp_path / "measured.json"
    settings.write_text(json.dumps({"get_latency_s": {"value": 0.02, "source": "a measurement"}, "workers": 2}))
    report = json.loads(run("--json", "--settings", settings, "--set", "put_price=0").stdout)
    assert report["simulation"] is True and report["dollars"]["put"] == 0
    assert report["settings"]["get_latency_s"] == {"value": 0.02, "source": "a measurement"}
    assert report["settings"]["workers"] == {"value": 2, "source": str(settings)}
    assert all(entry["source"] for entry in report["settings"].values())
    for args, words in [(("--set", "worker=2"), "no setting 'worker'"), (("--set", "workers"), "NAME=VALUE"),
                        (("--set", "memory_bytes=1e6"), "more than a worker's memory"),
                        (("--trace", tmp_path / "x"), "x"), (("--set", "workers=0"), "no worker is left"),
                        (("--set", "get_latency_s=-1"), "-1"), (("--agents", 0), "no turn"),
                        (("--hours", "nan"), "nan"),
                        (("--event", "1:kill"), "no event"), (("--event", "1:join:3"), "no event"),
                        (("--event", "1:kill:99"), "no worker 99")]:
        failed = run(*args)
        assert failed.returncode == 1 and failed.stderr.startswith("fleet_sim: ") and words in failed.stderr
