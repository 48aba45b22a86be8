"""Tables of tensor names: which published tensors hold which parameters of a config."""

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from transformer.config import Config
from transformer.program.fit import abstract_params
from transformer.storage.arrays import flat
from transformer.storage.formats.layouts import SAME, TRANSPOSED, Layout

# From our names to published ones. A name may have {n}, the number of a layer, and published ones
# {x}, that of an expert. A tuple of our names, or of theirs, is a group that a layout takes as one.
# The network of a layer is `feed_forward` where it is dense, and `experts` where it is a mixture;
# its mixer is `mixer` where it is attention, and else has the name of the layer's kind.
Names = str | tuple[str, ...]
Table = Mapping[Names, "str | Named"]


@dataclass(frozen=True)
class Named:
    """Published names, and the layout of their arrays."""

    names: Names
    layout: Layout


@dataclass(frozen=True)
class Entry:
    """Some parameters and the published tensors that hold them."""

    ours: tuple[str, ...]
    published: tuple[str, ...]
    layout: Layout


class Unnamed(Exception):
    """A table has no place for a parameter."""


def entries(table: Table, config: Config) -> Iterable[Entry]:
    """The table, written out for all parameters of a config.

    Raises:
      Unnamed: the table has no place for one of them; names it.
    """
    rules = {}
    for ours, published in table.items():
        ours = _tuple(ours)
        for name in ours:
            rules[name] = (ours, published)
    done, kinds = set(), [kind for kind, _ in config.layers]
    for name in flat(abstract_params(config)):
        if name in done:
            continue
        layer = re.match(r"layers\.(\d+)\.", name)
        n = layer[1] if layer else ""
        pattern = re.sub(r"^layers\.\d+\.", "layers.{n}.", name)
        if layer:
            has_experts = config.num_experts > 0 and int(n) not in config.dense_layers
            pattern = _with_kind(kinds[int(n)], has_experts, pattern)
        if pattern not in rules:
            raise Unnamed(name)
        ours, published = rules[pattern]
        if not isinstance(published, Named):
            is_matrix = pattern.endswith(".weight")
            published = Named(published, TRANSPOSED if is_matrix else SAME)
        names = [
            theirs.replace("{n}", n).replace("{x}", str(x))
            for theirs in _tuple(published.names)
            for x in (range(config.num_experts) if "{x}" in theirs else [0])
        ]
        ours = tuple(_without_kind(x.replace("{n}", n)) for x in ours)
        done |= set(ours)
        yield Entry(ours, tuple(names), published.layout)


def are_experts_apart(table: Table) -> bool:
    """Whether each expert has tensors of its own."""
    names = (named.names if isinstance(named, Named) else named for named in table.values())
    return any("{x}" in name for group in names for name in _tuple(group))


def _with_kind(kind, has_experts, pattern):
    """Our name of a parameter as it stands in a table, which depends on what the layer is."""
    if has_experts:
        pattern = pattern.replace(".feed_forward.", ".experts.")
    return pattern if kind == "attention" else pattern.replace(".mixer.", f".{kind}.")


def _without_kind(name):
    """The inverse of `_with_kind`."""
    name = re.sub(r"^(layers\.\d+)\.experts\.", r"\1.feed_forward.", name)
    return re.sub(r"^(layers\.\d+)\.(latent|delta)\.", r"\1.mixer.", name)


def _tuple(names):
    return (names,) if isinstance(names, str) else names


def biased(table: Mapping[str, str]) -> dict[str, str]:
    """A table of Linears and Norms by their paths: that of their arrays.

    A path that ends in `norm` has a scale and, published, a `weight`; both have a bias.
    """
    arrays = itertools.chain.from_iterable(
        (
            (f"{ours}.{'scale' if ours.endswith('norm') else 'weight'}", f"{theirs}.weight"),
            (f"{ours}.bias", f"{theirs}.bias"),
        )
        for ours, theirs in table.items()
    )
    return dict(arrays)
