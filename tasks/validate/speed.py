"""The speed part of a validation: which loads are run against which server, and the metrics made of them.

  candidate   one user (the figures), then each number of users, then each arrival rate; engine counters around the
              first give the waterfall
  forced      the same engine at a fixed acceptance: its speed without the draft's luck
  source      one user, the baseline of relative gates

It refuses to average loads: each has its own name in the metrics (`latency.*`, `latency.parallel_10.*`,
`latency.open_loop_4.*`, `forced.*`, `baseline.*`).

Run: part of `validate`; the loads alone are in load.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specs.errors import NetworkError
from tasks.validate import profiles
from tasks.validate.client import Ask, CountTokens, Endpoint
from tasks.validate.load import fetch, one_in_flight, open_loop, parallel_users
from tasks.validate.waterfall import cycle_metrics, read_counters, waterfall

BASELINE_REQUESTS = 8
Rows = list[dict[str, Any]]


def connect(base_url: str, count: CountTokens) -> Endpoint:
    """The endpoint with the name it serves its model under. Raises NetworkError when it does not say."""
    endpoint = Endpoint(base_url, "", count)
    reply = fetch(endpoint, "/v1/models")
    try:
        if reply is None or reply.status != 200:
            raise ValueError(f"status {reply.status}" if reply else "no answer")
        name = json.loads(reply.body)["data"][0]["id"]
    except (ValueError, LookupError, TypeError) as error:
        raise NetworkError(
            f"the endpoint does not list its model: {error}", f"{base_url}/v1/models", "look at the server's log"
        ) from error
    return Endpoint(base_url, str(name), count)


def warm_up(endpoint: Endpoint, asks: Sequence[Ask]) -> None:
    """Raises NetworkError when one has no answer: nothing is measured on such an endpoint."""
    for ask in asks:
        (row,) = one_in_flight(endpoint, [ask])
        if not row["ok"]:
            what = f"the endpoint does not answer a request: {row['findings']} (status {row['status']})"
            raise NetworkError(what, endpoint.base_url, "look at the server's log")


def counters(endpoint: Endpoint) -> dict[str, float]:
    reply = fetch(endpoint, "/metrics")
    return read_counters(reply.body.decode("utf-8", "replace")) if reply and reply.status == 200 else {}


def alone(
    endpoint: Endpoint, asks: Sequence[Ask], on_done: Callable[[int], None] | None = None
) -> tuple[Rows, dict[str, Any]]:
    """One user's rows and the waterfall of their cycles."""
    before = counters(endpoint)
    rows = one_in_flight(endpoint, asks, on_done)
    return rows, waterfall(before, counters(endpoint), rows)


def one_user(rows: Rows, made: Mapping[str, Any]) -> dict[str, float]:
    return profiles.latency_metrics(rows) | cycle_metrics(made) | profiles.integrity_metrics(rows)


def crowds(endpoint: Endpoint, asks: Sequence[Ask], latency: Mapping[str, Any]) -> tuple[Rows, dict[str, float]]:
    """Every load of the spec with more than one request in flight."""
    rows: Rows = []
    metrics: dict[str, float] = {}
    for users in latency["users"]:
        made = parallel_users(endpoint, asks, users)
        metrics |= _crowd(made, f"latency.parallel_{users}")
        rows += made
    for rate in latency["arrivals_per_s"]:
        made = open_loop(endpoint, asks, rate)
        name = "latency.open_loop_" + f"{rate:g}".replace(".", "_")
        metrics |= _crowd(made, name) | profiles.waiting_metrics(made, name)
        rows += made
    return rows, metrics


def _crowd(rows: Rows, name: str) -> dict[str, float]:
    return {f"{name}.tps_server": profiles.server_tps(rows), **profiles.latency_metrics(rows, name)}


def engine_alone(endpoint: Endpoint, asks: Sequence[Ask]) -> dict[str, float]:
    """`forced.*` from a server with forced acceptance; no answer of it is looked at."""
    rows, made = alone(endpoint, asks)
    good = [row for row in rows if row["cycles"] > 0]
    cycles = sum(row["cycles"] for row in good)
    accepted = sum(sum(row["accepted_by_position"]) for row in good)
    metrics = {**profiles.latency_metrics(rows, "forced"), "forced.cycle_us": made["cycle_us"] or made["client_us"]}
    metrics["forced.acceptance_length"] = 1 + accepted / cycles if cycles else float("nan")
    return {name: float("nan") if value is None else value for name, value in metrics.items()}
