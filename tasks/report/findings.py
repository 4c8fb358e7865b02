"""One sentence per section: what a reader should take from it. Shared by the page, the Markdown and the comparison.

Refuses adjectives: a sentence holds figures, and says "not measured" when there are none.
Run it: `python -m pytest tests/tasks/test_report_words.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tasks.report.plots import RECORD_TPS_SERVER, RECORD_TPS_USER
from tasks.report.words import as_number, count, figure, listed, micros, money, seconds, signed, three

Report = Mapping[str, Any]
RECORD_MODEL = "Llama-4-Maverick"


def findings(report: Report) -> dict[str, str]:
    """Section name -> sentence."""
    return {
        "gates": _gates(report),
        "changes": _changes(report),
        "speed": _speed(report),
        "cycle": _cycle(report),
        "acceptance": _acceptance(report),
        "accuracy": _accuracy(report),
        "quantization": _quantization(report),
        "latency": _latency(report),
        "stages": _stages(report),
        "prediction": _prediction(report),
        "provenance": _provenance(report),
    }


def _gates(report: Report) -> str:
    gates = report["gates"]
    if not gates:
        return "No gate was evaluated. A build without gates is never promoted."
    good = sum(gate["verdict"] == "PASS" for gate in gates)
    return f"{good} of {len(gates)} gates hold. What could not be measured does not count as a pass."


def _speed(report: Report) -> str:
    head = report["headline"]
    if head["tps_per_user"] is None:
        return "Speed for one user was not measured."
    text = f"One user gets {three(head['tps_per_user'])} tokens/s"
    if head["acceptance_length"] and head["cycle_us"]:
        text += f": {three(head['acceptance_length'])} tokens out of every cycle of {micros(head['cycle_us'])}"
    is_record_model = RECORD_MODEL in source_of(report)  # a share of the record says nothing of another model
    if is_record_model:
        text += f". That is {100 * head['tps_per_user'] / RECORD_TPS_USER:.0f} % of the record for one user"
    if head["speedup"]:
        joined = ", and" if is_record_model else ". That is"
        text += f"{joined} {three(head['speedup'])} times the source model on this machine"
    points = (report["pareto"] or {}).get("points") or []
    if len(points) > 1:
        best = max(points, key=lambda point: point["tps_server"])
        text += f". With {best['users']} users the server gives {three(best['tps_server'])} tokens/s"
        if is_record_model:
            text += f", {100 * best['tps_server'] / RECORD_TPS_SERVER:.2g} % of the record for a server"
    return text + "."


def source_of(report: Report) -> str:
    """URI of the model that was built from; "" when the provenance does not say."""
    spec = (report["provenance"] or {}).get("spec") or {}
    return str((spec.get("model") or {}).get("source") or "")


def _cycle(report: Report) -> str:
    cycle = report["cycle"]
    if not cycle or not cycle["parts"]:
        return "The parts of a cycle were not measured."
    total = cycle["total_us"]
    groups: dict[str, float] = {}
    for part in cycle["parts"]:
        groups[part["group"]] = groups.get(part["group"], 0.0) + part["us"]
    shares = [f"{name} {100 * us / total:.0f} %" for name, us in groups.items()]
    largest = max(cycle["parts"], key=lambda part: part["us"])
    text = f"{micros(total)} per cycle: {', '.join(shares)}"
    return f"{text}. The largest part is {largest['name']} with {micros(largest['us'])}."


def _acceptance(report: Report) -> str:
    data = report["acceptance"]
    if not data:
        return "Acceptance was not measured."
    named = [entry for entry in data["domains"] if entry["domain"] != "all"]
    text = (
        f"A cycle yields {three(data['length'])} tokens on average"
        if data["length"]
        else "Acceptance by position is below"
    )
    if len(named) > 1:
        best, worst = max(named, key=lambda entry: entry["length"]), min(named, key=lambda entry: entry["length"])
        text += f": from {three(worst['length'])} in {worst['domain']} to {three(best['length'])} in {best['domain']}"
    positions = {point["position"] for entry in data["domains"] for point in entry["positions"]}
    return f"{text}. {len(positions) + 1} would be the ceiling with {count(len(positions), 'draft token')}."


def _accuracy(report: Report) -> str:
    data = report["accuracy"]
    if not data:
        return "Accuracy was not measured."
    tasks = [task for task in data["tasks"] if task.get("difference") is not None]
    tasks = [task for task in tasks if task["task"] != "all"] or tasks
    if not tasks:
        return "Served and source model were not both measured."
    worst = min(tasks, key=lambda task: task["difference"])
    text = (
        f"The largest loss is {worst['task']} with {signed(100 * worst['difference'], 1)} points"
        if worst["difference"] < 0
        else "No task lost accuracy"
    )
    judged = [task for task in tasks if task.get("verdict")]
    if judged:
        good = [task for task in judged if str(task["verdict"]).upper() == "PASS"]
        text += f"; {len(good)} of {len(judged)} tasks are shown to stay within the margin"
        lacking = [
            f"{task['task']} ({task['needed']:,.0f} more samples)" for task in judged if as_number(task.get("needed"))
        ]
        text += f"; too few samples to tell for {listed(lacking)}" if lacking else ""
    return text + "."


def _quantization(report: Report) -> str:
    data = report["quantization"]
    if not data:
        return "Quantization was not measured."
    text = count(data["tensors"], "tensor")
    if data["worst"]:
        worst = data["worst"][0]
        text += f"; the noisiest is {worst['name']} with {worst['sqnr_db']:.1f} dB"
        text += f", the median {data['median_sqnr_db']:.1f} dB"
    top = data["most_saturated"]
    if top:
        share = f"{100 * top['saturation_share']:.2g} % of values"
        return f"{text}. {count(data['saturating'], 'tensor')} saturate, at most {share} ({top['name']})."
    return f"{text}. No value saturates."


def _latency(report: Report) -> str:
    data = report["latency"]
    if not data:
        return "Latency was not measured."
    parts = [f"{series['label'].lower()} {three(series['p50'])} {series['unit']}" for series in data["series"]]
    lost = data["requests"] - data["good"]
    tail = f" {count(lost, 'request')} failed and {'is' if lost == 1 else 'are'} not in these figures." if lost else ""
    return f"Medians over {count(data['single_user'], 'request')} of one user at a time: {', '.join(parts)}.{tail}"


def _stages(report: Report) -> str:
    rows = report["stages"]
    if not rows:
        return "No receipts were handed to the report."
    built = [row for row in rows if row["state"] == "built"]
    total = sum(row["seconds"] or 0 for row in rows)
    reused = sum(row["state"] == "cached" for row in rows)
    text = f"{seconds(total)} in all; {len(built)} of {count(len(rows), 'stage')} built, {reused} reused"
    longest = max(built, key=lambda row: row["seconds"] or 0, default=None)
    if longest and total:
        text += f"; {longest['stage'].replace('_', ' ')} took {100 * (longest['seconds'] or 0) / total:.0f} %"
    costs = [row["cost"] for row in rows if row.get("cost") is not None]
    return text + (f"; {money(sum(costs), rows[0]['currency'])} in all." if costs else ".")


def _changes(report: Report) -> str:
    data = report["changes"]
    if data is None:
        return "No earlier build of this spec has passed, so there is nothing to compare with."
    moved = [row for row in data["metrics"] if row["better"] is not None]
    worse = [row for row in moved if row["better"] is False]
    inputs = count(len(data["inputs"]), "input") if data["inputs"] else "no input"
    if data["unexplained"] and not data["inputs"]:
        inputs = f"{listed(data['unexplained'])} (details are gone with the old artifact)"
    since = data["since"] or "the last good build"
    text = f"Since {since}, {inputs} changed; {count(len(moved), 'figure')} moved by more than 2 %"
    text = f"{text}, {len(worse)} for the worse." if moved else f"{text}."
    return f"{text} {split_words(data['split'])}" if data.get("split") else text


def split_words(split: Mapping[str, float]) -> str:
    """Where a change of speed comes from: three factors that multiply to the whole."""
    gain = 100 * (split["speed"] - 1)
    if abs(gain) < 0.05:
        return "The speed for one user is the same."
    names = {"acceptance": "tokens per cycle", "cycle": "cycle time", "outside": "outside the engine"}
    shares = [
        f"{signed(100 * (split[key] - 1), 1)} % from {name}"
        for key, name in names.items()
        if abs(split[key] - 1) >= 0.003
    ]
    return f"The speed for one user {'rose' if gain > 0 else 'fell'} by {abs(gain):.1f} %: {listed(shares)}."


def _prediction(report: Report) -> str:
    rows = report["prediction"]
    if not rows:
        return "No prediction was made for this build."
    judged = [row for row in rows if row["actual"] is not None and row["low"] is not None and row["high"] is not None]
    if not judged:
        return "The prediction came without intervals."
    inside = sum(row["low"] <= row["actual"] <= row["high"] for row in judged)
    return f"{inside} of {len(judged)} figures fell inside their predicted interval."


def _provenance(report: Report) -> str:
    data = report["provenance"]
    if not data or not data["commit"]:
        return "The commit is not known."
    state = {True: ", with changes that are not committed", False: ", clean"}.get(data["dirty"], "")
    return f"Commit {data['commit'][:12]}{state}."


def verdict_words(verdict: str) -> tuple[str, str, str]:
    """(word, CSS class, glyph): a glyph beside the colour, for those who do not see it."""
    return {
        "PASS": ("Pass", "pass", "\N{CHECK MARK}"),
        "FAIL": ("Fail", "fail", "\N{MULTIPLICATION SIGN}"),
        "UNDERPOWERED": ("Underpowered", "open", "?"),
        "FIRST": ("First build", "open", "\N{EN DASH}"),
    }.get(verdict, ("Not measured", "open", "?"))


def delta_words(row: Mapping[str, Any]) -> str:
    """How a figure moved: points for shares, percent for the rest."""
    if row["unit"] in ("%", "points"):
        return f"{signed(100 * (row['after'] - row['before']), 1)} pt"
    return f"{signed(100 * row['share'], 1)} %" if row["share"] is not None else figure(row["after"], row["unit"])
