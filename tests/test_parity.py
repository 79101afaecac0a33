"""Our LSTM against torch.nn.LSTM over the whole grid of options: every number forward, every gradient backward."""

import itertools

import pytest
import torch
from runs import randn, run, twin
from tolerance import assert_as_accurate, assert_same_float64

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]

SMALL = (3, 5, 2)  # input features, units, projected features
MIDDLE = (7, 33, 16)  # enough numbers that torch's error in them is typical
SORTED, UNSORTED = [4, 3, 1], [2, 4, 1]
KINDS = ["batched", "unbatched", "sorted", "unsorted", "lengths"]
GRID = list(itertools.product(KINDS, [True, False], *[[False, True]] * 5))
NAMES = "kind, has_hx, two_layers, no_bias, batch_first, bidirectional, projection"
IDS = [f"{k}-" + "".join(str(int(flag)) for flag in flags) for k, *flags in GRID]


def build(
    two_layers, no_bias, batch_first, bidirectional, projection, device, dtype=torch.float64, sizes=SMALL, dropout=0.0
):
    torch.manual_seed(0)
    input_size, hidden_size, proj_size = sizes
    return torch.nn.LSTM(
        *(input_size, hidden_size, 2 if two_layers else 1, not no_bias, batch_first, dropout, bidirectional),
        proj_size=proj_size if projection else 0, device=device, dtype=dtype,
    )  # fmt: skip


def make_input(module, kind, has_hx, steps=4, rows=3):
    """input and hx, leaves that want gradients."""
    weight = next(module.parameters())
    options = {"dtype": weight.dtype, "device": weight.device, "requires_grad": True}
    count = module.num_layers * (2 if module.bidirectional else 1)
    shape, rows = ((steps,), ()) if kind == "unbatched" else ((steps, rows), (rows,))
    shape = shape[::-1] if module.batch_first else shape
    h_0 = randn(count, *rows, module.proj_size or module.hidden_size, seed=2, **options)
    c_0 = randn(count, *rows, module.hidden_size, seed=3, **options)
    return randn(*shape, module.input_size, seed=1, **options), (h_0, c_0) if has_hx else None


def run_both(module, backend, kind, has_hx, **sizes):
    """What torch's module gives, and what ours does."""
    input, hx = make_input(module, kind, has_hx, **sizes)
    lengths = {"sorted": SORTED, "unsorted": UNSORTED, "lengths": UNSORTED}.get(kind)
    pack = kind if kind in ("sorted", "unsorted") else None
    expected = run(module, input, hx, lengths=lengths, pack="unsorted" if kind == "lengths" else pack)
    return expected, run(twin(module, backend), input, hx, lengths=lengths, pack=pack)


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@pytest.mark.parametrize(NAMES, GRID, ids=IDS)
def test_reference(kind, has_hx, two_layers, no_bias, batch_first, bidirectional, projection, device):
    module = build(two_layers, no_bias, batch_first, bidirectional, projection, device)
    expected, actual = run_both(module, "reference", kind, has_hx)
    assert_same(actual, expected)


# every eleventh, so that each value of each option meets most of the others
@pytest.mark.parametrize(NAMES, GRID[::11], ids=IDS[::11])
def test_stepwise(kind, has_hx, two_layers, no_bias, batch_first, bidirectional, projection, device):
    module = build(two_layers, no_bias, batch_first, bidirectional, projection, device)
    expected, actual = run_both(module, "stepwise", kind, has_hx)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", ["batched", "sorted"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_torch_backend(projection, kind, device):
    """The same bits: it is torch's own."""
    expected, actual = run_both(build(True, False, False, True, projection, device), "torch", kind, True)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (1, 3), (2, 1), (7, 2)])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
def test_odd_sizes(projection, steps, rows, backend, device):
    module = build(False, False, False, True, projection, device)
    expected, actual = run_both(module, backend, "batched", True, steps=steps, rows=rows)
    assert_same(actual, expected)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize(("two_layers", "batch_first", "bidirectional"), [(False, False, False), (True, True, True)])
def test_no_rows(two_layers, batch_first, bidirectional, backend, device):
    """N = 0: empty results, and gradients of the weights that are zero."""
    module = build(two_layers, False, batch_first, bidirectional, False, device)
    for has_hx in (False, True):
        expected, actual = run_both(module, backend, "batched", has_hx, rows=0)
        assert_same(actual, expected)
        assert not actual["d_weight_hh_l0"].any()
    expected = module(make_input(module, "batched", False, rows=0)[0])
    with torch.no_grad():
        actual = twin(module, backend)(make_input(module, "batched", False, rows=0)[0])
    assert actual[0].shape == expected[0].shape
    assert [state.shape for state in actual[1]] == [state.shape for state in expected[1]]


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("kind", ["batched", "unsorted"])
@pytest.mark.parametrize("projection", [False, True], ids=["plain", "projection"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision(dtype, projection, kind, backend, device):
    module = build(True, False, False, True, projection, device, dtype, MIDDLE)
    same_dtype, actual = run_both(module, backend, kind, True)
    input, hx = make_input(module, kind, True)
    exact_input, exact_hx = input.detach().double().requires_grad_(), [s.detach().double().requires_grad_() for s in hx]
    lengths = UNSORTED if kind == "unsorted" else None
    exact = run(module.double(), exact_input, exact_hx, lengths=lengths, pack=kind if lengths else None)
    for name in exact:
        assert_as_accurate(actual[name], same_dtype[name], exact[name])


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("kind", ["batched", "unsorted"])
@pytest.mark.parametrize("dropout", [0.3, 1.0])
def test_dropout_between_layers(dropout, kind, backend, device):
    """One seed, one mask, as torch's own LSTM draws it on a CPU, on the packed rows if packed; none in eval."""
    module = build(True, False, False, True, False, device, dropout=dropout)
    options = {"lengths": UNSORTED, "pack": kind} if kind == "unsorted" else {}

    def seeded(module, seed=5):
        torch.manual_seed(seed)
        return run(module, *make_input(module, kind, True), **options)

    # cuDNN draws its own: on a CUDA device the reference stands for torch
    expected, actual = seeded(module if device == "cpu" else twin(module, "reference")), seeded(twin(module, backend))
    assert_same(actual, expected)
    if dropout < 1:
        assert not torch.equal(actual["output"], seeded(twin(module, backend), seed=6)["output"])
    module.eval()
    in_eval = seeded(twin(module, backend))
    assert_same(in_eval, seeded(module))
    assert not torch.equal(actual["output"], in_eval["output"])


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("kind", ["batched", "unsorted"])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(input_dtype, kind, backend, device):
    """Results in autocast's dtype, as torch's own (but for its packed loop on a CPU, which promotes them to float32),
    gradients in the dtype of what they belong to."""
    module = build(True, False, False, True, False, device, torch.float32, MIDDLE)
    input, hx = make_input(module, kind, True)
    input = input.detach().to(input_dtype).requires_grad_()
    options = {"lengths": UNSORTED, "pack": kind} if kind == "unsorted" else {}
    with torch.autocast(device, dtype=torch.bfloat16):
        same_dtype = run(module, input, hx, **options)
        actual = run(twin(module, backend), input, hx, **options)
    input, hx = input.detach().double().requires_grad_(), [state.detach().double().requires_grad_() for state in hx]
    exact = run(module.double(), input, hx, **options)
    for name, value in exact.items():
        promoted = device == "cpu" and kind == "unsorted" and name in ("output", "h_n", "c_n")
        assert actual[name].dtype == torch.bfloat16 if promoted else same_dtype[name].dtype
        # all of it was computed in bfloat16, whatever dtype holds it now
        assert_as_accurate(actual[name].bfloat16(), same_dtype[name].bfloat16(), value)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
def test_autocast_leaves_float64_alone(backend, device):
    module = build(False, False, False, False, False, device)
    expected = run(module, *make_input(module, "batched", True))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same(run(twin(module, backend), *make_input(module, "batched", True)), expected)


@pytest.mark.parametrize("backend", ["reference", "stepwise"])
@pytest.mark.parametrize("layout", ["sliced", "transposed", "expanded", "flipped_state", "non_contiguous_weights"])
def test_memory_layouts(layout, backend, device):
    """What is not contiguous in memory counts as if it were."""
    module = build(False, False, False, True, False, device)
    input, (h_0, c_0) = (value for value in make_input(module, "batched", True))
    if layout == "sliced":
        input = torch.stack((input, input.neg()), dim=3).detach()[..., 0].requires_grad_()
    elif layout == "transposed":
        input = input.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    elif layout == "expanded":
        input = input.detach()[:, :1].expand(-1, 3, -1).requires_grad_()
    elif layout == "flipped_state":
        h_0, c_0 = (s.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for s in (h_0, c_0))
    else:
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.detach().t().contiguous().t()
    assert not all(t.is_contiguous() for t in (input, h_0, c_0, *module.parameters()))
    assert_same(run(twin(module, backend), input, (h_0, c_0)), run(module, input, (h_0, c_0)))
