"""Triton kernels compiled for Hopper without a GPU, as they are launched: registers, stack, shared memory and instructions.

`compile_launches` imports a test module in a subprocess without TRITON_INTERPRET and makes the calls that are listed there, on
meta tensors; each kernel is compiled where it would be launched. The compiler and ptxas come with the triton package.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a program may have on Hopper


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launched kernel.

    Attributes:
        registers: Registers per thread.
        stack: Bytes of stack per thread; spilled registers lie there, so 0 means no spill.
        shared: Bytes of shared memory per program.
        copies: Number of asynchronous copies into shared memory, by their size in bytes.
        ptx: Number of PTX instructions by full name, such as `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`.
    """

    registers: int
    stack: int
    shared: int
    copies: dict[str, int]
    ptx: dict[str, int] = field(repr=False)

    def count(self, prefix: str) -> int:
        """Number of PTX instructions whose name begins so."""
        return sum(n for name, n in self.ptx.items() if name.startswith(prefix))


def compile_launches(module: str, calls: str) -> dict[str, dict[str, Compiled]]:
    """For each entry of the dictionary `calls` of a test module: the kernels that its function launches, by kernel name.

    It takes a second or two for each kernel that is not in triton's cache.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.support.compiled", module, calls]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    return {call: {name: Compiled(**it) for name, it in kernels.items()} for call, kernels in results.items()}


def _compile(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Compiled:
    """Compiles a `JITFunction` for these arguments, specialised as a launch does it."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float8_e4m3fn: "fp8e4nv"}
    types |= {torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "i1"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + types[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, bool | float):
            signature[parameter.name], aligned = "i1" if isinstance(value, bool) else "fp32", False
        else:
            signature[parameter.name], aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0
        if special and aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", 90, 32), options)

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global[\w.:]* \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", ptx)
    names = re.findall(r"^\s*(?:@!?%p\d+\s+)?([a-z][\w.:]*)[\s;]", ptx, re.MULTILINE)
    return Compiled(
        int(numbers["REG"]),
        int(numbers["STACK"]),
        compiled.metadata.shared,
        dict(Counter(str(int(size, 0)) for size in copies)),
        dict(Counter(names)),
    )


def _main(module: str, calls: str) -> None:
    from triton.runtime.jit import JITFunction

    compiled: dict[str, Compiled] = {}

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled[kernel.fn.__name__] = _compile(kernel, args, options)

    JITFunction.run = run  # type: ignore[method-assign]
    results = {}
    for name, call in getattr(importlib.import_module(module), calls).items():
        compiled.clear()
        call()
        results[name] = {kernel: asdict(result) for kernel, result in compiled.items()}
    print(json.dumps(results))


if __name__ == "__main__":
    _main(*sys.argv[1:])
