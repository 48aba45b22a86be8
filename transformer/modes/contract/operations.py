"""What one operation of JAX may do to the contract, whatever its operands are.

JAX's own operations, mapped over positions, compute for each token what they compute for one: that
is what `jax.vmap` means. Here stands what does not keep to it: operations over the axis of
positions, operations with effects, and operations whose rule for `vmap` somebody else wrote.
"""

import functools
import sys
from collections.abc import Iterator

from jax.extend.core import Primitive

from kernels.cpu import call
from transformer.memory.instruction import POSITIONS
from transformer.memory.rules import Rule
from transformer.modes.contract.tracing import INSTRUCTIONS, KERNELS, OURS, jaxprs

# Effects that connect no tokens: those of named axes are looked at by name, those of references by
# where the reference comes from.
_HARMLESS = {
    "NamedAxisEffect",
    "ReadEffect",
    "WriteEffect",
    "AccumEffect",
    "InternalMutableArrayEffect",
    "NoDCEEffect",
}
_CALLBACKS = {"pure_callback", "io_callback", "debug_callback", "callback", "python_callback"}
_OPAQUE = {
    "custom_vmap_call": "its rule for vmap is the program's own, and could mix tokens",
    "call_hi_primitive": "its rule for vmap is the program's own, and could mix tokens",
    "call_hi_primitive_linearized": "its rule for vmap is the program's own, and could mix tokens",
    "ffi_call": "foreign code may be given all tokens at once, and may remember them",
    "rng_uniform": "it draws from a state of the device that all tokens share",
}


def broken_rules(eqn, varies: bool) -> Iterator[tuple[Rule, str]]:
    """What an equation breaks by itself: pairs (rule, why).

    Args:
      eqn: the equation; jaxprs within it are looked into elsewhere.
      varies: whether an operand differs from token to token.
    """
    name = eqn.primitive.name
    if not is_known(eqn.primitive):
        yield (
            Rule.PROVABLE,
            f"{name} is no primitive of JAX, so what it does when tokens are mapped over is "
            "known to its author alone. Write it with JAX's operations, or as a Memory.",
        )
    elif name in _CALLBACKS:
        yield (
            Rule.STATE,
            f"{name} hands what a token computed to Python, which may remember it for another "
            "token. jax.debug.print is allowed.",
        )
    elif effects := harmful_effects(eqn):
        yield Rule.STATE, f"{name} has an effect ({', '.join(effects)}) that outlives the token."
    elif POSITIONS in axes(eqn):
        yield (
            Rule.APART,
            f'{name} works over the axis "{POSITIONS}", so what one token computes depends on '
            "the others that happen to run with it. Tokens reach each other through blocks only.",
        )
    elif varies and (why := _hidden(eqn)):
        yield Rule.PROVABLE, f"{name} cannot be looked into: {why}."


def is_known(primitive: Primitive) -> bool:
    """Whether a primitive is JAX's, or one of ours."""
    return primitive in INSTRUCTIONS | OURS | KERNELS or primitive in _of_jax(len(sys.modules))


def axes(eqn) -> set:
    """The named axes that an equation works over."""
    named = {name for key, value in eqn.params.items() if "ax" in key for name in _names(value)}
    return named | {effect.name for effect in _own_effects(eqn) if hasattr(effect, "name")}


def harmful_effects(eqn) -> list[str]:
    """The kinds of effects that could connect tokens, without those of jaxprs within."""
    allowed = _HARMLESS | ({"DebugEffect", "OrderedDebugEffect"} if prints(eqn) else set())
    return sorted({type(effect).__name__ for effect in _own_effects(eqn)} - allowed)


def prints(eqn) -> bool:
    """Whether an equation is a jax.debug.print, which gives nothing back."""
    return eqn.primitive.name == "debug_print"


def _own_effects(eqn):
    """The effects of an equation that are not those of a jaxpr within."""
    within = {type(effect) for inner in jaxprs(eqn) for effect in inner.effects}
    return [effect for effect in eqn.effects if type(effect) not in within]


@functools.lru_cache(maxsize=1)
def _of_jax(_):
    """The primitives that JAX's modules define; there may be more when more are loaded."""
    modules = [m for name, m in list(sys.modules.items()) if f"{name}.".startswith("jax.")]
    found = [x for m in modules for x in list(vars(m).values()) if isinstance(x, Primitive)]
    return frozenset(found)


def _names(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | set | frozenset):
        for x in value:
            yield from _names(x)


def _hidden(eqn):
    """Why an operation of JAX says nothing about what it does to each token; None: it does."""
    name = eqn.primitive.name
    if name == "custom_vmap_call":
        rule = getattr(eqn.params["rule"], "rule", None)
        if getattr(rule, "__module__", "").startswith(("jax.", "kernels.")):
            return None  # such as sequential_vmap
    if name == "ffi_call" and eqn.params["target_name"] in call.names():
        return None  # a kernel of ours, which keeps nothing
    if name == "pallas_call":
        # Mapped over tokens, a kernel runs for one after the other, each with its own part of the
        # operands; but memory that it does not initialise may hold what the last one left there.
        mapping = eqn.params["grid_mapping"]
        keeps = mapping.scratch_avals or eqn.params["input_output_aliases"]
        return "its kernel has memory that outlives one token's run" if keeps else None
    return _OPAQUE.get(name)
