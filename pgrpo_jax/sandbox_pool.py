"""The slots of a judge: in the strongest jail that this machine gives, tried before it is trusted.

A tier counts only if a slot of it could be built and the embedded attacks were held off in it. It
is found once, at the start; slots that break later are rebuilt in the same tier or not at all.

Part of the sandbox: standard library only.
"""

import os
import re
import shutil
import time
from typing import Any

from pgrpo_jax import sandbox_jail, sandbox_slot, sandbox_work

TIERS = ("namespaces", "landlock")
UNSAFE = "unsafe"
MOST_FAILED_STARTS = 8  # in a row: then this machine builds no more slots

PLAIN, NUMPY = "plain", "numpy"
_PRELOADS: dict[str, list[str]] = {PLAIN: [], NUMPY: ["numpy", "numpy.random"]}
_IMPORTS_NUMPY = re.compile(
    r"^[ \t]*(?:import|from)\b[^\n#]*\b(?:numpy|pandas|scipy)\b", re.MULTILINE
)


class Broken(Exception):
    """No slot starts any more."""


class Pool:
    """Slots in two flavours, started when they are first asked for: numpy makes the fork of a slot
    dearer, and its import would cost a program a hundred times that."""

    def __init__(self, loop: sandbox_slot.Loop, settings: dict[str, Any]):
        """`settings`: workers, tier ("auto" or one), allow_unsafe, packages."""
        self.tier = ""
        self.rebuilds = 0
        self._loop, self._settings = loop, settings
        self._slots: dict[sandbox_slot.Slot, str] = {}
        self._failed_starts = 0
        self._base = ""

    def start(self) -> dict[str, Any]:
        """Finds the tier. Returns what is to be told: `tier` and what is weaker than wished, or
        why there is none."""
        wished = self._settings["tier"]
        tiers = TIERS if wished == "auto" else (wished,)
        refused: dict[str, str] = {}
        for tier in (*tiers, UNSAFE) if self._settings["allow_unsafe"] else tiers:
            self.tier = tier
            slot = self._start(PLAIN)
            self._wait_for(slot)
            breaches = self._probe(slot) if slot.ready else []
            if slot.ready and (not breaches or tier == UNSAFE):
                for _ in range(self._settings["workers"] - 1):
                    self._start(PLAIN)
                said = {"tier": tier, "said": slot.said, "refused": refused}
                return said | {"breaches": breaches}
            why = f"a program could {', '.join(breaches)}" if breaches else slot.said
            refused[tier] = why or "the slot died"
            self._drop(slot)
        return {"refused": refused}

    def flavour(self, *code: str) -> str:
        """The slots that suit a program and its tests."""
        folders = self._settings["packages"]
        there = any(os.path.isdir(os.path.join(folder, NUMPY)) for folder in folders)
        return NUMPY if there and any(map(_IMPORTS_NUMPY.search, code)) else PLAIN

    def idle(self, flavour: str) -> sandbox_slot.Slot | None:
        """A slot without work. Starts another one if all are busy and there may be one more."""
        fitting = [slot for slot, kind in self._slots.items() if kind == flavour]
        found = next((slot for slot in fitting if slot.ready and slot.work is None), None)
        starting = not all(slot.ready for slot in fitting)  # one at a time
        if found is None and not starting and len(fitting) < self._settings["workers"]:
            self._start(flavour)
        return found

    def next_look(self) -> float:
        return min(slot.next_look() for slot in self._slots)

    def look(self) -> list[sandbox_slot.Slot]:
        """Looks after all slots. Returns those that broke: others stand in their places."""
        now, broken = time.monotonic(), []
        for slot, flavour in list(self._slots.items()):
            slot.look(now)
            if slot.ready:
                self._failed_starts = 0
            if slot.broken:
                broken.append(slot)
                self._replace(slot, flavour)
        return broken

    def close(self) -> None:
        for slot in list(self._slots):
            self._drop(slot)
        if self._base:
            shutil.rmtree(self._base, ignore_errors=True)

    # --- one slot

    def _start(self, flavour: str) -> sandbox_slot.Slot:
        packages = self._settings["packages"]
        root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        settings = {
            "tier": self.tier,
            "scratch": self._scratch(),
            "scratch_mb": sandbox_slot.SCRATCH_MB,
            "readable": sandbox_jail.readable_paths(packages),
            "packages": packages,
            "hidden": [root],
            "preload": _PRELOADS[flavour],
        }
        slot = sandbox_slot.Slot(self._loop, settings, root)
        self._slots[slot] = flavour
        return slot

    def _scratch(self) -> str:
        """A new folder for a slot that has no file system of its own."""
        if self.tier == "namespaces":
            return sandbox_jail.SCRATCH
        folder = os.path.join(self._folder(), str(time.monotonic_ns()))
        os.mkdir(folder, 0o700)
        return folder

    def _replace(self, slot: sandbox_slot.Slot, flavour: str) -> None:
        if not slot.ready:
            self._failed_starts += 1
        if self._failed_starts > MOST_FAILED_STARTS:
            raise Broken(f"no slot starts any more: {slot.said}")
        self.rebuilds += 1
        self._drop(slot)
        self._start(flavour)

    def _drop(self, slot: sandbox_slot.Slot) -> None:
        del self._slots[slot]
        slot.close()

    def _folder(self) -> str:
        if not self._base:
            name = f"judge-{os.getpid()}-{os.urandom(6).hex()}"
            self._base = os.path.join(_temporary(), name)
            os.mkdir(self._base, 0o700)
        return self._base

    # --- the attacks

    def _probe(self, slot: sandbox_slot.Slot) -> list[str]:
        """The embedded attacks that get through: there must be none."""
        breaches: list[str] = []
        outside = os.path.join(self._folder(), "outside")
        with open(outside, "w") as file:
            file.write("what no program may read")

        def work() -> sandbox_slot.Work:
            breaches.extend((yield from sandbox_work.probe(slot, outside)))

        slot.work = work()
        slot.resume()
        self._wait_for(slot)
        return breaches if slot.work is None else ["break the slot"]

    def _wait_for(self, slot: sandbox_slot.Slot) -> None:
        """Until it is idle, or broken."""
        while not (slot.broken or (slot.ready and slot.work is None)):
            self._loop.turn(slot.next_look() - time.monotonic())
            slot.look(time.monotonic())


def _temporary() -> str:
    places = ("/dev/shm", "/var/tmp", "/tmp")
    return next(place for place in places if os.access(place, os.W_OK | os.X_OK))
