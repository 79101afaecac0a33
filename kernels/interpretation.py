"""Are the kernels interpreted, in Python on any device, rather than compiled? Triton decides at the first import."""

import triton


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)
