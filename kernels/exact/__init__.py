"""Arithmetic with one order of sums: the bits of a row do not depend on the rows beside it."""
