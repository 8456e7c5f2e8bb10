"""How codes of a few bits lie in 32-bit words: one layout of the safetensors family, one file.

Codes are uint8 of shape (out, in), a row for each output, from 0 to 2^bits - 1 in every layout;
zero points are whole numbers of shape (out, groups) on the same scale, so that a weight is
``scale * (code - zero)`` everywhere. Each file has ``pack`` and ``unpack`` functions that are each
other's inverse; rows may be packed some at a time, in multiples of 32.
"""
