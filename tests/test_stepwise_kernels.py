"""The Triton kernels of the stepwise backend against the reference: interpreted on a CPU, for real on a CUDA device.

Here the plain cell; the options are in test_stepwise_variants.py.
"""

import itertools
import math

import pytest
import torch
import walks
from tolerance import assert_as_accurate, assert_same_float64
from walks import PLAIN, Variant

from fused_lstm import reference_recurrence
from fused_lstm.kernels import stepwise
from fused_lstm.kernels.configs import cell_config, pointwise_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# steps, rows, units, projected features or None; 513 and 1030 units take two and three programs a row
SIZES = [(1, 1, 1, None), (2, 3, 17, None), (5, 1, 100, None), (2, 1, 513, None), (1, 2, 1030, None)]
SIZES += [(1, 1, 2, 1), (5, 2, 17, 16), (2, 1, 530, 33)]
ONE_WAY = {"forward": (False,), "reverse": (True,), "both": (False, True)}


def random_inputs(sizes, dtype, device, seed, scale=1.0, reverse=(False,), d_c_all=False):
    steps, rows, hidden_size, proj_size = sizes
    variant = Variant(projection=proj_size is not None, d_c_all=d_c_all)
    options = {"dtype": dtype, "device": device, "reverse": reverse, "output_size": proj_size, "seed": seed}
    inputs = walks.make_inputs(steps, rows, hidden_size, variant, **options)
    parameters = tuple(p._replace(weight_hh=p.weight_hh * scale) for p in inputs.parameters)
    return inputs._replace(gates=inputs.gates * scale, parameters=parameters)


def assert_results(run, sizes, numbers=32) -> None:
    """run(seed) -> (actual, same_dtype, exact), tensors by name; compared over as many seeds as give a state of so many
    numbers, since torch's error in a few numbers may be small by chance."""
    _, rows, hidden_size, proj_size = sizes
    draws = [run(seed) for seed in range(math.ceil(numbers / (rows * (proj_size or hidden_size))))]
    actual, same_dtype, exact = (
        {name: torch.stack([d[k][name] for d in draws]) for name in draws[0][k]} for k in range(3)
    )
    assert actual.keys() == same_dtype.keys() == exact.keys()
    for name, value in actual.items():
        if value.dtype == torch.float64:
            assert_same_float64(value, exact[name])
        else:
            assert_as_accurate(value, same_dtype[name], exact[name])


def buffers(walk_or_gradients, *names):
    """Those of its buffers that are there, by name."""
    found = {name: getattr(walk_or_gradients, name) for name in names}
    return {name: buffer for name, buffer in found.items() if buffer is not None}


def forwards(inputs, save):
    """(actual, same_dtype, exact): the output, c, and the gates if saved."""

    def run(backend, inputs):
        walk = walks.walk_of(inputs, save)
        backend.recurrence_forward(walk)
        return buffers(walk, "output", "c", *["gates"] * save)

    exact = walks.cast(inputs, torch.float64)
    return run(stepwise, inputs), run(reference_recurrence, inputs), run(reference_recurrence, exact)


@pytest.mark.parametrize("save", [True, False], ids=["save", "no_save"])
@pytest.mark.parametrize("reverse", ONE_WAY.values(), ids=ONE_WAY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(sizes, dtype, reverse, save, device):
    assert_results(lambda seed: forwards(random_inputs(sizes, dtype, device, seed, reverse=reverse), save), sizes)


def test_gates_are_written_only_to_be_saved(device):
    """Activated in place for a backward; else left as they were, which is less to move."""
    inputs = random_inputs((3, 2, 17, None), torch.float32, device, 0)
    inputs = inputs._replace(parameters=(inputs.parameters[0]._replace(weight_hh=torch.zeros(68, 17, device=device)),))
    for save in (True, False):
        walk = walks.walk_of(inputs, save)
        stepwise.recurrence_forward(walk)
        assert torch.equal(walk.gates, inputs.gates) is not save


def saved_by_forward(inputs):
    """A walk as the backward gets it."""
    walk = walks.walk_of(inputs)
    reference_recurrence.recurrence_forward(walk)
    return walk


def tensors_of(value):
    """All tensors in tuples of tuples."""
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def backwards(inputs):
    """(actual, same_dtype, exact): what the backward fills, from the same saved tensors."""

    def run(backend, walk, inputs):
        gradients = walks.gradients_of(walk, inputs)
        backend.recurrence_backward(walk, gradients)
        return buffers(gradients, "d_gates", "d_h", "d_c", "d_projected", "hidden")

    walk = saved_by_forward(inputs)
    kept = [tensor.clone() for tensor in tensors_of((walk, inputs))]
    actual = run(stepwise, walk, inputs)
    for tensor, copy in zip(tensors_of((walk, inputs)), kept, strict=True):  # the caller's: a second backward may come
        assert torch.equal(tensor, copy)
    same_dtype = run(reference_recurrence, walk, inputs)
    return actual, same_dtype, run(reference_recurrence, *walks.cast((walk, inputs), torch.float64))


@pytest.mark.parametrize("d_c_all", [False, True], ids=["", "d_c_all"])
@pytest.mark.parametrize("reverse", ONE_WAY.values(), ids=ONE_WAY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward(sizes, dtype, reverse, d_c_all, device):
    def run(seed):
        return backwards(random_inputs(sizes, dtype, device, seed, reverse=reverse, d_c_all=d_c_all))

    assert_results(run, sizes)


@pytest.mark.parametrize("there", list(itertools.product([True, False], repeat=4))[1:], ids=str)
@pytest.mark.parametrize("reverse", [(False,), (True,)], ids=["forward", "reverse"])
@pytest.mark.parametrize("proj_size", [None, 16], ids=["plain", "projection"])
def test_backward_of_a_subset(proj_size, reverse, there, device):
    """there: which of d_output, d_h_n, d_c_n and d_c_all there are; None stands for zeros."""
    sizes = (3, 2, 17, proj_size)

    def run(seed):
        inputs = random_inputs(sizes, torch.float64, device, seed, reverse=reverse, d_c_all=True)
        names = ("d_output", "d_h_n", "d_c_n", "d_c_all")
        return backwards(inputs._replace(**{name: None for name, given in zip(names, there, strict=True) if not given}))

    assert_results(run, sizes)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, under the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated(dtype, device):
    """Gates of a thousand and more, of either sign: the activations are at their ends, not NaN, and so is all else."""
    sizes = (2, 3, 100, None)
    numbers = 2400  # few of which are between the ends, where an error can be
    assert_results(lambda seed: forwards(random_inputs(sizes, dtype, device, seed, scale=1e3), True), sizes, numbers)
    assert_results(lambda seed: backwards(random_inputs(sizes, dtype, device, seed, scale=1e3)), sizes, numbers)


def activated(gates, c0):
    """The gates (N, 4H) of one step, as they are saved, without an h to enter it."""
    rows, gate_size = gates.shape
    inputs = walks.make_inputs(1, rows, gate_size // 4, PLAIN, dtype=gates.dtype, device=gates.device)
    inputs = inputs._replace(gates=gates[None, None], h0=torch.zeros_like(inputs.h0), c0=c0[None])
    walk = walks.walk_of(inputs)
    stepwise.recurrence_forward(walk)
    return walk.gates[0, 0]


@pytest.mark.parametrize("gate", range(4), ids=["i", "f", "g", "o"])
@pytest.mark.parametrize("value", [-1e4, -700.0, -88.8, 88.8, 700.0, 1e4])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, under the interpreter
def test_activations_at_their_ends(value, gate, device):
    gates = torch.zeros(1, 4, device=device)
    gates[0, gate] = value
    found = activated(gates, torch.ones(1, 1, device=device))
    end = (math.tanh if gate == 2 else lambda x: 1 / (1 + math.exp(-min(max(x, -700), 700))))(value)
    expected = [0.0 if unit == 2 else 0.5 for unit in range(4)]
    expected[gate] = end
    torch.testing.assert_close(found.flatten().cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_between_their_ends(dtype, device):
    """Within two units in the last place of their largest value, 1."""
    x = torch.linspace(-12, 12, 501, dtype=dtype, device=device)
    found = activated(x.repeat(4)[None], torch.zeros(1, 501, dtype=dtype, device=device))
    exact = x.double()
    exact = torch.stack((exact.sigmoid(), exact.sigmoid(), exact.tanh(), exact.sigmoid()))
    assert (found.double().view(4, 501) - exact).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("variant", [PLAIN, Variant(projection=True), *walks.COMBINED], ids=str)
def test_no_rows(variant, device):
    inputs = walks.make_inputs(2, 0, 5, variant, device=device, output_size=2)
    actual, expected = walks.run(stepwise, inputs), walks.run(reference_recurrence, inputs)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=0)  # the sums over no rows are zeros


def test_every_size_has_a_configuration():
    """A block is a power of two that covers the units, with a warp or more to each 128 of its elements."""
    for hidden_size in range(1, 2050):
        for norm in (None, "gates"):
            config = cell_config(norm, hidden_size)
            assert config.block & (config.block - 1) == 0
            assert 32 * config.num_warps <= config.block <= 128 * config.num_warps
            assert norm is None or config.block >= hidden_size
        assert cell_config(None, hidden_size) == pointwise_config(hidden_size)
    assert cell_config("gates", 100_000).num_warps == 32  # no more go into a program


class TestFarOffsets:
    """One step at the far end of tensors whose offsets pass 2**31: the same bits as near, and nothing beside them.

    On a CPU the tensors are sparse files, most of whose pages do not exist. Before each tensor lies as much again, so
    that an offset that wraps around to a negative one reads zeros and fails the comparison, not the process.
    """

    ROWS, HIDDEN = 2, 40

    @pytest.fixture
    def places(self, device):
        """Steps that make a tensor (T, N, H) that long on a CPU; on a CUDA device, whose memory is real, (T, N, 4H)."""
        if device == "cuda" and torch.cuda.mem_get_info()[0] < 14e9:
            pytest.skip("needs 14 GB of GPU memory")
        return 2**31 // (self.ROWS * self.HIDDEN * (4 if device == "cuda" else 1)) + 3

    @pytest.fixture
    def zeros(self, device, tmp_path):
        """A function (steps, width, dtype) -> (steps, ROWS, width) of zeros."""
        if device == "cuda":
            return lambda steps, width, dtype: torch.zeros(steps, self.ROWS, width, dtype=dtype, device=device)

        def sparse(steps, width, dtype):
            size = 2**31 + steps * self.ROWS * width
            path = tmp_path / "sparse"
            with open(path, "wb") as file:
                file.truncate(size * dtype.itemsize)
            tensor = torch.from_file(str(path), shared=True, size=size, dtype=dtype)
            path.unlink()
            return tensor[2**31 :].view(steps, self.ROWS, width)

        return sparse

    def assert_same_at(self, far, near, place: int) -> None:
        """far at place is near[1]; beside place, as near[0] and near[2] have it."""
        assert near[1].any()
        assert torch.equal(far[place - 1 : place + 2], near)

    def launch(self, kernel, tensors, indices, flags):
        """kernel as the plain cell has it, on tensors, which it takes by name."""
        runtime = {"batch_size": self.ROWS, "hidden_size": self.HIDDEN, "step_after": 0}
        arguments = dict.fromkeys(name for name in kernel.arg_names if name.endswith("_ptr")) | tensors
        kernel[(self.ROWS, 1)](**arguments, **indices, **runtime, **flags, LAYER_NORM=None, PEEPHOLE=None, BLOCK=64)

    def test_forward(self, zeros, places, device):
        inputs = random_inputs((1, self.ROWS, self.HIDDEN, None), torch.float16, device, 0)

        def run(zeros, steps, step, apart):
            gates, h = zeros(steps, 4 * self.HIDDEN, torch.float16), zeros(steps, self.HIDDEN, torch.float16)
            c = zeros(steps, self.HIDDEN, torch.float32)
            gates[step], c[step - 1] = inputs.gates[0, 0], inputs.c0[0]
            indices = {"step": step, "c_from": step - 1, "c_to": step, "h_to": step}
            strides = {"h_step_stride": self.ROWS * self.HIDDEN, "h_row_stride": self.HIDDEN, "H_APART": apart}
            tensors = {"gates_ptr": gates, "c_ptr": c, "h_ptr": h}
            self.launch(stepwise.cell_forward_kernel, tensors, indices, {**strides, "SAVE": True})
            return gates, c, h

        near = run(self.small_zeros(device), 3, 1, 0)
        for apart in (0, 1):
            for far_part, near_part in zip(run(zeros, places, places - 2, apart), near, strict=True):
                self.assert_same_at(far_part, near_part, places - 2)

    def test_backward(self, zeros, places, device):
        inputs = random_inputs((1, self.ROWS, self.HIDDEN, None), torch.float16, device, 0)
        walk = saved_by_forward(inputs)

        def run(zeros, steps, step, apart):
            gates, d_gates = (zeros(steps, 4 * self.HIDDEN, torch.float16) for _ in range(2))
            d_output, hidden = (zeros(steps, self.HIDDEN, torch.float16) for _ in range(2))
            c, d_c = zeros(steps, self.HIDDEN, torch.float32), inputs.d_c_n[0].clone()
            gates[step], d_output[step], c[step - 1 : step + 1] = walk.gates[0, 0], inputs.d_output[0, :, 0], walk.c[0]
            tensors = {"d_output_ptr": d_output, "d_h_ptr": inputs.d_h_n[0], "d_c_ptr": d_c, "gates_ptr": gates}
            tensors |= {"c_ptr": c, "d_gates_ptr": d_gates, "hidden_ptr": hidden}
            strides = {"d_output_step_stride": self.ROWS * self.HIDDEN, "d_output_row_stride": self.HIDDEN}
            indices = {"step": step, "c_from": step - 1, "c_to": step}
            flags = {**strides, "D_OUTPUT_APART": apart, "SLOTS": 0}
            self.launch(stepwise.cell_backward_kernel, tensors, indices, flags)
            return d_gates, hidden, d_c

        *near, near_d_c = run(self.small_zeros(device), 3, 1, 0)
        for apart in (0, 1):
            *far, far_d_c = run(zeros, places, places - 2, apart)
            for far_part, near_part in zip(far, near, strict=True):
                self.assert_same_at(far_part, near_part, places - 2)
            assert torch.equal(far_d_c, near_d_c)

    def small_zeros(self, device):
        return lambda steps, width, dtype: torch.zeros(steps, self.ROWS, width, dtype=dtype, device=device)
