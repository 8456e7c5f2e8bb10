"""YAML of strangers: PyYAML's safe loader with bounds, and every fault of it as one error.

Aliases let a few lines stand for billions of values (each a list of nine of the one before), which
cost nothing until somebody walks through them, and merge keys are walked through at once. PyYAML
reads some hundred thousand characters a second, and what an explicit tag promises and the text is
not (``!!int x``, a date of the 99th month) ends in whichever error its converter happens to raise.
"""

from __future__ import annotations

from typing import Any

import yaml

MOST_CHARACTERS = 256 << 10
_MOST_VALUES = 100_000


def load_yaml(text: str, kind: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """What the YAML ``text`` holds, with a loader of this ``kind``; ValueError says what is wrong.

    Errors that are not PyYAML's own kind but raised by the loader on purpose pass unchanged.
    """
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"longer than {MOST_CHARACTERS >> 10} KiB")
    try:
        loader = kind(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            if _count(node, {}) > _MOST_VALUES:
                raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except (LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"a value is not what its tag says ({error})") from None


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values ``node`` stands for, written out; an alias of itself counts as too many."""
    if id(node) in known:
        return known[id(node)]
    known[id(node)] = _MOST_VALUES + 1
    count = 1
    if isinstance(node, yaml.MappingNode):
        count += sum(_count(part, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(part, known) for part in node.value)
    known[id(node)] = count
    return count
