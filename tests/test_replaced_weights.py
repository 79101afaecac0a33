"""Weights that are not Parameters of the module: computed, masked, dropped or handed in. As with torch.nn.LSTM."""

import pytest
import torch
import torch.nn.utils.prune
from runs import randn, run
from tolerance import assert_same_float64

import fused_lstm

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning"),
]

NAMES = ("weight_ih_l0", "weight_hh_l1", "weight_hh_l0_reverse")


def both(device, replace=lambda _: None, backend="reference"):
    """torch's module and ours, with the same weights, on which replace has been called."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "device": device, "dtype": torch.float64}
    theirs = torch.nn.LSTM(3, 5, **options)
    ours = fused_lstm.LSTM(3, 5, **options, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    for module in (theirs, ours):
        replace(module)
    return theirs, ours


def parametrize_weight_norm(module):
    for name in NAMES:
        torch.nn.utils.parametrizations.weight_norm(module, name)


def parametrize_spectral_norm(module):
    for name in NAMES:
        torch.manual_seed(4)  # it draws the vectors of its power iteration
        torch.nn.utils.parametrizations.spectral_norm(module, name)


def parametrize_orthogonal(module):
    for name in NAMES:
        torch.manual_seed(4)
        torch.nn.utils.parametrizations.orthogonal(module, name)


def hook_weight_norm(module):
    for name in NAMES:
        torch.nn.utils.weight_norm(module, name)


def hook_spectral_norm(module):
    for name in NAMES:
        torch.manual_seed(4)
        torch.nn.utils.spectral_norm(module, name)


def prune(module):
    for name in NAMES:
        torch.nn.utils.prune.l1_unstructured(module, name, amount=0.4)
        assert not getattr(module, name).all()


def drop_weights(module):
    """The way of AWD-LSTM: the raw weight under another name, and a plain tensor in the parameter's place."""
    for name in NAMES:
        raw = module._parameters.pop(name)
        module.register_parameter(f"{name}_raw", torch.nn.Parameter(raw.detach()))
        setattr(module, name, raw.detach())

    def drop(module, _):
        torch.manual_seed(9)
        for name in NAMES:
            setattr(module, name, torch.nn.functional.dropout(getattr(module, f"{name}_raw"), 0.5, module.training))

    module.register_forward_pre_hook(drop)


def drop_weights_in_the_dict(module):
    """The way of fastai: the plain tensor put among the parameters themselves."""
    for name in NAMES:
        module.register_parameter(f"{name}_raw", torch.nn.Parameter(module._parameters[name].detach().clone()))

    def drop(module, _):
        torch.manual_seed(9)
        for name in NAMES:
            raw = getattr(module, f"{name}_raw")
            module._parameters[name] = torch.nn.functional.dropout(raw, 0.5, module.training)

    module.register_forward_pre_hook(drop)


REPLACED = [
    *(parametrize_weight_norm, parametrize_spectral_norm, parametrize_orthogonal, hook_weight_norm, hook_spectral_norm),
    *(prune, drop_weights, drop_weights_in_the_dict),
]
EACH_WAY = pytest.mark.parametrize("replace", REPLACED, ids=lambda replace: replace.__name__)


def results(module):
    """Of two forwards, the second after a step of SGD: the weight must be computed anew."""
    input = randn(4, 2, 3, seed=1, device=module.bias_hh_l0.device, requires_grad=True)
    leaves = dict(module.named_parameters())
    found = {}
    for turn in range(2):
        # once a forward: torch's own module asks for its weights more often, and spectral norm iterates each time
        with torch.nn.utils.parametrize.cached():
            output, _ = module(input)
        d_output = randn(*output.shape, seed=2, device=output.device)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad and leaf.is_leaf]
        gradients = torch.autograd.grad(output, [input, *wanted], d_output, allow_unused=True)
        found.update({f"output_{turn}": output.detach()})
        found.update({f"gradient_{turn}_{i}": g for i, g in enumerate(gradients) if g is not None})
        with torch.no_grad():
            for leaf, gradient in zip(wanted, gradients[1:], strict=True):
                if gradient is not None:
                    leaf.sub_(0.1 * gradient)
    return found


def assert_same(actual, expected) -> None:
    assert actual.keys() == expected.keys()
    assert not torch.equal(expected["output_0"], expected["output_1"])
    for name, value in expected.items():
        assert_same_float64(actual[name], value)


@EACH_WAY
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_replaced(backend, replace, device):
    theirs, ours = both(device, replace, backend)
    assert_same(results(ours), results(theirs))


@EACH_WAY
def test_replaced_in_eval(replace, device):
    theirs, ours = both(device, replace)
    assert_same(results(ours.eval()), results(theirs.eval()))


@EACH_WAY
def test_converted_after_replacing(replace, device):
    theirs, _ = both(device, replace)
    ours = fused_lstm.convert(both(device, replace)[0], backend="reference")
    assert isinstance(ours, fused_lstm.LSTM)
    assert_same(results(ours), results(theirs))


@pytest.mark.parametrize("replace", [parametrize_weight_norm, drop_weights], ids=lambda replace: replace.__name__)
def test_stepwise(replace, device):
    theirs, ours = both(device, replace, "stepwise")
    assert_same(results(ours), results(theirs))


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l1"])
def test_parametrization_is_computed_once_a_forward(name, device):
    class Counted(torch.nn.Module):
        calls = 0

        def forward(self, weight):
            Counted.calls += 1
            return 2 * weight

    _, ours = both(device)
    torch.nn.utils.parametrize.register_parametrization(ours, name, Counted())
    before = Counted.calls
    ours(randn(4, 2, 3, device=device))
    assert Counted.calls == before + 1


def test_functional_call(device):
    theirs, ours = both(device)
    input = randn(4, 2, 3, seed=1, device=device)
    other = {name: (2 * value).detach().requires_grad_() for name, value in theirs.named_parameters()}
    found = []
    for module in (theirs, ours):
        output, _ = torch.func.functional_call(module, other, (input,))
        found.append([output, *torch.autograd.grad((output**2).sum(), list(other.values()))])
        assert module.weight_hh_l0 is dict(module.named_parameters())["weight_hh_l0"]
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_same_float64(actual.detach(), expected.detach())
    assert not torch.equal(ours(input)[0], found[1][0])


def test_tied_weights(device):
    """One Parameter in two places gets the sum of both gradients."""
    theirs, ours = both(device)
    for module in (theirs, ours):
        module.weight_hh_l0_reverse = module.weight_hh_l0
    assert_same(results(ours), results(theirs))
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))


def test_weight_replaced_by_assignment(device):
    """A new Parameter in the place of an old one is used from the next forward on."""
    theirs, ours = both(device)
    for module in (theirs, ours):
        module(randn(4, 2, 3, device=device))
        module.weight_hh_l0 = torch.nn.Parameter(randn(20, 5, seed=8, device=device))
    input = randn(4, 2, 3, seed=1, device=device, requires_grad=True)
    actual, expected = run(ours, input), run(theirs, input)
    for name, value in expected.items():
        assert_same_float64(actual[name], value)
