"""The native backend's shared library: found, loaded, and described to ctypes."""

import ctypes
import math
import os
import time
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from coterie.kernels.dispatch import Dispatch

INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512-bf16")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
instruction_limit = INSTRUCTION_SETS[-1]
"""What `instruction_set` was called with last: packed weights have the order of one set."""

_POOLED_BYTES = 4 << 20  # smaller blocks are recycled by malloc


def why_unavailable() -> str | None:
    """None when the backend works here, else one line saying why not."""
    try:
        library()
    except OSError as error:
        return str(error)
    return None


def instruction_set(limit: str = INSTRUCTION_SETS[-1]) -> str:
    """The instruction set in use from now on: the richest this processor has, up to `limit`."""
    global instruction_limit
    name: bytes = library().coterie_isa(INSTRUCTION_SETS.index(limit))
    instruction_limit = limit
    return name.decode()


def release_memory() -> int:
    """Returns the work space kept for the next call to the system; how many bytes that was.

    A training step writes gradients as large as the bank. First touching that much fresh memory takes
    longer than computing them, so freed blocks wait for the next step; idle ones go back by themselves
    after 4096 calls.
    """
    freed: int = library().coterie_release_idle()
    return freed


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> Dispatch:
    """`coterie.kernels.sort_by_expert` in one call; ids outside 0 … E-1 count as unused. CPU, int64."""
    experts_TK = experts_TK.contiguous()
    order_N = torch.empty(experts_TK.numel(), dtype=torch.int64)
    ends_E = torch.empty(num_experts, dtype=torch.int32)
    library().coterie_sort(
        experts_TK.data_ptr(), experts_TK.numel(), num_experts, order_N.data_ptr(), ends_E.data_ptr()
    )
    return Dispatch(order_N, ends_E, experts_TK.shape[1])


def machine_floor(dtype: torch.dtype, *, megabytes: int = 512) -> tuple[float, float]:
    """FLOP/s of multiply-adds in registers and bytes/s of reading memory, on torch's number of threads.

    The best of several short runs; no kernel can be faster than these allow.
    """
    native, threads = library(), torch.get_num_threads()
    data = torch.zeros(megabytes << 18)
    flops, bandwidth = 0.0, 0.0
    for _ in range(7):
        start = time.perf_counter()
        count: float = native.coterie_multiply_adds(DTYPES[dtype], threads)
        flops = max(flops, 2 * count / (time.perf_counter() - start))
        start = time.perf_counter()
        native.coterie_read(data.data_ptr(), data.numel(), threads)
        bandwidth = max(bandwidth, data.nbytes / (time.perf_counter() - start))
    return flops, bandwidth


# The order of enum Kind in csrc/profile.h.
PROFILE = (
    "tokens gathered and packed",
    "weights packed",
    "products",
    "activations and weighted sums",
    "operands of weight gradients packed",
    "products of weight gradients",
    "weight gradients written",
)


def profile(run: Callable[[], object]) -> dict[str, float]:
    """Where the time of `run()` goes: kind of work → share of its time on all of torch's threads.

    "everything else" is what is left: threads that wait for others, fresh memory, Python. Timing itself costs
    a few hundredths where experts have few tokens.
    """
    native, spent = library(), (ctypes.c_uint64 * len(PROFILE))()
    start = native.coterie_profile(1, None)
    run()
    total = (native.coterie_profile(0, spent) - start) * torch.get_num_threads()
    shares = {kind: ticks / total for kind, ticks in zip(PROFILE, spent, strict=True)}
    return shares | {"everything else": 1 - sum(shares.values())}


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """torch.empty on memory that returns to the library's pool with the last tensor on it."""
    size = math.prod(shape) * dtype.itemsize
    if size < _POOLED_BYTES:
        return torch.empty(shape, dtype=dtype)
    address = library().coterie_allocate(size)
    if address is None:
        raise MemoryError(f"the native kernel could not allocate {size} bytes")
    memory = (ctypes.c_char * size).from_address(address)
    weakref.finalize(memory, library().coterie_release, address).atexit = False
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Bank(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("expert", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("col", ctypes.c_int64),
        ("prepacked", ctypes.c_void_p),
    ]


class Mlp(ctypes.Structure):
    """struct CoterieMlp of csrc/coterie.h, field for field."""

    _fields_ = [
        *[(name, ctypes.c_int64) for name in ("tokens", "slots", "experts", "dim", "hidden", "out")],
        *[(name, ctypes.c_int32) for name in ("dtype", "activation", "gated", "interleaved", "threads")],
        *[(name, ctypes.c_float) for name in ("limit", "alpha", "shift")],
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("weights", "order", "ends")],
        ("w_in", Bank),
        ("w_out", Bank),
        *[(name, ctypes.c_void_p) for name in ("b_in", "b_out", "y", "pre", "dy")],
        ("dy_row", ctypes.c_int64),
        *[(name, ctypes.c_void_p) for name in ("dx", "dweights", "dw_in", "dw_out", "db_in", "db_out")],
    ]


class Codes(ctypes.Structure):
    """struct CoterieCodes of csrc/coterie.h, field for field."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("codes", "scales", "zeros", "input_scale")],
        *[(name, ctypes.c_int32) for name in ("bits", "group")],
    ]


@cache
def library() -> ctypes.CDLL:
    """The loaded library; OSError says why there is none."""
    path = Path(os.environ.get("COTERIE_NATIVE_LIBRARY", Path(__file__).with_name("_native.so")))
    if not path.exists():
        raise OSError(f"{path} is missing: no C++17 compiler was found when coterie was installed")
    loaded = ctypes.CDLL(str(path))
    for call in (loaded.coterie_forward, loaded.coterie_backward):
        call.argtypes, call.restype = [ctypes.POINTER(Mlp)], ctypes.c_int
    loaded.coterie_low_bit.argtypes = [ctypes.POINTER(Mlp), ctypes.POINTER(Codes)]
    loaded.coterie_low_bit.restype = ctypes.c_int
    loaded.coterie_isa.argtypes, loaded.coterie_isa.restype = [ctypes.c_int], ctypes.c_char_p
    sizes = [ctypes.c_int64] * 4 + [ctypes.c_int32]
    loaded.coterie_prepacked_floats.argtypes = sizes
    loaded.coterie_prepacked_floats.restype = ctypes.c_int64
    loaded.coterie_prepack.argtypes = [ctypes.POINTER(Bank), *sizes, *[ctypes.c_int32] * 2, ctypes.c_void_p]
    loaded.coterie_prepack.restype = None
    loaded.coterie_multiply_adds.argtypes = [ctypes.c_int, ctypes.c_int]
    loaded.coterie_multiply_adds.restype = ctypes.c_double
    loaded.coterie_read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    loaded.coterie_sort.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    loaded.coterie_allocate.argtypes, loaded.coterie_allocate.restype = [ctypes.c_size_t], ctypes.c_void_p
    loaded.coterie_release.argtypes, loaded.coterie_release.restype = [ctypes.c_void_p], None
    loaded.coterie_release_idle.restype = ctypes.c_size_t
    loaded.coterie_profile.argtypes = [ctypes.c_int32, ctypes.POINTER(ctypes.c_uint64)]
    loaded.coterie_profile.restype = ctypes.c_uint64
    loaded.coterie_use_openmp.argtypes = [ctypes.c_void_p]
    loaded.coterie_use_openmp(_torch_openmp())
    return loaded


def _torch_openmp() -> int | None:
    """GOMP_parallel of torch's own OpenMP: its idle workers spin, and a second pool would fight them."""
    name = "libtorch_cpu.dylib" if os.uname().sysname == "Darwin" else "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name)).GOMP_parallel
    except (OSError, AttributeError):  # a torch built without OpenMP: threads of our own do
        return None
    return ctypes.cast(parallel, ctypes.c_void_p).value
