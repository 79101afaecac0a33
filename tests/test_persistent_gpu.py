"""The persistent kernels on a GPU: real sizes, many launches, several at once."""

import pytest
import torch
from tolerance import assert_as_accurate

import fused_lstm

pytestmark = pytest.mark.gpu

STEPS = 63
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SIZES = [(16, 40), (16, 100), (3, 128), (1, 256), (16, 512), (64, 512), (128, 512), (65, 500), (3, 650), (64, 768)]
SIZES += [(1, 1024), (16, 1024), (64, 1024), (128, 1024), (16, 1150), (16, 1536)]


def build(batch_size, hidden_size, dtype, **options):
    """(module, input, hx) on the persistent backend, or None where the grid does not fit this device, which it says."""
    reason = None
    try:
        fused_lstm.select_backend(
            "persistent", device="cuda", dtype=dtype, hidden_size=hidden_size, batch_size=batch_size
        )
    except ValueError as error:
        reason = str(error)
    if reason is not None:
        assert "more than" in reason or "does not fit" in reason
        return None
    torch.manual_seed(0)
    module = fused_lstm.LSTM(64, hidden_size, device="cuda", dtype=dtype, backend="persistent", **options)
    states = 2 if module.bidirectional else 1
    input = torch.randn(STEPS, batch_size, 64, device="cuda", dtype=dtype)
    hx = tuple(torch.randn(states, batch_size, hidden_size, device="cuda", dtype=dtype) for _ in range(2))
    return module, input, hx


def train(module, input, hx):
    """output, h_n, c_n, then the gradients of input, hx and every parameter."""
    leaves = [tensor.detach().requires_grad_() for tensor in (input, *hx)]
    output, (h_n, c_n) = module(leaves[0], tuple(leaves[1:]))
    torch.manual_seed(1)
    loss = (output * torch.randn_like(output)).sum() + (h_n * torch.randn_like(h_n)).sum() + c_n.sum()
    return [output, h_n, c_n, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def twin(module, dtype):
    """torch.nn.LSTM of the same weights in another dtype."""
    theirs = torch.nn.LSTM(64, module.hidden_size, device="cuda", dtype=dtype, bidirectional=module.bidirectional)
    theirs.load_state_dict(module.state_dict())
    return theirs


@DTYPES
@pytest.mark.parametrize(("batch_size", "hidden_size"), SIZES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"recompute": True}], ids=["plain", "both", "again"])
def test_as_accurate_as_cudnn(batch_size, hidden_size, dtype, options):
    built = build(batch_size, hidden_size, dtype, **options)
    if built is None:
        return
    module, input, hx = built
    weights = [torch.randn(STEPS, batch_size, module.hidden_size * len(hx[0]), device="cuda", dtype=dtype)]
    weights += [torch.randn_like(state) for state in hx]

    def step(module, dtype):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (input, *hx)]
        output, states = module(leaves[0], tuple(leaves[1:]))
        loss = sum((r * w.to(dtype)).sum() for r, w in zip((output, *states), weights, strict=True))
        return [output, *states, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]

    results = (
        step(module, dtype),
        step(twin(module, dtype), dtype),
        step(twin(module, torch.float64), torch.float64),
    )
    for actual, same_dtype, exact in zip(*results, strict=True):
        assert_as_accurate(actual, same_dtype, exact)


@pytest.mark.parametrize(("batch_size", "hidden_size"), [(16, 512), (64, 1024)])
def test_a_thousand_launches_give_the_same_bits(batch_size, hidden_size):
    module, *inputs = build(batch_size, hidden_size, torch.bfloat16)
    first = train(module, *inputs)
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(500):  # two launches each
        for result, expected in zip(train(module, *inputs), first, strict=True):
            different += (result != expected).any()
    assert different.item() == 0


def test_two_streams_at_once():
    models = [build(16, 512, torch.bfloat16), build(16, 256, torch.bfloat16)]
    expected = [train(*model) for model in models]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in models]
    for _ in range(50):
        results = []
        for stream, model in zip(streams, models, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(train(*model))
        torch.cuda.synchronize()
        for result, same in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(result, same, strict=True))


def test_a_cuda_graph_replays_the_step():
    module, input, hx = build(16, 512, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = train(module, input, hx)
    torch.cuda.current_stream().wait_stream(stream)
    weights = [torch.randn_like(result) for result in expected[:3]]
    graph = torch.cuda.CUDAGraph()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (input, *hx)]

    def step():
        output, states = module(leaves[0], tuple(leaves[1:]))
        loss = sum((r * w).sum() for r, w in zip((output, *states), weights, strict=True))
        return [output, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]

    with torch.cuda.stream(stream):
        eager = step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    for result in captured:
        result.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


def test_nothing_waits_for_the_device():
    model = build(16, 512, torch.bfloat16)
    train(*model)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(*model)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_length_and_batch_compile_nothing_new():
    from fused_lstm.kernels.persistent_forward import forward_kernel

    module, input, hx = build(16, 512, torch.bfloat16)
    module(input, hx)
    compiled = sum(len(cache[0]) for cache in forward_kernel.device_caches.values())
    for steps in (2, 17, 62):
        module(input[:steps], hx)
    assert sum(len(cache[0]) for cache in forward_kernel.device_caches.values()) == compiled
