"""The parts of a scan are its constants, its carry and its slices."""

import jax
import jax.numpy as jnp

from kernels.tracing.loops import scan_parts


def test_parts_of_a_scan():
    def loop(w, carry, xs):
        step = lambda carry, x: ((carry[0] + w * x["a"], carry[1] + 1), x["b"])
        return jax.lax.scan(step, carry, xs)

    xs = {"a": jnp.ones(3), "b": jnp.ones((3, 2))}
    [eqn] = jax.make_jaxpr(loop)(1.0, (2.0, 3.0), xs).eqns
    consts, carry, slices = scan_parts(eqn, [x.aval.shape for x in eqn.invars])
    assert (consts, carry, slices) == ([()], [(), ()], [(3,), (3, 2)])
