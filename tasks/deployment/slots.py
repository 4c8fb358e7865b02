"""What can be done to one slot and to the public port; each action may be repeated without harm.

It refuses to know the order of things: tasks.deployment holds the steps, writes them down, and recovers.

Run it: `python -m pytest tests/tasks/test_deployment.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from specs.errors import InputError, StageFailed
from tasks.deployment.record import Record
from tasks.edges import containers, listener, machine, service
from tasks.edges.process import last_lines

POLL_S = 0.02
KEEPER_START_S = 10.0
DRAIN_TIMEOUT_S = 600.0  # a running answer may take this long before its server is ended
SMOKE_TIMEOUT_S = 60.0
PROVE_TIMEOUT_S = 60.0  # for a profiler's trace to be written
MIN_CYCLES = 8  # fewer say nothing about acceptance
SMOKE_PROMPTS = ("Write a Python function that adds two numbers.", "What is 12 + 30? Show the steps.")
PROJECT = Path(__file__).resolve().parents[2]


def in_container(slot: dict[str, Any]) -> bool:
    return bool(slot.get("plan", {}).get("to") == "docker")


def is_up(slot: dict[str, Any]) -> bool:
    process = slot.get("process")
    return containers.is_running(process) if process and in_container(slot) else service.is_same(process)


def base_url(slot: dict[str, Any]) -> str:
    return http_url(slot["plan"]["host"], slot["port"])


def http_url(host: str, port: int) -> str:
    """A URL that reaches a server bound to `host` from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def claim(record: Record, name: str, plan: dict[str, Any]) -> None:
    """Give the slot its plan, port and socket before anything is started. The socket's name marks the process."""
    nonce = secrets.token_hex(4)
    record.slots[name] = {
        "state": "starting",
        "plan": plan,
        "port": service.free_port(plan["host"]),
        "control": str(record.run_dir / f"{name}-{nonce}.sock"),
        "log": str(record.log_dir / f"{record.name}-{name}-{nonce}.log"),
        "process": None,
    }


def find(slot: dict[str, Any]) -> dict[str, Any] | None:
    """The slot's server by its marker, when its identity was not written down."""
    if in_container(slot):
        return containers.find(container_name(slot))
    found = service.find_marked(slot["control"]) if slot.get("control") else None
    return found.to_dict() if found else None


def container_name(slot: dict[str, Any]) -> str:
    return f"kilotok-{slot['plan']['name']}-{Path(slot['control']).stem}"


def spawn(slot: dict[str, Any], dies_with_us: bool = False) -> dict[str, Any]:
    """Start the slot's server, or find the one that was started before we could write it down."""
    plan = slot["plan"]
    values = {"{port}": str(slot["port"]), "{control}": slot["control"]}
    argv = [values.get(part, part) for part in plan["argv"]]
    if in_container(slot):
        return containers.start(plan, container_name(slot), argv, str(Path(slot["control"]).parent))
    found = find(slot)
    if found is not None:
        return found
    try:
        how = {"cwd": Path(plan["cwd"]), "env": plan["env"], "dies_with_us": dies_with_us}
        return service.start(argv, Path(slot["log"]), **how).to_dict()
    except OSError as error:
        raise StageFailed(
            f"cannot start {argv[0]}: {error.strerror}", plan["name"], "check deploy in the spec"
        ) from None


def wait_healthy(slot: dict[str, Any], timeout_s: float) -> None:
    """Until /health says 200. Raises StageFailed with the end of the log."""
    deadline = time.monotonic() + timeout_s
    status = 0
    while status != 200:
        status = service.http_status(base_url(slot) + slot["plan"]["health_path"])
        if status == 200:
            return
        if not is_up(slot):
            raise failure("the server ended while starting", slot, "read its log")
        if time.monotonic() > deadline:
            said = f"last answer HTTP {status}" if status else "no answer"
            raise failure(
                f"not healthy after {timeout_s:g} s ({said})", slot, "read its log; raise deploy.start_timeout_s"
            )
        time.sleep(POLL_S)


def failure(what: str, slot: dict[str, Any], fix: str) -> StageFailed:
    if in_container(slot) and slot.get("process"):
        containers.save_log(slot["process"], Path(slot["log"]))
    tail = last_lines(Path(slot["log"]))
    what = f"{what}; its last words:\n{tail}\n" if tail else what
    return StageFailed(what, slot["plan"]["name"], fix, log_path=slot["log"])


def smoke(slot: dict[str, Any], url: str) -> dict[str, Any]:
    """A few greedy answers; raises StageFailed for gibberish or for a draft that is never right."""
    plan = slot["plan"]
    cycles, accepted, drafted, texts = 0, 0, 0, []
    key = os.environ.get(plan.get("api_key_env") or "", "")  # a credential by reference: never in the plan
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    for prompt in SMOKE_PROMPTS:
        body = {
            "model": plan["model"],
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 48,
            "temperature": 0,
        }
        try:
            answer = service.post_json(f"{url}/v1/chat/completions", body, headers, SMOKE_TIMEOUT_S)
            texts.append(str(answer["choices"][0]["message"]["content"] or ""))
            speculation = speculation_of(answer)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise failure(
                f"the smoke request failed: {error}", slot, "the candidate is refused; the old version serves on"
            ) from None
        cycles += int(speculation.get("cycles", 0))
        accepted += sum(speculation.get("accepted_by_position", []))
        drafted = int(speculation.get("draft_tokens", 0))
    if all(is_gibberish(text) for text in texts):
        raise failure(
            f"the server answers gibberish: {texts[0][:80]!r}", slot, "check the checkpoint and the quantization"
        )
    length = 1 + accepted / cycles if cycles else 0.0
    if drafted and cycles >= MIN_CYCLES and accepted == 0:
        raise failure(
            f"acceptance is exactly 1.0 over {cycles} cycles: no draft was ever right",
            slot,
            "check the draft's capture layers",
        )
    return {"acceptance_length": round(length, 3), "cycles": cycles, "answer": texts[0][:200]}


def speculation_of(answer: dict[str, Any]) -> dict[str, Any]:
    """Cycles and accepted drafts of one answer: as our server counts them, or from TensorRT-LLM's tokens per step."""
    usage = answer.get("usage") or {}
    per_step = answer["choices"][0].get("avg_decoded_tokens_per_iter")
    if usage.get("speculation") or not per_step:
        return usage.get("speculation") or {}
    tokens = int(usage.get("completion_tokens") or 0)
    steps = round(tokens / per_step)  # the prompt's own is one of them
    return {"cycles": steps - 1, "accepted_by_position": [tokens - steps], "draft_tokens": 1}


def prove(slot: dict[str, Any]) -> dict[str, Any]:
    """Wait until everything the bundle asked for was seen to run; raises StageFailed with what was not."""
    from engine_plugins.trtllm.liveness import Expected, look, unproven

    expected = Expected.from_dict(slot["plan"]["expected"])
    evidence = folder(slot) / "evidence"
    version = service.get_json(f"{base_url(slot)}/version").get("version", "")
    deadline = time.monotonic() + PROVE_TIMEOUT_S
    while missing := unproven(expected, seen := look(evidence, version, slot["smoke"]["acceptance_length"])):
        if time.monotonic() > deadline or not is_up(slot) or seen.complete:
            raise failure(
                "what was asked for does not run: " + "; ".join(missing), slot, "the old version serves on; see above"
            )
        time.sleep(POLL_S * 10)
    return {"version": version, "ranks": len(seen.ranks), "kernels": sorted(expected.kernels)}


def folder(slot: dict[str, Any]) -> Path:
    """Where a server keeps the files of this start."""
    return Path(slot["control"]).with_suffix("")


def is_gibberish(text: str) -> bool:
    """Empty, or one short piece over and over."""
    text = text.strip()
    return not text or re.fullmatch(r"(.{1,12}?)\1{7,}.{0,11}", text, re.DOTALL) is not None


def free_memory(plan: dict[str, Any]) -> tuple[int, str]:
    """Bytes that a new server may take, and of which memory: the GPUs' where the plan uses them."""
    if plan["backend"] == "trtllm" and (free := machine.gpu_free_bytes()) is not None:
        return free, "GPU memory"
    return service.available_bytes(), "memory"


# The public port


def keeper_is_up(keeper: dict[str, Any] | None) -> bool:
    return bool(keeper) and service.is_same(keeper["process"])  # type: ignore[index]


def check_port(record: Record, host: str, port: int) -> None:
    """Refuse early when somebody else has the public port."""
    if keeper_is_up(record.data["keepers"].get(str(port))) or service.find_marked(str(_keeper_socket(record, port))):
        return
    live = record.slots.get(record.data["live"] or "", {})
    if is_up(live) and record.data["public"] == {"host": host, "port": port}:
        return  # the keeper died, its socket lives on in the server
    try:
        listener.bind_public(host, port).close()
    except OSError as error:
        fix = f"free it (`ss -ltnp 'sport = :{port}'` says who has it) or set deploy.port"
        raise InputError(f"cannot listen on {host}:{port}: {error.strerror}", "deploy.port", fix) from None


def _keeper_socket(record: Record, port: int) -> Path:
    return record.run_dir / f"keeper-{port}.sock"


def ensure_keeper(record: Record, host: str, port: int) -> None:
    """A keeper for the public port: the running one, one we forgot, a new one on the old socket, or a new one."""
    if keeper_is_up(record.data["keepers"].get(str(port))):
        return
    path = _keeper_socket(record, port)
    record.data["keepers"][str(port)] = {"process": None, "socket": str(path)}
    record.save()  # first written down, then started: a crash in between leaves a trace
    found = service.find_marked(str(path))
    if found is None:
        lent = _borrow_from_live(record, port)
        argv = [
            sys.executable,
            "-m",
            "tasks.edges.listener",
            "--socket",
            str(path),
            "--host",
            host,
            "--port",
            str(port),
        ]
        log = record.log_dir / f"{record.name}-keeper-{port}.log"
        try:
            found = service.start(
                [*argv, "--fd", str(lent)] if lent else argv, log, cwd=PROJECT, fds=[lent] if lent else []
            )
        finally:
            if lent:
                os.close(lent)
        _wait_for_keeper(path, found.to_dict(), log, port)
    record.data["keepers"][str(port)] = {"process": found.to_dict(), "socket": str(path)}
    record.data["public"] = {"host": host, "port": port}
    record.save()


def _borrow_from_live(record: Record, port: int) -> int | None:
    """The listening socket that a live server still holds, when its keeper was killed."""
    live = record.slots.get(record.data["live"] or "", {})
    if not is_up(live) or (record.data["public"] or {}).get("port") != port:
        return None
    with contextlib.suppress(OSError, ValueError):
        return listener.ask(Path(live["control"]), {"do": "listener"})[1]
    return None


def _wait_for_keeper(path: Path, process: dict[str, Any], log: Path, port: int) -> None:
    deadline = time.monotonic() + KEEPER_START_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            listener.ask(path, {"do": "status"})
            return
        if not service.is_same(process):
            break
        time.sleep(POLL_S)
    raise StageFailed(
        f"no keeper on port {port}: {last_lines(log, 2)}", "deploy.port", "free the port", log_path=str(log)
    )


def accept(record: Record, name: str) -> None:
    """The slot's server accepts from the public socket; the keeper stops refusing."""
    slot = record.slots[name]
    keeper = Path(record.data["keepers"][str(slot["plan"]["port"])]["socket"])
    pids = [other["process"]["pid"] for other in record.slots.values() if is_up(other)]
    descriptor = None
    try:
        descriptor = listener.ask(keeper, {"do": "listener"})[1]
        listener.ask(Path(slot["control"]), {"do": "accept"}, descriptor)
        listener.ask(keeper, {"do": "watch", "pids": pids})
    except (OSError, ValueError) as error:
        raise failure(f"cannot hand the public port over: {error}", slot, "run the promotion again") from None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def release(record: Record, name: str) -> None:
    """The slot's server stops accepting from the public socket and lets its connections go with their answers."""
    slot = record.slots[name]
    if not is_up(slot):
        return
    with contextlib.suppress(OSError, ValueError):  # a server that is gone has released everything
        listener.ask(Path(slot["control"]), {"do": "release"})


def watch_only(record: Record, name: str) -> None:
    """The keeper refuses politely as soon as this slot's server is gone."""
    slot = record.slots[name]
    keeper = Path(record.data["keepers"][str(slot["plan"]["port"])]["socket"])
    with contextlib.suppress(OSError, ValueError):  # a keeper that is gone is replaced by the next promotion
        listener.ask(keeper, {"do": "watch", "pids": [slot["process"]["pid"]]})


def refuse(record: Record) -> None:
    """New public connections get 503 with Retry-After from the keeper."""
    for keeper in record.data["keepers"].values():
        with contextlib.suppress(OSError, ValueError):
            listener.ask(Path(keeper["socket"]), {"do": "refuse"})


def wait_released(slot: dict[str, Any], timeout_s: float) -> None:
    """Until no public connection and no request is left, or the server or our patience is gone."""
    deadline = time.monotonic() + timeout_s
    while is_up(slot) and time.monotonic() < deadline:
        try:
            status, _ = listener.ask(Path(slot["control"]), {"do": "status"})
        except (OSError, ValueError):
            return
        if not status["active"] and not status["public_connections"]:
            return
        time.sleep(POLL_S)


def end(slot: dict[str, Any], grace_s: float = DRAIN_TIMEOUT_S) -> bool:
    """End the slot's server after its running requests; True if there was one."""
    process = slot.get("process") or find(slot)
    if in_container(slot):
        ended = process is not None and containers.end(process, Path(slot["log"]), grace_s)
    else:
        ended = service.end(process, grace_s)
    slot["process"] = None
    slot["state"] = "stopped" if slot.get("plan") else "empty"
    with contextlib.suppress(OSError, KeyError):
        shutil.rmtree(folder(slot), ignore_errors=True)
        Path(slot["control"]).unlink()
    return ended


def stop_keepers(record: Record, but_port: int | None = None) -> int:
    """End keepers; with `but_port`, all but that one."""
    stopped = 0
    for port, keeper in list(record.data["keepers"].items()):
        if int(port) != but_port:
            found = service.find_marked(keeper["socket"])
            stopped += service.end(keeper["process"] or (found.to_dict() if found else None), 5)
            with contextlib.suppress(OSError):
                Path(keeper["socket"]).unlink()
            del record.data["keepers"][port]
    return stopped
