"""From tables to figures: the arithmetic behind the page, one fact each."""

from __future__ import annotations

import math

import pytest

from tasks.report import measures, quality, trust


def test_a_waterfall_by_parts_keeps_the_engines_order_within_groups() -> None:
    parts = [
        {"name": "host", "us": 5.0},
        {"name": "qkv", "us": 30.0},
        {"name": "draft", "us": 20.0},
        {"name": "moe", "us": 45.0},
    ]
    cycle = measures.cycle_parts({"cycle_us": 100.0, "parts": parts}, {})
    assert cycle and [part["name"] for part in cycle["parts"]] == ["draft", "qkv", "moe", "host"]
    assert [part["group"] for part in cycle["parts"]] == ["draft", "verify", "verify", "host"]


def test_time_that_no_part_explains_is_shown_as_such() -> None:
    cycle = measures.cycle_parts({"cycle_us": 100.0, "parts": [{"name": "qkv", "us": 60.0}]}, {})
    assert cycle and cycle["parts"][-1] == {"name": "not attributed", "group": "host", "us": 40.0}


def test_seconds_by_group_are_divided_by_cycles() -> None:
    cycle = measures.cycle_parts({"seconds": {"qkv": 0.5, "draft": 0.25}, "cycles": 1000}, {})
    assert cycle and cycle["total_us"] == 750.0


def test_the_users_view_of_a_cycle_is_not_a_part_of_it() -> None:
    cycle = measures.cycle_parts(
        None, {"cycle.us": 100.0, "cycle.qkv_us": 100.0, "cycle.client_us": 130.0, "cycle.outside_us": 30.0}
    )
    assert cycle and [part["name"] for part in cycle["parts"]] == ["qkv"]


def test_without_a_cycle_there_is_none() -> None:
    assert measures.cycle_parts({}, {}) is None


def test_the_headline_splits_speed_and_shows_what_is_outside_the_engine() -> None:
    metrics = {
        "latency.tps_per_user.p50": 240.0,
        "acceptance.length": 2.5,
        "cycle.us": 10_000.0,
        "baseline.tps_per_user.p50": 120.0,
    }
    head = measures.headline(metrics, None)
    assert head["implied_tps"] == 250.0 and head["speedup"] == 2.0
    assert head["outside_engine_share"] == pytest.approx(0.04)


def test_a_chain_of_drafts_yields_one_plus_what_is_reached() -> None:
    assert measures.chain_length([{"rate": 0.5}, {"rate": 0.5}]) == 1.75


def test_an_interval_at_certainty_still_has_width() -> None:
    low, high = measures.wilson(20, 20)
    assert 0.8 < low < 0.9 and high == 1.0


def test_positions_by_domain_are_not_mistaken_for_positions() -> None:
    found = measures.acceptance(None, {"acceptance.position.1": 0.8, "acceptance.position.1.code": 0.9})
    assert found and [point["rate"] for point in found["domains"][0]["positions"]] == [0.8]


def test_a_position_never_drafted_is_left_out() -> None:
    rows = [
        {"domain": "all", "position": 1, "drafted": 10, "accepted": 0, "rate": 0.0},
        {"domain": "all", "position": 2, "drafted": 0, "accepted": 0, "rate": math.nan},
    ]
    found = measures.acceptance(rows, {})
    assert found and len(found["domains"][0]["positions"]) == 1


def request(user: int, sent_s: float, profile: str = "parallel_2", tokens: int = 100) -> dict[str, object]:
    return {
        "profile": profile,
        "user": user,
        "sent_s": sent_s,
        "duration_ms": 1000.0,
        "output_tokens": tokens,
        "tps_user": 110.0,
        "ok": True,
    }


def test_server_speed_is_all_tokens_over_the_wall() -> None:
    points = measures.throughput([request(0, 0.0), request(1, 0.0), request(0, 1.0), request(1, 1.0)])
    assert points == [{"profile": "parallel_2", "users": 2, "tps_user": 110.0, "tps_server": 200.0}]


def test_arrivals_by_the_clock_have_no_number_of_users() -> None:
    rows = [request(0, 0.0, "open_loop_5")]
    assert measures.throughput(rows) == [] and measures.single_user(rows) == []


def test_failed_requests_are_counted_and_left_out() -> None:
    rows = [{**request(0, float(at), "one_in_flight"), "ttft_ms": 30.0 + at, "ok": at != 2} for at in range(3)]
    found = measures.latency(rows)
    assert found and (found["requests"], found["good"]) == (3, 2)
    assert found["series"][0]["p50"] == 30.5


def problems(pairs: list[tuple[int, int]]) -> list[dict[str, object]]:
    return [
        {"task": "code", "id": str(at), "side": side, "correct": float(value)}
        for at, pair in enumerate(pairs)
        for side, value in zip(("source", "served"), pair, strict=True)
    ]


def test_accuracy_is_paired_by_problem() -> None:
    found = quality.accuracy(problems([(1, 1)] * 98 + [(1, 0), (0, 1)]), {}, {"margin": 0.02, "alpha": 0.05})
    assert found
    task = found["tasks"][0]
    assert (task["difference"], task["lost"], task["won"]) == (0.0, 1, 1)
    assert task["low"] < 0 < task["high"]


def test_validates_own_interval_wins_over_ours() -> None:
    metrics = {"accuracy.code.difference": 0.01, "accuracy.code.low": -0.005, "accuracy.code.high": 0.02}
    found = quality.accuracy(problems([(1, 1), (1, 0)]), metrics, {})
    assert found and (found["tasks"][0]["low"], found["tasks"][0]["high"]) == (-0.005, 0.02)


def test_several_samples_of_a_problem_count_once() -> None:
    rows = [
        {"task": "t", "id": "1", "side": side, "correct": value}
        for side, value in (("source", 1.0), ("source", 0.0), ("served", 1.0), ("served", 1.0))
    ]
    found = quality.accuracy(rows, {}, {})
    assert found and found["tasks"][0]["problems"] == 1 and found["tasks"][0]["difference"] == 0.5


def test_a_side_that_is_missing_gives_no_difference() -> None:
    rows = [{"task": "t", "id": "1", "side": "served", "correct": 1.0}]
    assert quality.accuracy(rows, {}, {}) is None


def test_the_worst_tensor_of_each_layer_and_kind_is_kept() -> None:
    rows = [
        {"name": f"model.layers.3.{part}", "kind": "weight", "sqnr_db": db, "saturation_share": 0.0}
        for part, db in (("a", 30.0), ("b", 21.0), ("c", 25.0))
    ]
    found = quality.quantization(rows)
    assert found and [(row["layer"], row["sqnr_db"]) for row in found["layers"]] == [(3, 21.0)]
    assert found["most_saturated"] is None


@pytest.mark.parametrize(
    ("name", "layer"), [("model.layers.17.self_attn.q_proj", 17), ("lm_head", None), ("layers.x.3", None)]
)
def test_layers_are_read_from_names(name: str, layer: int | None) -> None:
    assert quality.layer_of(name) == layer


# -- what the figures rest on
def test_every_load_has_a_row_in_a_sensible_order() -> None:
    metrics = {
        "latency.tps_per_user.p50": 300.0,
        "latency.parallel_64.tps_server": 900.0,
        "latency.parallel_10.tps_server": 800.0,
        "latency.parallel_10.tps_per_user.p50": 90.0,
        "latency.open_loop_2_5.tps_server": 100.0,
        "latency.open_loop_2_5.ttft_intended_ms.p90": 44.0,
    }
    rows = trust.loads(metrics)
    assert [row["load"] for row in rows] == ["one user", "10 users", "64 users", "2.5 arrivals/s, open loop"]
    assert (rows[1]["tps_user"], rows[2]["tps_user"], rows[3]["wait_ms"]) == (90.0, None, 44.0)
    assert trust.loads({}) == []


def test_the_engine_alone_is_shown_whole_or_not_at_all() -> None:
    whole = {"forced.tps_per_user.p50": 500.0, "forced.acceptance_length": 3.0, "forced.cycle_us": 5900.0}
    assert trust.engine_alone(whole) == {"tps": 500.0, "length": 3.0, "cycle_us": 5900.0}
    assert trust.engine_alone({**whole, "forced.cycle_us": float("nan")}) is None


def test_grounds_say_how_far_the_stopwatch_is_off() -> None:
    said = trust.grounds({"client.error_percent": 0.31, "client.ttft_error_ms": -0.05})
    assert said[0].endswith("known speed to within 0.310 % and 0.0500 ms of its time to first token.")
    assert trust.grounds({}) == []
