"""The page: opens offline, escapes everything, shows what is missing as missing, and never promotes it to a pass."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from specs.errors import IntegrityError
from tasks.job import Job, Progress
from tasks.report import build
from tasks.report.collect import collect
from tasks.report.markdown import render as markdown
from tasks.report.page import SECTIONS, render
from tasks.report.table import write_stages
from tests.tasks.report_data import make_job

HOSTILE = "</title><script>alert(1)</script><img src=http://x.test/a>\"'&|`x`"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(job: Job) -> str:
    build(job, Progress())
    return (job.out / "index.html").read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    """Every tag with its attributes; text apart."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def empty_job(tmp_path: Path, **spec: object) -> Job:
    (tmp_path / "out").mkdir()
    return Job("report", {"name": "bare", **spec}, tmp_path, {}, tmp_path / "out")


def test_the_stages_are_a_checked_table_too(job: Job, page: str) -> None:
    import pandas as pd

    frame = pd.read_parquet(job.out / "stages.parquet")
    assert len(frame) == len(collect(job)["stages"]) > 0
    with pytest.raises(IntegrityError, match="row 0 column seconds value -1.0"):
        write_stages([{**frame.iloc[0].to_dict(), "seconds": -1.0}], job.out / "bad.parquet")


def test_a_likely_cause_is_on_top_and_in_the_text(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    path = job.inputs["validate"] / "verdict.json"
    cause = {"cause": "the draft belongs to another checkpoint", "evidence": "cosine <0.02>", "fix": "train it"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "causes": [cause]}))
    report = collect(job)
    drawn = render(report)
    assert drawn.index("another checkpoint") < drawn.index('id="gates"')
    assert "Cosine &lt;0.02&gt;." in drawn
    assert "**Likely cause:** the draft belongs to another checkpoint." in markdown(report)


def test_an_old_record_without_the_newer_sections_is_still_drawn(job: Job) -> None:
    report = collect(job)
    for name in ("causes", "loads", "engine_alone", "grounds"):
        del report[name]
    assert "<h1>" in render(report)
    assert "# " in markdown(report)


def test_no_attribute_points_to_a_server(page: str) -> None:
    values = [value or "" for _, attrs in Tags(page).tags for value in attrs.values()]
    assert not [value for value in values if re.search(r"https?:|//", value)]
    assert "@import" not in page and "url(" not in page


def test_the_policy_forbids_every_request_and_script(page: str) -> None:
    policies = [attrs["content"] for tag, attrs in Tags(page).tags if attrs.get("http-equiv")]
    assert (
        len(policies) == 1 and policies[0] and policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'")
    )
    assert not {"script", "link"} & {tag for tag, attrs in Tags(page).tags if attrs.get("href") != "data:,"}


def test_the_page_is_light(page: str) -> None:
    assert len(page.encode()) < 150_000


def test_a_large_model_is_still_light_enough_to_mail(tmp_path: Path) -> None:
    size = build(make_job(tmp_path, layers=48), Progress())["report.bytes"]
    assert size < 400_000


def test_every_section_is_there_even_when_nothing_was_measured(page: str, tmp_path: Path) -> None:
    bare = render(collect(empty_job(tmp_path)))
    for name, _ in SECTIONS:
        assert f'id="{name}"' in page and f'id="{name}"' in bare
    assert bare.count("ot measured") > len(SECTIONS) - 3


def test_nothing_measured_is_not_a_pass(tmp_path: Path) -> None:
    report = collect(empty_job(tmp_path))
    assert report["verdict"] == "NOT MEASURED" and "badge pass" not in render(report)


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    job = make_job(tmp_path, name="x")
    hostile = Job(
        job.stage, {**job.spec, "name": HOSTILE}, job.root, job.inputs, job.out, extra={**job.extra, "build": HOSTILE}
    )
    text = render(collect(hostile))
    tags = [tag for tag, _ in Tags(text).tags]
    assert "script" not in tags and "img" not in tags and tags.count("title") >= 1
    assert "&lt;script&gt;" in text


def test_hostile_names_in_tables_are_escaped_too(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    receipts = [{**row, "reason": HOSTILE, "stage": HOSTILE} for row in job.extra["receipts"]]
    hostile = Job(job.stage, job.spec, job.root, job.inputs, job.out, extra={**job.extra, "receipts": receipts})
    assert "script" not in {tag for tag, _ in Tags(render(collect(hostile))).tags}
    stage_rows = [line for line in markdown(collect(hostile)).splitlines() if "alert(1)" in line and line[0] == "|"]
    assert stage_rows and all(len(re.findall(r"(?<!\\)\|", line)) == 7 and "<" not in line for line in stage_rows)


def gates_of(tmp_path: Path, rows: list[dict[str, object]], said: str = "PASS") -> dict[str, object]:
    folder = tmp_path / "validate"
    folder.mkdir()
    (folder / "gates.json").write_text(json.dumps(rows))
    (folder / "verdict.json").write_text(json.dumps({"verdict": said, "gates": rows}))
    return collect(Job("report", {"name": "x"}, tmp_path, {"validate": folder}, tmp_path))


GOOD = {"metric": "latency.tps_per_user.p50", "op": "at_least", "measured": 1012.0, "required": 1000, "verdict": "PASS"}


def test_a_pass_is_repeated_with_its_closest_gate(tmp_path: Path) -> None:
    report = gates_of(tmp_path, [GOOD])
    assert report["verdict"] == "PASS"
    assert (
        report["reason"] == "The one gate holds; the closest is median speed for one user, 1.2 % above what is asked."
    )


def test_a_pass_beside_a_missing_measurement_is_not_repeated(tmp_path: Path) -> None:
    report = gates_of(tmp_path, [GOOD, {**GOOD, "metric": "acceptance.length", "measured": None}])
    assert report["verdict"] == "NOT MEASURED"
    assert report["reason"] == "Tokens per cycle was not measured."


def test_a_nan_is_not_a_pass(tmp_path: Path) -> None:
    assert gates_of(tmp_path, [{**GOOD, "measured": float("nan")}])["verdict"] == "NOT MEASURED"


def test_a_failure_says_what_and_by_how_much(tmp_path: Path) -> None:
    report = gates_of(tmp_path, [GOOD, {**GOOD, "measured": 940.0, "verdict": "FAIL"}], said="FAIL")
    expected = "1 gate of 2 failed: median speed for one user is 940 tokens/s, at least 1,000 tokens/s was asked."
    assert report["verdict"] == "FAIL" and report["reason"] == expected


def test_a_verdict_without_gates_is_no_verdict(tmp_path: Path) -> None:
    assert gates_of(tmp_path, [])["verdict"] == "NOT MEASURED"


def test_a_broken_table_is_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    (job.inputs["validate"] / "requests.parquet").write_bytes(b"PAR1 but not really")
    report = collect(job)
    assert report["latency"] is None and report["acceptance"] is not None
    assert any("validate/requests.parquet" in note for note in report["notes"])
    assert "validate/requests.parquet" in render(report)


def test_the_record_draws_the_same_page_again(job: Job, page: str) -> None:
    record = json.loads(
        (job.out / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert render(record) == page


def test_the_drafts_training_figures_do_not_pass_for_measured_ones(tmp_path: Path) -> None:
    receipt = {"stage": "train_draft", "state": "built", "metrics": {"acceptance.length": 3.9, "train_draft.loss": 0.8}}
    job = empty_job(tmp_path, receipts=[receipt])
    assert collect(job)["metrics"] == {"train_draft.loss": 0.8}


def test_markdown_tells_the_same(job: Job, page: str) -> None:
    text = (job.out / "report.md").read_text(encoding="utf-8")
    speed = json.loads((job.out / "report.json").read_text())["headline"]["tps_per_user"]
    assert text.startswith("# \N{CHECK MARK} Pass: tiny-llama4-cpu")
    assert f"| Median speed for one user | {speed:.0f} tokens/s |" in text


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_finds_nothing_to_complain_about(job: Job, page: str, tmp_path: Path) -> None:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    flags += ["--disable-component-update", "--enable-logging=stderr", f"--user-data-dir={tmp_path}", "--dump-dom"]
    command = ["chromium", *flags, (job.out / "index.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr and "Refused" not in done.stderr
    assert done.stdout.count("<section") == len(SECTIONS)
