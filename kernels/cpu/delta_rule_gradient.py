"""Gradients of the gated delta rule on a CPU, token by token, from the operands alone.

With G the gradient of the state behind a token, and d that of what the token's key held:

    G    = (later G + later k d^T) * later decay + q dz^T
    dv   = beta G^T k,   d = -dv,   dbeta = (v - held) . G^T k
    dq   = S dz,   dk = G beta (v - held) + (decay S before) d

States run on from the first token, and gradients back from the last, so three passes over the
tokens need no state but the running one. The gradient of a log decay is that of the state before,
times that state. It need not be formed, since both change together: it is what it is at the next
token, and q . dq - v . dv more.
"""

from functools import cache

import jax
import jax.numpy as jnp

from kernels.cpu.call import Frame, Kernel, register
from kernels.cpu.delta_rule import LANES, VECTORS, Row, Sums


def gradients(state, q, k, v, decay, beta, dstate, dz):
    """The gradients of T tokens of B sequences, none of which is padding.

    Args:
      state, dstate: [B, N, Hk, Hv], the state before and the gradient of that behind.
      q, k: [B, T, N, Hk].
      v, dz: [B, T, N, Hv].
      decay, beta: [B, T, N]; a token whose decay is 0 begins anew.

    All are float32.

    Returns:
      The gradients of state, q, k, v, the logarithm of the decay, and beta.
    """
    if 0 in (q.size, v.size):
        return dstate, *map(jnp.zeros_like, (q, k, v, decay, beta))
    Hk, Hv = state.shape[2:]
    vectors = min(-(-Hv // LANES), VECTORS)
    widths = [(0, -Hk % LANES), (0, -Hv % (LANES * vectors))]
    fill = lambda x, widths: jnp.pad(x, [(0, 0)] * (x.ndim - len(widths)) + widths)
    state, dstate = (fill(x, widths) for x in (state, dstate))
    q, k = (fill(x, widths[:1]) for x in (q, k))
    v, dz = (fill(x, widths[1:]) for x in (v, dz))
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (state, q, k, v, decay, beta)]
    call = jax.ffi.ffi_call(register(_kernel(vectors)), results)
    of_state, of_q, of_k, of_v, of_g, of_beta = call(state, q, k, v, decay, beta, dstate, dz)
    return of_state[..., :Hk, :Hv], of_q[..., :Hk], of_k[..., :Hk], of_v[..., :Hv], of_g, of_beta


@cache
def _kernel(vectors):
    width = LANES * vectors
    heads = lambda frame: frame.operand(1).size(0) * frame.operand(1).size(2)

    def room(frame):
        q = frame.operand(1)
        return (q.size(1) + q.size(3)) * (4 * width) + q.size(1) * 4

    def run(frame, head):
        with frame.code.loop(0, frame.operand(3).size(3), width) as column:
            piece = _Piece(frame, head, column, vectors)
            _forwards(piece)
            _backwards(piece)
            _again(piece)

    return Kernel(f"unison_delta_rule_gradient_{vectors}", heads, run, room)


class _Piece:
    """Some columns of one head of one sequence, and where its numbers lie.

    What is a sum over columns is added up from piece to piece.

    Attributes:
      code: where it is written.
      row: of its columns.
      T, Hk: as in `gradients`.
      state, dstate, of_state: functions of m, a row of the state.
      q, k, of_q, of_k: functions of a token t and m.
      v, dz, of_v, decay, beta, of_g, of_beta: functions of t.
      kept, error, asked: in the thread's room. A row m of the running state, or of its gradient;
        how far the value of token t is from what its key held; q . dq of token t.
    """

    def __init__(self, frame: Frame, head, column, vectors):
        self.code, self.row = frame.code, Row(frame.code, vectors)
        self.is_first = column.equals(0)
        state, q, k, v, decay, beta, dstate, dz = map(frame.operand, range(8))
        of_state, of_q, of_k, of_v, of_g, of_beta = map(frame.result, range(6))
        T, N, Hk = map(q.size, range(1, 4))
        Hv, width = v.size(3), LANES * vectors
        self.T, self.Hk = T, Hk
        place = lambda t: (head // N * T + t) * N + head % N
        numbers = lambda x: lambda t: x.address + place(t) * 4
        keys = lambda x: lambda t, m: x.address + (place(t) * Hk + m) * 4
        values = lambda x: lambda t: x.address + (place(t) * Hv + column) * 4
        states = lambda x: lambda m: x.address + ((head * Hk + m) * Hv + column) * 4
        self.state, self.dstate, self.of_state = map(states, (state, dstate, of_state))
        self.q, self.k, self.of_q, self.of_k = map(keys, (q, k, of_q, of_k))
        self.v, self.dz, self.of_v = map(values, (v, dz, of_v))
        self.decay, self.beta, self.of_g, self.of_beta = map(numbers, (decay, beta, of_g, of_beta))
        errors = frame.room + Hk * (4 * width)
        self.kept = lambda m: frame.room + m * (4 * width)
        self.error = lambda t: errors + t * (4 * width)
        self.asked = lambda t: errors + T * (4 * width) + t * 4

    def splat(self, address):
        """A row of the number that lies there."""
        return self.code.splat(self.code.float(address), LANES)

    def add(self, x, address, load=None):
        """Adds to what the pieces before have left at an address; `load` reads it there."""
        old = load(address) if load else self.code.vector(address, lanes=LANES)
        self.code.put(self.code.select(self.is_first, x, x + old), address)

    def change(self, new, use):
        """Changes the rows that are kept, and uses a number of each.

        Args:
          new: `new(m, row) -> (the new row m, a vector whose numbers add up to its number)`.
          use: `use(m, numbers)`, given a vector of the numbers from row m on.
        """

        def number(m):
            row, products = new(m, self.row.load(self.kept(m)))
            self.row.store(row, self.kept(m))
            return products

        with self.code.loop(0, self.Hk, LANES) as m:
            use(m, self.code.totals(lambda n: number(m + n), LANES))

    def dot(self, xs, ys):
        """The products of two rows, added up to one vector."""
        (x, y), *others = zip(xs, ys, strict=True)
        total = x * y
        for x, y in others:
            total = self.code.fma(x, y, total)
        return total


def _forwards(p: _Piece):
    """From the first token on: errors, gradients of q, and the last state, which stays."""
    code, row = p.code, p.row
    held, asked = Sums(row), code.variable(row.zeros[0])
    with code.loop(0, p.Hk) as m:
        xs = row.load(p.state(m))
        row.store(xs, p.kept(m))
        held.add(p.splat(p.k(0, m)), xs)
    with code.loop(0, p.T) as t:
        then = code.smaller(t + 1, p.T - 1)  # any one, behind the last
        decay, beta, asks = p.splat(p.decay(t)), p.splat(p.beta(t)), row.load(p.dz(t))
        error = [x - decay * old for x, old in zip(row.load(p.v(t)), held.get(), strict=True)]
        row.store(error, p.error(t))
        written = [beta * x for x in error]
        held.clear()
        asked.set(row.zeros[0])

        def new(m, olds):
            key = p.splat(p.k(t, m))
            xs = [code.fma(key, x, old * decay) for x, old in zip(written, olds, strict=True)]
            held.add(p.splat(p.k(then, m)), xs)
            return xs, p.dot(xs, asks)

        def use(m, numbers):
            p.add(numbers, p.of_q(t, m))
            asked.set(code.fma(code.vector(p.q(t, m), lanes=LANES), numbers, asked.get()))

        p.change(new, use)
        code.put(code.total(asked.get()), p.asked(t))


def _backwards(p: _Piece):
    """From the last token on: gradients of v, beta, the decay and the state, and part of k's."""
    code, row = p.code, p.row
    product = code.variable(row.zeros[0])
    with code.loop(0, p.Hk) as m:
        xs = row.load(p.dstate(m))
        product.set(product.get() + p.dot(xs, row.load(p.kept(m))))
        row.store(xs, p.kept(m))
    of_decay = code.variable(code.total(product.get()))
    of_written = Sums(row)
    # d and the decay of the token behind; there is none behind the last one.
    moved, decay = Sums(row), code.variable(code.splat(code.number(1.0), LANES))
    with code.loop(0, p.T) as n:
        t = p.T - n - 1
        behind = code.smaller(t + 1, p.T - 1)
        error, asks, beta = row.load(p.error(t)), row.load(p.dz(t)), p.splat(p.beta(t))
        written, ds, fade = [beta * x for x in error], moved.get(), decay.get()
        of_written.clear()

        def new(m, olds):
            key, query = p.splat(p.k(behind, m)), p.splat(p.q(t, m))
            xs = [code.fma(key, d, old) * fade for d, old in zip(ds, olds, strict=True)]
            xs = [code.fma(query, ask, x) for ask, x in zip(asks, xs, strict=True)]
            of_written.add(p.splat(p.k(t, m)), xs)
            return xs, p.dot(xs, written)

        p.change(new, lambda m, numbers: p.add(numbers, p.of_k(t, m)))
        of_v = [beta * x for x in of_written.get()]
        row.store(of_v, p.of_v(t))
        p.add(code.total(p.dot(of_written.get(), error)), p.of_beta(t), code.float)
        moved.set([x * -1.0 for x in of_v])
        decay.set(p.splat(p.decay(t)))
        more = code.float(p.asked(t)) - code.total(p.dot(row.load(p.v(t)), of_v))
        begins, zero = code.float(p.decay(t)).equals(0.0), code.number(0.0)
        of_decay.set(code.select(begins, zero, of_decay.get() + more))
        p.add(of_decay.get(), p.of_g(t), code.float)
    with code.loop(0, p.Hk) as m:
        key, olds = p.splat(p.k(0, m)), row.load(p.kept(m))
        xs = [code.fma(key, d, old) for d, old in zip(moved.get(), olds, strict=True)]
        row.store([x * decay.get() for x in xs], p.of_state(m))


def _again(p: _Piece):
    """From the first token on once more: the part of k's gradients that states have."""
    code, row = p.code, p.row
    with code.loop(0, p.Hk) as m:
        row.store(row.load(p.state(m)), p.kept(m))
    with code.loop(0, p.T) as t:
        decay, beta, of_v = p.splat(p.decay(t)), p.splat(p.beta(t)), row.load(p.of_v(t))
        written = [beta * x for x in row.load(p.error(t))]

        def new(m, olds):
            key, olds = p.splat(p.k(t, m)), [decay * x for x in olds]
            xs = [code.fma(key, x, old) for x, old in zip(written, olds, strict=True)]
            return xs, p.dot(olds, of_v)

        def use(m, numbers):
            at = p.of_k(t, m)
            code.put(code.vector(at, lanes=LANES) - numbers, at)

        p.change(new, use)
