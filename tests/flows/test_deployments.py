"""prefect.yaml says what the specs say."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_prefect_yaml_is_what_the_specs_render_to() -> None:
    rendered = subprocess.run(
        [sys.executable, "infra/prefect/deployments.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (ROOT / "prefect.yaml").read_text() == rendered.stdout, "run: python infra/prefect/deployments.py --write"


def test_every_spec_has_its_deployment() -> None:
    declared = {
        entry["parameters"]["spec"] for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert declared == {f"specs/{path.name}" for path in (ROOT / "specs").glob("*.yaml")}


def test_the_flow_fits_one_screen() -> None:
    assert len((ROOT / "flows" / "rebuild.py").read_text().splitlines()) <= 60


def test_a_nightly_carries_the_schedule_of_its_spec_and_a_rebuild_none() -> None:
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    by_flow = {(entry["entrypoint"].rpartition(":")[2], entry["name"]): entry["schedules"] for entry in entries}
    assert by_flow["nightly", "llama4-maverick-b200-throughput"][0]["cron"] == "0 5 * * *"
    assert {len(schedules) for (flow, _), schedules in by_flow.items() if flow == "rebuild"} == {0}


def test_no_deployment_holds_a_secret_or_a_path_of_this_machine() -> None:
    text = (ROOT / "prefect.yaml").read_text()
    assert "prefect.blocks" not in text and str(ROOT) not in text


@pytest.mark.parametrize("day", ["2027-03-26", "2026-10-23"], ids=["no 02:00", "two 02:00"])
@pytest.mark.parametrize("cron", ["0 2 * * *", "30 2 * * *"])
def test_a_clock_change_neither_drops_nor_doubles_a_night(day: str, cron: str) -> None:
    from prefect.server.schemas.schedules import CronSchedule

    zone = ZoneInfo("Europe/Berlin")
    start = datetime.fromisoformat(f"{day}T12:00").replace(tzinfo=zone)
    nights = asyncio.run(CronSchedule(cron=cron, timezone=zone.key).get_dates(5, start))
    local = [night.astimezone(zone) for night in nights]
    assert [night.date() for night in local] == [(start + timedelta(days=n)).date() for n in range(1, 6)]
    assert {night.hour for night in local} <= {1, 2}  # in spring an hour early


@pytest.mark.parametrize(
    ("channel", "words"),
    [
        ({"KILOTOK_SLACK_WEBHOOK": "https://example.org/services/T0/B0/secret"}, "KILOTOK_SLACK_WEBHOOK: not https"),
        ({"KILOTOK_SENDGRID_KEY": "secret", "KILOTOK_EMAIL_FROM": "a@b.c"}, "KILOTOK_EMAIL_FROM and KILOTOK_EMAIL_TO"),
    ],
)
def test_channel_that_could_not_carry_a_message_is_refused_first(channel: dict[str, str], words: str) -> None:
    nobody = {"PREFECT_API_URL": "http://127.0.0.1:1/api"}
    argv = [sys.executable, "infra/prefect/setup.py"]
    ended = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | channel | nobody)
    assert ended.returncode == 1 and words in ended.stderr and "secret" not in ended.stderr
