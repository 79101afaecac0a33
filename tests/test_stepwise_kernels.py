"""The Triton kernels of the stepwise backend against the reference: interpreted on a CPU, for real on a CUDA device."""

import itertools
import math

import pytest
import torch
from tolerance import assert_as_accurate, assert_same_float64

from fused_lstm import reference
from fused_lstm.kernels import stepwise
from fused_lstm.kernels.configs import pointwise_config

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# steps, rows, units, projected features or None; 513 and 1030 units take two and three programs a row
SIZES = [(1, 1, 1, None), (2, 3, 17, None), (5, 1, 100, None), (2, 1, 513, None), (1, 2, 1030, None)]
SIZES += [(1, 1, 2, 1), (5, 2, 17, 16), (2, 1, 530, 33)]


def doubled(tensors):
    return [None if tensor is None else tensor.double() for tensor in tensors]


def random_inputs(sizes, dtype, device, seed, scale=1.0):
    """gates before the recurrent product, h0, c0, weight_hh, weight_hr."""
    steps, rows, hidden_size, proj_size = sizes
    output_size = proj_size or hidden_size
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape, factor=1.0):
        return (torch.randn(shape, generator=generator) * factor).to(device, dtype)

    return (
        randn(steps, rows, 4 * hidden_size, factor=scale),
        randn(rows, output_size),
        randn(rows, hidden_size),
        randn(4 * hidden_size, output_size, factor=scale / math.sqrt(output_size)),
        randn(proj_size, hidden_size, factor=1 / math.sqrt(hidden_size)) if proj_size else None,
    )


def random_gradients(sizes, dtype, device, seed):
    """d_output, d_h_n, d_c_n."""
    steps, rows, hidden_size, proj_size = sizes
    output_size = proj_size or hidden_size
    generator = torch.Generator().manual_seed(seed)
    shapes = [(steps, rows, output_size), (rows, output_size), (rows, hidden_size)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def assert_results(run, sizes) -> None:
    """run(seed) -> (actual, same_dtype, exact), lists of tensors or None; compared over as many seeds as give a state
    of 32 numbers, since torch's error in a few numbers may be small by chance."""
    _, rows, hidden_size, proj_size = sizes
    draws = [run(seed) for seed in range(math.ceil(32 / (rows * (proj_size or hidden_size))))]
    for results in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        if results[0][0] is None:
            assert all(result is None for draw in results for result in draw)
            continue
        actual, same_dtype, exact = (torch.stack(parts) for parts in zip(*results, strict=True))
        if actual.dtype == torch.float64:
            assert_same_float64(actual, exact)
        else:
            assert_as_accurate(actual, same_dtype, exact)


def forwards(inputs, reverse, save):
    """(actual, same_dtype, exact), each [output, c, and the gates if saved]."""

    def run(backend, inputs):
        gates = inputs[0].clone()
        results = backend.recurrence_forward(gates, *inputs[1:], reverse, save)
        return [*results, gates] if save else [*results]

    return run(stepwise, inputs), run(reference, inputs), run(reference, doubled(inputs))


@pytest.mark.parametrize("save", [True, False], ids=["save", "no_save"])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward(sizes, dtype, reverse, save, device):
    assert_results(lambda seed: forwards(random_inputs(sizes, dtype, device, seed), reverse, save), sizes)


def test_gates_are_written_only_to_be_saved(device):
    """Activated in place for a backward; else left as they were, which is less to move."""
    gates, h0, c0, weight_hh, _ = random_inputs((3, 2, 17, None), torch.float32, device, 0)
    for save in (True, False):
        given = gates.clone()
        stepwise.recurrence_forward(given, h0, c0, torch.zeros_like(weight_hh), None, False, save)
        assert torch.equal(given, gates) is not save


def saved_by_forward(inputs, reverse):
    """The activated gates, and c of all steps, as the backward gets them."""
    gates = inputs[0].clone()
    _, c = reference.recurrence_forward(gates, *inputs[1:], reverse, True)
    return gates, c


def backwards(inputs, d_results, lengths, reverse):
    """(actual, same_dtype, exact), each [d_gates, d_h0, d_c0, d_h_all, hidden_all], of the same saved tensors."""
    tensors = [*d_results, *saved_by_forward(inputs, reverse), *inputs[3:]]
    kept = [None if tensor is None else tensor.clone() for tensor in tensors]
    actual = stepwise.recurrence_backward(*tensors, lengths, reverse)
    for tensor, copy in zip(tensors, kept, strict=True):  # the caller's: a second backward may come
        assert copy is None or torch.equal(tensor, copy)
    same_dtype = reference.recurrence_backward(*tensors, lengths, reverse)
    return actual, same_dtype, reference.recurrence_backward(*doubled(tensors), lengths, reverse)


def row_lengths(sizes, device):
    steps, rows = sizes[:2]
    return torch.tensor([1 + (3 * row + steps // 2) % steps for row in range(rows)], device=device)


@pytest.mark.parametrize("mode", ["forward", "reverse", "lengths"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_backward(sizes, dtype, mode, device):
    lengths = row_lengths(sizes, device) if mode == "lengths" else None

    def run(seed):
        inputs = random_inputs(sizes, dtype, device, seed)
        d_results = random_gradients(sizes, dtype, device, seed)
        return backwards(inputs, d_results, lengths, mode == "reverse")

    assert_results(run, sizes)


@pytest.mark.parametrize("there", list(itertools.product([True, False], repeat=3))[1:], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reverse", "lengths"])
@pytest.mark.parametrize("proj_size", [None, 16], ids=["plain", "projection"])
def test_backward_of_a_subset(proj_size, mode, there, device):
    """there: which of d_output, d_h_n and d_c_n there are; None stands for zeros."""
    sizes = (3, 2, 17, proj_size)
    lengths = row_lengths(sizes, device) if mode == "lengths" else None

    def run(seed):
        inputs = random_inputs(sizes, torch.float64, device, seed)
        d_results = random_gradients(sizes, torch.float64, device, seed)
        d_results = [d if given else None for d, given in zip(d_results, there, strict=True)]
        return backwards(inputs, d_results, lengths, mode == "reverse")

    assert_results(run, sizes)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, under the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated(dtype, device):
    """Gates of a thousand and more, of either sign: the activations are at their ends, not NaN, and so is all else."""
    sizes = (2, 3, 100, None)

    def run_forward(seed):
        return forwards(random_inputs(sizes, dtype, device, seed, scale=1e3), False, True)

    def run_backward(seed):
        inputs = random_inputs(sizes, dtype, device, seed, scale=1e3)
        return backwards(inputs, random_gradients(sizes, dtype, device, seed), None, False)

    assert_results(run_forward, sizes)
    assert_results(run_backward, sizes)


@pytest.mark.parametrize("gate", range(4), ids=["i", "f", "g", "o"])
@pytest.mark.parametrize("value", [-1e4, -700.0, -88.8, 88.8, 700.0, 1e4])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # NumPy's, under the interpreter
def test_activations_at_their_ends(value, gate, device):
    gates = torch.zeros(1, 1, 4, device=device)
    gates[0, 0, gate] = value
    h0, c0, weight_hh = (
        torch.zeros(1, 1, device=device),
        torch.ones(1, 1, device=device),
        torch.zeros(4, 1, device=device),
    )
    stepwise.recurrence_forward(gates, h0, c0, weight_hh, None, False, True)
    end = (math.tanh if gate == 2 else lambda x: 1 / (1 + math.exp(-min(max(x, -700), 700))))(value)
    expected = [0.0 if unit == 2 else 0.5 for unit in range(4)]
    expected[gate] = end
    torch.testing.assert_close(gates.flatten().cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_between_their_ends(dtype, device):
    """Within two units in the last place of their largest value, 1."""
    x = torch.linspace(-12, 12, 501, dtype=dtype, device=device)
    gates = x.repeat(4)[None, None]
    state, weight_hh = (
        torch.zeros(1, 501, dtype=dtype, device=device),
        torch.zeros(2004, 501, dtype=dtype, device=device),
    )
    stepwise.recurrence_forward(gates, state, state, weight_hh, None, False, True)
    exact = x.double()
    exact = torch.stack((exact.sigmoid(), exact.sigmoid(), exact.tanh(), exact.sigmoid()))
    assert (gates.double().view(4, 501) - exact).abs().max() <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("proj_size", [None, 2], ids=["plain", "projection"])
def test_no_rows(proj_size, device):
    sizes = (2, 0, 5, proj_size)
    inputs = random_inputs(sizes, torch.float32, device, 0)
    output, c = stepwise.recurrence_forward(*inputs, False, True)
    assert output.shape == (2, 0, proj_size or 5)
    assert c.shape == (3, 0, 5)
    d_results = random_gradients(sizes, torch.float32, device, 0)
    gradients = stepwise.recurrence_backward(*d_results, inputs[0], c, *inputs[3:], None, False)
    for actual, expected in zip(
        gradients, reference.recurrence_backward(*d_results, inputs[0], c, *inputs[3:], None, False), strict=True
    ):
        assert (actual is None) == (expected is None)
        assert actual is None or actual.shape == expected.shape


def test_every_size_has_a_configuration():
    """A block is a power of two that covers the units, with a warp or more to each 128 of its elements."""
    for hidden_size in range(1, 2050):
        config = pointwise_config(hidden_size)
        assert config.block & (config.block - 1) == 0
        assert 32 * config.num_warps <= config.block <= 128 * config.num_warps


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

    def test_forward(self, zeros, places, device):
        pre, _, c0, _, _ = random_inputs((1, self.ROWS, self.HIDDEN, None), torch.float16, device, 0)

        def run(zeros, steps, step):
            gates, h = zeros(steps, 4 * self.HIDDEN, torch.float16), zeros(steps, self.HIDDEN, torch.float16)
            c = zeros(steps, self.HIDDEN, torch.float32)
            gates[step], c[step - 1] = pre[0], c0
            stepwise.cell_forward_kernel[(self.ROWS, 1)](
                gates, c, h, step, step - 1, step, step, self.ROWS, self.HIDDEN, SAVE=True, BLOCK=64
            )
            return gates, c, h

        for far, near in zip(run(zeros, places, places - 2), run(self.small_zeros(device), 3, 1), strict=True):
            self.assert_same_at(far, near, places - 2)

    def test_backward(self, zeros, places, device):
        sizes = (1, self.ROWS, self.HIDDEN, None)
        gates_there, c_there = saved_by_forward(random_inputs(sizes, torch.float16, device, 0), False)
        d_output_there, d_h, d_c = random_gradients(sizes, torch.float16, device, 0)

        def run(zeros, steps, step):
            gates, d_gates = (zeros(steps, 4 * self.HIDDEN, torch.float16) for _ in range(2))
            d_output, hidden = (zeros(steps, self.HIDDEN, torch.float16) for _ in range(2))
            c, d_c_before = zeros(steps, self.HIDDEN, torch.float32), d_c.float()
            gates[step], d_output[step], c[step - 1 : step + 1] = gates_there[0], d_output_there[0], c_there
            stepwise.cell_backward_kernel[(self.ROWS, 1)](
                *(d_output, d_h, d_c_before, d_h, d_h, gates, c, d_gates, hidden, step, step - 1, step),
                *(self.ROWS, self.HIDDEN),
                HAS_D_OUTPUT=True, HAS_LENGTHS=False, HAS_PROJECTION=True, BLOCK=64,
            )  # fmt: skip
            return d_gates, hidden, d_c_before

        *far, far_d_c = run(zeros, places, places - 2)
        *near, near_d_c = run(self.small_zeros(device), 3, 1)
        for far_part, near_part in zip(far, near, strict=True):
            self.assert_same_at(far_part, near_part, places - 2)
        assert torch.equal(far_d_c, near_d_c)

    def small_zeros(self, device):
        return lambda steps, width, dtype: torch.zeros(steps, self.ROWS, width, dtype=dtype, device=device)
