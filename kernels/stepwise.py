"""The backend "stepwise": one cuBLAS product and one fused pointwise kernel a time step.

Memory is in torch's own order: gates and their gradients (T, N, 4H) as i | f | g | o, c (T + 1, N, H) in the order of
time. The product `h @ W_hh^T` accumulates onto the input product, unless each has a norm of its own, and the kernel
activates the gates in place, so the forward moves every gate once in each direction. All options are in the same
kernel; only with a projection does what acts on h need a second, small one, behind the projection's product. Directions
are walked one after the other, their time steps on the host, which allocates, slices and compiles everything before
the first one.
"""

from fused_lstm.kernels.stepwise_backward import cell_backward_kernel, recurrence_backward
from fused_lstm.kernels.stepwise_forward import cell_forward_kernel, recurrence_forward

__all__ = ["cell_backward_kernel", "cell_forward_kernel", "recurrence_backward", "recurrence_forward"]
