"""The gated delta rule on a CPU: tokens follow one another, and the state stays in a near cache.

Columns of a state never meet, so a piece is up to four vectors of columns of one head. A token is
one pass over them, which changes them, reads them under the token's query, and under the key of the
token that comes next. So a token is the same arithmetic, whatever runs with it.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from kernels.blocks import Blocks
from kernels.cpu import code as words
from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.code import Code, Value

LANES = words.widest()
VECTORS = 4  # of a piece: the sums of its two reads stay in registers
_LEAST = 1 << 15  # numbers that a part changes: for fewer, waking a thread takes longer


def delta_rule(blocks: Blocks, i, q, k, v, decay, beta):
    """Writes T tokens of B sequences, one after the other, and reads for each of them.

    Args:
      blocks: of B states [N, Hk, Hv], which may change in place.
      i: [B, T], int32, the positions; padding and position 0 as in `kernels.delta_rule.step`.
      q, k: [B, T, N, Hk].
      v: [B, T, N, Hv].
      decay, beta: [B, T, N]; a decay at position 0 counts for nothing, but is finite.

    All but positions are float32.

    Returns:
      The arrays of the blocks, with the states after the last token, and z [B, T, N, Hv].
    """
    states = blocks.arrays
    if 0 in (q.size, v.size):
        return states, jnp.zeros_like(v)
    vectors = min(-(-v.shape[-1] // LANES), VECTORS)
    width = LANES * vectors
    size = width * q.shape[1] * q.shape[3]
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (states, v)]
    kernel = register(_kernel(vectors, v.shape[-1] % width == 0))
    call = jax.ffi.ffi_call(kernel, results, input_output_aliases={0: 0})
    stacked = blocks.layer is not None
    return call(
        *(states, i, q, k, v, decay, beta),
        jnp.asarray(blocks.layer if stacked else 0, jnp.int32),
        layers=np.int64(states.shape[-4] if stacked else 1),
        together=np.int64(-(-_LEAST // size)),
    )


@cache
def _kernel(vectors, whole):
    def pieces(frame):
        q = frame.operand(2)
        return q.size(0) * q.size(2) * _pieces_of_head(frame, vectors)

    def parts(frame):
        together = frame.attribute(1)
        return (pieces(frame) + (together - 1)) // together

    def run(frame, part):
        together = frame.attribute(1)
        end = frame.code.smaller((part + 1) * together, pieces(frame))
        with frame.code.loop(part * together, end) as piece:
            _run(frame, piece, vectors, whole)

    room = lambda frame: frame.operand(2).size(3) * (4 * LANES * vectors)
    return Kernel(f"unison_delta_rule_{vectors}" + "_whole" * whole, parts, run, room)


def _pieces_of_head(frame, vectors):
    return (frame.operand(4).size(3) + (LANES * vectors - 1)) // (LANES * vectors)


class Row:
    """As many columns as a piece has, as vectors; the last ones may not be there.

    Attributes:
      zeros: such a row.
    """

    def __init__(self, code: Code, vectors: int, count: Value | None = None):
        """`count` columns are there; None: all of them."""
        self.code = code
        there = lambda n: count and code.smaller(code.larger(count - n, 0), LANES)
        self.parts = [(4 * n, there(n)) for n in range(0, LANES * vectors, LANES)]
        self.zeros = [code.splat(code.number(0.0), LANES)] * vectors

    def load(self, at):
        """The columns that lie at an address."""
        load = lambda n, count: (
            self.code.vector(at + n, lanes=LANES)
            if count is None
            else self.code.some(at + n, count, LANES)
        )
        return [load(*part) for part in self.parts]

    def store(self, xs, at):
        """Stores those that are there."""
        for x, (n, count) in zip(xs, self.parts, strict=True):
            if count is None:
                self.code.put(x, at + n)
            else:
                self.code.put_some(x, at + n, count)


class Sums:
    """A row of sums that stay in registers: chains of multiply-adds."""

    def __init__(self, row: Row):
        self.code, self.zeros = row.code, row.zeros
        self.variables = [self.code.variable(x) for x in row.zeros]

    def set(self, xs):
        """Sets them to other numbers."""
        for variable, x in zip(self.variables, xs, strict=True):
            variable.set(x)

    def clear(self):
        """Sets them to zero."""
        self.set(self.zeros)

    def add(self, factor, xs):
        """Adds a multiple of a row."""
        self.set([self.code.fma(factor, x, y) for x, y in zip(xs, self.get(), strict=True)])

    def get(self):
        """What they are now."""
        return [x.get() for x in self.variables]


def _run(frame: Frame, piece, vectors, whole):
    """The tokens of one piece, whose state is in the room between the first and the last."""
    code = frame.code
    state, i, q, k, v, decay, beta, layer = map(frame.operand, range(8))
    new_state, z = map(frame.result, range(2))
    T, N, Hk, Hv = q.size(1), q.size(2), q.size(3), v.size(3)
    per_head = _pieces_of_head(frame, vectors)
    head, column = piece // per_head, piece % per_head * (LANES * vectors)
    sequence, head = head // N, head % N
    block = sequence * frame.attribute(0) + code.small_integer(layer.address)
    first = sequence * T  # of its tokens
    row = Row(code, vectors, None if whole else Hv - column)
    held, read = Sums(row), Sums(row)

    position = lambda t: code.small_integer(i.address + (first + t) * 4)
    place = lambda t: (first + t) * N + head
    splat = lambda address: code.splat(code.float(address), LANES)
    of_token = lambda x, t: splat(x.address + place(t) * 4)
    of_key = lambda x, t, m: splat(x.address + (place(t) * Hk + m) * 4)
    columns = lambda x, t: x.address + (place(t) * Hv + column) * 4
    start = ((block * N + head) * Hk * Hv + column) * 4  # of a state; its rows follow in steps
    lies = lambda x: (x.address + start, Hv * 4)
    room = frame.room, code.constant(4 * LANES * vectors)

    def real(t):
        """The first token from t on that is no padding, which reads zeros; T if there is none."""
        t = code.variable(t)
        is_padding = lambda t: (t < T) & (position(code.smaller(t, T - 1)) < 0)
        with code.repeat(lambda: is_padding(t.get())):
            row.store(row.zeros, columns(z, t.get()))
            t.set(t.get() + 1)
        return t.get()

    at, step = map(code.variable, lies(state))
    token = code.variable(real(0))
    upcoming = lambda: code.smaller(token.get(), T - 1)  # any one, where there is none
    then = upcoming()
    with code.loop(0, Hk) as m:
        held.add(of_key(k, then, m), row.load(at.get() + m * step.get()))
    with code.when(token.get().equals(T)), code.loop(0, Hk) as m:
        to, to_step = lies(new_state)
        row.store(row.load(at.get() + m * step.get()), to + m * to_step)
    with code.repeat(lambda: token.get() < T):
        now = token.get()
        with code.when(position(now).equals(0)):
            held.clear()
            at.set(room[0])
            step.set(room[1])
            with code.loop(0, Hk) as m:
                row.store(row.zeros, room[0] + m * room[1])
        fade, strength = of_token(decay, now), of_token(beta, now)
        pairs = zip(row.load(columns(v, now)), held.get(), strict=True)
        new = [strength * (x - fade * old) for x, old in pairs]
        token.set(real(now + 1))
        then, is_last = upcoming(), token.get().equals(T)
        source, source_step = at.get(), step.get()
        to, to_step = map(partial(code.select, is_last), lies(new_state), room)
        held.clear()
        read.clear()
        with code.loop(0, Hk) as m:
            write, olds = of_key(k, now, m), row.load(source + m * source_step)
            xs = [code.fma(write, x, old * fade) for x, old in zip(new, olds, strict=True)]
            row.store(xs, to + m * to_step)
            read.add(of_key(q, now, m), xs)
            held.add(of_key(k, then, m), xs)
        at.set(to)
        step.set(to_step)
        row.store(read.get(), columns(z, now))
