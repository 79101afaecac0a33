"""The stepwise backend on a GPU: real sizes, the host that never waits, graphs, streams, memory.

Of the kernel tests that run interpreted elsewhere, those whose arithmetic or flags are the hardware's run here too.
"""

import contextlib

import pytest
import torch
from runs import randn, run, twin
from test_stepwise_kernels import (  # noqa: F401  collected in this file too, under its marker
    TestFarOffsets,
    test_activations_at_their_ends,
    test_activations_between_their_ends,
    test_backward_of_a_subset,
    test_no_rows,
    test_saturated,
)
from tolerance import assert_as_accurate
from torch.nn.utils.rnn import pack_padded_sequence

import fused_lstm
from fused_lstm.kernels import stepwise

pytestmark = pytest.mark.gpu

# steps, rows, input features, units
SIZES = [(63, 16, 64, 512), (20, 3, 10, 100), (9, 65, 33, 500), (33, 64, 128, 1024), (500, 1, 8, 128)]
SIZES += [(7, 40, 5, 17), (2, 5, 3, 1030)]
OPTIONS = {"plain": {}, "both": {"num_layers": 2, "bidirectional": True}, "projection": {"proj_size": 9}}


def build(input_size, hidden_size, dtype, **options) -> torch.nn.LSTM:
    torch.manual_seed(0)
    return torch.nn.LSTM(input_size, hidden_size, device="cuda", dtype=dtype, **options)


def make_input(module, steps, rows):
    weight = module.weight_ih_l0
    options = {"device": "cuda", "dtype": weight.dtype, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    h_0 = randn(count, rows, module.proj_size or module.hidden_size, seed=2, **options)
    c_0 = randn(count, rows, module.hidden_size, seed=3, **options)
    return randn(steps, rows, module.input_size, seed=1, **options), (h_0, c_0)


def exact_results(module, input, hx, **options):
    """What torch's module gives in float64, of the same rounded numbers."""
    exact = torch.nn.LSTM(
        *(module.input_size, module.hidden_size, module.num_layers),
        bidirectional=module.bidirectional, proj_size=module.proj_size, device="cuda", dtype=torch.float64,
    )  # fmt: skip
    exact.load_state_dict(module.state_dict())
    hx = [state.detach().double().requires_grad_() for state in hx]
    return run(exact, input.detach().double().requires_grad_(), hx, **options)


@contextlib.contextmanager
def tf32(allowed):
    """torch's own switch for an LSTM."""
    found = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = found


def assert_all_as_accurate(actual, same_dtype, exact) -> None:
    assert actual.keys() == same_dtype.keys() == exact.keys()
    for name, value in exact.items():
        try:
            assert_as_accurate(actual[name], same_dtype[name], value)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


DTYPES = {
    "bfloat16": (torch.bfloat16, True),
    "float16": (torch.float16, True),
    "float32-tf32": (torch.float32, True),
    "float32-ieee": (torch.float32, False),
}


@pytest.mark.parametrize(("steps", "rows", "input_size", "hidden_size"), SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "allow_tf32"), DTYPES.values(), ids=DTYPES)
def test_as_accurate_as_cudnn(dtype, allow_tf32, options, steps, rows, input_size, hidden_size):
    module = build(input_size, hidden_size, dtype, **options)
    input, hx = make_input(module, steps, rows)
    with tf32(allow_tf32):
        same_dtype, actual = run(module, input, hx), run(twin(module, "stepwise"), input, hx)
    assert_all_as_accurate(actual, same_dtype, exact_results(module, input, hx))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lengths_as_accurate_as_cudnn_packed(dtype):
    module = build(64, 256, dtype, bidirectional=True)
    input, hx = make_input(module, 40, 16)
    lengths = [1 + (7 * row) % 40 for row in range(16)]
    same_dtype = run(module, input, hx, lengths=lengths, pack="unsorted")
    exact = exact_results(module, input, hx, lengths=lengths, pack="unsorted")
    ours = twin(module, "stepwise")
    assert_all_as_accurate(run(ours, input, hx, lengths=lengths), same_dtype, exact)
    assert_all_as_accurate(run(ours, input, hx, lengths=lengths, pack="unsorted"), same_dtype, exact)


@pytest.mark.parametrize(("steps", "rows", "input_size", "hidden_size"), SIZES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_float64(options, steps, rows, input_size, hidden_size):
    module = build(input_size, hidden_size, torch.float64, **options)
    input, hx = make_input(module, steps, rows)
    expected, actual = run(module, input, hx), run(twin(module, "stepwise"), input, hx)
    for name, value in expected.items():
        error = (actual[name] - value).abs().max()
        assert error <= 1e-12 * max(1.0, value.abs().max()), f"{name}: {error:.3e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_runs_give_the_same_bits(dtype):
    module = twin(build(64, 512, dtype, bidirectional=True), "stepwise")
    input, hx = make_input(module, 40, 16)
    first = run(module, input, hx)
    for _ in range(20):
        again = run(module, input, hx)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def make_step(module, input, hx, **options):
    """A function of nothing that runs forward and backward on these tensors: [results and gradients]."""
    leaves = [input, *hx, *module.parameters()]

    def step():
        output, (h_n, c_n) = module(input, hx, **options)
        loss = (output.float() ** 2).sum() + h_n.float().sum() + (c_n.float() ** 2).sum()
        return [output, h_n, c_n, *torch.autograd.grad(loss, leaves)]

    return step


CAPTURED = {
    "plain": ({}, None),
    "both": ({"num_layers": 2, "bidirectional": True}, None),
    "projection": ({"proj_size": 48}, None),
    "lengths": ({"bidirectional": True}, [40, 3, 17, 1]),
}


@pytest.mark.parametrize(("options", "lengths"), CAPTURED.values(), ids=CAPTURED)
def test_cuda_graph(options, lengths):
    """Captured once by the caller, replayed on other numbers: what runs eagerly on them, bit for bit."""
    module = twin(build(64, 256, torch.bfloat16, **options), "stepwise")
    input, hx = make_input(module, 40, 4)
    given = {} if lengths is None else {"lengths": torch.tensor(lengths, device="cuda")}
    step = make_step(module, input, hx, **given)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        input.copy_(randn(*input.shape, seed=11, dtype=input.dtype, device="cuda"))
        for parameter in module.parameters():
            parameter.mul_(0.5)
    for tensor in captured:
        tensor.detach().fill_(float("nan"))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("kind", ["padded", "lengths", "lengths_on_the_host", "packed", "unsorted"])
def test_host_never_waits(kind):
    """No synchronisation in a training step, once the kernels are compiled."""
    module = twin(build(64, 256, torch.bfloat16, num_layers=2, bidirectional=True), "stepwise")
    input, hx = make_input(module, 40, 4)
    lengths, options = [40, 17, 3, 1], {}
    if kind.startswith("lengths"):
        options["lengths"] = torch.tensor(lengths, device="cpu" if kind.endswith("host") else "cuda")
    elif kind == "packed":
        input = pack_padded_sequence(input.detach(), torch.tensor(lengths))
    elif kind == "unsorted":
        input = pack_padded_sequence(input.detach(), torch.tensor(lengths[::-1]), enforce_sorted=False)
    parameters = list(module.parameters())

    def step():
        output, (h_n, c_n) = module(input, hx, **options)
        output = output if isinstance(output, torch.Tensor) else output.data
        return torch.autograd.grad(output.float().sum() + h_n.float().sum() + c_n.float().sum(), parameters)

    expected = step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_another_stream():
    """The kernels go where torch's current stream is: nothing is read before it is written there."""
    module = twin(build(64, 512, torch.bfloat16), "stepwise")
    input, hx = make_input(module, 40, 16)
    expected = run(module, input, hx)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # kernels on the default stream would overtake this one
        late = input.detach() * 1
        actual = run(module, late.requires_grad_(), hx)
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(actual[name], value)


def test_two_streams_at_once():
    modules = [twin(build(64, size, torch.bfloat16), "stepwise") for size in (512, 256)]
    steps = [make_step(module, *make_input(module, 40, 16)) for module in modules]
    expected = [step() for step in steps]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in steps]
    for _ in range(10):
        found = []
        for stream, step in zip(streams, steps, strict=True):
            with torch.cuda.stream(stream):
                found.append(step())
        torch.cuda.synchronize()
        for actual, values in zip(found, expected, strict=True):
            assert all(torch.equal(a, e) for a, e in zip(actual, values, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_device():
    """On the tensors' device, which need not be the current one."""
    module = build(64, 256, torch.float32)
    expected = run(twin(module, "stepwise"), *make_input(module, 20, 4))
    there = twin(module, "stepwise").to("cuda:1")
    input, hx = make_input(module, 20, 4)
    input, *hx = (tensor.detach().to("cuda:1").requires_grad_() for tensor in (input, *hx))
    assert torch.cuda.current_device() == 0
    for name, value in run(there, input, hx).items():
        assert value.device == torch.device("cuda:1")
        assert torch.equal(value.cpu(), expected[name].cpu())


class TestHugeTensors:
    """T * N * 4H past 2**31, for real: the last steps are those of a short run from the same state."""

    STEPS, ROWS, HIDDEN, LAST = 2049, 64, 4096, 4

    @pytest.fixture
    def layer(self):
        """(input, state, weights): in bfloat16, scaled so that nothing saturates."""
        if torch.cuda.mem_get_info()[0] < 24e9:
            pytest.skip("needs 24 GB of GPU memory")
        assert self.STEPS * self.ROWS * 4 * self.HIDDEN > 2**31
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*shape, scale=1.0):
            values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
            return values.mul_(scale).requires_grad_()

        state = normal(self.ROWS, self.HIDDEN), normal(self.ROWS, self.HIDDEN)
        weights = normal(4 * self.HIDDEN, 16, scale=0.25), normal(4 * self.HIDDEN, self.HIDDEN, scale=1 / 128)
        return normal(self.STEPS, self.ROWS, 16), state, weights

    def test_forward(self, layer):
        input, state, weights = layer
        with torch.no_grad():
            output, _ = fused_lstm.lstm_layer(input, state, *weights, backend="stepwise")
            _, middle = fused_lstm.lstm_layer(input[: -self.LAST], state, *weights, backend="stepwise")
            last, _ = fused_lstm.lstm_layer(input[-self.LAST :], middle, *weights, backend="stepwise")
        assert last.float().std() > 0.1
        torch.testing.assert_close(output[-self.LAST :], last, rtol=0, atol=2**-5)

    def test_backward(self, layer):
        """Walked in reverse, the last steps come first and know nothing of the others; a loss on them alone has the
        gradients of the short run."""
        input, state, weights = layer

        def gradients(input):
            leaf = input.detach().requires_grad_()
            output, _ = fused_lstm.lstm_layer(leaf, state, *weights, reverse=True, backend="stepwise")
            loss = output[-self.LAST :].float().square().sum()
            return output[-self.LAST :].detach(), torch.autograd.grad(loss, [leaf, *state, *weights])

        output, (d_input, *d_others) = gradients(input)
        assert not d_input[: -self.LAST].any()
        expected, (d_expected, *d_others_expected) = gradients(input[-self.LAST :])
        torch.testing.assert_close(output, expected, rtol=0, atol=2**-5)
        for actual, value in zip((d_input[-self.LAST :], *d_others), (d_expected, *d_others_expected), strict=True):
            assert value.any()
            assert (actual.float() - value.float()).abs().max() <= 2**-5 * value.float().abs().max()


@pytest.mark.filterwarnings("ignore")  # dynamo and inductor warn about themselves, in each version otherwise
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_compiled(options, compiler):
    """torch.compile without a graph break: the same bits, since all arithmetic is in operators opaque to it."""
    torch._dynamo.reset()
    module = twin(build(64, 256, torch.bfloat16, **options), "stepwise")
    input, hx = make_input(module, 20, 8)
    compiled = torch.compile(module, backend=compiler, fullgraph=True)
    leaves = [input, *hx, *module.parameters()]
    found = []
    for candidate in (module, compiled):
        output, (h_n, c_n) = candidate(input, hx)
        d_results = [randn(*r.shape, seed=i, dtype=r.dtype, device="cuda") for i, r in enumerate((output, h_n, c_n))]
        found.append([output, h_n, c_n, *torch.autograd.grad((output, h_n, c_n), leaves, d_results)])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert torch.equal(actual, expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pack", [None, "unsorted"])
def test_autocast(pack, dtype):
    """float32 weights: torch's dtypes, and its accuracy."""
    module = build(64, 256, torch.float32, num_layers=2, bidirectional=True)
    input, hx = make_input(module, 20, 4)
    options = {} if pack is None else {"lengths": [3, 20, 17, 1], "pack": pack}
    with torch.autocast("cuda", dtype=dtype):
        same_dtype = run(module, input, hx, **options)
        actual = run(twin(module, "stepwise"), input, hx, **options)
    for name, value in exact_results(module, input, hx, **options).items():
        assert actual[name].dtype == same_dtype[name].dtype
        # all of it was computed in the lower dtype, whatever holds it now
        assert_as_accurate(actual[name].to(dtype), same_dtype[name].to(dtype), value)


def test_cell():
    """A loop of LSTMCell, with gradients, against torch's."""
    torch.manual_seed(0)
    cell = torch.nn.LSTMCell(64, 256, device="cuda", dtype=torch.float64)
    inputs = randn(5, 16, 64, device="cuda")
    found = []
    for candidate in (cell, twin(cell, "stepwise")):
        state = None
        for input in inputs:
            state = candidate(input, state)
        found.append([*state, *torch.autograd.grad((state[0] ** 2).sum(), list(candidate.parameters()))])
    for actual, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_converted_model_trains_alike():
    """A CUDA model, converted in the middle of training; flattened weights and all."""
    losses = []
    for converted in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Embedding(50, 32), torch.nn.LSTM(32, 64, num_layers=2)).to("cuda")
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses.append([])
        for step in range(20):
            if converted and step == 5:
                fused_lstm.convert(model, backend="stepwise")
                model[1].flatten_parameters()
            words = torch.randint(50, (12, 8), generator=torch.Generator().manual_seed(step)).to("cuda")
            with tf32(False):
                loss = (model(words)[0] - 0.5).square().mean()
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("options", [{}, {"proj_size": 48}, {"bidirectional": True}], ids=str)
def test_allocations_do_not_grow_with_the_steps(options):
    """The time loop allocates nothing: as many allocations in a step of training, however long the sequence."""
    module = twin(build(64, 256, torch.bfloat16, **options), "stepwise")

    def allocations(steps):
        step = make_step(module, *make_input(module, steps, 4))
        step()
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        step()
        return torch.cuda.memory_stats()["allocation.all.allocated"] - before

    assert allocations(64) == allocations(128) > 0


def test_other_lengths_and_batches_compile_nothing():
    """One compiled kernel serves every number of steps and rows."""
    module = twin(build(64, 256, torch.bfloat16), "stepwise")

    def compiled():
        kernels = (stepwise.cell_forward_kernel, stepwise.cell_backward_kernel)
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    run(module, *make_input(module, 20, 4))
    before = compiled()
    assert before > 0
    for steps, rows in ((1, 4), (21, 5), (64, 1), (3, 128)):
        run(module, *make_input(module, steps, rows))
    assert compiled() == before
