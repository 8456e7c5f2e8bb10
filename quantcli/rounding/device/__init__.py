"""Rounding with feedback as batched torch operations, for accelerators.

The native kernels are the reference (`quantcli.rounding.kernels` and what stands on them): given
the same numbers the kernels here choose the same codes, bit by bit on the CPU, where ``--device
cpu:torch`` runs them to be compared. Sums over many columns are in another order than BLAS's, so a
weight within a rounding error of the middle between two levels may go the other way, and what
follows in its row with it.
"""
