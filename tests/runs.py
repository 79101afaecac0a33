"""One forward and backward of a module of torch's or ours, as a dict of all the numbers that came of it."""

import copy

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fused_lstm


def randn(*shape, seed=0, dtype=torch.float64, device="cpu", requires_grad=False) -> Tensor:
    """The same numbers on every device and, rounded, in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_(requires_grad)


def twin(module: torch.nn.Module, backend: str) -> torch.nn.Module:
    """A copy of a torch module as ours, with the same weights, on backend."""
    return fused_lstm.convert(copy.deepcopy(module), backend=backend)


def run(
    module, input: Tensor, hx=None, *, lengths=None, pack=None, results=("output", "h_n", "c_n")
) -> dict[str, Tensor]:
    """Forward, and backward from a random gradient of each of `results`.

    Args:
        input: padded or unbatched; hx: None, or (h_0, c_0)
        lengths: a list, given to forward as a tensor, unless pack
        pack: "sorted" or "unsorted" packs the input by lengths; the output is padded again

    Returns:
        the three results, and "d_" and the name of each of input, h_0, c_0 and the parameters: the gradient, or None
    """
    leaves = {"input": input, **dict(module.named_parameters())}
    if hx is not None:
        leaves.update(h_0=hx[0], c_0=hx[1])
    options = {}
    given = input
    if pack is not None:
        given = pack_padded_sequence(input, torch.tensor(lengths), module.batch_first, enforce_sorted=pack == "sorted")
    elif lengths is not None:
        options["lengths"] = torch.tensor(lengths, device=input.device)
    output, (h_n, c_n) = module(given, hx, **options)
    if isinstance(output, PackedSequence):
        time = 1 if module.batch_first else 0
        output, _ = pad_packed_sequence(output, module.batch_first, total_length=input.size(time))
    found = {"output": output, "h_n": h_n, "c_n": c_n}
    chosen = [found[name] for name in results]
    d_chosen = [randn(*r.shape, seed=7 + i, dtype=r.dtype, device=r.device) for i, r in enumerate(chosen)]
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    gradients = torch.autograd.grad(chosen, [leaves[name] for name in wanted], d_chosen, allow_unused=True)
    by_name = dict(zip(wanted, gradients, strict=True))
    return {**{name: value.detach() for name, value in found.items()}, **{"d_" + n: by_name.get(n) for n in leaves}}
