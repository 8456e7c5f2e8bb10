"""The functions behind the commands, for Python: what the command line can say, they can.

Options are keywords, spelled as the command line's with ``_`` for ``-``. Each function calls
``on_event`` with progress, notes and what became of each tensor as it happens, and returns a
frozen result with the notes. Whatever is wrong is a `QuantcliError` in one sentence.
"""
