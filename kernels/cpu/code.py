"""A few words for writing machine code: integers, floats, vectors and loops, compiled by LLVM.

A kernel in these words is a Python function that runs once and leaves instructions behind. Nothing
is reordered and no product is fused with a sum unless it is written as `fma`, so that the order of
a sum is the order in which it is written down.
"""

import contextlib
from functools import cache, partialmethod

import llvmlite
from llvmlite import binding, ir

LANES = 8  # floats of a vector, unless said otherwise; a narrower machine takes two of its own

_int, _byte = ir.IntType(64), ir.IntType(8)
_float = ir.FloatType()
_lane = ir.IntType(32)


class Value:
    """An integer of 64 bits, a float, or a vector of either, with the operators of Python."""

    def __init__(self, code, value):
        self.code, self.value = code, value

    @property
    def is_float(self) -> bool:
        """Whether it is a float or a vector of floats."""
        return getattr(self.value.type, "element", self.value.type) == _float

    def _do(self, name, other):
        b = self.code.builder
        other = self.code.constant(other, self.value.type)
        kind = "f" if self.is_float else ""
        return Value(self.code, getattr(b, kind + name)(self.value, other.value))

    def _compare(self, sign, other):
        b = self.code.builder
        other = self.code.constant(other, self.value.type).value
        if self.is_float:
            return Value(self.code, b.fcmp_ordered(sign, self.value, other))
        return Value(self.code, b.icmp_signed(sign, self.value, other))

    __add__ = partialmethod(_do, "add")
    __sub__ = partialmethod(_do, "sub")
    __mul__ = partialmethod(_do, "mul")
    __truediv__ = partialmethod(_do, "div")
    __floordiv__ = partialmethod(_do, "sdiv")
    __mod__ = partialmethod(_do, "srem")
    __lshift__ = partialmethod(_do, "shl")
    __rshift__ = partialmethod(_do, "ashr")
    __and__ = partialmethod(_do, "and_")
    __lt__ = partialmethod(_compare, "<")
    __le__ = partialmethod(_compare, "<=")
    __gt__ = partialmethod(_compare, ">")
    __ge__ = partialmethod(_compare, ">=")

    def equals(self, other):
        """Whether both are the same number."""
        return self._compare("==", other)

    def negated(self):
        """Whether a condition does not hold."""
        return Value(self.code, self.code.builder.not_(self.value))


class Code:
    """Where a function is being written."""

    def __init__(self, builder):
        self.builder = builder

    def constant(self, x, type_=_int) -> Value:
        """A number, or a value as it is."""
        if isinstance(x, Value):
            return x
        if isinstance(type_, ir.VectorType):
            return Value(self, ir.Constant(type_, [x] * type_.count))
        return Value(self, ir.Constant(type_, x))

    def number(self, x: float) -> Value:
        """A constant float."""
        return self.constant(x, _float)

    def integer(self, address) -> Value:
        """The integer of 64 bits at an address."""
        return self._load(address, _int)

    def small_integer(self, address) -> Value:
        """The integer of 32 bits at an address."""
        return Value(self, self.builder.sext(self._load(address, _lane).value, _int))

    def put_integer(self, x, address):
        """Stores 64 bits."""
        self._store(self.constant(x).value, address)

    def put_small_integer(self, x, address):
        """Stores 32 bits."""
        self._store(self.builder.trunc(self.constant(x).value, _lane), address)

    def float(self, address, dtype="float32") -> Value:
        """The number at an address, as a float."""
        return self._widened(address, dtype, 1)

    def vector(self, address, dtype="float32", lanes=LANES) -> Value:
        """So many numbers that lie at an address one after the other, as floats."""
        return self._widened(address, dtype, lanes)

    def put(self, x, address):
        """Stores a float or a vector of floats."""
        self._store(x.value, address)

    def some(self, address, count, lanes=LANES) -> Value:
        """The first `count` floats of a vector at an address, then zeros; it reads no more."""
        zeros = self.constant(0.0, ir.VectorType(_float, lanes))
        return self._masked("load", zeros, address, count, zeros.value)

    def put_some(self, x, address, count):
        """Stores the first `count` floats of a vector."""
        self._masked("store", x, address, count)

    def prefetch(self, address):
        """Asks for the memory at an address, which is needed soon."""
        pointer, flag = _byte.as_pointer(), _lane
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        function = _declared(self.builder.module, "llvm.prefetch.p0", kind)
        here = self.builder.inttoptr(address.value, pointer)
        flags = [ir.Constant(flag, x) for x in (0, 3, 1)]  # to read, keep near, data
        self.builder.call(function, [here, *flags])

    def splat(self, x: Value, lanes=LANES) -> Value:
        """A vector of one number."""
        b, vector = self.builder, ir.VectorType(x.value.type, lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = b.insert_element(undefined, x.value, ir.Constant(_lane, 0))
        zeros = ir.Constant(ir.VectorType(_lane, lanes), [0] * lanes)
        return Value(self, b.shuffle_vector(first, undefined, zeros))

    def lane(self, x: Value, n: int) -> Value:
        """Number n of a vector."""
        return Value(self, self.builder.extract_element(x.value, ir.Constant(_lane, n)))

    def transposed(self, rows: list[Value]) -> list[Value]:
        """As many vectors as they have lanes, as the columns of what they are the rows of."""
        rows, lanes = list(rows), len(rows)
        distance = lanes // 2
        while distance:
            low = [n if not n & distance else n - distance + lanes for n in range(lanes)]
            high = [n + distance if not n & distance else n + lanes for n in range(lanes)]
            for n in range(lanes):
                if not n & distance:
                    pair = rows[n], rows[n + distance]
                    rows[n], rows[n + distance] = (self._mixed(*pair, x) for x in (low, high))
            distance //= 2
        return rows

    def totals(self, row, lanes=LANES) -> Value:
        """The sums of as many vectors as they have lanes; `row(n)` gives vector n."""

        def of_every(step, first):
            if step == lanes:
                return row(first)
            pair = of_every(2 * step, first), of_every(2 * step, first + step)
            low = [n if not n & step else n - step + lanes for n in range(lanes)]
            high = [n + step if not n & step else n + lanes for n in range(lanes)]
            return self._mixed(*pair, low) + self._mixed(*pair, high)

        return of_every(1, 0)

    def total(self, x: Value) -> Value:
        """The sum of the numbers of a vector."""
        lanes = x.value.type.count
        while lanes > 1:
            lanes //= 2
            low, high = range(lanes), range(lanes, 2 * lanes)
            x = self._mixed(x, x, list(low)) + self._mixed(x, x, list(high))
        return self.lane(x, 0)

    def nearest(self, x: Value) -> Value:
        """The nearest whole number, as a float; the even one of two."""
        return self._intrinsic("rint", x)

    def whole(self, x: Value) -> Value:
        """A float that is a whole number, as an integer of 32 bits."""
        return Value(self, self.builder.fptosi(x.value, self._like(x, _lane)))

    def from_integers(self, x: Value) -> Value:
        """Integers of 32 bits as floats."""
        return Value(self, self.builder.sitofp(x.value, self._like(x, _float)))

    def float_of_bits(self, x: Value) -> Value:
        """The float that these 32 bits mean."""
        return Value(self, self.builder.bitcast(x.value, self._like(x, _float)))

    def narrow(self, x: Value) -> Value:
        """An integer of 64 bits in 32."""
        return Value(self, self.builder.trunc(x.value, _lane))

    def counted(self, first: Value, lanes=LANES) -> Value:
        """A vector of integers of 32 bits, from the first one on."""
        steps = ir.Constant(ir.VectorType(_lane, lanes), list(range(lanes)))
        return self.splat(self.narrow(first), lanes) + Value(self, steps)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, rounded once."""
        return self._intrinsic("fma", x, y, z)

    def select(self, condition, x, y) -> Value:
        """x where the condition holds, y elsewhere."""
        return Value(self, self.builder.select(condition.value, x.value, y.value))

    def smaller(self, x: Value, y) -> Value:
        """The smaller of two numbers."""
        y = self.constant(y, x.value.type)
        return self.select(x < y, x, y)

    def larger(self, x: Value, y) -> Value:
        """The larger of two numbers."""
        y = self.constant(y, x.value.type)
        return self.select(x > y, x, y)

    def variable(self, x) -> "Variable":
        """A name for a value that changes."""
        return Variable(self, self.constant(x))

    @contextlib.contextmanager
    def loop(self, start, stop, step=1):
        """for n in range(start, stop, step)"""
        n = self.variable(start)
        with self.repeat(lambda: n.get() < stop):
            at = n.get()
            yield at
            n.set(at + step)

    @contextlib.contextmanager
    def repeat(self, condition):
        """while condition():"""
        b = self.builder
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        b.cbranch(condition().value, body, after)
        b.position_at_end(body)
        yield
        b.branch(head)
        b.position_at_end(after)

    @contextlib.contextmanager
    def when(self, condition: Value):
        """if condition:"""
        with self.builder.if_then(condition.value):
            yield

    def add_atomically(self, address, x) -> Value:
        """Adds to the integer at an address and returns what it was before."""
        pointer = self.builder.inttoptr(address.value, _int.as_pointer())
        x = self.constant(x).value
        return Value(self, self.builder.atomic_rmw("add", pointer, x, "seq_cst"))

    def call(self, function, *arguments) -> Value:
        """Calls the function at an address, or one of the C library, of integers to an integer."""
        b = self.builder
        kind = ir.FunctionType(_int, [_int] * len(arguments))
        if isinstance(function, str):
            target = _declared(b.module, function, kind)
        else:
            target = b.inttoptr(function.value, kind.as_pointer())
        return Value(self, b.call(target, [self.constant(x).value for x in arguments]))

    def address_of(self, function: ir.Function) -> Value:
        """Where another function of this module begins."""
        return Value(self, self.builder.ptrtoint(function, _int))

    def _masked(self, name, x, address, count, *otherwise):
        kind, lanes = x.value.type, x.value.type.count
        pointer = self.builder.inttoptr(address.value, kind.as_pointer())
        mask = (self.counted(self.constant(0), lanes) < self.splat(self.narrow(count), lanes)).value
        place = [pointer, ir.Constant(_lane, _align(kind)), mask]
        operands = [*place, *otherwise] if name == "load" else [x.value, *place]
        returned = kind if name == "load" else ir.VoidType()
        function = ir.FunctionType(returned, [operand.type for operand in operands])
        function = _declared(self.builder.module, f"llvm.masked.{name}.v{lanes}f32.p0", function)
        return Value(self, self.builder.call(function, operands))

    def _intrinsic(self, name, *arguments):
        kind = arguments[0].value.type
        suffix = "f32" if kind == _float else f"v{kind.count}f32"
        function = ir.FunctionType(kind, [kind] * len(arguments))
        function = _declared(self.builder.module, f"llvm.{name}.{suffix}", function)
        return Value(self, self.builder.call(function, [x.value for x in arguments]))

    def _like(self, x, element):
        kind = x.value.type
        return ir.VectorType(element, kind.count) if isinstance(kind, ir.VectorType) else element

    def _mixed(self, x, y, lanes):
        lanes = ir.Constant(ir.VectorType(_lane, len(lanes)), lanes)
        return Value(self, self.builder.shuffle_vector(x.value, y.value, lanes))

    def _widened(self, address, dtype, lanes):
        b = self.builder
        kind = lambda x: x if lanes == 1 else ir.VectorType(x, lanes)
        if dtype == "float32":
            return self._load(address, kind(_float))
        if dtype == "float16":
            half = self._load(address, kind(ir.HalfType())).value
            return Value(self, b.fpext(half, kind(_float)))
        if dtype == "int8":
            number = self._load(address, kind(_byte)).value
            return Value(self, b.sitofp(b.sext(number, kind(_lane)), kind(_float)))
        bits = b.zext(self._load(address, kind(ir.IntType(16))).value, kind(_lane))
        shift = self.constant(16, kind(_lane)).value
        return Value(self, b.bitcast(b.shl(bits, shift), kind(_float)))

    def _load(self, address, type_):
        pointer = self.builder.inttoptr(self.constant(address).value, type_.as_pointer())
        loaded = self.builder.load(pointer)
        loaded.align = _align(type_)
        return Value(self, loaded)

    def _store(self, x, address):
        pointer = self.builder.inttoptr(self.constant(address).value, x.type.as_pointer())
        self.builder.store(x, pointer).align = _align(x.type)


class Variable:
    """A value that changes; LLVM keeps it in a register."""

    def __init__(self, code, x):
        self.code = code
        with code.builder.goto_entry_block():
            self.slot = code.builder.alloca(x.value.type)
        self.set(x)

    def get(self) -> Value:
        """What it is now."""
        return Value(self.code, self.code.builder.load(self.slot))

    def set(self, x):
        """Changes it."""
        self.code.builder.store(self.code.constant(x).value, self.slot)


def _align(type_):
    element = getattr(type_, "element", type_)
    return {_int: 8, _lane: 4, _float: 4, _byte: 1}.get(element, 2)


def _declared(module, name, kind):
    return module.globals.get(name) or ir.Function(module, kind, name)


def function(module: ir.Module, name: str, write) -> ir.Function:
    """Writes a function of one integer; `write(code, argument)` returns what it returns."""
    made = ir.Function(module, ir.FunctionType(_int, [_int]), name)
    builder = ir.IRBuilder(made.append_basic_block())
    code = Code(builder)
    result = write(code, Value(code, made.args[0]))
    builder.ret(code.constant(result).value)
    return made


def widest() -> int:
    """The floats of a vector that one instruction takes on this processor, and `LANES` at least."""
    return 16 if binding.get_host_cpu_features().get("avx512f") else LANES


def is_amd() -> bool:
    """Whether AMD made this processor, of those that LLVM knows by a name."""
    return binding.get_host_cpu_name().startswith("znver")


def has_fma() -> bool:
    """Whether this processor multiplies and adds in one instruction."""
    processor = binding.get_host_cpu_features()
    return "fma" not in processor or processor["fma"]


def machine_code(module: ir.Module) -> bytes:
    """A module as an object file for this processor."""
    machine = _machine()
    code = binding.parse_assembly(str(module))
    code.verify()
    options = binding.create_pipeline_tuning_options(speed_level=1)
    # Vectors are written as such, and loops are as long as they should be.
    options.loop_vectorization = options.slp_vectorization = options.loop_unrolling = False
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(code, passes)
    return machine.emit_object(code)


def linked(code: bytes, name: str) -> int:
    """The address of a function of an object file, which is loaded."""
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), _machine())
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # its memory holds the machine code
    return engine.get_function_address(name)


def processor() -> str:
    """What machine code depends on besides its module."""
    features = binding.get_host_cpu_features().flatten()
    return f"{llvmlite.__version__} {binding.get_host_cpu_name()} {features}"


_engines = []


@cache
def _machine():
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(),
        features=binding.get_host_cpu_features().flatten(),
        opt=2,
        codemodel="jitdefault",
    )
