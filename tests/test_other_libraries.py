"""The cells of other libraries, from their public definitions: with their weights copied in, ours gives their numbers.

Each is a few lines of a step in its own layout and order of gates, written for this test.
"""

import numpy as np
import pytest
import torch
import variants
from runs import randn
from torch.nn.functional import layer_norm
from variants import BACKENDS, assert_same, record

import fused_lstm
from fused_lstm.gate_orders import load_weights, reorder_gates

pytestmark = pytest.mark.usefixtures("poisoned_memory")

T, N, I, H = 6, 3, 5, 4  # noqa: E741
EACH_BACKEND = pytest.mark.parametrize("backend", BACKENDS)


class Numbers:
    """Random float64 weights that want gradients, no two alike."""

    def __init__(self, device):
        self.device, self.count = device, 0

    def __call__(self, *shape, shift=0.0):
        self.count += 1
        return (shift + 0.5 * randn(*shape, seed=self.count, device=self.device)).requires_grad_()


@pytest.fixture
def numbers(device):
    return Numbers(device)


def walk(cell, x, h, c):
    """All steps of a cell that takes and returns x_t, h, c."""
    output = []
    for x_t in x:
        h, c = cell(x_t, h, c)
        output.append(h)
    return torch.stack(output), h, c


def ours(device, backend, input_size=I, hidden_size=H, **options):
    return fused_lstm.LSTM(input_size, hidden_size, device=device, dtype=torch.float64, backend=backend, **options)


@torch.no_grad()
def fill(module, suffix="_l0", **values):
    """Copy values into the parameters of these names."""
    for name, value in values.items():
        getattr(module, name + suffix).copy_(value)


def assert_computes(module, x, h, c, expected) -> None:
    """The module's output and final states of one layer are expected, and so is what goes back to x, h and c."""
    output, (h_n, c_n) = module(x, (h[None], c[None]))
    found = {"output": output, "h_n": h_n[0], "c_n": c_n[0]}
    leaves = {"x": x, "h": h, "c": c}
    wanted = dict(zip(found, expected, strict=True))
    wanted |= variants.gradients(list(wanted.values()), leaves)
    assert_same(found | variants.gradients(list(found.values()), leaves), wanted)


def labml_cell(numbers, input_size, normed):
    """labml_nn.lstm.LSTMCell: hidden_lin with a bias, input_lin without; with layer_norm one nn.LayerNorm(H) for each
    of i, f, g, o, and layer_norm_c on c' inside h' alone.

    Returns the cell, and its weights by our names.
    """
    hidden_lin, bias, input_lin = numbers(4 * H, H), numbers(4 * H), numbers(4 * H, input_size)
    norms = [(numbers(H, shift=1), numbers(H)) for _ in range(5)]

    def cell(x, h, c):
        ifgo = (h @ hidden_lin.t() + bias + x @ input_lin.t()).chunk(4, -1)
        if normed:
            ifgo = [layer_norm(gate, (H,), *norm) for gate, norm in zip(ifgo, norms[:4], strict=True)]
        i, f, g, o = ifgo
        c_next = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        shown = layer_norm(c_next, (H,), *norms[4]) if normed else c_next
        return torch.sigmoid(o) * torch.tanh(shown), c_next

    weights = {"weight_ih": input_lin, "weight_hh": hidden_lin, "bias_ih": bias.new_zeros(4 * H), "bias_hh": bias}
    if normed:
        weights["norm_gates_weight"] = torch.cat([weight for weight, _ in norms[:4]])
        weights["norm_gates_bias"] = torch.cat([bias for _, bias in norms[:4]])
        weights["norm_cell_weight"], weights["norm_cell_bias"] = norms[4]
    return cell, weights


@EACH_BACKEND
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "layer_norm"])
def test_labml_cell(normed, numbers, backend, device):
    cell, weights = labml_cell(numbers, I, normed)
    module = ours(device, backend, layer_norm="gates" if normed else None)
    fill(module, **weights)
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    assert_computes(module, x, h, c, walk(cell, x, h, c))
    own = fused_lstm.LSTMCell(I, H, layer_norm=module.layer_norm, device=device, dtype=torch.float64, backend=backend)
    fill(own, "", **weights)
    assert_same(dict(zip("hc", own(x[0], (h, c)), strict=True)), dict(zip("hc", cell(x[0], h, c), strict=True)))


@EACH_BACKEND
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "layer_norm"])
def test_labml_lstm(normed, numbers, backend, device):
    """labml_nn.lstm.LSTM: cells one above the other in each step, h of the top one put out."""
    layers = 3
    cells = [labml_cell(numbers, I if k == 0 else H, normed) for k in range(layers)]
    module = ours(device, backend, num_layers=layers, layer_norm="gates" if normed else None)
    for k, (_, weights) in enumerate(cells):
        fill(module, f"_l{k}", **weights)
    x, h_0, c_0 = numbers(T, N, I), numbers(layers, N, H), numbers(layers, N, H)
    h, c, out = list(h_0), list(c_0), []
    for x_t in x:
        inp = x_t
        for k, (cell, _) in enumerate(cells):
            h[k], c[k] = cell(inp, h[k], c[k])
            inp = h[k]
        out.append(h[-1])
    output, (h_n, c_n) = module(x, (h_0, c_0))
    assert_same({"o": output, "h": h_n, "c": c_n}, {"o": torch.stack(out), "h": torch.stack(h), "c": torch.stack(c)})


@EACH_BACKEND
@pytest.mark.parametrize("order", ["ifog", "ifgo"])
def test_fastai_cell(order, numbers, backend, device):
    """fastai's course, the AWD-LSTM notebook: one product for all gates, (ih(x) + hh(h)).chunk(4, 1), the first three
    through sigmoid, the last through tanh: i, f, o, g. And the same in the order i, f, g, o, as x @ ih + h @ hh."""
    w_ih, w_hh, b_ih, b_hh = numbers(I, 4 * H), numbers(H, 4 * H), numbers(4 * H), numbers(4 * H)

    def cell(x, h, c):
        gates = ((x @ w_ih + b_ih) + (h @ w_hh + b_hh)).chunk(4, 1)
        if order == "ifog":
            ingate, forgetgate, outgate = map(torch.sigmoid, gates[:3])
            cellgate = gates[3].tanh()
        else:
            ingate, forgetgate, cellgate, outgate = (
                *map(torch.sigmoid, gates[:2]),
                gates[2].tanh(),
                gates[3].sigmoid(),
            )
        c = (forgetgate * c) + (ingate * cellgate)
        return outgate * c.tanh(), c

    module = ours(device, backend)
    load_weights(module, w_ih.detach(), w_hh.detach(), b_ih.detach(), b_hh.detach(), order=order, transposed=True)
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    assert_computes(module, x, h, c, walk(cell, x, h, c))


@EACH_BACKEND
def test_two_linears(numbers, backend, device):
    """i2h and h2h, each an nn.Linear, whose sum is cut as i, f, o | g: the first 3H through sigmoid, the rest
    through tanh (seba-1511's lstms.pth and many cells like it)."""
    i2h, h2h = (torch.nn.Linear(size, 4 * H, device=device, dtype=torch.float64) for size in (I, H))

    def cell(x, h, c):
        preact = i2h(x) + h2h(h)
        gates, g = preact[:, : 3 * H].sigmoid(), preact[:, 3 * H :].tanh()
        i, f, o = gates[:, :H], gates[:, H : 2 * H], gates[:, -H:]
        c = f * c + i * g
        return o * c.tanh(), c

    weights = (i2h.weight, h2h.weight, i2h.bias, h2h.bias)
    module = load_weights(ours(device, backend), *(weight.detach() for weight in weights), order="ifog")
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    assert_computes(module, x, h, c, walk(cell, x, h, c))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lecture_cell(x, h, c, w_hh, w_ih, b):
    """CMU's Deep Learning Systems, the lecture on implementing an LSTM: np.split of W_ih @ x + W_hh @ h + b."""
    i, f, g, o = np.split(w_ih @ x + w_hh @ h + b, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def lecture_cell_batched(x, h, c, w_hh, w_ih, b):
    """The same on rows: the weights stand on the right, transposed."""
    i, f, g, o = np.split(x @ w_ih + h @ w_hh + b[None, :], 4, axis=1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def lecture_sequence(cell, x, h, c, *weights):
    output = []
    for x_t in x:
        h, c = cell(x_t, h, c, *weights)
        output.append(h)
    return np.stack(output), c


def lecture_weights(module, suffix=""):
    """W_hh, W_ih and one bias, b_ih + b_hh, as the lecture takes them from a module."""
    names = ("weight_hh", "weight_ih", "bias_ih", "bias_hh")
    w_hh, w_ih, *biases = (getattr(module, name + suffix).detach().cpu().numpy() for name in names)
    return w_hh, w_ih, sum(biases)


def array(tensor):
    return tensor.detach().cpu().numpy()


@EACH_BACKEND
def test_cmu_lecture_step(numbers, backend, device):
    """One step of one sequence."""
    cell = fused_lstm.LSTMCell(I, H, device=device, dtype=torch.float64, backend=backend)
    x, h, c = numbers(I), numbers(H), numbers(H)
    expected = lecture_cell(*map(array, (x, h, c)), *lecture_weights(cell))
    for found, value in zip(cell(x, (h, c)), expected, strict=True):
        np.testing.assert_allclose(array(found), value, rtol=1e-12, atol=1e-14)


@EACH_BACKEND
def test_cmu_lecture_sequence(numbers, backend, device):
    """A sequence, unbatched, through our module and as one row of a batch; then whole batches, (T, N, I)."""
    module = ours(device, backend)
    w_hh, w_ih, b = lecture_weights(module, "_l0")
    x, h, c = numbers(T, I), numbers(H), numbers(H)
    expected, c_n = lecture_sequence(lecture_cell, *map(array, (x, h, c)), w_hh, w_ih, b)
    found, (_, c_found) = module(x, (h[None], c[None]))
    np.testing.assert_allclose(array(found), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(array(c_found[0]), c_n, rtol=1e-12, atol=1e-14)
    found, _ = module(x[:, None], (h[None, None], c[None, None]))
    np.testing.assert_allclose(array(found[:, 0]), expected, rtol=1e-12, atol=1e-14)

    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    expected, c_n = lecture_sequence(lecture_cell_batched, *map(array, (x, h, c)), w_hh.T, w_ih.T, b)
    found, (_, c_found) = module(x, (h[None], c[None]))
    np.testing.assert_allclose(array(found), expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(array(c_found[0]), c_n, rtol=1e-12, atol=1e-14)


@EACH_BACKEND
def test_cmu_lecture_one_bias(numbers, backend):
    """The lecture's single bias, given to the function alone: its two are one sum."""
    w_ih, w_hh, b = numbers(4 * H, I), numbers(4 * H, H), numbers(4 * H)
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    expected, _ = lecture_sequence(lecture_cell_batched, *map(array, (x, h, c, w_hh.t(), w_ih.t(), b)))
    for biases in ({"bias_ih": b}, {"bias_hh": b}):
        found, _ = fused_lstm.lstm_layer(x, (h, c), w_ih, w_hh, **biases, backend=backend)
        np.testing.assert_allclose(array(found), expected, rtol=1e-12, atol=1e-14)


@EACH_BACKEND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("zoneout", [0.0, 0.3])
def test_haste_layer_norm_lstm(zoneout, training, numbers, backend, device, monkeypatch):
    """haste_pytorch.LayerNormLSTM: gates i, g, f, o; kernel (I, 4H), recurrent_kernel (H, 4H), bias (4H); gamma (2, 4H)
    scales the norms of x @ kernel and of h @ recurrent_kernel, which have no shift; gamma_h, beta_h (H) that of c',
    which h' alone sees. zoneout_mask keeps the new h; in evaluation both are mixed. It starts from zeros."""
    kernel, recurrent_kernel, bias = numbers(I, 4 * H), numbers(H, 4 * H), numbers(4 * H)
    gamma, gamma_h, beta_h = numbers(2, 4 * H, shift=1), numbers(H, shift=1), numbers(H)
    x = numbers(T, N, I)
    module = ours(device, backend, layer_norm="projections", zoneout=zoneout).train(training)
    load_weights(module, kernel.detach(), recurrent_kernel.detach(), bias.detach(), order="igfo", transposed=True)
    norms = {"norm_ih_weight": gamma[0], "norm_hh_weight": gamma[1]}
    fill(module, **{name: reorder_gates(value, "igfo") for name, value in norms.items()})
    fill(module, norm_cell_weight=gamma_h, norm_cell_bias=beta_h)
    drawn = record(monkeypatch)
    torch.manual_seed(2)
    zeros = torch.zeros(N, H, dtype=torch.float64, device=device, requires_grad=True)
    module(x)  # draws once; the same again below
    zoneout_mask = ~drawn.masks[0].zoneout_h if training and zoneout else None
    wx = layer_norm(x @ kernel, (4 * H,), gamma[0])
    h, c, output = zeros, zeros.detach().clone().requires_grad_(), []
    h_0, c_0 = h, c
    for t in range(T):
        v = layer_norm(h @ recurrent_kernel, (4 * H,), gamma[1]) + wx[t] + bias
        i, g, f, o = v.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        new = torch.sigmoid(o) * torch.tanh(layer_norm(c, (H,), gamma_h, beta_h))
        if zoneout_mask is not None:
            new = (new - h) * zoneout_mask[t] + h
        elif zoneout:
            new = zoneout * h + (1 - zoneout) * new
        h = new
        output.append(h)
    torch.manual_seed(2)
    assert_computes(module, x, h_0, c_0, (torch.stack(output), h, c))


@EACH_BACKEND
@pytest.mark.parametrize("bidirectional", [False, True])
def test_fastrnns_layer_norm_lstm(bidirectional, numbers, backend, device):
    """torch's benchmarks/fastrnns LayerNormLSTMCell: no biases but those of layernorm_i, layernorm_h (4H) and
    layernorm_c (H), through which c goes before anything else sees it. NeMo's is the same."""
    layers = []
    module = ours(device, backend, bias=False, layer_norm="projections_cell", bidirectional=bidirectional)
    for suffix in ("_l0", "_l0_reverse")[: 1 + bidirectional]:
        weight_ih, weight_hh = numbers(4 * H, I), numbers(4 * H, H)
        norms = [(numbers(size, shift=1), numbers(size)) for size in (4 * H, 4 * H, H)]

        def cell(x, h, c, weight_ih=weight_ih, weight_hh=weight_hh, norms=norms):
            igates = layer_norm(x @ weight_ih.t(), (4 * H,), *norms[0])
            hgates = layer_norm(h @ weight_hh.t(), (4 * H,), *norms[1])
            ingate, forgetgate, cellgate, outgate = (igates + hgates).chunk(4, 1)
            c = torch.sigmoid(forgetgate) * c + torch.sigmoid(ingate) * torch.tanh(cellgate)
            c = layer_norm(c, (H,), *norms[2])
            return torch.sigmoid(outgate) * torch.tanh(c), c

        layers.append(cell)
        named = [f"norm_{name}_{kind}" for name in ("ih", "hh", "cell") for kind in ("weight", "bias")]
        values = dict(zip(named, [value for norm in norms for value in norm], strict=True))
        fill(module, suffix, weight_ih=weight_ih, weight_hh=weight_hh, **values)
    x, h, c = numbers(T, N, I), numbers(len(layers), N, H), numbers(len(layers), N, H)
    expected = [walk(cell, x if d == 0 else x.flip(0), h[d], c[d]) for d, cell in enumerate(layers)]
    output, (h_n, c_n) = module(x, (h, c))
    outputs = [out if d == 0 else out.flip(0) for d, (out, _, _) in enumerate(expected)]
    assert_same({"output": output}, {"output": torch.cat(outputs, 2)})
    for d, (_, h_d, c_d) in enumerate(expected):
        assert_same({"h": h_n[d], "c": c_n[d]}, {"h": h_d, "c": c_d})


@EACH_BACKEND
def test_tensorflow_addons_peepholes(numbers, backend, device):
    """tfa.rnn.PeepholeLSTMCell: Keras's cell, order i, f, c, o, with input_gate, forget_gate and output_gate peephole
    weights (H): i and f see the old c, o the new one."""
    kernel, recurrent_kernel, bias = numbers(I, 4 * H), numbers(H, 4 * H), numbers(4 * H)
    peep_i, peep_f, peep_o = numbers(H), numbers(H), numbers(H)

    def cell(x, h, c_tm1):
        z = (x @ kernel + h @ recurrent_kernel + bias).chunk(4, 1)
        i = torch.sigmoid(z[0] + peep_i * c_tm1)
        f = torch.sigmoid(z[1] + peep_f * c_tm1)
        c = f * c_tm1 + i * torch.tanh(z[2])
        o = torch.sigmoid(z[3] + peep_o * c)
        return o * torch.tanh(c), c

    module = ours(device, backend, peephole=True)
    load_weights(module, kernel.detach(), recurrent_kernel.detach(), bias.detach(), order="ifgo", transposed=True)
    fill(module, weight_ph=torch.cat((peep_i, peep_f, peep_o)))
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    assert_computes(module, x, h, c, walk(cell, x, h, c))


@EACH_BACKEND
def test_onnx_peepholes(numbers, backend, device):
    """ONNX's operator LSTM: W and R (4H, ·) and the biases in the order i, o, f, c; P (3H) in the order i, o, f."""
    w, r, w_bias, r_bias, p = numbers(4 * H, I), numbers(4 * H, H), numbers(4 * H), numbers(4 * H), numbers(3 * H)
    p_i, p_o, p_f = p.chunk(3)

    def cell(x, h, c):
        i, o, f, g = (x @ w.t() + h @ r.t() + w_bias + r_bias).chunk(4, 1)
        i, f = torch.sigmoid(i + p_i * c), torch.sigmoid(f + p_f * c)
        c = f * c + i * torch.tanh(g)
        return torch.sigmoid(o + p_o * c) * torch.tanh(c), c

    module = ours(device, backend, peephole=True)
    load_weights(module, w.detach(), r.detach(), w_bias.detach(), r_bias.detach(), order="iofg")
    fill(module, weight_ph=torch.cat((p_i, p_f, p_o)))
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    assert_computes(module, x, h, c, walk(cell, x, h, c))


@EACH_BACKEND
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_espnet_zoneout(training, numbers, backend, device, monkeypatch):
    """espnet's ZoneOutCell over an LSTMCell, as in Krueger et al.: the cell gives its next h and c, and then each is
    mask * old + (1 - mask) * next, or rate * old + (1 - rate) * next in evaluation; one rate for h, one for c."""
    rates = (0.3, 0.2)
    inner = torch.nn.LSTMCell(I, H, device=device, dtype=torch.float64)
    module = ours(device, backend, zoneout=rates).train(training)
    fill(module, **dict(inner.named_parameters()))
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    drawn = record(monkeypatch)
    torch.manual_seed(3)
    module(x)
    masks = drawn.masks[0][2:] if training else [[rate] * T for rate in rates]

    def cell(pair, h, c):
        x_t, *old_parts = pair
        new = inner(x_t, (h, c))
        return tuple(part * old + (1 - part) * after for part, old, after in zip(old_parts, (h, c), new, strict=True))

    factors = [[m.double() if training else m for m in mask] for mask in masks]
    expected = walk(cell, list(zip(x, *factors, strict=True)), h, c)
    torch.manual_seed(3)
    assert_computes(module, x, h, c, expected)


@EACH_BACKEND
def test_awd_lstm_weight_drop(numbers, backend, device):
    """salesforce's and fastai's WeightDropout: F.dropout of weight_hh_l0 before each forward of torch's own LSTM."""
    theirs = torch.nn.LSTM(I, H, device=device, dtype=torch.float64)
    module = ours(device, backend, weight_dropout=0.4)
    module.load_state_dict(theirs.state_dict())
    x = numbers(T, N, I)
    torch.manual_seed(5)
    dropped = torch.nn.functional.dropout(theirs.weight_hh_l0, 0.4)
    weights = {**dict(theirs.named_parameters()), "weight_hh_l0": dropped}
    expected, _ = torch.func.functional_call(theirs, weights, (x,))
    torch.manual_seed(5)
    output, _ = module(x)
    found = variants.gradients([output], {"x": x, **dict(module.named_parameters())})
    wanted = variants.gradients([expected], {"x": x, **dict(theirs.named_parameters())})
    assert_same({"o": output, **found}, {"o": expected, **wanted})


@EACH_BACKEND
def test_tied_recurrent_dropout(numbers, backend, device, monkeypatch):
    """Gal & Ghahramani, tied weights: one mask a sequence on h_{t-1}, for all four gates; here as a loop over torch's
    own cell."""
    inner = torch.nn.LSTMCell(I, H, device=device, dtype=torch.float64)
    module = ours(device, backend, recurrent_dropout=0.4)
    fill(module, **dict(inner.named_parameters()))
    x, h, c = numbers(T, N, I), numbers(N, H), numbers(N, H)
    drawn = record(monkeypatch)
    torch.manual_seed(3)
    module(x)
    mask = drawn.masks[0].recurrent.double() / 0.6
    torch.manual_seed(3)
    assert_computes(module, x, h, c, walk(lambda x_t, h, c: inner(x_t, (h * mask, c)), x, h, c))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_keras_unit_forget_bias(bidirectional, layers, device):
    """keras.layers.LSTM(unit_forget_bias=True): ones where the forget gate's bias starts. Keras has one bias, torch has
    two, which add up to it."""
    module = ours(device, "auto", num_layers=layers, bidirectional=bidirectional, forget_bias=1.0)
    forget = slice(H, 2 * H)
    plain = slice(2 * H, None)
    for bias_ih, bias_hh in [(weights[2], weights[3]) for weights in module.all_weights]:
        assert (bias_ih[forget] + bias_hh[forget] == 1).all()
        assert (bias_ih[forget] == 1).all()
        for bias in (bias_ih, bias_hh):
            assert (bias[:H] != 0).all()
            assert (bias[plain].abs() <= H**-0.5).all()
            assert bias[plain].unique().numel() == 2 * H
