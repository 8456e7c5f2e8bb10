"""The detailed views of a model: tensors, key-values, statistics; with a filter and an order."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from quantcli.errors import UsageError
from quantcli.plan.linear_layers import natural
from quantcli.registry import near
from quantcli.report.inspection import StoredTensor, Subject
from quantcli.report.stats import WeightStats
from quantcli.report.tables import Column, Table
from quantcli.report.units import number_text, rate_text, shape_text, size_text
from quantcli.report.weights import WeightSource
from quantcli.types import MetaValue

_SHOWN_ITEMS = 6
_SHOWN_LETTERS = 60

_TENSOR_ORDERS: dict[str, Callable[[StoredTensor], Any]] = {
    "name": lambda tensor: natural(tensor.info.name),
    "size": lambda tensor: -tensor.info.nbytes,
    "weights": lambda tensor: -tensor.info.elements,
    "dtype": lambda tensor: tensor.info.dtype,
    "shape": lambda tensor: tensor.info.shape,
    "bits": lambda tensor: -tensor.bits_per_weight,
}
_STATS_ORDERS: dict[str, Callable[[WeightStats], float]] = {
    "kurtosis": lambda stats: -_or_lowest(stats.moments.kurtosis),
    "outliers": lambda stats: -stats.outlier_share,
    "std": lambda stats: -_or_lowest(stats.moments.std),
    "max": lambda stats: -max(stats.moments.high, -stats.moments.low),
    "channel": lambda stats: -max((c.ratio for c in stats.channels(1)), default=0.0),
}
SORT_KEYS = (*_TENSOR_ORDERS, *_STATS_ORDERS)
"""What ``--sort`` takes; numbers go from the largest down."""


def check_order(key: str | None, *, stats: bool) -> None:
    """UsageError unless ``key`` is a known order, and one of statistics only with statistics."""
    if key is None or key in _TENSOR_ORDERS or (stats and key in _STATS_ORDERS):
        return
    if key in _STATS_ORDERS:
        raise UsageError(f"--sort {key} needs the weights", hint="add --stats")
    guesses = near(key, SORT_KEYS)
    known = SORT_KEYS if stats else tuple(_TENSOR_ORDERS)
    raise UsageError(
        f"there is no order named {key!r}",
        hint=f"did you mean {' or '.join(guesses)}?" if guesses else f"known: {', '.join(known)}",
    )


def compile_filter(pattern: str | None) -> re.Pattern[str] | None:
    """The regular expression; UsageError that says where it is wrong."""
    if pattern is None:
        return None
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"--filter {pattern!r} is not a regular expression: {error}",
            hint="a plain part of a name works too: --filter attn_v",
        ) from error


def choose_tensors(
    subject: Subject, pattern: re.Pattern[str] | None, order: str | None
) -> list[StoredTensor]:
    """The tensors whose stored or GGUF name the pattern is found in, in the order asked for."""
    chosen = [
        tensor
        for tensor in subject.tensors
        if pattern is None or any(map(pattern.search, (tensor.info.name, *tensor.becomes)))
    ]
    if order in _TENSOR_ORDERS:
        chosen.sort(key=_TENSOR_ORDERS[order])
    return chosen


def choose_sources(
    subject: Subject, chosen: Sequence[StoredTensor], order: str | None
) -> list[WeightSource]:
    """What is to be measured of the chosen tensors, in their order."""
    places: dict[str, int] = {}
    for place, tensor in enumerate(chosen):
        for name in (tensor.info.name, *tensor.becomes):
            places.setdefault(name, place)
    return sorted(
        (source for source in subject.sources if source.name in places),
        key=lambda source: places[source.name],
    )


def sort_stats(
    stats: Mapping[str, WeightStats], order: str | None
) -> list[tuple[str, WeightStats]]:
    """Name and statistics, in the order asked for."""
    pairs = list(stats.items())
    if order in _STATS_ORDERS:
        pairs.sort(key=lambda pair: _STATS_ORDERS[order](pair[1]))
    return pairs


def tensor_table(subject: Subject, chosen: Iterable[StoredTensor]) -> Table:
    """One line a tensor: its name, GGUF names, shape, type, size and bits per weight."""
    renamed = subject.kind == "checkpoint" and bool(subject.outputs)
    rows = [
        (
            tensor.info.name,
            *((", ".join(tensor.becomes) or "-",) if renamed else ()),
            shape_text(tensor.info.shape),
            tensor.info.dtype,
            size_text(tensor.info.nbytes),
            f"{tensor.bits_per_weight:.2f}",
        )
        for tensor in chosen
    ]
    columns = (
        Column("Tensor"),
        *((Column("In GGUF", drop=1),) if renamed else ()),
        Column("Shape", "right"),
        Column("Type"),
        Column("Size", "right"),
        Column("Bits", "right", drop=2),
    )
    return Table(columns, tuple(rows))


def key_value_table(metadata: Mapping[str, MetaValue], *, full: bool) -> Table:
    """A GGUF's key-values; without ``full`` long strings and arrays are cut short."""
    rows = [(key, value.kind, value_text(value, full=full)) for key, value in metadata.items()]
    cut = any(row[2].endswith(("...", "in all]")) for row in rows) and not full
    return Table(
        (Column("Key"), Column("Kind"), Column("Value")),
        tuple(rows),
        title="Key-values",
        note="long values are cut short; --kv shows them whole" if cut else None,
    )


def value_text(value: MetaValue, *, full: bool = False) -> str:
    """A key-value's value for a line of text."""
    if not value.kind.startswith("["):
        return _scalar_text(value.value, full)
    shown = value.value if full else value.value[:_SHOWN_ITEMS]
    items = ", ".join(_scalar_text(item, full) for item in shown)
    rest = f", ... {len(value.value):,} in all" if len(shown) < len(value.value) else ""
    return f"[{items}{rest}]"


def _scalar_text(value: Any, full: bool) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, float):
        return f"{value:.7g}"
    text = str(value)
    return text if full or len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 3] + "..."


def stats_table(sources: Iterable[WeightSource], pairs: Iterable[tuple[str, WeightStats]]) -> Table:
    """One line a tensor: extremes, spread, and how much stands out where."""
    types = {source.name: source.dtype for source in sources}
    pairs = list(pairs)
    broken = any(stats.nonfinite for _, stats in pairs)
    rows = [
        (
            name,
            types[name],
            number_text(stats.moments.low),
            number_text(stats.moments.high),
            number_text(stats.moments.std),
            number_text(stats.moments.kurtosis),
            rate_text(stats.outlier_share) if stats.outlier_count else "-",
            _channel_text(stats),
            *((f"{stats.nonfinite:,}",) if broken else ()),
        )
        for name, stats in pairs
    ]
    columns = (
        Column("Tensor"),
        Column("Type", drop=1),
        Column("Min", "right"),
        Column("Max", "right"),
        Column("Std", "right", drop=2),
        Column("Kurtosis", "right"),
        Column("Outliers", "right"),
        Column("Top channel", "right"),
        *((Column("Not finite", "right"),) if broken else ()),
    )
    return Table(
        columns,
        tuple(rows),
        title="Weights",
        note="Kurtosis: 3 for a bell curve, more with heavier tails. Outliers: weights beyond 6 "
        "times the root mean square of their row. Top channel: the input column with the largest "
        "weight, and how many times the median column's that is.",
    )


def channel_table(pairs: Iterable[tuple[str, WeightStats]], most: int) -> Table:
    """The input channels of the whole model that stand out most; vectors have no channels."""
    found = [
        (channel, name)
        for name, stats in pairs
        if stats.moments.count > stats.abs_max.size
        for channel in stats.channels(most)
    ]
    found.sort(key=lambda pair: -pair[0].ratio)
    rows = [
        (
            name,
            str(channel.index),
            number_text(channel.abs_max),
            f"{channel.ratio:.1f} x",
            f"{channel.outliers:,}",
        )
        for channel, name in found[:most]
    ]
    return Table(
        (
            Column("Tensor"),
            Column("Channel", "right"),
            Column("Largest", "right"),
            Column("Median channel", "right"),
            Column("Outliers", "right"),
        ),
        tuple(rows),
        title="Channels that stand out",
    )


def _channel_text(stats: WeightStats) -> str:
    top = stats.channels(1)
    return f"{top[0].index} ({top[0].ratio:.1f} x)" if top else "-"


def _or_lowest(value: float) -> float:
    return -math.inf if math.isnan(value) else value
