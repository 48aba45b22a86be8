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
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from transformer.storage import arrays
from transformer.storage.arrays import Damaged

FOLDER = "checkpoints"
SPARE_BYTES = 2**20  # what a checkpoint may take besides its arrays
_RECORD = "metadata"  # the item, and the file in it, that says what else there is

_log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written, or none that can be read."""


class LayoutError(CheckpointError):
    """A good checkpoint that holds other arrays than those asked for.

    item: the name of the tree of arrays. metadata: as given to `save`.
    """

    def __init__(self, message: str, item: str, metadata: dict):
        super().__init__(message)
        self.item, self.metadata = item, metadata


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
        self._manager = None if read_only else self._make_manager()
        self._losses: dict[int, float] = {}
        for step in self.steps:
            try:
                loss = self._record(step)["validation_loss"]
            except Damaged:
                continue
            if loss is not None:
                self._losses[step] = loss

    def _make_manager(self):
        import orbax.checkpoint as ocp  # here, because it takes a while

        self.path.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self,
            cleanup_tmp_directories=True,
            # Told to stop, several processes have Orbax ask how old the step before is: it must
            # then have read that.
            lightweight_initialize=jax.process_count() == 1,
        )
        return ocp.CheckpointManager(self.path, options=options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._manager is not None:
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
        import orbax.checkpoint as ocp

        self.wait()
        content = json.dumps(
            {
                "metadata": dict(metadata),
                "validation_loss": validation_loss,
                "items": {
                    name: {"layout": arrays.layout(tree), "sum": arrays.checksum(tree)}
                    for name, tree in items.items()
                },
            }
        )
        record = {"content": content, "checksum": zlib.crc32(content.encode())}
        if validation_loss is not None:
            self._losses[step] = validation_loss
        parts = {name: ocp.args.StandardSave(arrays.flat(tree)) for name, tree in items.items()}
        parts[_RECORD] = ocp.args.JsonSave(record)
        with self._explained():
            self._require_space(items)
            self._manager.save(step, args=ocp.args.Composite(**parts))

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
        """Reads the first of some checkpoints that is good; a warning tells of those that are not.

        Every tree of arrays is compared with the checksum taken when it was saved, so a bit that
        turned on the disk is found too.

        Args:
          wanted: from the names of a checkpoint's items to those to read, each a tree of
            `jax.ShapeDtypeStruct`, with shardings where the arrays have any.
          steps: where to look, in order.

        Raises:
          LayoutError: the first good one has other arrays than those wanted.
          CheckpointError: none is good.
        """
        steps = list(steps)
        for step in steps:
            try:
                return self._read(step, wanted)
            except Damaged as error:
                _log.warning(
                    "checkpoint %s is damaged and left out (%s)", self.path / str(step), error
                )
        found = f"all of {', '.join(map(str, steps))} are damaged" if steps else "there is none"
        raise CheckpointError(f"no good checkpoint in {self.path}: {found}.")

    def discard_after(self, step: int) -> None:
        """Deletes later checkpoints, which a run that goes on from this step will write anew."""
        for later in [later for later in self._manager.all_steps() if later > step]:
            self._manager.delete(later)
            self._losses.pop(later, None)

    def _read(self, step, wanted):
        folder, record = self.path / str(step), self._record(step)
        saved, metadata = record["items"], record["metadata"]
        targets = wanted(set(saved))
        for name, tree in targets.items():
            if name not in saved or saved[name]["layout"] != arrays.layout(tree):
                differs = "holds other arrays" if name in saved else "is missing"
                raise LayoutError(f"{folder} is whole, but its {name} {differs}.", name, metadata)
            if "sum" not in saved[name]:
                raise CheckpointError(
                    f"{folder} was written by an earlier version of Unison, which can read it."
                )
        items = {}
        for name, tree in targets.items():
            try:
                items[name] = arrays.read(folder / name, tree, saved[name]["sum"])
            except Damaged as error:
                raise Damaged(f"{name}: {error}") from error
        return Restored(step, items, metadata)

    def _record(self, step):
        """What is known about a checkpoint besides its arrays."""
        try:
            record = json.loads((self.path / str(step) / _RECORD / _RECORD).read_bytes())
            content = record["content"]
            if zlib.crc32(content.encode()) == record["checksum"]:
                return json.loads(content)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise Damaged(f"{_RECORD}: it cannot be read") from error
        raise Damaged(f"{_RECORD}: it is not what was saved")

    def _require_space(self, items):
        """Asks for space before anything is written: TensorStore would fill the terminal too."""
        needed = SPARE_BYTES + sum(leaf.nbytes for leaf in jax.tree.leaves(items))
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


def _reason(error):
    """A short form of an error: TensorStore's fill a screen and end with the system's code."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    code = int(code[1]) if code else getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT):
        return f"{getattr(error, 'strerror', None) or os.strerror(code)}; free some space there"
    if code:
        return os.strerror(code)
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
