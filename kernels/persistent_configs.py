"""Does a layer's grid fit a device at once, and how is it cut? A pure function; each number stands with its reason."""

import functools
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from fused_lstm.kernels.devices import Device


@dataclass(frozen=True)
class PersistentConfig:
    """How the persistent kernels of one layer cut their work.

    units: that a program owns; tiles: programs of a batch tile / slices; slices: parts of the backward's contraction;
    rows: of a batch tile; directions: that walk at once, in one grid; forward_k, backward_k: chunks of the contraction,
    in order; at_once: all chunks of h are loaded before the first product; hoist: what does not change over the steps
    may stay in registers; num_warps: of a program; shared_memory: bytes that a program needs.
    """

    units: int
    tiles: int
    slices: int
    rows: int
    batch_tiles: int
    directions: int
    forward_k: tuple[int, ...]
    backward_k: tuple[int, ...]
    at_once: bool
    hoist: bool
    num_warps: int
    shared_memory: int

    @property
    def programs(self) -> int:
        """Programs that wait for each other: those of one batch tile in one direction."""
        return self.tiles * self.slices


# What a walk holds in registers that a plain one does not: nothing; one option, elementwise; more options, or forward
# norms; or a step back through norms, which has twice a plain one's values at once, with whatever other options.
Burden = Literal["none", "option", "options", "norms"]


class DoesNotFit(ValueError):
    """Why no grid of the persistent kernels fits the device at once."""


@functools.lru_cache(maxsize=1024)  # asked at every call of a layer, several times
def persistent_config(
    device: Device,
    element_size: int,
    hidden_size: int,
    batch_size: int,
    directions: int = 1,
    burden: Burden = "none",
) -> PersistentConfig:
    """The grid for a layer of hidden_size units (H) and batch_size rows (N) in a dtype of element_size bytes.

    All directions walk in one grid where they fit, in taller batch tiles if need be: a step waits longer than it
    computes. Else they walk one after the other, in the grid of one.

    Args:
        burden: "none" for the plain cell; "option" with one; "options" with more, or with layer norms, but backward
            through these "norms"

    Raises:
        DoesNotFit: no grid does, for one direction; its text gives the numbers
    """
    if directions > 1:
        try:
            return _config(device, element_size, hidden_size, batch_size, directions, burden)
        except DoesNotFit:
            pass
    return _config(device, element_size, hidden_size, batch_size, 1, burden)


def _config(
    device: Device, element_size: int, hidden_size: int, batch_size: int, directions: int, burden: Burden
) -> PersistentConfig:
    # 64 rows of W a program: the least that wgmma and tcgen05 multiply; forward they are 16 units by 4 gates, backward
    # 64 outputs. More would halve the programs, and with them the shared memory that W can lie in.
    units, slices, tiles = 16, 4, -(-hidden_size // 64)
    if hidden_size <= 64 and (burden == "none" or (burden != "norms" and element_size == 2)):
        # One program holds all of W and waits for nobody: a barrier costs more than the products it would spread.
        # (Through norms, or with options in float32, 64 units are more than its registers hold.)
        units, slices, tiles = 64, 1, 1
    programs = tiles * slices
    forward_total, backward_total = units * programs, 4 * units * tiles
    weights = 4 * units * forward_total * element_size  # as many as backward: 64 * backward_total
    if weights > device.shared_memory:
        raise DoesNotFit(f"{weights // 1024} KB of W_hh a program are more than a block of {device.name} has")
    # One program a multiprocessor: what it keeps in shared memory and registers leaves little beside it.
    most = device.multiprocessors // (programs * directions)
    # Rows of a batch tile: as few as let all tiles run at once, since all h of a tile is loaded in every step.
    # 16 are the least that a product takes without waste; of more than these the registers do not hold a step.
    described = device.capability in _DESCRIBED_BYTES
    power_of_two = backward_total & (backward_total - 1) == 0
    if burden == "none":
        choices = (16, 32, 64) if described else (16, 32)
    elif burden != "norms":  # mma.sync: only beside the addresses of one chunk of W
        choices = (16, 32) if described or (power_of_two and backward_total * element_size <= 1024) else (16,)
    else:
        # 32 where h lies in shared memory at once, for few accumulators: with tcgen05, which fetches them, for one
        chunks = backward_total.bit_count()
        fits = backward_total * element_size <= 2048 and chunks <= (3 if device.capability == 90 else 1)
        choices = (16, 32) if described and fits else (16,)
    rows = next((rows for rows in choices if -(-batch_size // rows) <= most), None)
    if rows is None:
        raise DoesNotFit(
            f"{programs} programs for each {choices[-1]} of {batch_size} rows are more than "
            f"the {device.multiprocessors} multiprocessors of {device.name}"
        )
    room = (device.shared_memory - weights) // (rows * element_size)  # for how much of a contraction's h at a time
    largest = 1024
    if not described:
        # mma.sync reads W through addresses, of which the registers hold those of one chunk of 1024 bytes, or of
        # several of 512, which share most of theirs.
        whole = backward_total * element_size <= 1024 and burden != "norms"
        largest = (1024 if whole else 512) // element_size
        if burden in ("option", "options") and backward_total * element_size > 2048:
            raise DoesNotFit(
                f"the registers of {device.name} do not hold its options beside the addresses of "
                f"{len(_chunks(backward_total, largest))} chunks of W_hh"
            )
    at_once = backward_total <= room
    while not at_once and largest > room:
        largest //= 2
    if burden == "norms" and device.capability == 100 and element_size == 4 and not at_once:
        raise DoesNotFit(f"the registers of {device.name} do not hold a step through norms beside h in pieces")
    if largest < 128:  # smaller chunks would be mostly barriers
        raise DoesNotFit(
            f"beside {weights // 1024} KB of W_hh, h of {rows} rows does not fit into a block of {device.name}"
        )
    # The descriptors of all products fill the registers before the last ones are hoisted, and then they spill. Made
    # anew in each step they cost wgmma some 20 to 50 instructions, and tcgen05 less than fetching them.
    held = _DESCRIBED_BYTES.get(device.capability, 8192)
    if described and burden != "none":
        held = min(held, 2048 if burden == "norms" else 2304)
    if rows == 64 or (rows == 32 and burden == "options"):
        held //= 2
    if burden == "norms" and (rows == 32 or device.capability == 100):
        held = 0
    forward_k, backward_k = _chunks(forward_total, largest), _chunks(backward_total, largest)
    return PersistentConfig(
        units=units,
        tiles=tiles,
        slices=slices,
        rows=rows,
        batch_tiles=-(-batch_size // rows),
        directions=directions,
        forward_k=forward_k,
        backward_k=backward_k,
        at_once=at_once,
        hoist=backward_total * element_size <= held,
        # Eight: h in flight takes half the registers of four, and each warp issues fewer instructions.
        num_warps=8,
        shared_memory=weights + rows * element_size * (backward_total if at_once else backward_k[0]),
    )


# Bytes of a row of W whose products' descriptors the registers hold beside a step: counted from compiled code, for the
# capabilities whose products (wgmma, tcgen05) take W by descriptors.
_DESCRIBED_BYTES = {90: 2816, 100: 512}


def _chunks(total: int, largest: int) -> tuple[int, ...]:
    """total as a sum of powers of two, which the sides of a tile are, from the largest down."""
    whole, rest = divmod(total, largest)
    return (largest,) * whole + tuple(1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1)


def starts(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Where each chunk begins."""
    return tuple(accumulate(sizes, initial=0))[:-1]
