"""torch.compile traces our modules whole: two opaque nodes a layer and direction, the same numbers."""

import copy
import pickle
import shutil

import pytest
import torch
from functorch.compile import make_boxed_func
from runs import randn, run, twin
from tolerance import assert_same_float64
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._dynamo.variables import builder

import fused_lstm
from fused_lstm._compile import let_dynamo_trace

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    # dynamo's own, when it traces any autograd.Function
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]

INPUT, HIDDEN = 3, 5
BACKENDS = pytest.mark.parametrize("backend", ["reference", "stepwise"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    assert torch._dynamo.config.allow_rnn is False
    torch._dynamo.reset()


def build(device, backend="auto", **options) -> fused_lstm.LSTM:
    torch.manual_seed(0)
    return twin(torch.nn.LSTM(INPUT, HIDDEN, device=device, dtype=torch.float64, **options), backend)


def make_input(module, steps=4, rows=2):
    options = {"device": module.weight_ih_l0.device, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    h_0 = randn(count, rows, module.proj_size or HIDDEN, seed=2, **options)
    return randn(steps, rows, INPUT, seed=1, **options), (h_0, randn(count, rows, HIDDEN, seed=3, **options))


class Compiled(torch.nn.Module):
    """A module, its forward compiled, with the attributes that `run` looks at."""

    def __init__(self, module, compiler):
        super().__init__()
        self.named_parameters = module.named_parameters
        self.batch_first = module.batch_first
        self.compiled = torch.compile(module, backend=compiler, fullgraph=True)

    def forward(self, *args, **kwargs):
        return self.compiled(*args, **kwargs)


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@BACKENDS
@pytest.mark.parametrize("has_hx", [True, False], ids=["hx", "no_hx"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"proj_size": 2, "bias": False}],
    ids=str,
)
def test_equals_eager(options, has_hx, backend, device):
    module = build(device, backend, **options)
    input, hx = make_input(module)
    hx = hx if has_hx and not module.batch_first else None
    expected = run(module, input, hx)
    assert_same(run(Compiled(module, "aot_eager"), input, hx), expected)


def test_default_backend(device):
    """auto takes one that can be traced."""
    module = build(device, bidirectional=True)
    assert_same(run(Compiled(module, "aot_eager"), *make_input(module)), run(module, *make_input(module)))


@BACKENDS
def test_lengths(backend, device):
    module = build(device, backend, bidirectional=True)
    expected = run(module, *make_input(module), lengths=[2, 4])
    assert_same(run(Compiled(module, "aot_eager"), *make_input(module), lengths=[2, 4]), expected)


def test_dropout(device):
    """In eval and at rate zero the same numbers; in training a mask."""
    module = build(device, "reference", num_layers=2, dropout=0.5)
    input, hx = make_input(module)
    compiled = Compiled(module, "aot_eager")
    torch.manual_seed(1)
    dropped = run(compiled, input, hx)["output"]
    module.eval()
    expected = run(module, input, hx)
    assert_same(run(compiled, input, hx), expected)
    assert not torch.equal(dropped, expected["output"])


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
def test_inductor(device):
    """Inside a larger model, through the default compiler."""
    torch.manual_seed(0)
    lstm = build(device, "reference", bidirectional=True)
    model = torch.nn.Sequential(torch.nn.Linear(2, INPUT), lstm).to(device, torch.float64)
    input = randn(4, 2, 2, device=device)
    found = []
    for candidate in (model, torch.compile(model, fullgraph=True)):
        output, (_, c_n) = candidate(input)
        found.append([output, *torch.autograd.grad((output**2).sum() + c_n.sum(), list(model.parameters()))])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_same_float64(actual.detach(), expected.detach())


@BACKENDS
@pytest.mark.parametrize("rows", [(), (2,)], ids=str)
def test_cell(rows, backend, device):
    torch.manual_seed(0)
    cell = fused_lstm.LSTMCell(INPUT, HIDDEN, device=device, dtype=torch.float64, backend=backend)
    input, h, c = (randn(*rows, s, seed=s + i, device=device) for i, s in enumerate((INPUT, HIDDEN, HIDDEN)))
    found = []
    for candidate in (cell, torch.compile(cell, backend="aot_eager", fullgraph=True)):
        results = candidate(input, (h, c))
        found.append([*results, *torch.autograd.grad((results[0] * results[1]).sum(), list(cell.parameters()))])
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_same_float64(actual.detach(), expected.detach())


def test_functions(device):
    module = build(device, "reference")
    input, h_0, c_0 = (randn(*shape, device=device) for shape in ((4, 2, INPUT), (2, HIDDEN), (2, HIDDEN)))
    weights = list(module.parameters())

    def both(input, h, c):
        output, state = fused_lstm.lstm_layer(input, (h, c), *weights, reverse=True, backend="reference")
        return output, *fused_lstm.lstm_cell(input[0], state, *weights, backend="reference")

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(input, h_0, c_0), both(input, h_0, c_0), strict=True):
        assert_same_float64(actual.detach(), expected.detach())


def test_without_gradients(device):
    module = build(device, "reference", num_layers=2)
    input, hx = make_input(module)
    compiled = Compiled(module, "aot_eager")
    with torch.no_grad():
        actual, expected = compiled(input, hx), module(input, hx)
    assert_same_float64(actual[0], expected[0])
    assert not actual[0].requires_grad


def graphs_of(module, steps):
    """The operations of the forward and of the backward graph."""
    found = []

    def record(graph, _):
        found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    compiled = torch.compile(module, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    input = randn(steps, 2, INPUT, device=module.weight_ih_l0.device)
    output, _ = compiled(input)
    output.sum().backward()
    return found


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_graph_does_not_grow_with_the_steps(options, device):
    """One node for each layer in each graph, however many steps."""
    module = build(device, "reference", **options)
    forward, backward = graphs_of(module, 4)
    assert graphs_of(module, 13) == [forward, backward]
    assert forward.count("fused_lstm.layer_forward.default") == module.num_layers
    assert backward.count("fused_lstm.layer_backward.default") == module.num_layers


@pytest.mark.parametrize("dynamic", [None, True])
def test_lengths_of_time_do_not_recompile(dynamic, device):
    """One graph for the first number of steps, at most one more for all others."""
    module = build(device, "reference", bidirectional=True)
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    for steps in (4, 7, 5, 12, 9):
        input = randn(steps, 2, INPUT, device=device)
        assert_same_float64(compiled(input)[0].detach(), module(input)[0].detach())
    assert counter.frame_count <= (1 if dynamic else 2)


def test_other_modules_compile_as_before(device):
    """torch's own LSTM still breaks the graph: the switch that lets ours through is off for it."""
    build(device, "reference")
    theirs = torch.nn.LSTM(INPUT, HIDDEN, device=device)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(theirs, backend="eager", fullgraph=True)(torch.zeros(4, 2, INPUT, device=device))
    model = torch.nn.Sequential(theirs)
    assert torch.compile(model, backend="eager")(torch.zeros(4, 2, INPUT, device=device))[0].shape == (4, 2, HIDDEN)


WAYS = {
    "made": lambda module: fused_lstm.LSTM(INPUT, HIDDEN, device=module.weight_ih_l0.device, backend="reference"),
    "loaded": lambda module: pickle.loads(pickle.dumps(module)),
    "copied": copy.deepcopy,
    "converted": lambda module: fused_lstm.convert(
        torch.nn.LSTM(INPUT, HIDDEN, device=module.weight_ih_l0.device), backend="reference"
    ),
}


@pytest.mark.parametrize("come_by", WAYS.values(), ids=WAYS)
def test_the_first_module_of_a_process(come_by, monkeypatch, device):
    """However one comes by it, dynamo lets it through."""
    module = build(device, "reference")
    let_through = builder.VariableBuilder.wrap_module
    monkeypatch.setattr(builder.VariableBuilder, "wrap_module", let_through.__wrapped__)
    let_dynamo_trace.cache_clear()
    first = come_by(module)
    x = torch.zeros(4, 2, INPUT, dtype=first.weight_ih_l0.dtype, device=device)
    assert torch.equal(torch.compile(first, backend="eager", fullgraph=True)(x)[0], first(x)[0])
