"""What becomes of a query's scores on a CPU before their softmax: a soft cap and ALiBi.

Each score has the roundings of `kernels.exact.attention`. A call without them skips this.
"""

from typing import NamedTuple

import jax.numpy as jnp

from kernels.cpu.call import Buffer
from kernels.cpu.code import Code
from kernels.cpu.functions import tanh
from kernels.cpu.tiles import LANES


def optional(x):
    """An operand of a kernel, float32: [1] of a number, [0] of None, an array [N] as it is."""
    return jnp.zeros(0) if x is None else jnp.atleast_1d(jnp.asarray(x, jnp.float32))


class Bends(NamedTuple):
    """Soft cap and ALiBi, as code sees them.

    Attributes:
      code: where it is written.
      cap: [1], or empty.
      slopes: [N], or empty.
    """

    code: Code
    cap: Buffer
    slopes: Buffer

    def has_cap(self):
        """Whether there is a soft cap."""
        return self.cap.size(0) > 0

    def has_slopes(self):
        """Whether there are slopes."""
        return self.slopes.size(0) > 0

    def is_any(self):
        """Whether there is either."""
        return self.cap.size(0) + self.slopes.size(0) > 0

    def bend(self, scores, begin, end, head, distance):
        """Does both to the scores begin <= n < end of a row, and to their neighbours in a vector.

        Args:
          scores: the address of score 0.
          begin, end: which of them.
          head: of the query.
          distance: from the cell of score 0 to the query.
        """
        code = self.code
        begin = code.select(begin < end, begin // LANES * LANES, end)
        with code.when(self.has_cap()), code.loop(begin, end, LANES) as n:
            _, score = self._capped(code.vector(scores + n * 4, lanes=LANES))
            code.put(score, scores + n * 4)
        with code.when(self.has_slopes()):
            self.lean(scores, begin, end, head, distance)

    def lean(self, scores, begin, end, head, distance):
        """ALiBi's part of `bend`, where `begin` is that of a vector."""
        code = self.code
        slope = code.splat(code.float(self.slopes.address + head * 4), LANES)
        with code.loop(begin, end, LANES) as n:
            places = code.splat(code.narrow(distance), LANES) - code.counted(n, LANES)
            here = scores + n * 4
            code.put(code.vector(here, lanes=LANES) - slope * code.from_integers(places), here)

    def cap_gradients(self, scores, gradients, count, delta):
        """Caps so many scores, and makes of gradients of weights, less delta, those before a cap.

        What a gradient is multiplied by is the slope of the cap at its score.
        """
        code = self.code
        with code.loop(0, count, LANES) as n:
            here, there = scores + n * 4, gradients + n * 4
            bent, score = self._capped(code.vector(here, lanes=LANES))
            slope = code.splat(code.number(1.0), LANES) - bent * bent
            gradient = code.vector(there, lanes=LANES) - code.splat(delta, LANES)
            code.put(score, here)
            code.put(gradient * slope, there)

    def _capped(self, scores):
        """A vector of scores: what tanh makes of them, and that times the cap."""
        code, cap = self.code, self.code.float(self.cap.address)
        bent = tanh(code, scores * code.splat(code.number(1.0) / cap, LANES))
        return bent, bent * code.splat(cap, LANES)
