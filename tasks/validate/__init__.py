"""Stage `validate`: measure the candidate and its source, then say PASS, FAIL or UNDERPOWERED, with every reason.

Order: the client tests itself; the candidate is timed (one user, then ten); both sides answer the same problems; the
paired test and the gates decide. It leaves requests, problems and acceptance as checked tables, the waterfall, gates
and verdict.

It refuses to time with a client that fails its own test, and to pass what it could not measure. It never promotes
anything.

Run: by `kilotok run SPEC`; pieces alone: `python -m tasks.validate.selftest`, `python -m tasks.validate.accuracy`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tasks.job import Job, Progress

    Serve = Callable[[Path], str]
    Source = Callable[[Path, Path, Path, str], AbstractContextManager[str]]

PARALLEL_USERS = 10
BASELINE_REQUESTS = 8
WARM_UP_REQUESTS = 3
USAGE_LIMIT_PERCENT = 2.0
STEPS = ("client", "speed", "served answers", "source speed", "source answers", "verdict")


def build(job: Job, progress: Progress, serve: Serve | None = None, source: Source | None = None) -> dict[str, float]:
    """See the module docstring. Raises StageFailed when the client fails its self-test or a server does not come up.

    `serve` gives the candidate's base URL for its deployment.json, `source` runs the source's server; both are for
    tests.
    """
    from tasks.validate.reference import source_server

    if serve is None:
        from tasks.deployment import ensure_running

        serve = ensure_running
    return _Validation(job, progress).run(serve, source or source_server)


class _Validation:
    """One validation. Holds what its steps share; every step is resumable by what it left in scratch."""

    def __init__(self, job: Job, progress: Progress) -> None:
        from tasks.prompts import read_prompts, resolve
        from tasks.validate.client import token_counter
        from tasks.validate.problems import by_task, read_problems

        self.job, self.progress = job, progress
        self.settings = job.spec["validate"]
        self.accuracy, self.latency = self.settings["accuracy"], self.settings["latency"]
        self.draft_tokens = int(job.spec["engine"]["draft_tokens"])
        self.count = token_counter(job.inputs["download"] / "tokenizer.json")
        self.problems_path = resolve(self.accuracy["problems"], job) if self.accuracy.get("problems") else None
        problems = read_problems(self.problems_path) if self.problems_path else []
        self.local = by_task(problems, self.accuracy["tasks"], self.accuracy.get("samples"), str(self.problems_path))
        prompts = self.latency.get("prompts")
        self.prompts: list[Any] = list(read_prompts(resolve(prompts, job))) if prompts else list(problems)
        self.asks = self.choose(self.latency["requests"])  # refuses too few prompts before anything is spent
        self.metrics: dict[str, float] = {}
        self.findings: dict[str, dict[str, int]] = {}

    def choose(self, number: int, offset: int = 0) -> list[Any]:
        from tasks.validate.profiles import choose

        return choose(self.prompts, self.latency["profile"], number, self.latency["max_new_tokens"], self.count, offset)

    def run(self, serve: Serve, source: Source) -> dict[str, float]:
        from tasks.validate.acceptance import acceptance_frame, acceptance_metrics
        from tasks.validate.accuracy import accuracy_metrics, problems_frame, verdicts
        from tasks.validate.client import speculation
        from tasks.validate.tables import requests_frame, write

        self.test_client()
        served_url = serve(self.job.inputs["deploy"] / "deployment.json")
        rows = self.time_served(served_url)
        write(requests_frame(rows, "requests.parquet"), self.job.out / "requests.parquet")
        served = self.answers("served", served_url, 2)
        inputs = self.job.inputs
        with source(inputs["download"], inputs["build_engine"], self.job.scratch, self.backend) as source_url:
            baseline = self.time_source(source_url)
            write(requests_frame(baseline, "baseline_requests.parquet"), self.job.out / "baseline_requests.parquet")
            reference = self.answers("source", source_url, 4)
        self.step(5)
        usages = [(row["domain"], row) for row in rows if row["ok"]]
        usages += [(task, speculation(usage)) for task, usage in served["usages"]]
        acceptance = acceptance_frame(usages, self.draft_tokens)
        write(acceptance, self.job.out / "acceptance.parquet")
        problems = problems_frame(reference["rows"] + served["rows"])
        write(problems, self.job.out / "problems.parquet")
        results = verdicts(problems, self.accuracy["margin"], self.accuracy["alpha"], self.accuracy["power"])
        self.metrics.update(acceptance_metrics(acceptance) | accuracy_metrics(results))
        self.conclude({task: asdict(result) for task, result in results.items()})
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}

    @property
    def backend(self) -> str:
        return str(self.job.spec["engine"].get("backend") or "native")

    def step(self, number: int, note: str = "") -> None:
        self.progress(number, len(STEPS), note or STEPS[min(number, len(STEPS) - 1)])

    # -- measuring
    def test_client(self) -> None:
        """Twice at most: on a shared machine one hiccup is not the client's fault, two are a machine that cannot
        time.
        """
        from specs.errors import StageFailed
        from tasks.validate.selftest import ERROR_LIMIT_PERCENT, before_a_run

        self.step(0)
        for _ in range(2):
            self.metrics.update(before_a_run())
            if self.metrics["client.error_percent"] <= ERROR_LIMIT_PERCENT:
                return
        error = f"{self.metrics['client.error_percent']:.1f}%"
        raise StageFailed(
            f"the client mistimes a mock of known timing by {error}",
            "self-test",
            f"free the CPU; at most {ERROR_LIMIT_PERCENT:g}%",
        )

    def endpoint(self, base_url: str) -> Any:
        """The endpoint with the name it serves its model under. Raises NetworkError when it does not say."""
        from specs.errors import NetworkError
        from tasks.validate.client import Endpoint
        from tasks.validate.load import fetch

        endpoint = Endpoint(base_url, "", self.count)
        reply = fetch(endpoint, "/v1/models")
        try:
            if reply is None or reply.status != 200:
                raise ValueError(f"status {reply.status}" if reply else "no answer")
            name = json.loads(reply.body)["data"][0]["id"]
        except (ValueError, LookupError, TypeError) as error:
            raise NetworkError(
                f"the endpoint does not list its model: {error}", f"{base_url}/v1/models", "look at the server's log"
            ) from error
        return Endpoint(base_url, str(name), self.count)

    def time_served(self, base_url: str) -> list[dict[str, Any]]:
        """One user (the figures), then ten in parallel; engine counters around the former give the waterfall."""
        from tasks.validate import profiles
        from tasks.validate.load import one_in_flight, parallel_users
        from tasks.validate.waterfall import cycle_metrics, waterfall

        self.step(1)
        endpoint = self.endpoint(base_url)
        self.warm_up(endpoint)
        before = self.counters(endpoint)
        total = len(self.asks)
        alone = one_in_flight(endpoint, self.asks, lambda done: self.progress(1 + done / total, len(STEPS), STEPS[1]))
        made = waterfall(before, self.counters(endpoint), alone)
        (self.job.out / "waterfall.json").write_text(json.dumps(made, indent=1))
        crowd = parallel_users(endpoint, self.asks, PARALLEL_USERS)
        self.metrics.update(profiles.latency_metrics(alone) | cycle_metrics(made) | profiles.integrity_metrics(alone))
        self.metrics["latency.failed_requests"] += sum(not row["ok"] for row in crowd)
        name = f"latency.parallel_{PARALLEL_USERS}"
        self.metrics.update({f"{name}.tps_server": profiles.server_tps(crowd), **profiles.latency_metrics(crowd, name)})
        self.findings["served"] = profiles.findings([*alone, *crowd])
        return [*alone, *crowd]

    def time_source(self, base_url: str) -> list[dict[str, Any]]:
        from tasks.validate import profiles
        from tasks.validate.load import one_in_flight

        self.step(3)
        endpoint = self.endpoint(base_url)
        self.warm_up(endpoint)
        rows = one_in_flight(endpoint, self.asks[:BASELINE_REQUESTS])
        self.metrics.update(profiles.latency_metrics(rows, "baseline"))
        self.findings["source"] = profiles.findings(rows)
        return rows

    def warm_up(self, endpoint: Any) -> None:
        """With prompts the measured run does not send, if any are left. Raises NetworkError when one has no answer."""
        from specs.errors import InputError, NetworkError
        from tasks.validate.load import one_in_flight

        try:
            asks = self.choose(WARM_UP_REQUESTS, len(self.asks))
        except InputError:
            asks = self.asks[-WARM_UP_REQUESTS:]
        for ask in asks:
            (row,) = one_in_flight(endpoint, [ask])
            if not row["ok"]:
                what = f"the endpoint does not answer a request: {row['findings']} (status {row['status']})"
                raise NetworkError(what, endpoint.base_url, "look at the server's log")

    def counters(self, endpoint: Any) -> dict[str, float]:
        from tasks.validate.load import fetch
        from tasks.validate.waterfall import read_counters

        reply = fetch(endpoint, "/metrics")
        return read_counters(reply.body.decode("utf-8", "replace")) if reply and reply.status == 200 else {}

    def answers(self, side: str, base_url: str, step: int) -> dict[str, Any]:
        """One side's answers; from scratch when an interrupted validation already has them."""
        from tasks.validate.accuracy import Side, ask

        self.step(step)
        kept = self.job.scratch / f"answers-{side}.json"
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        total = sum(len(problems) for problems in self.local.values()) or 1

        def on_answer(done: int) -> None:
            self.progress(step + min(done / total, 1), len(STEPS), STEPS[step])

        model = self.endpoint(base_url).model
        answers = ask(
            Side(side, base_url, model, in_flight=self.slots()),
            self.accuracy["tasks"],
            self.local,
            self.job.scratch / "lm_tasks",
            int(self.accuracy["max_new_tokens"]),
            self.accuracy.get("samples"),
            on_answer,
        )
        made = {"rows": answers.rows, "usages": answers.usages}
        _write_whole(kept, json.dumps(made))
        return made

    def slots(self) -> int:
        path = self.job.inputs["build_engine"] / "bundle.json"
        return int(json.loads(path.read_text(encoding="utf-8")).get("max_batch_size") or 16) if path.is_file() else 16

    # -- judging
    def conclude(self, accuracy: dict[str, dict[str, Any]]) -> None:
        from tasks.validate.gates import judge, passed

        spec_gates = [
            {name: value for name, value in gate.items() if value is not None}
            for gate in self.settings.get("gates") or ()
        ]
        last_good = (self.job.extra.get("last_good") or {}).get("metrics")
        results = judge(self.metrics, [*spec_gates, *self.own_gates()], last_good)
        rows = [_gate_row(result) for result in results if result.state != "FIRST"]
        warnings = [f"{result.metric}: {result.reason}" for result in results if result.state == "FIRST"]
        overall = accuracy["all"]
        only_warn = overall["verdict"] == "UNDERPOWERED" and self.accuracy.get("underpowered") == "warn"
        row = _accuracy_row(overall)
        if only_warn:
            warnings.append(row["reason"])
        else:
            rows.append(row)
        verdict = "PASS" if passed(results) else "FAIL"
        if overall["verdict"] == "FAIL" or (
            overall["verdict"] == "UNDERPOWERED" and verdict == "PASS" and not only_warn
        ):
            verdict = overall["verdict"]
        by_task = {task: entry for task, entry in accuracy.items() if task != "all"}
        record = {
            "verdict": verdict,
            "gates": rows,
            "warnings": warnings,
            "accuracy": by_task,
            "overall": overall,
            "findings": self.findings,
        }
        out: Path = self.job.out
        (out / "gates.json").write_text(json.dumps(rows, indent=1))
        (out / "verdict.json").write_text(json.dumps(record, indent=1))
        finite = {name: value for name, value in sorted(self.metrics.items()) if math.isfinite(value)}
        (out / "summary.json").write_text(json.dumps({"verdict": verdict, **finite}, indent=1))

    def own_gates(self) -> list[dict[str, Any]]:
        """Without these the other figures mean nothing, so no spec can leave them out."""
        from tasks.validate.selftest import ERROR_LIMIT_PERCENT

        return [
            {"metric": "client.error_percent", "at_most": ERROR_LIMIT_PERCENT},
            {"metric": "latency.failed_requests", "at_most": 0},
            {"metric": "latency.usage_error_percent", "at_most": USAGE_LIMIT_PERCENT},
        ]


def _gate_row(result: Any) -> dict[str, Any]:
    return {
        "metric": result.metric,
        "op": result.direction,
        "measured": result.value,
        "required": result.bound,
        "asked": result.asked,
        "unit": result.unit,
        "verdict": result.state,
        "reason": result.reason,
    }


def _accuracy_row(overall: dict[str, Any]) -> dict[str, Any]:
    reason = (
        f"{100 * overall['difference']:+.1f} points against the source on {overall['problems']} problems "
        f"(one-sided limits {100 * overall['lower']:+.1f} and {100 * overall['upper']:+.1f}, "
        f"p = {overall['p_value']:.3g})"
    )
    if overall["verdict"] == "UNDERPOWERED":
        reason += f"; too few to tell at a margin of {100 * overall['margin']:g} points"
        reason += f": {overall['samples_needed']} more problems needed"
    return {
        "metric": "accuracy.difference",
        "op": "at_least",
        "measured": overall["difference"],
        "required": -overall["margin"],
        "asked": "non-inferiority",
        "unit": "share",
        "kind": "accuracy",
        "verdict": overall["verdict"],
        "reason": reason,
    }


def _write_whole(path: Path, text: str) -> None:
    """So that a crash leaves either all answers or none."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
