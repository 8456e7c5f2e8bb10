"""The machine that ``fit`` names, and the type that is taken for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantcli.errors import PlanError, UsageError
from quantcli.events import Show
from quantcli.fit.machine import find_machine, parse_context
from quantcli.report.fit import fit_sentences, fit_subject
from quantcli.report.inspect import FitWish
from quantcli.report.opening import open_subject
from quantcli.sources.resolve import resolve
from quantcli.types import Note


def read_fit(
    fit: str | None,
    *,
    on: str | None = None,
    ram: str | None = None,
    ctx: int | str | None = None,
    kv_type: str | None = None,
    flash_attn: bool = True,
) -> FitWish | None:
    """The machine that is asked for; UsageError for what belongs to one, without one."""
    if fit is None:
        given = {"--on": on, "--ram": ram, "--ctx": ctx, "--kv-type": kv_type}
        given["--no-flash-attn"] = None if flash_attn else True
        for name in (name for name, value in given.items() if value is not None):
            raise UsageError(f"{name} belongs to --fit", hint="add --fit SIZE, such as --fit 24G")
        return None
    tokens = None if ctx is None else parse_context(ctx)
    return FitWish(find_machine(fit, on, ram), tokens, kv_type, flash_attn)


def choose_type(source: str, wish: FitWish, fields: Mapping[str, Any], show: Show) -> str:
    """The type of ``source`` to take for that machine, from headers alone; the reason is shown.

    UsageError where ``fields`` of a recipe name a type already, PlanError where nothing fits.
    """
    for name in ("type", "bits", "set", "target_size", "to"):
        if fields.get(name) not in (None, (), [], "gguf", ["gguf"], ("gguf",)):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--fit chooses the type of a GGUF, and --{flag} does too",
                hint="leave one of them out",
            )
    with open_subject(resolve(source, weights=False), source) as subject:
        if subject.kind == "gguf" and not subject.sizes:
            raise UsageError(
                f"{source} is quantized already, so there is no type to choose",
                hint=f"'quantcli inspect {source} --fit SIZE' tells whether it fits",
            )
        found = fit_subject(
            subject, wish.machine, context=wish.context, cache=wish.cache, flash=wish.flash
        )
    first, *others = fit_sentences(found)
    if found.best is None:
        raise PlanError(
            first.partition(". ")[0],
            hint=f"'quantcli inspect {source} --fit SIZE' shows what each type needs",
        )
    for sentence in (first, *others[:-1]):
        show(Note(sentence))
    return found.best.name
