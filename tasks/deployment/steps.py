"""A deployment: two slots, one public port, and the steps between them, each of which may be the last before a kill -9.

blue_green: the new server starts beside the old one, then both accept from the public socket, then the old one lets
go: no connection is refused. drain_swap: the old one finishes and stops first, and comes back if the new one fails.
Each step is written down before it is done and may be done again, so the next call finishes or undoes what a crash
left.

It refuses to judge: validate's gates decide, promote asks. It refuses to run without the record's lock.

Run it: `kilotok rollback SPEC`, `kilotok drain SPEC`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import InputError, KilotokError
from tasks.deployment import slots
from tasks.deployment.record import SLOTS, Record, locked
from tasks.edges import containers, service

OnStep = Callable[[str], None]  # called before and after each step is written down; the crash tests die here


def silent(_: str) -> None:
    pass


class Deployment:
    """One deployment whose lock we hold. Its verbs finish, or raise with the old state restored."""

    def __init__(
        self, record: Record, on_step: OnStep = silent, drain_timeout_s: float = slots.DRAIN_TIMEOUT_S
    ) -> None:
        self.record, self.on_step, self.drain_timeout_s = record, on_step, drain_timeout_s

    # Looking

    @property
    def live(self) -> dict[str, Any] | None:
        return self.record.slots[self.record.data["live"]] if self.record.data["live"] else None

    def slot_of(self, plan: dict[str, Any]) -> str | None:
        """The slot whose server runs this plan; a live one before a candidate."""
        for name in sorted(SLOTS, key=lambda name: name != self.record.data["live"]):
            slot = self.record.slots[name]
            if slot.get("plan", {}).get("digest") == plan["digest"] and slots.is_up(slot):
                return name
        return None

    def _other(self) -> str:
        """The slot that a new version may take."""
        return next(name for name in SLOTS if name != self.record.data["live"])

    # Steps

    def _begin(self, kind: str, **facts: Any) -> dict[str, Any]:
        self.record.data["operation"] = {"kind": kind, "step": "", **facts}
        return self.record.data["operation"]

    def _step(self, name: str) -> None:
        operation = self.record.data["operation"]
        self.on_step(f"{operation['kind']}:before-{name}")
        operation["step"] = name
        self.record.note(f"{operation['kind']}: {name}")
        self.record.save()
        self.on_step(f"{operation['kind']}:{name}")

    def _end(self, event: str) -> None:
        self.on_step("before-end")
        self.record.data["operation"] = None
        self.record.note(event)
        self.record.save()

    # Start a candidate

    def start(self, plan: dict[str, Any]) -> str:
        """Have a healthy, smoke-tested server for this plan; returns its slot. blue_green leaves the live one alone."""
        name = self.slot_of(plan)
        if name is not None and self.record.slots[name]["state"] in ("candidate", "live"):
            slots.wait_healthy(self.record.slots[name], plan["start_timeout_s"])
            return name
        self._check(plan)
        live = self.record.data["live"]
        restart = live is not None and self.record.slots[live]["plan"]["digest"] == plan["digest"]  # it stopped or died
        target = live if restart and live else self._other()
        swap = plan["strategy"] == "drain_swap" and self.live is not None and slots.is_up(self.live) and target != live
        self._begin("start", slot=target, swap=swap)
        try:
            if swap:
                self._close_live()
            self._start_server(target, plan, fresh=name != target)
            if swap:
                self._step("open")
                slots.ensure_keeper(self.record, plan["host"], plan["port"])
                slots.accept(self.record, target)
                self.record.data["trial"] = target
        except KilotokError:
            self._undo_start(target, swap)
            raise
        self.record.slots[target]["state"] = "candidate"
        self._end(f"slot {target} runs {plan['bundle_digest'][:12]}")
        return target

    def _start_server(self, name: str, plan: dict[str, Any], fresh: bool) -> None:
        record = self.record
        if fresh:
            slots.end(record.slots[name], self.drain_timeout_s)
            slots.claim(record, name, plan)
        slot = record.slots[name]
        self._step("spawn")
        process = slots.spawn(slot)
        self.on_step("start:spawned")
        slot["process"] = process
        self._step("health")
        slots.wait_healthy(slot, plan["start_timeout_s"])
        self._step("smoke")
        slot["smoke"] = slots.smoke(slot, slots.base_url(slot))
        if plan.get("expected"):
            self._step("prove")
            slot["proof"] = slots.prove(slot)

    def _check(self, plan: dict[str, Any]) -> None:
        """Everything that can be refused before anything starts."""
        slots.check_port(self.record, plan["host"], plan["port"])
        if plan["to"] == "docker":
            containers.ensure_image(plan["image"])
        bundle = Path(plan["bundle"])
        if not bundle.is_dir():
            raise InputError("the bundle is gone", str(bundle), "run `kilotok run` again: it rebuilds what is missing")
        swap = plan["strategy"] == "drain_swap" and self.live is not None and slots.is_up(self.live)
        need, (have, where) = plan["memory_bytes"], slots.free_memory(plan)
        if need > have and not swap:
            beside = "beside what runs" if self.live else "and others use the rest"
            raise InputError(
                f"the bundle needs {need / 2**30:.1f} GiB {beside}, {have / 2**30:.1f} GiB of {where} are available",
                "deploy.strategy",
                "set deploy.strategy: drain_swap, or free memory",
            )

    def _close_live(self) -> None:
        """drain_swap: the old server finishes and stops; meanwhile the public port answers 503 with Retry-After."""
        live = self.record.data["live"]
        self._step("close")
        slots.release(self.record, live)
        slots.refuse(self.record)
        slots.end(self.record.slots[live], self.drain_timeout_s)  # it answers 503 itself on connections it still has

    def _undo_start(self, name: str, swap: bool) -> None:
        slots.end(self.record.slots[name], 5)
        self.record.slots[name]["state"] = "failed"
        self.record.data["trial"] = None
        if swap:
            self._revive_live()
        self._end(f"slot {name} failed to start")

    def _revive_live(self) -> None:
        """Bring the live version back on its slot and its port."""
        name = self.record.data["live"]
        slot = self.record.slots[name]
        if not slots.is_up(slot):
            plan = slot["plan"]
            slots.claim(self.record, name, plan)
            self.record.save()
            slot = self.record.slots[name]
            slot["process"] = slots.spawn(slot)
            self.record.save()
            slots.wait_healthy(slot, plan["start_timeout_s"])
        slots.ensure_keeper(self.record, slot["plan"]["host"], slot["plan"]["port"])
        slots.accept(self.record, name)
        slot["state"] = "live"

    # Promote

    def promote(self, plan: dict[str, Any]) -> str:
        """Make the plan's server the live one; returns its public URL. On failure the old one is live, as before."""
        name = self.start(plan)
        old = self.record.data["live"]
        if old == name:
            old = None
        self._begin("promote", slot=name, old=old)
        self._promote()
        return self.url()

    def url(self) -> str:
        public = self.record.data["public"]
        return slots.http_url(public["host"], public["port"])

    def _promote(self) -> None:
        """From the operation in the record, which may be one that a crash interrupted."""
        operation = self.record.data["operation"]
        try:
            self._hand_over(operation["slot"], operation["old"])
        except KilotokError as error:
            self._revert(error)
            raise
        self._step("drain")
        if operation["old"] is not None:
            slots.wait_released(self.record.slots[operation["old"]], self.drain_timeout_s)
            slots.end(self.record.slots[operation["old"]], self.drain_timeout_s)
        plan = self.record.slots[operation["slot"]]["plan"]
        slots.stop_keepers(self.record, but_port=plan["port"])
        self._end(f"slot {operation['slot']} is live: {plan['bundle_digest'][:12]}")

    def _hand_over(self, name: str, old: str | None) -> None:
        record = self.record
        plan = record.slots[name]["plan"]
        self._step("listen")
        slots.ensure_keeper(record, plan["host"], plan["port"])
        self._step("accept")
        slots.accept(record, name)
        self._step("flip")
        if old is not None:
            record.data["previous"] = record.slots[old]["plan"]
        record.data.update(live=name, trial=None, desired="running")
        record.slots[name]["state"] = "live"
        self._step("release")
        if old is not None:
            record.slots[old]["state"] = "draining"
            slots.release(record, old)
        slots.watch_only(record, name)
        self._step("canary")
        slots.smoke(record.slots[name], self.url())

    def _revert(self, cause: KilotokError | None) -> None:
        """The promoted server failed: the old one is live again. Its server still runs, unless this was a swap."""
        record, operation = self.record, self.record.data["operation"]
        name, old = operation["slot"], operation["old"]
        operation["kind"] = "revert"
        self._step("restore")
        slots.release(record, name)
        record.data.update(live=old, trial=None)
        if old is None:
            slots.refuse(record)
        else:
            if record.slots[name]["plan"]["strategy"] == "drain_swap":
                slots.end(record.slots[name], 5)  # both do not fit
            self._revive_live()
        self._step("discard")
        slots.wait_released(record.slots[name], 5)
        slots.end(record.slots[name], 5)
        record.slots[name]["state"] = "failed"
        self._end(f"slot {name} failed after its promotion: {cause.what.splitlines()[0] if cause else 'interrupted'}")

    # Memory lent to a stage

    def set_aside(self, plan: dict[str, Any]) -> None:
        """End the plan's server for a while: its memory is needed, and `bring_back` follows."""
        name = self.slot_of(plan)
        if name is not None:
            self._begin("aside", slot=name)
            self._step("end")
            slots.end(self.record.slots[name], self.drain_timeout_s)  # the keeper refuses as soon as it is gone
            self._end(f"slot {name} is set aside")

    def bring_back(self, plan: dict[str, Any]) -> None:
        """Start it again, where it was: a candidate, on trial, or live."""
        name = self.start(plan)
        if name in (self.record.data["trial"], self.record.data["live"]):
            slots.ensure_keeper(self.record, plan["host"], plan["port"])
            slots.accept(self.record, name)
            if name == self.record.data["live"]:
                self.record.slots[name]["state"] = "live"
            self.record.save()

    # Undo and end

    def rollback(self) -> str:
        """The version before this one is live again; returns the public URL."""
        previous = self.record.data["previous"]
        if previous is None:
            raise InputError(
                "there is no earlier version to go back to", self.record.name, "promote a second one first"
            )
        return self.promote(previous)

    def discard(self) -> int:
        """Stop what is not live; after a drain_swap, bring the live version back."""
        if self.record.data["trial"]:
            self._begin("start", slot=self.record.data["trial"], swap=True)
            self._step("undo")
            self._undo_start(self.record.data["trial"], swap=True)
            return 1
        names = [name for name in SLOTS if name != self.record.data["live"]]
        stopped = sum(slots.end(self.record.slots[name], 5) for name in names)
        self.record.save()
        return stopped

    def drain(self) -> int:
        """Stop admitting, finish, stop everything; returns how many processes were stopped."""
        self._begin("drain")
        self.record.data["desired"] = "stopped"
        self._step("close")
        slots.refuse(self.record)
        for name in SLOTS:
            slots.release(self.record, name)
        self._step("finish")
        stopped = sum(slots.end(self.record.slots[name], self.drain_timeout_s) for name in SLOTS)
        self._step("keepers")
        stopped += slots.stop_keepers(self.record)
        self.record.data["trial"] = None
        self._end("drained")
        return stopped

    # After a crash

    def recover(self, wanted: dict[str, Any] | None = None) -> None:
        """Finish or undo what a killed deployer left. `wanted` is the plan that the caller is about to start."""
        operation = self.record.data["operation"]
        if operation is None:
            return
        self.record.note(f"recovering: {operation['kind']} was interrupted at {operation['step'] or 'its beginning'}")
        kind = operation["kind"]
        if kind == "start":
            self._recover_start(operation, wanted)
        elif kind == "promote":
            slot = self.record.slots[operation["slot"]]
            if slots.is_up(slot) and service.http_status(slots.base_url(slot) + slot["plan"]["health_path"]) == 200:
                self._promote()
            else:
                self._revert(None)
        elif kind == "revert":
            self._revert(None)
        elif kind == "drain":
            self.drain()
        elif kind == "aside":  # whoever needs the server starts it
            self.record.data["operation"] = None

    def _recover_start(self, operation: dict[str, Any], wanted: dict[str, Any] | None) -> None:
        slot = self.record.slots[operation["slot"]]
        same = wanted is not None and slot.get("plan", {}).get("digest") == wanted["digest"]
        if same and slot["state"] == "starting" and not operation["swap"]:
            slot["process"] = slots.find(slot)
            self.record.data["operation"] = None
            if slot["process"]:
                return  # `start` goes on with the server that is already there
        self._undo_start(operation["slot"], operation["swap"])


@contextmanager
def opened(
    root: Path, name: str, wanted: dict[str, Any] | None = None, on_step: OnStep = silent, **options: Any
) -> Iterator[Deployment]:
    """The deployment, locked and recovered."""
    with locked(root, name) as record:
        deployment = Deployment(record, on_step, **options)
        deployment.recover(wanted)
        yield deployment
