"""What this device means: the one place that decides precision, chunks and limits of memory.

On a GPU models stay as quantised as their files and caches are half precision; MLX's CPU backend
has fast products of float32 alone, so there all is made dense float32. `C2C_MLX_REHEARSE=gpu` has
all of it decided as on a Mac's GPU while the arithmetic stays where it is, `=m1` as on an M1 or M2.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import c2c_mlx.blas  # noqa: F401

import mlx.core as mx

from c2c_mlx.errors import C2CError

Kind = Literal["cpu", "gpu", "m1"]  # m1: a GPU that emulates bfloat16

REHEARSE = "C2C_MLX_REHEARSE"
LOGITS = 1 << 27  # bytes of them, as float32, that training has at once
_SMALL_BUFFERS = 1 << 28  # bytes that MLX may always keep for reuse
_MOST_BUFFERS = 1 << 31
# Of what people do where macOS keeps interrupting the GPU, the first always helped, the second some
# of them (github.com/ml-explore/mlx/issues/3267); smaller batches did not.
UNDISTURBED = (
    "where it happens again, let the display sleep, or try AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 in the "
    "environment"
)


def kind() -> Kind:
    """As which device decisions are made.

    Raises:
        C2CError: if the environment asks for a device that nobody knows.
    """
    wanted = os.environ.get(REHEARSE, "")
    if wanted in ("gpu", "m1"):
        return "m1" if wanted == "m1" else "gpu"
    if wanted:
        raise C2CError(f"{REHEARSE}={wanted}: must be gpu or m1")
    if mx.default_device().type == mx.cpu:
        return "cpu"
    # Apple's names: g13 is the M1, g14 the M2. They compute bfloat16 in software, float16 does the
    # same work 14 to 55 % faster.
    architecture = str(mx.device_info().get("architecture", ""))
    return "m1" if re.match(r"applegpu_g1[34]", architecture) else "gpu"


def is_rehearsed() -> bool:
    """Whether a GPU's decisions are made, but a CPU computes."""
    return kind() != "cpu" and mx.default_device().type == mx.cpu


def is_dense() -> bool:
    """Whether weights are made dense float32 when they are loaded."""
    return kind() == "cpu"


def dtype_of(stored: mx.Dtype) -> mx.Dtype:
    """In which dtype the floats of a model are held, given that of its file."""
    if is_dense():
        return mx.float32
    return mx.float16 if kind() == "m1" and stored == mx.bfloat16 else stored


def prefill_chunk() -> int:
    """Positions per pass of a prefill; bounds the memory of attention scores."""
    return 512 if is_dense() else 2048  # the latter is mlx-lm's own


def prefill_slice() -> int:
    """Positions of a prompt that are read between two tokens of other people's answers."""
    return prefill_chunk() // 4


def fuser_pass(weights: int) -> int:
    """Bytes that a pass of a fuser may hold at once, beside weights of so many bytes.

    Every pass reads all of them, so a large fuser wants many positions at a time.
    """
    return max(1 << 27, weights // 4) if is_dense() else 1 << 28


def cached_bytes() -> int:
    """Bytes of an activation that elementwise work goes over at a time.

    A CPU that finds them in its cache is four times as fast; a GPU wants all at once.
    """
    return 1 << 20 if mx.default_device().type == mx.cpu else 1 << 40


def second_stream() -> mx.Stream | mx.ThreadLocalStream:
    """The stream for work beside that of the current one, to be evaluated together with it.

    A CPU computes on each stream in a thread of its own; of the streams of one GPU nobody has
    measured what they are good for, so there it is the current one.
    """
    device = mx.default_device()
    return _second_stream() if device.type == mx.cpu else mx.default_stream(device)


@cache
def _second_stream() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.Device(mx.cpu))


def has_slow_erf() -> bool:
    """Whether erf is a call of a library per number, as in MLX's CPU backend on Linux."""
    return mx.default_device().type == mx.cpu


def memory_limit() -> int:
    """Bytes that the device allows a process."""
    if mx.default_device().type == mx.gpu:
        info = mx.device_info()
        # Metal's own advice; CUDA tells the device's memory.
        for key in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if size := int(info.get(key, 0)):
                return size
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's share of it
        try:
            physical = min(physical, int((Path("/sys/fs/cgroup") / file).read_text()))
        except (OSError, ValueError):
            pass
    for which in (resource.RLIMIT_DATA, resource.RLIMIT_AS):  # ulimit -d, ulimit -v
        allowed, _ = resource.getrlimit(which)
        if allowed != resource.RLIM_INFINITY:
            physical = min(physical, allowed)
    return int(0.9 * physical)  # the rest is the system's


def buffer_limit() -> int:
    """Bytes of freed buffers that MLX keeps for reuse; part of every estimate of memory."""
    return max(_SMALL_BUFFERS, min(_MOST_BUFFERS, memory_limit() // 16))


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Inside, MLX waits for what it is at before it takes more than so many bytes.

    Without that it takes memory for a whole graph in advance, as far as its queue goes. Where so
    many bytes do not suffice it goes on, one operation after the other.
    """
    before = mx.set_memory_limit(size)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def prepare() -> None:
    """Sets MLX's limits for this process; called before a model is loaded.

    The wired limit is never raised. mlx-lm does so around every generation, and a raised limit with
    concurrent work panicked the kernel of a Mac 3 times out of 3, never in 10 runs without it
    (github.com/ml-explore/mlx/issues/3186). What it is good for, models near the size of the
    memory, is not what two small models need.
    """
    library: Any = import_module("mlx_lm.generate")  # as an attribute of mlx_lm it is a function
    library.maybe_set_recommended_wired_limit = _leave_wired_limit
    mx.set_cache_limit(buffer_limit())


def _leave_wired_limit() -> None:
    """Stands for mlx-lm's function; None tells it that there is no limit to come back to."""


def describe() -> str:
    """The device for people, e.g. 'Apple M3 GPU'."""
    device = mx.default_device()
    name = mx.device_info(device).get("device_name", "")
    text = f"{name} {'CPU' if device.type == mx.cpu else 'GPU'}".strip()
    return f"{text}, rehearsing {wanted}" if (wanted := os.environ.get(REHEARSE)) else text


def is_out_of_memory(error: Exception) -> bool:
    """Whether this is what MLX raises when the memory is full, on Metal, CUDA or a CPU."""
    text = str(error).lower()
    signs = ("alloc", "insufficient memory", "out of memory")  # [metal::malloc], std::bad_alloc
    is_said = isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    return is_said or isinstance(error, MemoryError)


def is_interrupted(error: Exception) -> bool:
    """Whether this is what MLX raises when macOS ended the GPU's work before it was done.

    It does so where work keeps the screen waiting or takes too long, and to bystanders of that.
    """
    is_said = "command buffer execution failed" in str(error).lower()
    return isinstance(error, RuntimeError) and is_said and not is_out_of_memory(error)
