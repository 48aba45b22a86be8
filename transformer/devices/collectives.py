"""What a compiled program moves between devices, read from its text."""

import math
import re
from collections import Counter
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\((.*)$")
_CALLED = re.compile(r"(?:body|to_apply|calls|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")


class Moved(NamedTuple):
    """What one kind of collective operation moves in one run of a program.

    count: how often it runs. bytes: of all its results, on one device. largest: the numbers in the
    largest array among them.
    """

    count: int
    bytes: int
    largest: int


def collectives(text: str) -> dict[str, Moved]:
    """What a program moves, by the kind of operation, from `compiled.as_text()`.

    A loop counts as often as it runs, where the compiler knows that, and once otherwise; of
    branches all count.
    """
    computations, entry = _parse(text)
    count, size, largest = Counter(), Counter(), Counter()

    def visit(name, times):
        for kind, arrays, called, trips in computations.get(name, ()):
            if kind in KINDS:
                count[kind] += times
                size[kind] += times * sum(bits * n // 8 for bits, n in arrays)
                largest[kind] = max([largest[kind], *(n for _, n in arrays)])
            for other in called:
                visit(other, times * trips)

    visit(entry, 1)
    return {kind: Moved(count[kind], size[kind], largest[kind]) for kind in KINDS if count[kind]}


def _parse(text):
    """The instructions of each computation that move something or call others."""
    computations, entry, current = {}, None, []
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = computations[begins[2]] = []
            entry = begins[2] if begins[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction is None:
            continue
        result, name, rest = instruction.groups()
        kind = name.removesuffix("-start")
        called = _CALLED.findall(rest)
        for branches in _BRANCHES.findall(rest):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        if kind in KINDS or called:
            trips = _TRIPS.search(rest)
            arrays = [_size(*array) for array in _ARRAY.findall(result)]
            if name != kind and kind != "all-reduce":  # operands stand before the results
                arrays = arrays[len(arrays) // 2 :]
            # What a reduction calls is arithmetic on single numbers.
            called = [] if kind in KINDS else called
            current.append((kind, arrays, called, int(trips[1]) if trips else 1))
    return computations, entry


def _size(kind, shape):
    bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
    return bits, math.prod(int(n) for n in shape.split(",") if n)
