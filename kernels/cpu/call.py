"""A kernel as an operation of XLA on a CPU, whose parts run on XLA's own threads.

XLA calls an address with a `XLA_FFI_CallFrame` (`xla/ffi/api/c_api.h`, which jaxlib carries). The
threads of its pool, this one included, take part after part until none is left; a thread of the
pool that comes late finds nothing to do, so nobody waits for a thread that is not there.
"""

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
from llvmlite import ir

from kernels.cpu import code as words
from kernels.cpu import kept
from kernels.cpu.code import Code, Value
from kernels.tracing import target

# Offsets in bytes: see the header. The members of structs of the calling interface do not move
# while its major version is 0; those of `XLA_FFI_Api` are counted in the header that is there.
_EXTENSION, _API, _CONTEXT, _STAGE, _ARGUMENTS, _RESULTS, _ATTRIBUTES = 8, 16, 24, 32, 72, 112, 160
_EXECUTE = 3
_LINE = 64  # bytes of a cache line
_FUNCTIONS = 48  # where the functions of `XLA_FFI_Api` begin
_NEXT, _DONE, _PARTS, _USERS, _FRAME, _THREADS, _STATE_SIZE = 0, 8, 16, 24, 32, 40, 48

_told: set[str] = set()  # names of kernels that XLA knows
_telling = threading.Lock()


class Buffer(NamedTuple):
    """An operand or a result: where its numbers begin, and the struct that has its shape."""

    address: Value
    struct: Value

    def size(self, axis: int | Value) -> Value:
        """The number of elements along an axis."""
        code = self.struct.code
        return code.integer(code.integer(self.struct + 40) + axis * 8)

    def count(self) -> Value:
        """The number of its elements."""
        code = self.struct.code
        count = code.variable(1)
        with code.loop(0, code.integer(self.struct + 32)) as axis:
            count.set(count.get() * self.size(axis))
        return count.get()


class Frame:
    """What a call of a kernel was given, and the room of the thread that runs a part."""

    def __init__(self, code: Code, frame: Value, room: Value | None = None):
        self.code, self.frame, self.room = code, frame, room

    def operand(self, n: int | Value) -> Buffer:
        """Operand n."""
        return self._buffer(_ARGUMENTS, n)

    def result(self, n: int | Value) -> Buffer:
        """Result n."""
        return self._buffer(_RESULTS, n)

    def attribute(self, n: int) -> Value:
        """Attribute n in the order of their names, an integer of 64 bits."""
        code = self.code
        scalar = code.integer(code.integer(self.frame + _ATTRIBUTES) + 8 * n)
        return code.integer(code.integer(scalar + 8))

    def _buffer(self, offset, n):
        code = self.code
        struct = code.integer(code.integer(self.frame + offset) + n * 8)
        return Buffer(code.integer(struct + 24), struct)


class Kernel(NamedTuple):
    """A kernel that XLA can call by its name.

    name: of the operation.
    parts: `parts(frame) -> how many parts there are`.
    run: `run(frame, part)` writes the code of one part; parts may run in any order, or at once.
    room: `room(frame) -> bytes` of memory that a thread has for itself, or None.
    in_turn: whether parts that follow one another read memory that does. A thread then takes many
      of them in turn, fewer the fewer are left, so that the processor goes on reading ahead.
    """

    name: str
    parts: Callable
    run: Callable
    room: Callable | None = None
    in_turn: bool = False


@functools.cache
def register(kernel: Kernel) -> str:
    """Compiles a kernel, unless its machine code is kept, and tells XLA of it; returns its name."""
    _tell(kernel.name, kept.machine_code(kernel.name, functools.partial(_compiled, kernel)))
    return kernel.name


def restore(name: str) -> bool:
    """Tells XLA of a kernel whose machine code is kept; whether it knows it now."""
    code = None if name in _told else kept.found_machine_code(name)
    if code is not None:
        _tell(name, code)
    return name in _told


def names() -> list[str]:
    """The kernels that XLA has been told of."""
    return sorted(_told)


def _tell(name, code):
    with _telling:  # XLA takes a name only once, whatever the thread
        if name in _told:
            return
        address = words.linked(code, name)
        pointer = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(pointer), platform="cpu")
        _told.add(name)


def _compiled(kernel):
    module = ir.Module(kernel.name)
    task = words.function(module, f"{kernel.name}_task", functools.partial(_task, kernel))
    write = functools.partial(_handler, kernel, task, _api())
    words.function(module, kernel.name, write)
    return words.machine_code(module)


def is_available() -> bool:
    """Whether the processor that is traced for is this one, and it and jaxlib can run kernels."""
    return target.platform() == jax.default_backend() == "cpu" and _can_run()


@functools.cache
def _can_run():
    return words.has_fma() and ctypes.sizeof(ctypes.c_void_p) == 8 and _api() is not None


@functools.cache
def _api():
    """Where the functions of `XLA_FFI_Api` lie, by name; None if the interface is another one."""
    try:
        header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    except OSError:
        return None
    names = re.findall(r"^\s+_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\)", header, re.M)
    found = {name: _FUNCTIONS + 8 * n for n, name in enumerate(names)}
    needed = {"ThreadPool_Schedule", "ThreadPool_NumThreads", "Error_Destroy"}
    is_known = re.search(r"^#define XLA_FFI_API_MAJOR 0$", header, re.M)
    return found if is_known and needed <= found.keys() else None


def _task(kernel, code, state):
    """Takes parts until none is left; whoever is last to go frees the state.

    Where parts are taken in turn, a share is what is left divided by twice the number of threads.
    """
    parts, threads = code.integer(state + _PARTS), code.integer(state + _THREADS)
    begin, end = code.variable(0), code.variable(0)

    def take():
        share = code.add_atomically(state + _NEXT, 1)
        if not kernel.in_turn:
            begin.set(share)
            end.set(share + 1)
            return
        begin.set(0)
        end.set(0)
        with code.loop(0, share + 1):
            left = parts - end.get()
            begin.set(end.get())
            end.set(end.get() + code.larger((left + threads * 2 - 1) // (threads * 2), 1))

    take()
    room = code.variable(0)
    with code.when(begin.get() < parts):  # a late one finds no frame any more
        if kernel.room is not None:
            frame = Frame(code, code.integer(state + _FRAME))
            room.set(code.call("malloc", kernel.room(frame) + _LINE))
    with code.repeat(lambda: begin.get() < parts):
        aligned = (room.get() + (_LINE - 1)) & -_LINE
        frame = Frame(code, code.integer(state + _FRAME), aligned)
        with code.loop(begin.get(), end.get()) as part:
            kernel.run(frame, part)
        code.add_atomically(state + _DONE, end.get() - begin.get())
        take()
    if kernel.room is not None:
        code.call("free", room.get())
    with code.when(code.add_atomically(state + _USERS, -1).equals(1)):
        code.call("free", state)
    return 0


def _handler(kernel, task, api, code, frame):
    extension = code.integer(frame + _EXTENSION)
    is_asked = extension.equals(0).negated()
    with code.when(is_asked):  # XLA asks for the version of the interface
        metadata, version = code.integer(extension + 24), code.integer(frame + _API)
        code.put_small_integer(code.small_integer(version + 32), metadata + 24)
        code.put_small_integer(code.small_integer(version + 36), metadata + 28)
    runs = code.small_integer(frame + _STAGE).equals(_EXECUTE)
    with code.when(is_asked.negated() & runs):
        _execute(kernel, task, api, code, frame)
    return 0


def _execute(kernel, task, api, code, frame):
    functions = code.integer(frame + _API)
    function = lambda name: code.integer(functions + api[name])
    # The arguments of calls of the interface, and behind them a number that one call returns.
    arguments = code.call("malloc", 64)
    number = arguments + 48
    code.put_integer(1, number)
    code.put_integer(0, arguments + 8)
    code.put_integer(code.integer(frame + _CONTEXT), arguments + 16)
    code.put_integer(number, arguments + 24)
    code.put_integer(32, arguments)
    _destroy(code, function, code.call(function("ThreadPool_NumThreads"), arguments))
    parts = kernel.parts(Frame(code, frame))
    helpers = code.smaller(code.integer(number), parts) - 1
    state = code.call("malloc", _STATE_SIZE)
    for offset, x in ((_NEXT, 0), (_DONE, 0), (_PARTS, parts), (_FRAME, frame)):
        code.put_integer(x, state + offset)
    code.put_integer(code.integer(number), state + _THREADS)
    code.put_integer(helpers + 2, state + _USERS)  # the task run here, and what waits below
    code.put_integer(40, arguments)
    code.put_integer(code.address_of(task), arguments + 24)
    code.put_integer(state, arguments + 32)
    with code.loop(0, helpers):
        error = code.call(function("ThreadPool_Schedule"), arguments)
        with code.when(error.equals(0).negated()):
            code.add_atomically(state + _USERS, -1)
            _destroy(code, function, error)
    code.call("free", arguments)
    code.call(code.address_of(task), state)
    with code.repeat(lambda: code.add_atomically(state + _DONE, 0) < parts):
        pass
    with code.when(code.add_atomically(state + _USERS, -1).equals(1)):
        code.call("free", state)


def _destroy(code, function, error):
    with code.when(error.equals(0).negated()):
        arguments = code.call("malloc", 24)
        for offset, x in ((0, 24), (8, 0), (16, error)):
            code.put_integer(x, arguments + offset)
        code.call(function("Error_Destroy"), arguments)
        code.call("free", arguments)
