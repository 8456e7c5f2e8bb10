"""Which type fits a machine, for people and for programs."""

from __future__ import annotations

from typing import Any

from quantcli.errors import PlanError
from quantcli.fit.choose import Candidate, Fit, fit_types
from quantcli.fit.machine import Machine, gib
from quantcli.plan.filetypes import MXFP4_TYPE, TRAINED_TYPES
from quantcli.report.inspection import Subject
from quantcli.report.tables import Column, Table

_COARSE = 3.0
_ORIGINAL = 8.0
"""Bits per weight from which on answers can hardly be told from the original's."""


def fit_subject(
    subject: Subject, machine: Machine, *, context: int | None, cache: str | None, flash: bool
) -> Fit:
    """The types of a model that was opened; PlanError where its memory cannot be told."""
    if not subject.outputs or not subject.model_keys:
        raise PlanError(
            f"{subject.label} is of an architecture that quantcli does not know, so the memory "
            "that it needs cannot be told"
        )
    stored = None
    if subject.kind == "gguf" and not subject.sizes:
        stored = subject.file_type or "as it is"
    return fit_types(
        subject.outputs,
        subject.model_keys,
        machine,
        context=context,
        cache=cache,
        flash=flash,
        stored=stored,
        from_gguf=subject.kind == "gguf",
    )


def fit_tables(fit: Fit, *, every: bool = False) -> list[Table]:
    """The types that people take, or ``every`` one, the best first; a sentence each side."""
    shown = [each for each in fit.candidates if every or _belongs(fit, each)]
    if fit.best is not None:
        shown = [fit.best, *(each for each in shown if each is not fit.best)]
    on_gpu = fit.machine.kind == "gpu"
    columns = [
        Column("--type"),
        Column("weights", "right"),
        Column("cache", "right"),
        Column("compute", "right"),
        Column("total", "right"),
        *([Column("on GPU", "right"), Column("in RAM", "right")] if on_gpu else []),
        Column("fits"),
    ]
    rows = tuple(_row(fit, each, on_gpu) for each in shown)
    kind = fit.run.cache.lower()
    title = (
        f"GiB on {fit.machine.label}, {gib(fit.machine.usable)} of them to use, "
        f"context {fit.run.context:,}, cache {kind}"
    )
    starred = any(each.needs_importance for each in shown)
    note = "* needs an importance matrix (--imatrix)" if starred else None
    return [Table(tuple(columns), rows, title=title, note=note)]


def _belongs(fit: Fit, candidate: Candidate) -> bool:
    return candidate.is_usual or candidate is fit.best or len(fit.candidates) == 1


def _row(fit: Fit, candidate: Candidate, on_gpu: bool) -> tuple[str, ...]:
    needs = candidate.needs
    star = " *" if candidate.needs_importance else ""
    places = (gib(needs.device), gib(needs.beside)) if on_gpu else ()
    return (
        candidate.name + star,
        gib(needs.weights),
        gib(needs.cache),
        gib(needs.compute),
        gib(needs.total),
        *places,
        _verdict(fit, candidate),
    )


def _verdict(fit: Fit, candidate: Candidate) -> str:
    needs = candidate.needs
    if not needs.fits:
        return f"{gib(max(1, needs.device - fit.machine.usable))} too much"
    if needs.whole or needs.layout is None:
        return "yes"
    if needs.layout.cpu_experts:
        return f"--n-cpu-moe {needs.layout.cpu_experts}"
    return f"-ngl {needs.layout.layers} of {fit.layers}"


def fit_sentences(fit: Fit) -> list[str]:
    """Which one to take and why, what more would need, and how to run it."""
    best = fit.best
    if best is None:
        return [_nothing(fit)]
    needs, usable = best.needs, gib(fit.machine.usable)
    layout = needs.layout
    if needs.whole:
        why = "it fits whole" if len(fit.candidates) == 1 else "the most accurate that fits whole"
        if fit.native and best.name == MXFP4_TYPE:
            why = "its experts are stored as MXFP4, which other types would round again; it fits"
        elif best.bits >= _ORIGINAL and len(fit.candidates) > 1:
            why = "it fits, and its answers can hardly be told from the original's"
        said = f"Take {best.name}: {why}, in {gib(needs.device)} of {usable} GiB."
        finer = _finer(fit, best)
        if finer is not None:
            missing = finer.needs.total - fit.machine.usable
            said += f" {finer.name} would need {gib(max(missing, 0))} GiB more."
    elif layout is not None and layout.cpu_experts:
        said = (
            f"Take {best.name} with the experts of {layout.cpu_experts} layers in memory "
            f"({gib(needs.beside)} GiB there, {gib(needs.device)} on the GPU): a token needs few "
            "of them, so it stays quick."
        )
    else:
        count = layout.layers if layout is not None else 0
        said = (
            f"Take {best.name} with {count} of {fit.layers} layers on the GPU and "
            f"{gib(needs.beside)} GiB in memory: "
        )
        said += (
            "it is slower so."
            if len(fit.candidates) == 1
            else "it is slower so, but a type that fits whole would lose too much."
        )
    sentences = [said]
    if not needs.whole and fit.machine.ram is None:
        sentences.append("With less memory than that beside the GPU, add --ram SIZE.")
    if best.bits < _COARSE and len(fit.candidates) > 1:
        sentences.append(
            f"With {best.bits:.1f} bits per weight answers suffer; a smaller model with 4 is often "
            "better."
        )
    if best.needs_importance:
        sentences.append("It needs an importance matrix: --calibrate TEXT makes one.")
    if fit.longest is not None and fit.longest > fit.run.context:
        most = ", all that the model takes" if fit.longest >= fit.trained > 0 else ""
        sentences.append(f"It leaves room for a context of {fit.longest:,} tokens{most}.")
    if fit.trained and fit.run.context > fit.trained:
        sentences.append(
            f"The model was trained for {fit.trained:,} tokens, fewer than {fit.run.context:,}."
        )
    sentences.append(f"Run it with: {' '.join(run_options(fit))}")
    return sentences


def _finer(fit: Fit, best: Candidate) -> Candidate | None:
    """The next finer type that people take and that does not fit whole."""
    if fit.native and best.name == MXFP4_TYPE:
        return None
    finer = [each for each in fit.candidates if each.is_usual and each.bits > best.bits]
    finer = [each for each in finer if not each.needs.whole or not each.needs.fits]
    return min(finer, key=lambda each: each.bits, default=None)


def _nothing(fit: Fit) -> str:
    offered = [each for each in fit.candidates if each.name not in TRAINED_TYPES]
    least = min(offered or fit.candidates, key=lambda each: each.needs.total)
    usable = fit.machine.usable + (fit.machine.ram or 0)
    missing = gib(max(1, least.needs.total - usable))
    return (
        f"Nothing fits: {least.name}, the smallest, needs {missing} GiB more. A shorter --ctx, "
        "--kv-type q8_0 or a smaller model would help."
    )


def run_options(fit: Fit) -> list[str]:
    """llama-cli's arguments for the best type, without the file's name."""
    options = ["llama-cli", "-m", "FILE", "-c", str(fit.run.context)]
    layout = fit.best.needs.layout if fit.best is not None else None
    if layout is not None and layout.cpu_experts:
        options += ["--n-cpu-moe", str(layout.cpu_experts)]
    elif layout is not None and layout.layers < fit.layers:
        options += ["-ngl", str(layout.layers)]
    if fit.run.cache != "F16":
        options += ["-ctk", fit.run.cache.lower(), "-ctv", fit.run.cache.lower()]
    if not fit.run.flash:
        options += ["-fa", "off"]
    return options


def fit_document(fit: Fit) -> dict[str, Any]:
    """The same with exact bytes, for ``--json``."""
    return {
        "machine": {
            "kind": fit.machine.kind,
            "bytes": fit.machine.size,
            "usable_bytes": fit.machine.usable,
            "ram_usable_bytes": fit.machine.ram,
        },
        "context": fit.run.context,
        "cache_type": fit.run.cache,
        "flash_attention": fit.run.flash,
        "ubatch": fit.run.ubatch,
        "recommended": fit.best.name if fit.best is not None else None,
        "why": fit_sentences(fit)[0],
        "longest_context": fit.longest,
        "trained_context": fit.trained or None,
        "layers": fit.layers,
        "types": [_candidate(each) for each in fit.candidates],
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    needs = candidate.needs
    layout = needs.layout
    return {
        "type": candidate.name,
        "usual": candidate.is_usual,
        "needs_imatrix": candidate.needs_importance,
        "bits_per_weight": candidate.bits,
        "weights_bytes": needs.weights,
        "cache_bytes": needs.cache,
        "compute_bytes": needs.compute,
        "total_bytes": needs.total,
        "device_bytes": needs.device,
        "ram_bytes": needs.beside,
        "fits": needs.fits,
        "whole": needs.whole,
        "gpu_layers": layout.layers if layout is not None else None,
        "cpu_expert_layers": layout.cpu_experts if layout is not None else None,
    }
