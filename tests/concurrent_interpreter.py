"""Run one launch of an interpreted kernel with all programs of its grid alive at once, as kernels that wait need it.

Triton's interpreter runs one program after another. Here each program is a process of its own, over shared memory.
"""

import itertools
import multiprocessing
import time
import traceback

import torch
from triton.runtime import interpreter


class Deadlock(AssertionError):
    """The programs did not end in time."""


def launch_concurrently(kernel, grid, *args, timeout: float = 60.0, **constants) -> None:
    """kernel[grid](*args, **constants), each program in its own process.

    Args:
        timeout: seconds that all programs together may take

    Raises:
        Deadlock: one was still running then; all are killed
        AssertionError: one failed; its traceback is the text
    """
    for arg in args:
        if isinstance(arg, torch.Tensor) and arg.numel() > 0:
            arg.share_memory_()  # moves the storage, so that all views of it follow
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    programs = [
        context.Process(target=_run_program, args=(kernel, index, grid, args, constants, failures), daemon=True)
        for index in itertools.product(*map(range, grid))
    ]
    deadline = time.monotonic() + timeout
    for program in programs:
        program.start()
    try:
        for program in programs:
            program.join(max(0.0, deadline - time.monotonic()))
            if program.is_alive():
                raise Deadlock(f"{kernel.fn.__name__}: programs still wait after {timeout} s")
    finally:
        for program in programs:
            program.kill()
            program.join()
    if not failures.empty():
        raise AssertionError(failures.get())


def _run_program(kernel, index, grid, args, constants, failures) -> None:
    try:
        torch.set_num_threads(1)
        builder = interpreter.interpreter_builder
        set_index, set_size = builder.set_grid_idx, builder.set_grid_dim
        builder.set_grid_idx = lambda *_: set_index(*index)
        builder.set_grid_dim = lambda *_: set_size(*grid)
        executor = interpreter.GridExecutor(kernel.fn, kernel.arg_names, (1, 1, 1))
        executor._restore_args_dev = lambda *_: None  # would copy the shared memory onto itself, over others' stores
        executor(*args, **constants)
    except BaseException:
        failures.put(traceback.format_exc())
