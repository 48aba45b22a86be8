"""In which order this machine sums the terms of a product of matrices, found by running it.

A library for products picks its blocks by the shapes and by the processor, and promises nothing. So
what is wanted is said here, and whether the library does it is found out: on random numbers, in the
shapes of the model, at the first use. What was found is kept in a file of the user's cache, for
this jaxlib on this processor.

The wanted order of a sum over k: blocks of so many terms, each a chain of fused multiply-adds with
k ascending that begins at zero, and the sums of the blocks added one after the other. In a chain a
term of zero changes nothing, wherever it stands.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from kernels.tracing import target

COLUMNS = 64  # a product has a multiple of so many columns
ROWS = 64  # and so many rows at least, where it is one of many rows
BLOCKS = (1024, 768, 512, 256, 128)  # terms of a chain that are looked for
_CHECKED_ROWS = (ROWS, ROWS + 1, 3 * ROWS + 8)

_logger = logging.getLogger(__name__)


class Order(NamedTuple):
    """How a product of many rows gets the wanted order.

    block: terms of one chain; 0: no block has been found, and every product runs on tiles of so
      many rows, which gives one order, if not one that is known.
    whole: whether the library cuts into these blocks by itself; it is given one block at a time
      otherwise.
    by_output: from how many rows on the library has this order too where the matrix is stored as
      [columns, terms]. 0: no such number has been found.
    """

    block: int
    whole: bool
    by_output: int = 0


def order(terms: int, columns: int, dtype) -> Order:
    """The order of x [M, terms] @ w [terms, columns], with M at least 64 and columns in 64s."""
    if target.platform() != jax.default_backend():  # traced for a device that is not there
        return Order(0, False)
    found = _known("product", (terms, columns, jnp.dtype(dtype).name), _find_order)
    if not found[0]:
        _say(terms, columns)
    return Order(*found)


def few_rows(terms: int, columns: int, dtype, turned: bool) -> int:
    """From how many rows on each product of a batch sums all its terms in one chain.

    The products are x [M, terms] @ w [terms, columns], where w is stored as [columns, terms] if
    `turned`. 0: no number of rows has been found.
    """
    if target.platform() != jax.default_backend():
        return 0
    key = (terms, columns, jnp.dtype(dtype).name, turned)
    return _known("batch", key, _find_few_rows)


def chains(x, w, block: int):
    """x [M, K] @ w [K, N] in the wanted order, by NumPy.

    Rounds twice, to float64 and then to the type of x: a wrong last bit in 2^29 terms.
    """
    total = None
    wide = np.promote_types(np.float64, x.dtype)
    for begin in range(0, x.shape[1], block):
        sums = np.zeros((len(x), w.shape[1]), x.dtype)
        for k in range(begin, min(begin + block, x.shape[1])):
            sums = (x[:, k : k + 1].astype(wide) * w[k].astype(wide) + sums).astype(x.dtype)
        total = sums if total is None else total + sums
    return total


def _find_order(terms, columns, dtype):
    x, w = _numbers(dtype, (_CHECKED_ROWS[-1], terms), (terms, columns))
    product = jax.jit(jnp.matmul)
    some = np.r_[0:8, columns - 8 : columns, columns // 2 : columns // 2 + 8]
    rows = np.array([0, 5, ROWS - 1])

    def agree(run):
        """What all numbers of rows have in common in three rows, or None."""
        results = [np.asarray(run(x[:m], w))[rows] for m in _CHECKED_ROWS]
        return results[0] if all((y == results[0]).all() for y in results) else None

    whole = agree(product)
    if whole is not None:
        for block in sorted({terms, *(b for b in BLOCKS if b < terms)}, reverse=True):
            if block <= max(BLOCKS) and _same(chains(x[rows], w[:, some], block), whole[:, some]):
                one = agree_one_row(x[rows], w, block)
                if _same(one, whole):
                    return block, True, _find_by_output(x, w, np.asarray(product(x, w)))
    for block in BLOCKS[2:]:
        if block < terms:
            pieces = agree(lambda x, w, block=block: _pieces(product, x, w, block))
            if pieces is not None and _same(agree_one_row(x[rows], w, block), pieces):
                return block, False, 0
    return 0, False, 0


def _find_by_output(x, w, expected):
    """From how many rows on a product with the matrix stored by output gives what is expected."""
    stored, product = np.ascontiguousarray(w.T), jax.jit(lambda x, w: x @ w.T)
    right = lambda m: _same(product(x[:m], stored), expected[:m])
    tried = (2, 3, 16, 17, 33, *_CHECKED_ROWS)
    found = (m for m in (2, 16, ROWS) if all(right(rows) for rows in tried if rows >= m))
    return next(found, 0)


def agree_one_row(x, w, block):
    """Rows one by one, in blocks."""
    product = jax.jit(jnp.matmul)
    return np.concatenate([np.asarray(_pieces(product, row[None], w, block)) for row in x])


def _pieces(product, x, w, block):
    parts = [product(x[:, k : k + block], w[k : k + block]) for k in range(0, len(w), block)]
    return functools.reduce(lambda a, b: np.asarray(a) + np.asarray(b), parts)


def _find_few_rows(terms, columns, dtype, turned):
    x, w = _numbers(dtype, (3, 2 * ROWS, terms), (3, terms, columns))
    expected = np.stack([chains(*pair, terms) for pair in zip(x[:, :ROWS], w, strict=True)])
    w = w.swapaxes(1, 2) if turned else w
    product = jax.jit(lambda x, w: jnp.einsum("bmk,bnk->bmn" if turned else "bmk,bkn->bmn", x, w))

    def right(rows):
        products = (product(x[:batch, :rows], w[:batch])[:, :ROWS] for batch in (1, 3))
        return all(_same(y, expected[: len(y), :rows]) for y in products)

    for rows in (2, 16, ROWS):
        if all(map(right, sorted({rows, rows + 1, 2 * ROWS} | {16, ROWS} - set(range(rows))))):
            return rows
    return 0


def _numbers(dtype, *shapes):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def _same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@functools.cache
def _known(kind, key, find):
    """What `find(*key)` gives, from the file if it is there."""
    name = " ".join(map(str, (kind, *key)))
    path = _file()
    known = _read(path)
    if name not in known:
        # A thread of its own knows nothing of a trace that is under way in this one.
        with ThreadPoolExecutor(1) as thread:
            found = thread.submit(_with_types, find, key).result()
        known = _read(path) | {name: found}
        _write(path, known)
    return known[name]


def _with_types(find, key):
    with jax.enable_x64("float64" in key):
        return find(*key)


def _file():
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    except OSError:
        pass
    machine = (
        jaxlib.__version__,
        jax.default_backend(),
        jax.devices()[0].device_kind,
        processor,
        os.cpu_count(),
        os.environ.get("XLA_FLAGS", ""),
    )
    digest = hashlib.sha256(repr(machine).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "unison" / f"order-{digest}.json"


def _read(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write(path, known):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(known, file, indent=0)
        os.replace(file.name, path)
    except OSError as error:
        _logger.info("the order of products is not kept for the next run: %s", error)


@functools.cache
def _say(terms, columns):
    _logger.warning(
        "products of %d terms and %d columns have no order here that is known; exact numerics run "
        "them on tiles of %d rows, which is slower",
        terms,
        columns,
        ROWS,
    )
