"""Runs trials in forked processes, a batch in each, and groups what went wrong.

A trial is a kind and a number. A batch whose process dies tells which trial was at work; it is then
run again alone, and the next process goes on behind it. A fault that a trial shows only behind
others is told so.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from support.fuzz import micro
from support.fuzz.batch import run_batch
from support.fuzz.case import Kind

BATCH = 40
_BASE = (
    "numpy", "gguf", "safetensors", "tokenizers", "jinja2", "yaml", "msgspec", "tomllib",
    "quantcli.cli.app", "quantcli.api.inspect", "quantcli.api.quantize", "quantcli.api.export",
    "rich.console", "rich.text", "quantcli.run.quantize", "quantcli.exports.job",
)  # fmt: skip


@dataclass
class Campaign:
    """The trials of some kinds, and their figures."""

    kinds: dict[str, Kind]
    folder: Path
    bases: dict[str, Any] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    slowest: dict[str, Any] = field(default_factory=lambda: {"seconds": 0.0})
    largest: dict[str, Any] = field(default_factory=lambda: {"memory": 0})

    def warm(self, name: str) -> None:
        """Import what the kind needs and make its sound inputs."""
        if name in self.bases:
            return
        os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", COLUMNS="100")
        kind = self.kinds[name]
        for module in (*_BASE, *kind.imports):
            import_module(module)
        if not self.bases:
            warm_up(self.folder / "warm")
        folder = self.folder / "bases" / name
        folder.mkdir(parents=True)
        self.bases[name] = kind.warm(folder)

    def run(self, name: str, first: int, count: int) -> Iterator[dict[str, Any]]:
        """The outcomes of trials ``first`` to ``first + count - 1`` of a kind."""
        self.warm(name)
        gc.collect()
        gc.freeze()
        number = first
        while number < first + count:
            batch = range(number, min(number + BATCH, first + count))
            kind, bases = self.kinds[name], self.bases[name]
            done = list(run_batch(kind, batch, self.folder, bases))
            number += len(done)
            for outcome in done:
                if outcome["fault"] and len(batch) > 1:
                    again = range(outcome["number"], outcome["number"] + 1)
                    (alone,) = run_batch(kind, again, self.folder, bases)
                    if not alone["fault"]:
                        alone["fault"] = f"only behind others: {outcome['fault']}"
                    outcome = {**outcome, **alone}
                self._count(outcome)
                yield outcome

    def _count(self, outcome: dict[str, Any]) -> None:
        name = outcome["kind"]
        if outcome["fault"]:
            self.faults.append(outcome)
            self.outcomes[f"{name}: faults"] += 1
        else:
            self.outcomes[f"{name}: {'refused' if outcome['code'] else 'done'}"] += 1
        if outcome.get("seconds", 0) > self.slowest["seconds"]:
            self.slowest = outcome
        if outcome.get("memory", 0) > self.largest["memory"]:
            self.largest = outcome


def warm_up(folder: Path) -> None:
    """Run each command once, so that what it imports and remembers is there before the forks."""
    source = micro.model(folder)
    output = folder / "m.gguf"
    for args in (
        ("inspect", source),
        ("inspect", source, "--json", "--tensors"),
        ("inspect", source, "--stats"),
        ("quantize", source, "--dry-run"),
        ("quantize", source, "--type", "Q4_K_M", "-o", output),
        ("quantize", source, "--to", "gptq", "--group-size", "32", "-o", folder / "g"),
        (
            "quantize",
            source,
            "--to",
            "compressed-tensors",
            "--group-size",
            "32",
            "-o",
            folder / "c",
        ),
        ("inspect", folder / "g"),
        ("export", folder / "g", "--verify"),
        ("export", output, "--verify"),
        ("export", output, "--to", "hf", "-o", folder / "h"),
        ("inspect", output, "--kv"),
        ("export", output, "--to", "card", "-o", folder / "c.md"),
    ):
        micro.run(*args)


def clusters(faults: list[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Faults grouped by what went wrong and where, the largest group first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for fault in faults:
        said = fault.get("said", "").strip().splitlines()
        where = fault.get("frame") or (said[-1][:100] if said else "")
        error = fault.get("trace", "").strip().splitlines()
        kind = (
            error[-1].partition(":")[0] if error and not fault["fault"].startswith("time") else ""
        )
        groups.setdefault(f"{fault['fault']} | {kind} | {where}", []).append(fault)
    return sorted(groups.items(), key=lambda item: -len(item[1]))
