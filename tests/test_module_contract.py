"""LSTM as a module of torch's: made, printed, copied, saved, loaded and moved like torch.nn.LSTM."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from runs import randn, run, twin
from tolerance import assert_same_float64

import fused_lstm

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

NEW = {"layer_norm", "peephole", "forget_bias", "zoneout", "recurrent_dropout", "weight_dropout", "locked_dropout"}
NEW |= {"recompute", "backend"}
OPTIONS = [
    {},
    {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25},
    {"bidirectional": True, "proj_size": 2},
]
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS, ids=str)


def both(device, options, backend="auto"):
    """torch's module and ours, made alike, with the same weights."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(3, 5, **options, device=device, dtype=torch.float64)
    torch.manual_seed(0)
    ours = fused_lstm.LSTM(3, 5, **options, device=device, dtype=torch.float64, backend=backend)
    return theirs, ours


def results(module, **options):
    weight = next(module.parameters())
    input = randn(4, 2, 3, seed=1, dtype=weight.dtype, device=weight.device, requires_grad=True)
    torch.manual_seed(1)
    return run(module, input, **options)


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@EACH_OPTION
def test_initialisation(options, device):
    """One seed, one module."""
    theirs, ours = both(device, options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())


def test_positional_arguments(device):
    given = (3, 5, 2, False, True, 0.5, True, 2, device, torch.float64)
    theirs, ours = torch.nn.LSTM(*given), fused_lstm.LSTM(*given)
    assert vars(ours).keys() - vars(theirs).keys() == NEW
    for name in torch.nn.LSTM.__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert [(n, p.shape, p.dtype) for n, p in ours.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in theirs.named_parameters()
    ]


def test_is_one_of_torch(device):
    theirs, ours = both(device, {})
    assert isinstance(ours, torch.nn.LSTM)
    assert isinstance(ours, torch.nn.RNNBase)
    assert isinstance(fused_lstm.LSTMCell(3, 5), torch.nn.LSTMCell)
    assert ours.mode == theirs.mode == "LSTM"


@EACH_OPTION
def test_repr(options, device):
    theirs, ours = both(device, options)
    assert repr(ours) == repr(theirs)
    assert repr(both(device, options, "reference")[1]) == repr(theirs)[:-1] + ", backend='reference')"


@EACH_OPTION
def test_lists_of_weights(options, device):
    theirs, ours = both(device, options)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [[id(w) for w in layer] for layer in ours.all_weights] == [
        [id(getattr(ours, name)) for name in layer] for layer in theirs._all_weights
    ]
    assert [id(w) for w in ours._flat_weights] == [id(getattr(ours, name)) for name in ours._flat_weights_names]


def test_dropout_at_one_layer_warns():
    found = []
    for module_type in (torch.nn.LSTM, fused_lstm.LSTM):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            module_type(3, 5, dropout=0.5)
        found.append([(w.category, str(w.message)) for w in caught])
    assert found[0] == found[1]
    assert len(found[0]) == 1


@EACH_OPTION
@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_both_ways(assign, options, device):
    theirs, ours = both(device, options, "reference")
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1)
    expected = results(ours)
    theirs.load_state_dict(ours.state_dict(), assign=assign)
    assert_same(results(theirs), expected)
    _, fresh = both(device, options, "reference")
    fresh.load_state_dict(theirs.state_dict(), assign=assign)
    assert_same(results(fresh), expected)
    assert all((fresh.state_dict()[n].data_ptr() == v.data_ptr()) == assign for n, v in theirs.state_dict().items())


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved_and_loaded}


@EACH_OPTION
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copies(make_copy, options, device):
    """A copy is of the same type and gives the same numbers, from weights of its own."""
    _, ours = both(device, options, "reference")
    expected = results(ours)
    copied = make_copy(ours)
    assert type(copied) is fused_lstm.LSTM
    assert copied.backend == "reference"
    assert_same(results(copied), expected)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert_same(results(copied), expected)
    with torch.no_grad():
        copied.weight_ih_l0.zero_()
    assert not torch.equal(results(copied)["output"], expected["output"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype, device):
    """.to(dtype) as torch's: the same rounded weights, and results in that dtype."""
    theirs, ours = both(device, {"num_layers": 2}, "reference")
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    assert {value.dtype for value in results(ours).values()} == {dtype}
    assert [id(w) for w in ours._flat_weights] == [id(p) for p in ours.parameters()]
    assert_same(results(ours.double()), results(theirs.double()))


def test_flatten_parameters_changes_nothing(device):
    _, ours = both(device, {"num_layers": 2, "bidirectional": True}, "reference")
    expected, before = results(ours), [id(parameter) for parameter in ours.parameters()]
    assert ours.flatten_parameters() is None
    assert [id(parameter) for parameter in ours.parameters()] == before
    assert_same(results(ours), expected)


def test_shared_memory():
    _, ours = both("cpu", {}, "reference")
    expected = results(ours)
    assert ours.share_memory() is ours
    assert all(parameter.is_shared() for parameter in ours.parameters())
    assert_same(results(ours), expected)


def test_from_meta(device):
    """Made without memory, then filled."""
    _, ours = both(device, {}, "reference")
    empty = fused_lstm.LSTM(3, 5, device="meta", dtype=torch.float64, backend="reference").to_empty(device=device)
    empty.load_state_dict(ours.state_dict())
    assert_same(results(empty), results(ours))


def test_training_flag(device):
    """Dropout between layers is for training only, and the flag is torch's."""
    theirs, ours = both(device, {"num_layers": 2, "dropout": 0.5}, "reference")
    assert ours.training
    assert not ours.eval().training
    assert_same(results(ours), results(theirs.eval()))


def test_weights_under_an_optimiser(device):
    """Ten steps of Adam on ours and on torch's: the same losses."""
    losses = []
    for module in both(device, {"num_layers": 2}, "reference"):
        optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
        losses.append([])
        for step in range(10):
            optimiser.zero_grad()
            loss = (module(randn(4, 2, 3, seed=step, device=device))[0] ** 2).mean()
            loss.backward()
            optimiser.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(torch.stack(losses[1]), torch.stack(losses[0]), rtol=1e-9, atol=0)
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_hooks_of_a_module(device):
    """Forward pre-hooks, forward hooks and full backward hooks fire, and see what torch's see."""
    seen = []
    for module in both(device, {}, "reference"):
        calls = []
        module.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args[0]))
        module.register_forward_hook(lambda *given, calls=calls: calls.append(given[2][0]))
        module.register_full_backward_hook(lambda _, d_in, d_out, calls=calls: calls.extend([d_in[0], d_out[0]]))
        results(module)
        seen.append(calls)
    assert len(seen[0]) == 4
    for actual, expected in zip(seen[1], seen[0], strict=True):
        assert_same_float64(actual.detach(), expected.detach())


def test_subclass_of_ours(device):
    """Somebody's own module on top of ours keeps working, arguments and all."""

    class Mine(fused_lstm.LSTM):
        def __init__(self, width):
            super().__init__(3, width, dtype=torch.float64, device=device, backend="reference")

        def forward(self, input):
            return super().forward(input)[0]

    torch.manual_seed(0)
    mine = Mine(5)
    theirs, _ = both(device, {})
    input = randn(4, 2, 3, device=device)
    assert_same_float64(mine(input).detach(), theirs(input)[0].detach())
    assert_same_float64(copy.deepcopy(mine)(input).detach(), theirs(input)[0].detach())


def test_backend_can_be_changed(device):
    """It is a plain attribute, read at each forward."""
    theirs, ours = both(device, {}, "torch")
    expected = results(theirs)
    assert torch.equal(results(ours)["output"], expected["output"])
    for backend in ("reference", "stepwise"):
        ours.backend = backend
        assert_same(results(ours), expected)


def test_convert_is_the_same_as_making_one(device):
    theirs, ours = both(device, {"bidirectional": True}, "reference")
    assert_same(results(twin(theirs, "reference")), results(ours))
