"""A layer's walk with random numbers: the same in every dtype, and for one backend after the other."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_lstm import reference
from fused_lstm.recurrence import Gradients, Walk, new_gradients, new_walk
from fused_lstm.reference import Conditions, Parameters


class Variant(NamedTuple):
    """What a cell has beyond the plain one.

    zoneout: None, "masks" (of a training step) or "rates" (of an evaluation).
    """

    layer_norm: str | None = None
    peephole: bool = False
    zoneout: str | None = None
    recurrent_mask: bool = False
    reset: bool = False
    projection: bool = False
    d_c_all: bool = False

    def __str__(self) -> str:
        named = [field if value is True else str(value) for field, value in self._asdict().items() if value]
        return "-".join(named) or "plain"


PLAIN = Variant()
# each option alone; then all of them under each norm
SINGLE = [
    *(Variant(layer_norm=name) for name in reference.LAYER_NORMS),
    Variant(peephole=True),
    Variant(zoneout="masks"),
    Variant(zoneout="rates"),
    Variant(recurrent_mask=True),
    Variant(reset=True),
    Variant(d_c_all=True),
]
COMBINED = [
    Variant(name, True, zoneout, True, True, False, True)
    for name, zoneout in zip((None, *reference.LAYER_NORMS), itertools.cycle(("masks", "rates")))
]


class Inputs(NamedTuple):
    """All that a walk and its backward are made from. gates: the input product."""

    gates: Tensor
    h0: Tensor
    c0: Tensor
    parameters: tuple[Parameters, ...]
    conditions: tuple[Conditions, ...]
    layer_norm: str | None
    reverse: tuple[bool, ...]
    d_output: Tensor | None
    d_c_all: Tensor | None
    d_h_n: Tensor
    d_c_n: Tensor


def make_inputs(
    steps: int,
    batch_size: int,
    hidden_size: int,
    variant: Variant = PLAIN,
    *,
    reverse: tuple[bool, ...] = (False,),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    output_size: int | None = None,
    seed: int = 0,
) -> Inputs:
    """Random numbers of the usual sizes, rounded to dtype; parameters of norms and peepholes in float32 or better.

    output_size: P, with variant.projection
    """
    generator = torch.Generator().manual_seed(seed + steps * 1000 + batch_size * 100 + hidden_size)
    directions = len(reverse)
    width = output_size if variant.projection else hidden_size
    wide = reference.compute_dtype(dtype)

    def randn(*shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale + shift).to(device, dtype)

    def bernoulli(*shape: int, p: float = 0.3) -> Tensor:
        return (torch.rand(shape, generator=generator) < p).to(device)

    def parameters() -> Parameters:
        scale = hidden_size**-0.5
        norms = {}
        if variant.layer_norm == "gates":
            norms = {"norm_gates_weight": 4, "norm_gates_bias": 4}
        elif variant.layer_norm is not None:
            norms = {"norm_ih_weight": 4, "norm_hh_weight": 4}
            if variant.layer_norm == "projections_cell":
                norms |= {"norm_ih_bias": 4, "norm_hh_bias": 4}
        if variant.layer_norm is not None:
            norms |= {"norm_cell_weight": 1, "norm_cell_bias": 1}
        return Parameters(
            weight_ih=randn(4 * hidden_size, 1),
            weight_hh=randn(4 * hidden_size, width, scale=scale),
            bias_ih=randn(4 * hidden_size, scale=scale),
            bias_hh=randn(4 * hidden_size, scale=scale),
            weight_hr=randn(width, hidden_size, scale=scale) if variant.projection else None,
            weight_ph=randn(3 * hidden_size, scale=0.5, dtype=wide) if variant.peephole else None,
            **{
                name: randn(parts * hidden_size, scale=0.3, shift=name.endswith("weight"), dtype=wide)
                for name, parts in norms.items()
            },
        )

    def zoneout(rate: float, size: int) -> Tensor | float | None:
        if variant.zoneout == "masks":
            return bernoulli(steps, batch_size, size)
        return rate if variant.zoneout == "rates" else None

    state = (directions, batch_size, hidden_size)
    resets = {}
    if variant.reset:
        reset = bernoulli(steps, batch_size)
        resets = {"reset": reset, "reset_h": randn(batch_size, width), "reset_c": randn(batch_size, hidden_size)}
    return Inputs(
        gates=randn(directions, steps, batch_size, 4 * hidden_size),
        h0=randn(directions, batch_size, width),
        c0=randn(*state),
        parameters=tuple(parameters() for _ in reverse),
        conditions=tuple(
            Conditions(
                **resets,
                recurrent_mask=bernoulli(batch_size, width, p=0.75).to(dtype) / 0.75
                if variant.recurrent_mask
                else None,
                zoneout_h=zoneout(0.125, width),
                zoneout_c=zoneout(0.25, hidden_size),
            )
            for _ in reverse
        ),
        layer_norm=variant.layer_norm,
        reverse=reverse,
        d_output=randn(steps, batch_size, directions, width),
        d_c_all=randn(directions, steps, batch_size, hidden_size, dtype=wide) if variant.d_c_all else None,
        d_h_n=randn(directions, batch_size, width),
        d_c_n=randn(*state, dtype=wide),
    )


def cast(value, dtype: torch.dtype):
    """The same numbers, in dtype, through tuples; masks as they are."""
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [cast(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def walk_of(inputs: Inputs, save: bool = True) -> Walk:
    """Fresh buffers for a walk from inputs, which stay as they are."""
    return new_walk(
        inputs.gates.clone(),
        inputs.gates.new_empty(*inputs.gates.shape[1:3], *inputs.h0.shape[::2]),
        inputs.h0,
        inputs.c0,
        inputs.parameters,
        inputs.conditions,
        inputs.layer_norm,
        inputs.reverse,
        save,
    )


def gradients_of(walk: Walk, inputs: Inputs) -> Gradients:
    """Fresh buffers for the walk's backward."""
    reset = inputs.conditions[0].reset is not None
    return new_gradients(walk, inputs.d_output, inputs.d_c_all, inputs.d_h_n, inputs.d_c_n, reset)


def run(backend, inputs: Inputs) -> dict[str, Tensor]:
    """What a backend makes of inputs: every buffer of forward and backward that is there, by its name."""
    walk = walk_of(inputs)
    backend.recurrence_forward(walk)
    gradients = gradients_of(walk, inputs)
    backend.recurrence_backward(walk, gradients)
    forward = {name: getattr(walk, name) for name in ("gates", "product", "output", "entered", "moments", "c")}
    filled = {name: buffer for name, buffer in gradients._asdict().items() if name not in ("d_output", "d_c_all")}
    return {name: buffer.clone() for name, buffer in {**forward, **filled}.items() if buffer is not None}
