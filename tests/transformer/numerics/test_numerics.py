"""Exact numerics leave no order to the compiler, as traces of all choices of Config show."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core

from kernels.tracing.loops import scan_parts
from transformer import Config, init_cache, presets, program, run
from transformer.memory.instruction import read_p, write_read_p
from transformer.numerics.layouts import dot_by_output_p
from transformer.numerics.products import exact_dot_p
from transformer.program.experts import experts_p

OURS = {dot_by_output_p, exact_dot_p, experts_p, read_p, write_read_p}
# Written by the compiler as polynomials, or in an order of its own.
UNORDERED = {
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "sin", "cos", "tan", "pow"),
    *("erf", "erfc", "erf_inv", "rsqrt", "cbrt", "cumsum", "reduce_sum", "reduce_prod"),
    *("dot", "dot_general", "ragged_dot", "ragged_dot_general", "conv_general_dilated"),
}
MOVES = {
    *("neg", "abs", "max", "min", "clamp", "select_n", "concatenate", "reshape", "squeeze", "pad"),
    *("broadcast_in_dim", "transpose", "slice", "dynamic_slice", "dynamic_update_slice", "gather"),
    *("expand_dims", "rev", "copy", "reduce_max", "reduce_min", "split", "stop_gradient", "sort"),
    *("optimization_barrier", "sharding_constraint", "stack"),
}
PRODUCT, NARROWED = "a product", "a number of a narrow type that is not rounded"


class Walk:
    """What the compiler could do in more than one way, in a jaxpr and those within it.

    A number is marked while it is a product that has not been made integers since: a sum of it may
    be a multiply-add. So is one that was computed in a narrow type, until it is rounded.
    """

    def __init__(self):
        self.faults = set()

    def __call__(self, closed, marks):
        """The marks of the results, from those of the operands."""
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.invars, marks, strict=True))
        of = lambda x: set() if isinstance(x, core.Literal) else known.get(x, set())
        for eqn in jaxpr.eqns:
            results = self._equation(eqn, [of(x) for x in eqn.invars])
            known.update(zip(eqn.outvars, results, strict=True))
        return [of(x) for x in jaxpr.outvars]

    def _equation(self, eqn, marks):
        name, count = eqn.primitive.name, len(eqn.outvars)
        if eqn.primitive in OURS:
            inner = jax.make_jaxpr(partial(eqn.primitive.impl, **eqn.params))
            shapes = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in eqn.invars]
            return self(inner(*shapes), marks)
        if name == "scan":
            consts, carry, _ = scan_parts(eqn, marks)
            return self._loop(eqn.params["jaxpr"], marks, len(consts), len(carry))
        if name == "while":
            first, consts = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            return self._loop(eqn.params["body_jaxpr"], marks[first:], consts, count)
        if name == "cond":
            branches = [self(x, marks[1:]) for x in eqn.params["branches"]]
            return [set().union(*x) for x in zip(*branches, strict=True)]
        for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if key in eqn.params:
                inner = eqn.params[key]
                closed = isinstance(inner, core.ClosedJaxpr)
                return self(inner if closed else core.ClosedJaxpr(inner, ()), marks)
        out = eqn.outvars[0].aval
        if not jnp.issubdtype(out.dtype, jnp.floating):
            return [set()] * count
        return [self._number(eqn, name, out, marks)] * count

    def _number(self, eqn, name, out, marks):
        every = set().union(*marks)
        if name in MOVES or (name == "mul" and any(map(_is_power_of_two, eqn.invars))):
            return every
        if NARROWED in every:
            self._say(eqn, f"{NARROWED} goes into {name}")
        narrow = {NARROWED} if out.dtype.itemsize < 4 else set()
        if name == "convert_element_type":
            return every - {NARROWED} | (narrow if _is_float(eqn.invars[0]) else set())
        if name in ("add", "sub", "add_any") and PRODUCT in every:
            self._say(eqn, f"{PRODUCT} feeds a sum")
        if name in UNORDERED:
            if not _in_room_of_products(eqn):
                self._say(eqn, f"{name} is left to the compiler")
            return {PRODUCT} | narrow
        divided = name == "div" and isinstance(eqn.invars[1], core.Literal)
        if name in ("mul", "integer_pow", "square") or divided:  # a division by a constant is one
            return {PRODUCT} | narrow
        return narrow if name != "bitcast_convert_type" else set()

    def _loop(self, body, marks, num_consts, num_carry):
        consts, rest = marks[:num_consts], marks[num_consts:]
        carry, rest = rest[:num_carry], rest[num_carry:]
        for _ in range(3):  # a mark goes round with what is carried
            results = self(body, [*consts, *carry, *rest])
            carry = [x | y for x, y in zip(carry, results, strict=False)]
        return [*carry, *results[num_carry:]]

    def _say(self, eqn, what):
        frames = [x for x in eqn.source_info.traceback.frames if "/tests/" not in x.file_name]
        frames = [x for x in frames if "/kernels/" in x.file_name or "/transformer/" in x.file_name]
        where = [f"{x.file_name.rpartition('/')[2]}:{x.line_num}" for x in frames[:3]]
        self.faults.add(f"{what}: {' in '.join(where)}")


def _is_power_of_two(x):
    """By which a product is not rounded."""
    return isinstance(x, core.Literal) and np.ndim(x.val) == 0 and abs(np.frexp(x.val)[0]) == 0.5


def _is_float(x):
    """Whether x is an array of floats; a number of Python is as exact in a narrow type."""
    return jnp.issubdtype(x.aval.dtype, jnp.floating) and not x.aval.weak_type


def _in_room_of_products(eqn):
    """Products whose order is found out by running them."""
    frames = eqn.source_info.traceback.frames
    return any(x.file_name.endswith("kernels/exact/products.py") for x in frames)


def left_to_the_compiler(f, *operands):
    """What of a function's trace has no fixed order: a set of words."""
    walk, closed = Walk(), jax.make_jaxpr(lambda *operands: f(*operands))(*operands)
    walk(closed, [set()] * len(closed.jaxpr.invars))
    return walk.faults


def of_program(config, random_params, chunk, numerics="exact"):
    params, cache = random_params(config), init_cache(config, 12)
    f = program(config, numerics=numerics)
    tokens = jnp.zeros(12, jnp.int32)
    return left_to_the_compiler(lambda p, c: run(f, p, c, tokens, chunk=chunk), params, cache)


@settings(max_examples=5)
@given(st.from_type(Config), st.sampled_from(["float32", "bfloat16"]), st.sampled_from([None, 1]))
def test_nothing_is_left_to_the_compiler(random_params, config, dtype, chunk):
    assert not of_program(config.replace(dtype=dtype), random_params, chunk)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", [name for name in presets if name.startswith("tiny")])
def test_nothing_is_left_to_it_in_the_shapes_that_people_use(random_params, preset, dtype):
    for chunk in (None, 1):
        assert not of_program(presets[preset].replace(dtype=dtype), random_params, chunk)


def test_fast_numerics_leave_it_the_order(random_params):
    """The walk sees what it is there to see."""
    faults = of_program(presets["tiny"].replace(dtype="bfloat16"), random_params, None, "fast")
    for what in (PRODUCT, NARROWED, "logistic is left", "dot", "rsqrt is left"):
        assert any(what in fault for fault in faults), what
