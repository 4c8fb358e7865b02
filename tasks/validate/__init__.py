"""Stage `validate`: measure the candidate and its source, then say PASS, FAIL or UNDERPOWERED, with every reason.

Order: the client tests itself; the candidate is timed (one user, then more, then the engine alone); both sides answer
the same problems; the paired test and the gates decide; what failed gets its likely cause. It leaves requests,
problems and acceptance as checked tables, the waterfall, gates and verdict.

It refuses to time with a client that fails its own test, and to pass what it could not measure. It never promotes
anything.

Run: by `kilotok run SPEC`; pieces alone: `python -m tasks.validate.selftest`, `python -m tasks.validate.accuracy`.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tasks.deployment.plain import Starter
    from tasks.job import Job, Progress

    Serve = Callable[[Path], str]
    Source = Callable[[Path, Path, Path, str], AbstractContextManager[str]]

WARM_UP_REQUESTS = 3
DIALOGUES_READ = 64  # answers on which the draft is read again, teacher-forced
STEPS = ("client", "speed", "engine alone", "served answers", "source speed", "source answers", "verdict")


def build(
    job: Job,
    progress: Progress,
    serve: Serve | None = None,
    source: Source | None = None,
    starter: Starter | None = None,
) -> dict[str, float]:
    """See the module docstring. Raises StageFailed when the client fails its self-test or a server does not come up.

    `serve` gives the candidate's base URL for its deployment.json, `source` runs the source's server, `starter` says
    how trtllm-serve is started for it; all are for tests.
    """
    from functools import partial

    from tasks.validate.servers import source_server

    if serve is None:
        from tasks.deployment import ensure_running

        serve = ensure_running
    return _Validation(job, progress, starter).run(serve, source or partial(source_server, job=job, starter=starter))


class _Validation:
    """One validation. Holds what its steps share; every step is resumable by what it left in scratch."""

    def __init__(self, job: Job, progress: Progress, starter: Starter | None = None) -> None:
        from tasks.prompts import read_prompts, resolve
        from tasks.validate.accuracy import Questions
        from tasks.validate.client import token_counter
        from tasks.validate.problems import by_task, read_problems

        self.job, self.progress, self.starter = job, progress, starter
        self.settings = job.spec["validate"]
        self.accuracy, self.latency = self.settings["accuracy"], self.settings["latency"]
        self.draft_tokens = int(job.spec["engine"]["draft_tokens"])
        self.golden = self.settings["acceptance"]["golden"] if self.draft_tokens else {}
        self.backend = str(job.spec["engine"].get("backend") or "native")
        self.count = token_counter(job.inputs["download"] / "tokenizer.json")
        path = resolve(self.accuracy["problems"], job) if self.accuracy.get("problems") else None
        problems = read_problems(path) if path else []
        tasks, samples = self.accuracy["tasks"], self.accuracy.get("samples")
        shared = {
            name: self.accuracy[name] for name in ("max_new_tokens", "repeats", "temperature", "run_generated_code")
        }
        self.how = Questions(tasks, by_task(problems, tasks, samples, str(path)), samples=samples, **shared)
        prompts = self.latency.get("prompts")
        self.prompts: list[Any] = list(read_prompts(resolve(prompts, job))) if prompts else list(problems)
        self.asks = self.choose(self.latency["requests"])  # refuses too few prompts before anything is spent
        self.metrics: dict[str, float] = {}
        self.findings: dict[str, dict[str, int]] = {}
        self.remarks: list[str] = []

    def choose(self, number: int, offset: int = 0) -> list[Any]:
        from tasks.validate.profiles import choose

        return choose(self.prompts, self.latency["profile"], number, self.latency["max_new_tokens"], self.count, offset)

    def run(self, serve: Serve, source: Source) -> dict[str, float]:
        from tasks.tables import write
        from tasks.validate.paired import problems_frame
        from tasks.validate.tables import requests_frame

        inputs, out = self.job.inputs, self.job.out
        self.test_client()
        deployment = inputs["deploy"] / "deployment.json"
        rows = self.time_served(serve(deployment))
        write(requests_frame(rows, "requests.parquet"), out / "requests.parquet")
        self.time_engine_alone()
        served = self.answers("served", serve(deployment), 3)  # which may have moved: it was set aside meanwhile
        with source(inputs["download"], inputs["build_engine"], self.job.scratch, self.backend) as source_url:
            baseline = self.time_source(source_url)
            write(requests_frame(baseline, "baseline_requests.parquet"), out / "baseline_requests.parquet")
            reference = self.source_answers(source_url, served)
        self.step(6)
        write(problems_frame(reference["rows"] + served["rows"]), out / "problems.parquet")
        self.judge(rows, served, reference)
        return {name: value for name, value in self.metrics.items() if math.isfinite(value)}

    def step(self, number: int, done: float = 0.0) -> None:
        self.progress(number + min(done, 1.0), len(STEPS), STEPS[number])

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

    def time_served(self, base_url: str) -> list[dict[str, Any]]:
        from tasks.validate import profiles, speed

        self.step(1)
        endpoint = speed.connect(base_url, self.count)
        speed.warm_up(endpoint, self.warm_up_asks())
        rows, made = speed.alone(endpoint, self.asks, lambda done: self.step(1, done / len(self.asks)))
        made = self.add_trace(made)
        (self.job.out / "waterfall.json").write_text(json.dumps(made, indent=1))
        self.metrics.update(speed.one_user(rows, made))
        crowd, metrics = speed.crowds(endpoint, self.crowd_asks(), self.latency)
        self.metrics.update(metrics)
        self.metrics["latency.failed_requests"] += sum(not row["ok"] for row in crowd)
        self.findings["served"] = profiles.findings([*rows, *crowd])
        if self.latency.get("witness"):
            self.hear_witness(endpoint, rows)
        return [*rows, *crowd]

    def add_trace(self, made: dict[str, Any]) -> dict[str, Any]:
        """Parts of the cycle from the profiler, for an engine that does not count them itself."""
        from tasks.deployment import traces
        from tasks.validate.trace import longest
        from tasks.validate.waterfall import with_trace

        deployment = self.job.inputs["deploy"] / "deployment.json"
        given = self.backend == "trtllm" and deployment.is_file()
        return with_trace(made, longest(traces(deployment)) if given else None)

    def time_engine_alone(self) -> None:
        from tasks.validate import speed
        from tasks.validate.servers import forced_server

        length, most = self.latency.get("forced_acceptance"), self.draft_tokens + 1
        if length is None or not self.draft_tokens:
            return
        if length > most:
            self.remarks.append(f"the engine alone was not timed: a cycle has at most {most} tokens, not {length:g}")
            return
        self.step(2)
        with forced_server(self.job, length, self.starter) as url:
            endpoint = speed.connect(url, self.count)
            speed.warm_up(endpoint, self.warm_up_asks())
            self.metrics.update(speed.engine_alone(endpoint, self.asks[: speed.BASELINE_REQUESTS]))

    def hear_witness(self, endpoint: Any, rows: list[dict[str, Any]]) -> None:
        from tasks.validate.witness import measure

        folder = self.job.scratch / "witness"
        heard = measure(self.latency["witness"], endpoint, self.asks, rows, self.job.inputs["download"], folder)
        self.metrics.update(heard.metrics)
        disagreement = heard.disagreement(self.latency["witness_tolerance"])
        self.remarks.append(disagreement or heard.sentence())
        self.findings["witness"] = {"disagreement": int(disagreement is not None)}

    def time_source(self, base_url: str) -> list[dict[str, Any]]:
        from tasks.validate import profiles, speed
        from tasks.validate.load import one_in_flight

        self.step(4)
        endpoint = speed.connect(base_url, self.count)
        speed.warm_up(endpoint, self.warm_up_asks())
        rows = one_in_flight(endpoint, self.asks[: speed.BASELINE_REQUESTS])
        self.metrics.update(profiles.latency_metrics(rows, "baseline"))
        self.findings["source"] = profiles.findings(rows)
        return rows

    def warm_up_asks(self) -> list[Any]:
        """Prompts that the measured run does not send, if any are left."""
        from specs.errors import InputError

        try:
            return self.choose(WARM_UP_REQUESTS, len(self.asks))
        except InputError:
            return self.asks[-WARM_UP_REQUESTS:]

    def crowd_asks(self) -> list[Any]:
        """Two turns for each user at least; the prompts come again where a file has no more of them."""
        from specs.errors import InputError

        number = max(len(self.asks), 2 * max(self.latency["users"], default=0))
        try:
            return self.choose(number)
        except InputError:
            return [self.asks[index % len(self.asks)] for index in range(number)]

    # -- answers
    def answers(self, side: str, base_url: str, step: int, only: dict[str, list[int]] | None = None) -> dict[str, Any]:
        """One side's answers; from scratch when an interrupted validation already has them."""
        from tasks.validate.accuracy import Side, ask
        from tasks.validate.speed import connect

        self.step(step)
        kept = self.job.scratch / f"answers-{side}.json"
        if only is None and kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        total = self.how.repeats * sum(len(problems) for problems in self.how.local.values()) or 1
        model = connect(base_url, self.count).model
        asked = Side(side, base_url, model, in_flight=self.slots())
        made = ask(asked, self.how, self.job.scratch / "lm_tasks", lambda n: self.step(step, n / total), only)
        answers = {"rows": made.rows, "usages": made.usages, "places": [[*k, *v] for k, v in made.places.items()]}
        if only is None:
            _write_whole(kept, json.dumps(answers))
        return answers

    def source_answers(self, base_url: str, served: dict[str, Any]) -> dict[str, Any]:
        """All of the source's answers, or with `early_stop` as many as settle the verdict."""
        from tasks.validate.paired import ask_until_settled

        if not self.accuracy["early_stop"]:
            return self.answers("source", base_url, 5)
        places = {(task, name): (lm_task, number) for task, name, lm_task, number in served["places"]}

        def ask(keys: list[tuple[str, str]]) -> list[dict[str, Any]]:
            only: dict[str, list[int]] = {}
            for key in keys:
                only.setdefault(places[key][0], []).append(places[key][1])
            rows: list[dict[str, Any]] = self.answers("source", base_url, 5, only)["rows"]
            return rows

        rows, settled = ask_until_settled(served["rows"], ask, self.accuracy["margin"], self.accuracy["alpha"])
        return {"rows": rows, "settled": settled}

    def slots(self) -> int:
        path = self.job.inputs["build_engine"] / "bundle.json"
        return int(json.loads(path.read_text(encoding="utf-8")).get("max_batch_size") or 16) if path.is_file() else 16

    # -- judging
    def judge(self, rows: list[dict[str, Any]], served: dict[str, Any], reference: dict[str, Any]) -> None:
        from dataclasses import asdict

        from tasks.validate.diagnosis import diagnose
        from tasks.validate.judge import Evidence, judge_all, write_verdict
        from tasks.validate.probe import scale_errors

        self.measure_acceptance(rows, served)
        results = self.compare(served["rows"], reference)
        scales = scale_errors(self.job.inputs["build_engine"], self.job.inputs["download"])
        self.metrics["bundle.scale_error_percent"] = scales[0].percent if scales else math.nan
        fit = self.read_draft(served["rows"])
        if fit is not None:
            self.metrics["draft.capture_gain_nats"] = fit.gain_nats
        last_good = (self.job.extra.get("last_good") or {}).get("metrics")
        evidence = Evidence(self.metrics, results, bool(self.golden), self.findings, self.remarks)
        said = judge_all(evidence, self.settings, last_good)
        causes = [asdict(cause) for cause in diagnose(said.failed, self.metrics, scales, fit, last_good)]
        write_verdict(self.job.out, evidence, said, causes)

    def measure_acceptance(self, rows: list[dict[str, Any]], served: dict[str, Any]) -> None:
        from tasks.acceptance import acceptance_frame, acceptance_metrics, golden_gap
        from tasks.tables import write
        from tasks.validate.client import speculation

        usages = [(row["domain"], row) for row in rows if row["ok"]]
        usages += [(task, speculation(usage)) for task, usage in served["usages"]]
        frame = acceptance_frame(usages, self.draft_tokens)
        write(frame, self.job.out / "acceptance.parquet")
        self.metrics.update(acceptance_metrics(frame))
        if self.golden:
            self.metrics["acceptance.golden_gap"], where = golden_gap(frame, self.golden)
            self.remarks.append(f"furthest below the golden curve: {where}")
            (self.job.out / "golden.json").write_text(json.dumps(self.golden))

    def compare(self, served: list[dict[str, Any]], reference: dict[str, Any]) -> dict[str, Any]:
        from tasks.validate.paired import accuracy_metrics, fill_unasked, problems_frame, verdicts

        source, settled = reference["rows"], reference.get("settled", "")
        if settled:
            source = source + fill_unasked(source, served, settled)
            self.remarks.append(
                f"the source answered {len(reference['rows'])} of {len(served)} problems: no further answer can change "
                f"{settled}; its figures count the others {'for' if settled == 'PASS' else 'against'} the source"
            )
        results = verdicts(
            problems_frame(source + served), self.accuracy["margin"], self.accuracy["alpha"], self.accuracy["power"]
        )
        self.metrics.update(accuracy_metrics(results))
        return results

    def read_draft(self, answered: list[dict[str, Any]]) -> Any:
        """The head on some served answers, teacher-forced; None where there is no head that can be read."""
        from tasks.validate.probe import draft_fit

        prompts = {problem.id: problem.prompt for problems in self.how.local.values() for problem in problems}
        known = [(prompts[row["id"]], row["answer"]) for row in answered if row["id"] in prompts]
        return draft_fit(self.job.inputs["build_engine"], known[:: max(len(known) // DIALOGUES_READ, 1)])


def _write_whole(path: Path, text: str) -> None:
    """So that a crash leaves either all answers or none."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
