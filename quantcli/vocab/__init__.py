"""Tokenizer files of a checkpoint -> ``tokenizer.*`` key-values of a GGUF.

One rule for all of it: the ids that llama.cpp gives for a text are those that the checkpoint's
own tokenizer gives, or the tokenizer is refused in a sentence that says what llama.cpp lacks.
"""

from __future__ import annotations

from quantcli.vocab.load import load_vocabulary

__all__ = ["load_vocabulary"]
