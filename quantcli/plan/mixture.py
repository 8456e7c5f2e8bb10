"""The mixture rules: which block format a file type gives to which tensor, as one table.

They are llama.cpp's (``llama_tensor_get_type_impl`` in src/llama-quant.cpp). Reading the table:
the first line that names the tensor's kind and the file type and whose conditions all hold
decides; no kinds or no types on a line means all of them; if no line holds, the tensor gets the
file type's base format. Of the result for attention values, 70B models lift Q3_K and Q4_K to Q5_K.

A condition on layers looks at a place ``(i, n)``: the i-th of n, counted as
`quantcli.plan.layer_position` says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from quantcli.formats import BlockFormat
from quantcli.plan.model_hparams import Traits
from quantcli.plan.names import VALUE_LIKE, Kind
from quantcli.types import OutputTensor

VALUE_LIFT_70B = {"Q3_K": "Q5_K", "Q4_K": "Q5_K"}


@dataclass(frozen=True)
class Case:
    """What a rule may look at: one tensor of one model for one base format."""

    tensor: OutputTensor
    kind: Kind
    base: BlockFormat
    traits: Traits
    has_importance: bool
    place: Callable[[], tuple[int, int]]
    """Computes (i, n); called only by conditions on layers."""


def _more(i: int, n: int) -> bool:
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _is_expert(case: Case) -> bool:
    stacked = len(case.tensor.shape) > 2 and case.tensor.shape[-3] > 1
    projection = case.kind in (Kind.UP, Kind.GATE, Kind.DOWN)
    return stacked and (projection or case.traits.arch != "bailingmoe3")


def _is_pinned(case: Case) -> bool:
    parts = ("attn_q_a", "attn_q_b", "nextn.eh_proj")
    return case.traits.arch == "glm5-next" and any(part in case.tensor.name for part in parts)


def _first(share: int) -> Callable[[Case], bool]:
    def holds(case: Case) -> bool:
        i, n = case.place()
        return i < n // share

    return holds


def _middle(case: Case) -> bool:
    i, n = case.place()
    return n // 8 <= i < 7 * n // 8


CONDITIONS: dict[str, tuple[Callable[[Case], bool], str]] = {
    "first 1/8": (_first(8), "in the first eighth of the layers"),
    "first 1/16": (_first(16), "in the first sixteenth of the layers"),
    "more": (
        lambda case: _more(*case.place()),
        "in the first and last eighth of the layers and every third between",
    ),
    "middle": (_middle, "in the middle six eighths of the layers"),
    "first two": (lambda case: case.place()[0] < 2, "in the first two layers"),
    "first four": (lambda case: case.place()[0] < 4, "in the first four layers"),
    "gqa": (lambda case: case.traits.queries_per_key >= 4, "that four or more heads share"),
    "gqa or experts": (
        lambda case: case.traits.queries_per_key >= 4 or case.traits.experts >= 4,
        "that four or more heads or experts share",
    ),
    "8 experts": (lambda case: case.traits.experts == 8, "in a model of eight experts"),
    "not 8 experts": (lambda case: case.traits.experts != 8, ""),
    "imatrix": (lambda case: case.has_importance, "with an importance matrix"),
    "no imatrix": (lambda case: not case.has_importance, "without an importance matrix"),
    "falcon": (lambda case: case.traits.arch == "falcon", "in Falcon"),
    "not falcon": (lambda case: case.traits.arch != "falcon", ""),
    "ragged": (
        lambda case: not case.base.fits(case.tensor.columns),
        "whose rows the base format's blocks do not divide",
    ),
    "expert": (_is_expert, "with one matrix per expert"),
    "pinned": (_is_pinned, "that this architecture keeps at eight bits or more"),
}
"""Each condition's test, and how it reads in a plan."""


@dataclass(frozen=True, slots=True)
class MixtureRule:
    """One line of the table; empty ``kinds`` or ``types`` stand for all."""

    kinds: frozenset[Kind]
    types: frozenset[str]
    format: str
    when: tuple[str, ...] = ()

    def holds(self, case: Case) -> bool:
        """Whether every condition is met."""
        return all(CONDITIONS[name][0](case) for name in self.when)

    def reason(self, case: Case) -> str:
        """Why the format was chosen, for the plan."""
        words = [case.kind.value, *(CONDITIONS[name][1] for name in self.when)]
        return " ".join(word for word in words if word) + f": {self.format}"


_LOW = "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ2_M"
_ALL = ""
_HEAD = frozenset({Kind.HEAD})
_EMBEDDING = frozenset({Kind.EMBEDDING})
_VALUES = VALUE_LIKE
_Q = frozenset({Kind.Q})
_K = frozenset({Kind.K})
_OUT = frozenset({Kind.ATTENTION_OUTPUT})
_DOWN = frozenset({Kind.DOWN})
_GATE_UP = frozenset({Kind.GATE, Kind.UP})
_ANY: frozenset[Kind] = frozenset()


def _rule(kinds: frozenset[Kind], types: str, format_name: str, *when: str) -> MixtureRule:
    return MixtureRule(kinds, frozenset(types.split()), format_name, when)


RULES: tuple[MixtureRule, ...] = (
    _rule(_ANY, _ALL, "Q8_0", "pinned"),
    # The head, or the embedding of a model whose head is tied to it.
    _rule(_HEAD, "MXFP4_MOE", "Q8_0"),
    _rule(_HEAD, _ALL, "Q8_0", "falcon"),
    _rule(_HEAD, _ALL, "Q8_0", "ragged"),
    _rule(_HEAD, f"{_LOW} IQ3_XXS", "Q5_K"),
    _rule(_HEAD, "Q8_0", "Q8_0"),
    _rule(_HEAD, _ALL, "Q6_K"),
    _rule(_ANY, "MXFP4_MOE", "MXFP4", "expert"),
    _rule(_ANY, "MXFP4_MOE", "Q8_0"),
    _rule(_EMBEDDING, "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    _rule(_EMBEDDING, "IQ2_S IQ2_M IQ3_XXS", "IQ3_S"),
    _rule(_EMBEDDING, "TQ1_0 TQ2_0 Q2_0", "Q4_K"),
    # The types of one and two bits have rules of their own.
    _rule(_VALUES, _LOW, "Q4_K", "gqa or experts"),
    _rule(_VALUES, "IQ2_S IQ2_M", "IQ3_S"),
    _rule(_VALUES, "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K"),
    _rule(_K, _LOW, "Q4_K", "8 experts"),
    _rule(_DOWN, "IQ2_S IQ2_M", "IQ3_S", "first 1/8"),
    _rule(_DOWN, "IQ1_S IQ1_M IQ2_XXS IQ2_XS", "Q2_K", "first 1/8"),
    _rule(_OUT, _LOW, "Q5_K", "8 experts"),
    _rule(_OUT, "IQ1_S IQ1_M", "IQ2_XXS"),
    _rule(_OUT, "IQ2_S IQ2_M", "IQ3_S"),
    # Attention values.
    _rule(_VALUES, _ALL, "Q8_0", "8 experts"),
    _rule(_VALUES, "Q2_K Q2_K_S IQ3_XXS IQ3_XS IQ3_S", "Q4_K", "gqa"),
    _rule(_VALUES, "Q2_K", "Q3_K"),
    _rule(_VALUES, "IQ3_XXS", "IQ3_S", "no imatrix"),
    _rule(_VALUES, "IQ3_M", "Q4_K"),
    _rule(_VALUES, "Q3_K_M", "Q5_K", "first two"),
    _rule(_VALUES, "Q3_K_M", "Q4_K"),
    _rule(_VALUES, "Q3_K_L", "Q5_K"),
    _rule(_VALUES, "IQ4_NL IQ4_XS", "Q5_K", "gqa"),
    _rule(_VALUES, "Q4_K_M Q5_K_M", "Q6_K", "more"),
    _rule(_VALUES, "Q4_K_S", "Q5_K", "first four"),
    # Attention queries and keys.
    _rule(_K, _ALL, "Q8_0", "8 experts"),
    _rule(_Q | _K, "IQ3_XS", "IQ3_XXS"),
    _rule(_Q | _K, "IQ3_XXS", "IQ2_S"),
    # The feed-forward network.
    _rule(_DOWN, "Q2_K", "Q3_K"),
    _rule(_DOWN, "Q2_K_S", "Q4_K", "first 1/8"),
    _rule(_DOWN, "IQ3_XXS", "Q4_K", "no imatrix", "first 1/8"),
    _rule(_DOWN, "IQ3_XXS", "Q3_K", "no imatrix"),
    _rule(_DOWN, "Q3_K_M", "Q5_K", "first 1/16"),
    _rule(_DOWN, "Q3_K_M", "Q4_K", "not falcon"),
    _rule(_DOWN, "Q3_K_M", "Q4_K", "more"),
    _rule(_DOWN, "IQ3_M", "Q4_K", "first 1/8"),
    _rule(_DOWN, "IQ3_M", "Q4_K", "8 experts", "more"),
    _rule(_DOWN, "Q3_K_L", "Q4_K", "falcon"),
    _rule(_DOWN, "Q3_K_L", "Q5_K"),
    _rule(_DOWN, "Q4_K_M", "Q6_K", "falcon", "first 1/16"),
    _rule(_DOWN, "Q4_K_M", "Q5_K", "falcon", "more"),
    _rule(_DOWN, "Q4_K_M", "Q6_K", "more"),
    _rule(_DOWN, "IQ4_NL IQ4_XS", "Q5_K", "no imatrix", "first 1/8"),
    _rule(_DOWN, "Q5_K_M", "Q6_K", "more"),
    _rule(_DOWN, "Q4_K_S", "Q5_K", "not falcon", "first 1/8"),
    _rule(_DOWN, "Q4_0", "Q4_1", "imatrix", "first 1/8"),
    _rule(_DOWN, "Q5_0", "Q5_1", "imatrix", "first 1/8"),
    _rule(_GATE_UP, "IQ3_XS", "IQ3_XXS", "middle"),
    # The attention's output projection.
    _rule(_OUT, "Q3_K_L", "Q4_K", "falcon"),
    _rule(
        _OUT,
        "Q2_K Q3_K_S Q3_K_M Q4_K_S Q4_K_M IQ3_XXS IQ3_XS IQ3_S IQ3_M IQ4_NL IQ4_XS",
        "Q5_K", "not falcon", "8 experts",
    ),
    _rule(_OUT, "Q2_K", "Q3_K", "not falcon"),
    _rule(_OUT, "IQ3_XXS", "IQ3_S", "not falcon"),
    _rule(_OUT, "Q3_K_M IQ3_M", "Q4_K", "not falcon"),
    _rule(_OUT, "Q3_K_L", "Q5_K", "not 8 experts"),
)  # fmt: skip


def is_low(file_type: str) -> bool:
    """Whether the file type is one of one or two bits, which count layers in their own way."""
    return file_type in _LOW.split()


@cache
def rules_for(file_type: str) -> tuple[MixtureRule, ...]:
    """The lines of the table that can decide for ``file_type``, in order."""
    return tuple(rule for rule in RULES if not rule.types or file_type in rule.types)


def formats_of(file_type: str) -> frozenset[str]:
    """The block formats, besides the base, that lines written for ``file_type`` can choose."""
    return frozenset(rule.format for rule in RULES if file_type in rule.types)


def choose(file_type: str, case: Case) -> tuple[str, str] | None:
    """The format that the mixture chooses and why, or None to stay with the base format."""
    for rule in rules_for(file_type):
        if (not rule.kinds or case.kind in rule.kinds) and rule.holds(case):
            return rule.format, rule.reason(case)
    return None
