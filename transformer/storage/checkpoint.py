"""Checkpoints of a directory: written in the background, verified when read, the best ones kept.

A directory that `model.load` reads, be it a saved model or the work directory of a training run,
holds

    config.json       the architecture
    tokenizer.json
    checkpoints/N/    step N: each item a tree of arrays (`params`, ...), and `metadata`

Orbax writes a step under another name and renames it when it is whole, so a process that is killed
leaves the steps before it as they were.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

FOLDER = "checkpoints"

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written, or none that can be read."""


class Restored(NamedTuple):
    """What a checkpoint holds.

    step: training steps done. items: trees of arrays by name. metadata: as given to `save`.
    """

    step: int
    items: dict[str, Any]
    metadata: dict


class Checkpoints:
    """The checkpoints in one directory. A context manager: leaving it waits for the last save."""

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens them; makes the folder unless `read_only`.

        Args:
          directory: holds, or will hold, the folder `checkpoints`.
          keep_last, keep_best: how many of the newest, and of those with the lowest validation
            loss, outlive the next save.
          read_only: leave files alone, as another process may be writing.
        """
        self.path = Path(directory).absolute() / FOLDER
        self._keep_last, self._keep_best = keep_last, keep_best
        with _without_warnings_of_reading():
            self._manager = ocp.CheckpointManager(
                self.path,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    create=not read_only,
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                    lightweight_initialize=True,
                ),
            )
        self._losses: dict[int, float] = {}
        for step in self.steps:
            try:
                loss = self._metadata(step)["validation_loss"]
            except _Damaged:
                continue
            if loss is not None:
                self._losses[step] = loss

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """The steps that are whole on disk, oldest first."""
        if not self.path.is_dir():
            return []
        folders = (path for path in self.path.iterdir() if path.is_dir())
        return sorted(int(folder.name) for folder in folders if folder.name.isdigit())

    @property
    def best_first(self) -> list[int]:
        """The steps by validation loss, lowest first, then those without one, newest first."""
        return sorted(self.steps, key=lambda step: (self._losses.get(step, float("inf")), -step))

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's `PreservationPolicy`: which of the steps so far to keep."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = sorted((self._losses[step], step) for step in steps if step in self._losses)
        kept = set(steps[-self._keep_last :]) | {step for _, step in best[: self._keep_best]}
        return [step in kept for step in steps]

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        metadata: Mapping[str, Any],
        validation_loss: float | None = None,
    ) -> None:
        """Begins to save a step, and returns once the arrays may change.

        Args:
          step: training steps done, higher than that of any checkpoint here.
          items: trees of arrays by name.
          metadata: what else to remember, of JSON values.
          validation_loss: at this step, where it is known; decides which checkpoints are best.

        Raises:
          CheckpointError: this save or the one before failed, as on a full disk.
        """
        self.wait()
        content = json.dumps(
            {
                "metadata": dict(metadata),
                "validation_loss": validation_loss,
                "items": {
                    name: {"layout": _layout(tree), "checksum": _checksum(tree)}
                    for name, tree in items.items()
                },
            }
        )
        record = {"content": content, "checksum": zlib.crc32(content.encode())}
        if validation_loss is not None:
            self._losses[step] = validation_loss
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        arguments = ocp.args.Composite(metadata=ocp.args.JsonSave(record), **arrays)
        with self._explained():
            self._require_space(items)
            self._manager.save(step, args=arguments)

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it failed.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def restore(
        self, wanted: Callable[[set[str]], Mapping[str, Any]], steps: Iterable[int]
    ) -> Restored:
        """The first of some checkpoints that is good; says so where one is not.

        Every array is compared with the checksum taken when it was saved, so a bit that turned
        on the disk is found too.

        Args:
          wanted: from the names of a checkpoint's items to those to read, each a tree of
            `jax.ShapeDtypeStruct`, with shardings where the arrays have any.
          steps: where to look, in order.

        Raises:
          CheckpointError: none is good, or one has other arrays than those wanted.
        """
        steps = list(steps)
        for step, following in zip_longest(steps, steps[1:]):
            try:
                return self._read(step, wanted)
            except _Damaged as error:
                instead = "none is left" if following is None else f"trying step {following}"
                _log.warning(
                    "checkpoint %s is damaged (%s); %s", self.path / str(step), error, instead
                )
        found = f"all of {', '.join(map(str, steps))} are damaged" if steps else "there is none"
        raise CheckpointError(f"no good checkpoint in {self.path}: {found}.")

    def discard_after(self, step: int) -> None:
        """Deletes later checkpoints, which a run that goes on from this step will write anew."""
        for later in self.steps:
            if later > step:
                self._manager.delete(later)
                self._losses.pop(later, None)

    def _read(self, step, wanted):
        record = self._metadata(step)
        saved = record["items"]
        targets = wanted(set(saved))
        for name, tree in targets.items():
            if name not in saved or saved[name]["layout"] != _layout(tree):
                raise CheckpointError(
                    f"{self.path / str(step)} is whole, and its {name} is "
                    f"{'laid out otherwise' if name in saved else 'missing'}: it was saved with "
                    "other settings of the model, the optimizer or the moving average."
                )
        arguments = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        # Orbax and TensorStore report damage with exceptions of a dozen types.
        try:
            items = dict(self._manager.restore(step, args=ocp.args.Composite(**arguments)))
        except Exception as error:
            raise _Damaged(_reason(error)) from error
        for name, tree in items.items():
            if _checksum(tree) != saved[name]["checksum"]:
                raise _Damaged(f"{name} is not what was saved")
        return Restored(step, items, record["metadata"])

    def _metadata(self, step):
        arguments = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        try:
            record = self._manager.restore(step, args=arguments).metadata
            if zlib.crc32(record["content"].encode()) != record["checksum"]:
                raise ValueError("its metadata is not what was saved")
            return json.loads(record["content"])
        except Exception as error:
            raise _Damaged(_reason(error)) from error

    def _require_space(self, items):
        """Before anything is written: TensorStore on a full disk fills the terminal too."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items))
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                errno.ENOSPC, f"{needed / 1e6:.1f} MB are needed and {free / 1e6:.1f} MB are free"
            )

    @contextmanager
    def _explained(self):
        """Turns whatever a save raises into a `CheckpointError`, and frees what it had written."""
        try:
            yield
        except Exception as error:
            for unfinished in self.path.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)
            whole = ", ".join(str(step) for step in self.steps) or "none"
            raise CheckpointError(
                f"could not save to {self.path}: {_reason(error)}. "
                f"Steps saved before are intact: {whole}."
            ) from error


@contextmanager
def _without_warnings_of_reading():
    """Orbax warns that a folder which it is told only to read will only be read."""
    logger = logging.getLogger("absl")
    other = lambda record: not re.search("read.only", record.getMessage())
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def _reason(error):
    """A short form of an error: TensorStore's fill a screen and end with the system's code."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first_line = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first_line[:200]}"


def _layout(tree) -> str:
    """A digest of the paths, shapes and types of a tree of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    text = [(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)) for path, leaf in leaves]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


def _checksum(tree) -> int:
    """The CRC-32 of the numbers of a tree of arrays."""
    checksum = 0
    for leaf in jax.tree.leaves(tree):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8), checksum)
    return checksum
