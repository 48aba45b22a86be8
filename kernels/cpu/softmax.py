"""The softmax of a query's scores on a CPU, in the order of `kernels.exact.attention`."""

from kernels.cpu.code import LANES, Code, Value
from kernels.cpu.functions import exp
from kernels.exact.sums import TILE, in_pairs


def weights(code, tile, begin, end, peak, whole):
    """Makes scores of a tile weights, zero where nothing is seen, and adds up what they are."""
    zeros = code.splat(code.number(0.0))
    for first, last in ((0, begin), (end + (LANES - 1), TILE)):
        with code.loop(
            code.constant(first) // LANES * LANES, code.constant(last) // LANES * LANES, LANES
        ) as n:
            code.put(zeros, tile + n * 4)
    peaks, begins, ends = map(code.splat, (peak, code.narrow(begin), code.narrow(end)))
    with code.loop(begin // LANES * LANES, end, LANES) as n:
        places = code.counted(n)
        weight = exp(code, code.vector(tile + n * 4) - peaks)
        seen = (places >= begins) & (places < ends)
        code.put(code.select(seen, weight, zeros), tile + n * 4)
    total = in_pairs([code.vector(tile + 4 * n) for n in range(0, TILE, LANES)])
    whole.set(whole.get() + in_pairs([code.lane(total, n) for n in range(LANES)]))


def largest(code: Code, at, begin, end, least: Value) -> Value:
    """The largest of the floats at `at(p)`, for begin <= p < end, and of `least`."""
    begin, end = code.constant(begin), code.constant(end)
    peak, several = code.variable(least), end - (end - begin) % LANES
    highest = code.variable(code.splat(least))
    with code.loop(begin, several, LANES) as p:
        highest.set(code.larger(code.vector(at(p)), highest.get()))
    for lane in range(LANES):
        peak.set(code.larger(code.lane(highest.get(), lane), peak.get()))
    with code.loop(several, end) as p:
        peak.set(code.larger(code.float(at(p)), peak.get()))
    return peak.get()
