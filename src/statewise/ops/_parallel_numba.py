"""Kernels on the threads that PyTorch already has, without Python in between.

After each of its own operators PyTorch keeps its OpenMP threads spinning for some milliseconds. Threads of our own
would have to share the cores with them, which made whole models wait up to twice as long; so PyTorch's threads are
asked, by the same call that PyTorch makes. What they run is a native loop around the kernel: a Python function there
would have to take Python's lock on every thread, which costs 30 to 250 microseconds a call.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import numba
import torch
from llvmlite import ir
from numba import _dispatcher, types
from numba.core import cgutils
from numba.extending import intrinsic

_I64, _I32 = ir.IntType(64), ir.IntType(32)
_ADDRESS = ir.IntType(8).as_pointer()


def find_team() -> int:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch has loaded; 0 if it uses another one."""
    try:
        with open("/proc/self/maps", encoding="utf-8") as maps:
            paths = {line.split(None, 5)[5].strip() for line in maps if "libgomp" in line}
    except (OSError, IndexError):
        return 0
    root = os.path.dirname(os.path.dirname(torch.__file__))
    ours = sorted(p for p in paths if p.startswith(root)) or sorted(paths)
    if not ours:
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(ours[0]).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


def _emit(context: Any, builder: Any, team: Any, threads: Any, stage: tuple, packed_type: Any) -> Any:
    """Code that calls kernel(start, stop, worker, *arguments) for `count` ranges of [0, blocks), where
    stage = (kernel, blocks, count, arguments). `kernel` and `team` are addresses; without a team, on this thread.

    Its value is 0, or 1 if a call of the kernel failed.
    """
    typed = (types.int64,) * 3 + tuple(types.unliteral(t) for t in packed_type.types)
    # What the threads share: kernel, blocks, count, the next range to take, whether a call failed, the arguments.
    kernel, blocks, count, packed = stage
    shared_type = ir.LiteralStructType([_I64] * 5 + [packed.type])
    shared = cgutils.alloca_once(builder, shared_type)
    for i, value in enumerate((kernel, blocks, count, ir.Constant(_I64, 0), ir.Constant(_I64, 0), packed)):
        builder.store(value, cgutils.gep_inbounds(builder, shared, 0, i))

    body_type = ir.FunctionType(ir.VoidType(), [_ADDRESS])
    name = builder.module.get_unique_name(f"{builder.function.name}.body")
    body = ir.Function(builder.module, body_type, name=name)
    body.linkage = "internal"
    inner = ir.IRBuilder(body.append_basic_block("entry"))
    data = inner.bitcast(body.args[0], shared_type.as_pointer())

    def field(i: int) -> Any:
        return cgutils.gep_inbounds(inner, data, 0, i)

    kernel_type = context.call_conv.get_function_type(types.none, typed)
    callee = inner.inttoptr(inner.load(field(0)), kernel_type.as_pointer())
    all_blocks, all_ranges = inner.load(field(1)), inner.load(field(2))
    values = cgutils.unpack_tuple(inner, inner.load(field(5)), len(packed_type))
    take, work, end = (body.append_basic_block(name) for name in ("take", "work", "end"))
    inner.branch(take)
    # Each thread takes ranges until none is left: OpenMP may give fewer threads than were asked for.
    inner.position_at_end(take)
    worker = inner.atomic_rmw("add", field(3), ir.Constant(_I64, 1), "monotonic")
    inner.cbranch(inner.icmp_signed("<", worker, all_ranges), work, end)
    inner.position_at_end(work)
    start = inner.sdiv(inner.mul(worker, all_blocks), all_ranges)
    stop = inner.sdiv(inner.mul(inner.add(worker, ir.Constant(_I64, 1)), all_blocks), all_ranges)
    status, _ = context.call_conv.call_function(inner, callee, types.none, typed, [start, stop, worker, *values])
    with inner.if_then(status.is_error):
        inner.store(ir.Constant(_I64, 1), field(4))
    inner.branch(take)
    inner.position_at_end(end)
    inner.ret_void()

    team_type = ir.FunctionType(ir.VoidType(), [body_type.as_pointer(), _ADDRESS, _I32, _I32])
    with builder.if_else(builder.icmp_signed("==", team, ir.Constant(_I64, 0))) as (alone, together):
        with alone:
            builder.call(body, [builder.bitcast(shared, _ADDRESS)])
        with together:
            builder.call(
                builder.inttoptr(team, team_type.as_pointer()),
                [body, builder.bitcast(shared, _ADDRESS), builder.trunc(threads, _I32), ir.Constant(_I32, 0)],
            )
    return builder.load(cgutils.gep_inbounds(builder, shared, 0, 4))


@intrinsic
def _fork(typingctx: Any, kernel: Any, team: Any, blocks: Any, count: Any, threads: Any, arguments: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kernel, team, blocks, count, threads, packed = args
        return _emit(context, builder, team, threads, (kernel, blocks, count, packed), sig.args[5])

    return types.int64(*(types.int64,) * 5, arguments), codegen


# (kernel, team, blocks, count, threads, arguments): inside a kernel, what `launch` is outside.
fork: Any = _fork


@numba.njit(nogil=True, cache=True)
def _launch(kernel, team, blocks, count, threads, *arguments):
    return fork(kernel, team, blocks, count, threads, arguments)


_addresses: dict[tuple[Any, bytes], int] = {}


def address(function: Any, arguments: tuple) -> int:
    """Where the machine code of `function` for arguments of these types stands."""
    key = function, _dispatcher.compute_fingerprint(arguments)
    found = _addresses.get(key)
    if found is None:
        typed = (types.int64,) * 3 + tuple(numba.typeof(a) for a in arguments)
        function.compile(typed)
        compiled = function.overloads[typed]
        found = _addresses[key] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return found


def launch(team: int, function: Any, blocks: int, count: int, threads: int, arguments: tuple) -> None:
    """function(start, stop, worker, *arguments) for `count` even ranges of [0, blocks), on `threads` threads."""
    if _launch(address(function, arguments), team, blocks, count, threads, *arguments):
        raise RuntimeError(f"the kernel {function.__name__} failed")
