"""Run Gluon source in Triton's interpreter: layouts mean nothing there, shared memory is an array.

Gluon has no interpreter of its own. What it adds to Triton is replaced by stand-ins, so that its kernels can be tested
for what they compute; that layouts fit together is the compiler's business, races are nobody's.
"""

import linecache
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def load(name):
    """The module `name` with stand-ins for Gluon, apart from the one that `import` gives."""
    gluon = ModuleType("triton.experimental.gluon")
    gluon.jit = triton.jit
    gluon.constexpr_function = lambda fn: fn
    gluon.language = language()
    ampere = ModuleType("ampere")
    ampere.mma_v2 = lambda a, b, acc: tl.dot(a, b, acc, input_precision="ieee")
    stand_ins = {
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": gluon.language,
        "triton.experimental.gluon.language.nvidia": ModuleType("nvidia"),
        "triton.experimental.gluon.language.nvidia.ampere": ampere,
    }
    # `from package import module` looks at the package first
    package = ModuleType("triton.experimental")
    package.gluon = gluon
    stand_ins["triton.experimental"] = package
    replaced = {key: sys.modules.pop(key) for key in [*stand_ins, name] if key in sys.modules}
    sys.modules.update(stand_ins)
    try:
        origin = find_spec(name).origin
        # the interpreter reads the source again, and knows compile-time arguments by this spelling
        source, shown = Path(origin).read_text().replace("gl.constexpr", "tl.constexpr"), f"<stand-in for {origin}>"
        linecache.cache[shown] = (len(source), None, source.splitlines(keepends=True), shown)
        module = ModuleType(name)
        # it patches the language of modules that refer to it
        module.tl, module.__file__ = tl, shown
        sys.modules[name] = module
        exec(compile(source, shown, "exec"), module.__dict__)
        return module
    finally:
        for key in [*stand_ins, name]:
            del sys.modules[key]
        sys.modules.update(replaced)


def language():
    gl = ModuleType("triton.experimental.gluon.language")
    for name in ("constexpr", "pointer_type", "int16", "int32", "int64", "float32"):
        setattr(gl, name, getattr(tl, name))
    for name in ("program_id", "num_programs", "static_range", "load", "store", "where", "minimum", "maximum"):
        setattr(gl, name, later(name))
    for name in ("exp2", "log", "max", "sum", "permute"):
        setattr(gl, name, later(name))
    for name in ("arange", "zeros", "full"):
        setattr(gl, name, later(name, n_arguments={"arange": 2, "zeros": 2, "full": 3}[name]))
    for name in ("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout"):
        setattr(gl, name, lambda *args, **kwargs: None)
    gl.convert_layout = lambda x, layout: x
    gl.associative_scan = lambda x, axis, combine: tl.cumsum(x, axis)
    gl.inline_asm_elementwise = run_ptx
    gl.shared_memory_descriptor = Shared
    gl.allocate_shared_memory = lambda dtype, shape, layout: Shared(dtype, np.full(shape, np.nan))
    return gl


def later(name, n_arguments=None):
    """A function of the language, looked up when it is called: the interpreter swaps them while a kernel runs."""
    return lambda *args, **kwargs: getattr(tl, name)(*args[:n_arguments], **kwargs)


def array(x):
    return x.handle.data


def tensor(data, dtype):
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)))


class Shared:
    """Shared memory descriptor: a view of an array."""

    def __init__(self, dtype, data):
        self.dtype, self.data = dtype, data
        if np.isnan(data).all():
            self.data = data.astype({"fp16": np.float16, "fp32": np.float32}[str(dtype)])
        self.shape = list(self.data.shape)

    def view(self, data):
        other = Shared.__new__(Shared)
        other.dtype, other.data, other.shape = self.dtype, data, list(data.shape)
        return other

    def permute(self, order):
        return self.view(self.data.transpose(order))

    def slice(self, start, length, dim):
        return self.view(self.data[(slice(None),) * dim + (slice(start, start + length),)])

    def store(self, x):
        self.data[...] = array(x)

    def load(self, layout):
        return tensor(self.data.copy(), self.dtype)

    def gather(self, indices, axis):
        return tensor(np.take_along_axis(self.data, array(indices).astype(np.int64), axis), self.dtype)

    def scatter(self, values, indices, axis):
        np.put_along_axis(self.data, array(indices).astype(np.int64), array(values), axis)


def run_ptx(text, constraints, operands, dtype, is_pure, pack):
    """Execute the few instructions that the kernels use, on whole arrays."""
    types = dtype if isinstance(dtype, tuple) else (dtype,)
    text = getattr(text, "value", text)
    registers = {f"${len(types) + i}": array(x) for i, x in enumerate(operands)}

    def value(name):
        return registers[name] if name in registers else np.int32(int(name, 0))

    for guard, operation, arguments in re.findall(r"(?:@(\w+) )?(\w+)\.[\w.]+ ([^;]+);", text):
        target, *sources = arguments.replace(" ", "").split(",")
        if operation in ("pred", "b32"):
            continue
        sources = [value(name) for name in sources]
        result = {
            "and": lambda a, b: a & b,
            "add": lambda a, b: a + b,
            "mov": lambda a: a,
            "setp": lambda a, b: a != b,
            "selp": lambda a, b, p: np.where(p, a, b),
            "popc": lambda a: np.array([int(x).bit_count() for x in a.flat], np.int32).reshape(a.shape),
        }[operation](*sources)
        registers[target] = np.where(registers[guard], result, registers[target]) if guard else result
    results = tuple(tensor(registers[f"${i}"].astype(np.int32), kind) for i, kind in enumerate(types))
    return results if isinstance(dtype, tuple) else results[0]
