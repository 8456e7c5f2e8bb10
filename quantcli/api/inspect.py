"""``quantcli.inspect``: what a model, a GGUF or an importance matrix holds, from Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.api.calls import Watch, refuse_below_one, takes_keywords
from quantcli.api.fit import read_fit
from quantcli.events import Show, drain
from quantcli.report.inspect import Inspected
from quantcli.report.inspect import inspect as look
from quantcli.types import Note


@dataclass(frozen=True)
class InspectResult:
    """What `inspect` found: ``document`` holds the facts that ``--json`` prints."""

    found: Inspected
    document: Mapping[str, Any]
    notes: tuple[Note, ...]


@takes_keywords
def inspect(
    target: str | Path,
    *,
    tensors: bool = False,
    kv: bool = False,
    stats: bool = False,
    filter: str | None = None,
    sort: str | None = None,
    top: int = 10,
    fit: str | None = None,
    on: str | None = None,
    ram: str | None = None,
    ctx: int | str | None = None,
    kv_type: str | None = None,
    flash_attn: bool = True,
    every: bool = False,
    threads: int | None = None,
    on_event: Show | None = None,
) -> InspectResult:
    """Read what a checkpoint, a GGUF or an importance matrix says of itself.

    ``filter`` (a regular expression) and ``sort`` choose and order tensors, ``kv`` gives long
    key-values whole, ``stats`` reads all weights once for their spread and the ``top`` channels
    that stand out. ``tensors`` is for the command line's tables; the document always has them.

    ``fit`` is the memory ("24G") of a machine, ``on`` its kind (gpu, mac or cpu) and ``ram`` the
    memory beside a GPU: the document then says under "fit" what each type needs there, with ``ctx``
    tokens of context, a cache of ``kv_type`` and flash attention or not, and which one to take.
    ``every`` has the tables show every type.
    """
    refuse_below_one(threads=threads, top=top)
    wish = read_fit(fit, on=on, ram=ram, ctx=ctx, kv_type=kv_type, flash_attn=flash_attn)
    watch = Watch(on_event)
    run = look(
        str(target), tensors=tensors, kv=kv, stats=stats, pattern=filter, order=sort, top=top,
        threads=threads, fit=wish, every=every, on_fetch=watch,
    )  # fmt: skip
    found = drain(run, watch)
    return InspectResult(found, found.document, tuple(watch.notes))
