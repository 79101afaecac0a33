"""An LSTM in NumPy float64, from the equations alone: one vector a step, one sequence at a time, no batch.

Forward and backpropagation through time. Gates in torch's order: 4H = i | f | g | o.
"""

from typing import NamedTuple

import numpy as np
from numpy import ndarray


class Weights(NamedTuple):
    """ih (4H, I), hh (4H, P), b_ih (4H), b_hh (4H), hr (P, H); the last three may be None."""

    ih: ndarray
    hh: ndarray
    b_ih: ndarray | None = None
    b_hh: ndarray | None = None
    hr: ndarray | None = None

    def zeros(self) -> "Weights":
        return Weights(*(None if weight is None else np.zeros_like(weight) for weight in self))


class Step(NamedTuple):
    """One step's vectors: what entered it, its activated gates, c and h after it (hidden: h before a projection)."""

    x: ndarray
    h_prev: ndarray
    c_prev: ndarray
    i: ndarray
    f: ndarray
    g: ndarray
    o: ndarray
    c: ndarray
    hidden: ndarray
    h: ndarray


class Forward(NamedTuple):
    """output (T, N, P), zero past each end; h_n (N, P); c_n (N, H); steps: each row's `Step` by time, None past its
    end."""

    output: ndarray
    h_n: ndarray
    c_n: ndarray
    steps: list[list[Step | None]]


class Gradients(NamedTuple):
    """Shaped as what they are gradients of; gates (T, N, 4H) are those before the activations."""

    x: ndarray
    h0: ndarray
    c0: ndarray
    weights: Weights
    gates: ndarray


def sigmoid(x: ndarray) -> ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def cell(x: ndarray, h: ndarray, c: ndarray, weights: Weights) -> Step:
    """One step of one sequence: x (I,), h (P,), c (H,)."""
    pre = weights.ih @ x + weights.hh @ h
    for bias in (weights.b_ih, weights.b_hh):
        if bias is not None:
            pre = pre + bias
    i, f, g, o = np.split(pre, 4)
    i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
    c_next = f * c + i * g
    hidden = o * np.tanh(c_next)
    h_next = hidden if weights.hr is None else weights.hr @ hidden
    return Step(x, h, c, i, f, g, o, c_next, hidden, h_next)


def cell_backward(step: Step, d_h: ndarray, d_c: ndarray, weights: Weights, d_weights: Weights):
    """Adds to d_weights; returns the gradients of x, h_prev, c_prev and of the gates before their activations."""
    d_hidden = d_h
    if weights.hr is not None:
        d_weights.hr[:] += np.outer(d_h, step.hidden)
        d_hidden = weights.hr.T @ d_h
    tanh_c = np.tanh(step.c)
    d_c = d_c + d_hidden * step.o * (1.0 - tanh_c**2)
    d_pre = np.concatenate(
        (
            d_c * step.g * step.i * (1.0 - step.i),
            d_c * step.c_prev * step.f * (1.0 - step.f),
            d_c * step.i * (1.0 - step.g**2),
            d_hidden * tanh_c * step.o * (1.0 - step.o),
        )
    )
    d_weights.ih[:] += np.outer(d_pre, step.x)
    d_weights.hh[:] += np.outer(d_pre, step.h_prev)
    for d_bias in (d_weights.b_ih, d_weights.b_hh):
        if d_bias is not None:
            d_bias[:] += d_pre
    return weights.ih.T @ d_pre, weights.hh.T @ d_pre, d_c * step.f, d_pre


def walk(length: int, reverse: bool) -> list[int]:
    """The time steps in the order in which they are taken."""
    return list(range(length))[:: -1 if reverse else 1]


def layer(x, h0, c0, weights: Weights, lengths=None, reverse: bool = False) -> Forward:
    """One layer and direction over x (T, N, I) from h0 (N, P), c0 (N, H); row n has lengths[n] steps, or T."""
    time, rows = x.shape[:2]
    lengths = [time] * rows if lengths is None else lengths
    output = np.zeros((time, rows, h0.shape[1]))
    h_n, c_n = np.empty_like(h0), np.empty_like(c0)
    steps: list[list[Step | None]] = [[None] * time for _ in range(rows)]
    for n in range(rows):
        h, c = h0[n], c0[n]
        for t in walk(lengths[n], reverse):
            step = steps[n][t] = cell(x[t, n], h, c, weights)
            output[t, n], h, c = step.h, step.h, step.c
        h_n[n], c_n[n] = h, c
    return Forward(output, h_n, c_n, steps)


def layer_backward(forward: Forward, weights: Weights, d_output, d_h_n, d_c_n, lengths=None, reverse=False):
    """The gradients of sum(d_output * output) + sum(d_h_n * h_n) + sum(d_c_n * c_n)."""
    time, rows = d_output.shape[:2]
    lengths = [time] * rows if lengths is None else lengths
    d_x = np.zeros((time, rows, weights.ih.shape[1]))
    d_gates = np.zeros((time, rows, weights.ih.shape[0]))
    d_h0, d_c0, d_weights = np.array(d_h_n), np.array(d_c_n), weights.zeros()
    for n in range(rows):
        for t in reversed(walk(lengths[n], reverse)):
            d_x[t, n], d_h0[n], d_c0[n], d_gates[t, n] = cell_backward(
                forward.steps[n][t], d_h0[n] + d_output[t, n], d_c0[n], weights, d_weights
            )
    return Gradients(d_x, d_h0, d_c0, d_weights, d_gates)
