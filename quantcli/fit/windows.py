"""Which layers look back over a sliding window only, as llama.cpp takes it.

A file may list the layers (``attention.sliding_window_pattern``); without the list llama.cpp
repeats a pattern of its own for each architecture, and of an architecture that is not in the table
it ignores the window. Source: ``load_arch_hparams`` of src/models/*.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantcli.fit.keys import Keys

_WINDOW, _PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


@dataclass(frozen=True, slots=True)
class _Rule:
    """One layer of ``every`` sees everything, the ``first`` or the last; 0: none does.

    ``window`` is what llama.cpp takes where the file does not say; ``fixed``: whatever it says.
    """

    every: int
    first: bool = False
    window: int = 0
    fixed: bool = False


_RULES = {
    "afmoe": _Rule(4),
    "cohere2": _Rule(4),
    "cohere2moe": _Rule(4, first=True),
    "exaone-moe": _Rule(4, window=128),
    "exaone4": _Rule(4, window=4096),
    "gemma2": _Rule(2, window=4096),
    "gemma3": _Rule(6),
    "gemma3n": _Rule(5),
    "gemma4": _Rule(0),
    "gpt-oss": _Rule(2),
    "granite_swa": _Rule(0),
    "laguna": _Rule(4, first=True),
    "lfm2": _Rule(0),
    "llama4": _Rule(4, window=8192, fixed=True),
    "mellum": _Rule(4),
    "mimo2": _Rule(0),
    "muse-glimmer": _Rule(4),
    "olmo2": _Rule(4),
    "plamo3": _Rule(8),
    "smallthinker": _Rule(4, first=True, window=4096),
    "step35": _Rule(0),
}


def window_size(keys: Keys) -> int:
    """Tokens of the window; 0 where every layer sees everything."""
    rule = _RULES.get(keys.arch)
    if rule is None or (keys.arch == "exaone4" and keys.layers != 64):
        return 0
    size = keys.number(_WINDOW, rule.window)
    return rule.window if rule.fixed and size else size


def windowed_layers(keys: Keys) -> list[bool]:
    """For each layer, whether it keeps a window of tokens alone."""
    if not window_size(keys):
        return [False] * keys.layers
    listed = keys.listed(_PATTERN)
    if listed is not None and keys.arch != "lfm2":
        return [bool(each) for each in listed]
    rule = _RULES[keys.arch]
    every = keys.number(_PATTERN, rule.every) if keys.arch != "lfm2" else 0
    full = 0 if rule.first else every - 1
    return [every == 0 or layer % every != full for layer in range(keys.layers)]
