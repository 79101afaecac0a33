"""How programs of one launch tell each other how far they are: counters that only grow.

All programs that wait for each other must be resident at once, or they wait for ever: such kernels are launched
cooperatively, and the driver refuses a grid that does not fit.
"""

import triton
import triton.language as tl

from fused_lstm.kernels.interpretation import INTERPRETED

_PTX = tl.constexpr(not INTERPRETED)


@triton.jit
def arrive(counter_ptr):
    """What this program has stored so far is there for whoever waits for this arrival."""
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait(counter_ptr, arrivals):
    """Until there have been so many arrivals at the counter."""
    if _PTX:
        # a plain load polls without the two barriers that each atomic of Triton brings
        seen = _load_acquire(counter_ptr)
        while seen < arrivals:
            seen = _load_acquire(counter_ptr)
    else:
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < arrivals:
            pass
    tl.debug_barrier()


@triton.jit
def _load_acquire(counter_ptr):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [counter_ptr], dtype=tl.int32, is_pure=False, pack=1
    )
