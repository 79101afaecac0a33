"""The rule that cuts the persistent kernels' grid, on devices that need not be here."""

from dataclasses import replace

import pytest

from fused_lstm.kernels.devices import KNOWN_DEVICES
from fused_lstm.kernels.persistent_configs import DoesNotFit, persistent_config, starts


@pytest.mark.parametrize(
    ("device", "element_size", "hidden_size", "batch_size", "rows", "batch_tiles", "programs", "k", "at_once", "kib"),
    [
        # by hand: programs = H / 16, W = 64 rows * K * bytes, h = rows * K * bytes
        ("h100", 2, 512, 16, 16, 1, 32, (512,), True, 64 + 16),
        ("h100", 2, 512, 64, 16, 4, 32, (512,), True, 64 + 16),  # 128 programs on 132 multiprocessors
        ("h100", 2, 512, 65, 32, 3, 32, (512,), True, 64 + 32),  # five tiles of 16 would be 160
        ("h100", 2, 1024, 64, 32, 2, 64, (1024,), True, 128 + 64),
        ("h100", 2, 1024, 128, 64, 2, 64, (512, 512), False, 128 + 64),  # h of 64 rows beside W: half of it at a time
        ("h100", 2, 1536, 16, 16, 1, 96, (1024, 512), False, 192 + 32),
        ("h100", 2, 100, 1, 16, 1, 8, (128,), True, 16 + 4),  # 100 units lie in tiles of 64
        ("h100", 2, 650, 16, 16, 1, 44, (512, 128, 64), True, 88 + 22),
        ("h200", 4, 768, 16, 16, 1, 48, (512, 256), False, 192 + 32),
        ("a100", 2, 1024, 16, 16, 1, 64, (256,) * 4, True, 128 + 32),
        ("a100", 4, 512, 16, 16, 1, 32, (128,) * 4, True, 128 + 32),
        ("l40s", 2, 512, 64, 16, 4, 32, (512,), True, 64 + 16),
        ("rtx4090", 2, 512, 64, 16, 4, 32, (512,), True, 64 + 16),
        ("rtx5090", 2, 512, 80, 16, 5, 32, (512,), True, 64 + 16),
        ("b200", 2, 1024, 64, 32, 2, 64, (1024,), True, 128 + 64),
    ],
)
def test_how_a_grid_is_cut(device, element_size, hidden_size, batch_size, rows, batch_tiles, programs, k, at_once, kib):
    config = persistent_config(KNOWN_DEVICES[device], element_size, hidden_size, batch_size)
    assert (config.rows, config.batch_tiles, config.programs) == (rows, batch_tiles, programs)
    assert config.forward_k == config.backward_k == k
    assert (config.at_once, config.shared_memory) == (at_once, kib * 1024)


@pytest.mark.parametrize(
    ("device", "hidden_size", "batch_size", "together", "rows", "batch_tiles"),
    [
        # by hand, in two bytes: two directions of H / 16 programs for each batch tile
        ("a100", 512, 16, 2, 16, 1),  # 64 programs on 108 multiprocessors
        ("a100", 768, 16, 2, 16, 1),  # 96
        ("a100", 1024, 16, 1, 16, 1),  # two of 64 are more than there are
        ("l40s", 512, 32, 2, 16, 2),  # 128 of 142
        ("l40s", 512, 33, 2, 32, 2),  # three tiles would be 192
        ("l40s", 650, 33, 1, 16, 3),  # two tiles of 32 rows would be 176, and alone three of 16 are 132
        ("rtx4090", 512, 32, 2, 16, 2),
        ("h100", 64, 500, 2, 16, 32),  # one program for each tile
        ("h100", 512, 32, 2, 16, 2),
        ("h100", 512, 64, 2, 32, 2),
        ("h100", 512, 128, 2, 64, 2),
        ("h100", 512, 129, 1, 64, 3),
        ("h100", 1024, 16, 2, 16, 1),  # 128 of 132
        ("h200", 1024, 64, 2, 64, 1),
        ("h200", 1024, 65, 1, 64, 2),
        ("b200", 1024, 32, 2, 32, 1),
        ("b200", 1536, 16, 1, 16, 1),
        ("rtx5090", 512, 32, 2, 16, 2),
        ("rtx5090", 512, 64, 2, 32, 2),
    ],
)
def test_both_directions_walk_at_once_where_they_fit(device, hidden_size, batch_size, together, rows, batch_tiles):
    config = persistent_config(KNOWN_DEVICES[device], 2, hidden_size, batch_size, 2)
    assert (config.directions, config.rows, config.batch_tiles) == (together, rows, batch_tiles)
    if together == 1:
        assert config == persistent_config(KNOWN_DEVICES[device], 2, hidden_size, batch_size)


@pytest.mark.parametrize("hidden_size", [1, 17, 64])
def test_a_small_layer_is_one_program(hidden_size):
    config = persistent_config(KNOWN_DEVICES["h100"], 2, hidden_size, 16)
    assert (config.programs, config.units, config.slices) == (1, 64, 1)
    assert (config.forward_k, config.backward_k) == ((64,), (256,))


@pytest.mark.parametrize(
    ("burden", "device", "element_size", "hidden_size", "batch_size", "rows", "batch_tiles", "programs", "k", "hoist"),
    [
        # as the registers allow; W by descriptors: 32 rows, fewer descriptors held
        ("options", "h100", 2, 1024, 16, 16, 1, 64, (1024,), True),
        ("options", "h100", 2, 512, 128, 32, 4, 32, (512,), True),
        ("options", "h100", 2, 1024, 64, 32, 2, 64, (1024,), False),
        ("options", "h100", 4, 650, 16, 16, 1, 44, (512, 128, 64), False),  # 2816 bytes a row of W, which plain holds
        ("options", "h100", 2, 40, 16, 16, 1, 1, (256,), True),
        ("options", "h100", 4, 40, 16, 16, 1, 4, (64,), True),  # where a plain layer is one program
        ("option", "h100", 2, 1024, 64, 32, 2, 64, (1024,), True),
        ("option", "h100", 4, 650, 16, 16, 1, 44, (512, 128, 64), False),
        # by addresses: 32 rows beside one chunk only
        ("options", "a100", 2, 512, 64, 32, 2, 32, (512,), True),
        ("options", "a100", 4, 256, 112, 32, 4, 16, (256,), True),
        ("options", "a100", 2, 1024, 16, 16, 1, 64, (256,) * 4, True),
        # back through norms: 32 rows by descriptors alone, to 2048 bytes a row; chunks of 512 bytes by addresses
        ("norms", "h100", 2, 40, 16, 16, 1, 4, (64,), True),
        ("norms", "h100", 2, 512, 64, 16, 4, 32, (512,), True),
        ("norms", "h100", 2, 512, 128, 32, 4, 32, (512,), False),
        ("norms", "h100", 2, 1024, 64, 32, 2, 64, (1024,), False),
        ("norms", "h100", 4, 512, 96, 32, 3, 32, (512,), False),
        ("norms", "h100", 2, 1150, 16, 16, 1, 72, (1024, 128), False),
        ("norms", "b200", 2, 1024, 64, 32, 2, 64, (1024,), False),
        ("norms", "a100", 2, 1024, 16, 16, 1, 64, (256,) * 4, True),
        ("norms", "a100", 4, 512, 16, 16, 1, 32, (128,) * 4, True),
        ("norms", "b200", 2, 256, 16, 16, 1, 16, (256,), False),
    ],
)
def test_what_more_than_a_plain_step_leaves(
    burden, device, element_size, hidden_size, batch_size, rows, batch_tiles, programs, k, hoist
):
    config = persistent_config(KNOWN_DEVICES[device], element_size, hidden_size, batch_size, burden=burden)
    assert (config.rows, config.batch_tiles, config.programs) == (rows, batch_tiles, programs)
    assert (config.backward_k, config.hoist) == (k, hoist)


@pytest.mark.parametrize(
    ("burden", "device", "element_size", "hidden_size", "batch_size", "reason"),
    [
        ("options", "h100", 2, 1024, 128, "programs for each 32 of 128 rows are more than"),
        ("option", "h100", 2, 1024, 128, "programs for each 32 of 128 rows are more than"),
        ("options", "a100", 2, 768, 48, "programs for each 16 of 48 rows are more than"),
        (
            "options",
            "a100",
            2,
            1088,
            16,
            "the registers of A100 do not hold its options beside the addresses of 5 chunks",
        ),
        ("norms", "h100", 2, 1024, 128, "programs for each 32 of 128 rows are more than"),
        ("norms", "h100", 4, 768, 48, "programs for each 16 of 48 rows are more than"),
        ("norms", "a100", 2, 768, 48, "programs for each 16 of 48 rows are more than"),
        ("norms", "h100", 2, 900, 40, "programs for each 16 of 40 rows are more than"),
        ("norms", "h100", 2, 1150, 24, "programs for each 16 of 24 rows are more than"),
        ("norms", "b200", 4, 768, 16, "the registers of B200 do not hold a step through norms beside h in pieces"),
        ("norms", "b200", 2, 900, 64, "programs for each 16 of 64 rows are more than"),
    ],
)
def test_what_only_a_plain_step_leaves_registers_for(burden, device, element_size, hidden_size, batch_size, reason):
    persistent_config(KNOWN_DEVICES[device], element_size, hidden_size, batch_size)
    with pytest.raises(DoesNotFit, match=reason):
        persistent_config(KNOWN_DEVICES[device], element_size, hidden_size, batch_size, burden=burden)


@pytest.mark.parametrize(
    ("device", "element_size", "hidden_size", "batch_size", "reason"),
    [
        ("h100", 4, 1024, 16, "256 KB of W_hh a program are more than a block of H100 has"),
        ("rtx4090", 2, 1024, 16, "128 KB of W_hh a program are more than a block of RTX 4090 has"),
        ("h100", 2, 1150, 128, "72 programs for each 64 of 128 rows are more than the 132 multiprocessors of H100"),
        ("a100", 2, 512, 128, "32 programs for each 32 of 128 rows are more than the 108 multiprocessors of A100"),
        ("l40s", 2, 768, 64, "beside 96 KB of W_hh, h of 32 rows does not fit into a block of L40S"),
    ],
)
def test_what_does_not_fit_says_why(device, element_size, hidden_size, batch_size, reason):
    with pytest.raises(DoesNotFit) as raised:
        persistent_config(KNOWN_DEVICES[device], element_size, hidden_size, batch_size)
    assert str(raised.value) == reason


@pytest.mark.parametrize("device", KNOWN_DEVICES.values(), ids=KNOWN_DEVICES)
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("burden", ["none", "option", "options", "norms"])
def test_every_grid_that_fits_holds_what_it_promises(device, element_size, directions, burden):
    fitting = 0
    for hidden_size in (1, 17, 64, 65, 100, 128, 160, 256, 500, 512, 650, 768, 1024, 1150, 1536):
        for batch_size in (1, 3, 16, 65, 128, 500):
            try:
                config = persistent_config(device, element_size, hidden_size, batch_size, directions, burden)
            except DoesNotFit:
                continue
            fitting += 1
            assert config.programs * config.batch_tiles * config.directions <= device.multiprocessors
            assert config.directions in (1, directions)
            assert config.shared_memory <= device.shared_memory
            assert config.batch_tiles * config.rows >= batch_size > (config.batch_tiles - 1) * config.rows
            assert sum(config.forward_k) == config.units * config.programs >= hidden_size
            assert sum(config.backward_k) == 4 * config.units * config.tiles
            assert all(k & (k - 1) == 0 for k in config.forward_k + config.backward_k)
    assert fitting > 20


def test_fewer_multiprocessors_take_taller_tiles_and_then_none():
    h100 = KNOWN_DEVICES["h100"]
    rows = [
        persistent_config(replace(h100, multiprocessors=count), 2, 512, 64).rows for count in (128, 127, 64, 63, 32)
    ]
    assert rows == [16, 32, 32, 64, 64]
    with pytest.raises(DoesNotFit, match="more than the 31 multiprocessors"):
        persistent_config(replace(h100, multiprocessors=31), 2, 512, 64)


def test_starts_are_the_sums_before():
    assert starts((512, 128, 64)) == (0, 512, 640)
