"""The variants of the cell in the benchmark: who computes them, how they are checked, what is said of them."""

import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch

import fused_lstm
from fused_lstm.bench import contenders as module
from fused_lstm.bench import measure as measuring
from fused_lstm.bench.cli import main
from fused_lstm.bench.contenders import (
    CELL_LOOP,
    TEXTBOOK_LOOP,
    TORCH,
    CannotRun,
    Contender,
    Model,
    Step,
    contenders_for,
    exact_step,
)
from fused_lstm.bench.measure import measure, problems
from fused_lstm.bench.results_table import detail_header, detail_rows, overview, remarks
from fused_lstm.bench.textbook import carried_norm_cell, peephole_cell, projection_norm_cell
from fused_lstm.bench.timing import ClockTimer
from fused_lstm.bench.variants import PLAIN, VARIANTS
from fused_lstm.bench.workload import Case, Workload

NAMES = [name for name in VARIANTS if name != PLAIN]
OPTIONS = {"repeats": 3, "warmup": 1, "seed": 1, "sample_seconds": 0.0}
ORDINARY = ["torch.nn.LSTM plain", "fused_lstm reference plain", "fused_lstm reference", TEXTBOOK_LOOP]


def small(name, **sizes):
    return Case(**{"hidden_size": 12, "batch_size": 5, "steps": 6, "input_size": 7} | sizes, variant=name)


def wide(name):
    """Wide enough for the largest of many errors to be steady: see the gate."""
    return Case(64, 8, 8, dtype="bfloat16", variant=name)


def results_of(name, workload, seed=3):
    """Of the contender of that name."""
    [contender] = (c for c in contenders_for(workload.case, ["reference"]) if c.name == name)
    return Step(contender.build(workload), workload).checked(seed)


def assert_near(actual, expected, tolerance):
    """|actual - expected| <= tolerance * max(1, max|expected|) for each of the numbers."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name}: {error:.1e}"


def measured(*contenders, case, **options):
    return measure(case, [*contenders_for(case, ["reference"]), *contenders], **OPTIONS | options)


def entry_of(record, name):
    [entry] = (entry for entry in record["contenders"] if entry["name"] == name)
    return entry


# What is computed


@pytest.mark.parametrize("stack", [False, True], ids=["one layer", "stack"])
@pytest.mark.parametrize("name", NAMES)
def test_the_textbook_loop_computes_what_fused_lstm_does(name, stack):
    """In float64, on the same draws: results and all gradients."""
    sizes = {"layers": 2, "bidirectional": VARIANTS[name].given != "reset"} if stack else {}
    workload = Workload.draw(small(name, dtype="float64", **sizes), seed=1)
    ours, loop = (results_of(each, workload) for each in ("fused_lstm reference", TEXTBOOK_LOOP))
    assert list(loop)[6:] == [f"gradient of {weight}" for weight in workload.weights]
    assert_near(loop, ours, 1e-11)
    if name not in ("recompute",):  # which changes no number
        plain = Workload.draw(small(PLAIN, dtype="float64", **sizes), seed=1)
        assert not torch.allclose(loop["output"], results_of(TORCH, plain)["output"], atol=1e-3)


@pytest.mark.parametrize("name", ["lengths", "weight_dropout"])
def test_torch_computes_the_same_where_it_can(name):
    workload = Workload.draw(small(name, dtype="float64", layers=2, bidirectional=True), seed=1)
    assert_near(results_of(TORCH, workload), results_of(TEXTBOOK_LOOP, workload), 1e-11)


def test_a_checkpointed_loop_keeps_less_and_computes_the_same():
    workload = Workload.draw(small("recompute", dtype="float64", layers=2), seed=1)
    assert_near(results_of("textbook loop checkpointed", workload), results_of(TEXTBOOK_LOOP, workload), 1e-11)
    kept = {}
    for contender in contenders_for(workload.case, [])[-2:]:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            results = contender.build(workload).forward(*workload.leaves)
        kept[contender.name] = sum(sizes)
        del results
    assert kept["textbook loop checkpointed"] < 0.5 * kept[TEXTBOOK_LOOP]


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_step_computes_on_the_draws_of_the_others(name):
    """In another dtype; one draw more or less would be another mask."""
    workload = Workload.draw(small(name, layers=2), seed=2)
    step = exact_step(workload, "cpu", seed=3)
    exact = dict(zip(step.names, step(), strict=True))
    assert {value.dtype for value in exact.values()} == {torch.float64}
    assert_near(results_of("fused_lstm reference", workload), exact, 1e-4)
    assert_near(results_of(TEXTBOOK_LOOP, workload), exact, 1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_each_timed_step_draws_anew(name):
    workload = Workload.draw(small(name), seed=2)
    draws = any(part in name for part in ("dropout", "zoneout"))
    for contender in contenders_for(workload.case, ["reference"]):
        if not contender.yardstick:
            step = Step(contender.build(workload), workload)
            assert torch.equal(step()[0], step()[0]) is not draws, contender.name


@pytest.mark.parametrize("name", ["torch.nn.LSTM plain", "fused_lstm reference plain"])
@pytest.mark.parametrize("variant", NAMES)
def test_yardsticks_compute_the_plain_cell_on_the_same_numbers(variant, name):
    workload = Workload.draw(small(variant, layers=2), seed=4)
    plain = replace(workload, case=replace(workload.case, variant=PLAIN))
    assert_near(results_of(name, workload), results_of(TORCH, plain), 1e-5)


def test_weights_are_torchs_and_then_those_of_the_option():
    weights = Workload.draw(small("layer_norm_projections_cell", hidden_size=64, layers=2), seed=5).weights
    plain = Workload.draw(small(PLAIN, hidden_size=64, layers=2), seed=5).weights
    assert list(weights)[: len(plain)] == list(plain)
    for name, weight in plain.items():
        assert torch.equal(weights[name], weight)
    for name in list(weights)[len(plain) :]:
        assert name.startswith("norm_")
        around = 1.0 if "_weight_" in name else 0.0
        assert 0 < (weights[name] - around).abs().max() <= 1 / 8
        assert weights[name].unique().numel() == weights[name].numel()


@pytest.mark.parametrize("name", ["reset", "lengths"])
def test_refill_gives_other_conditions_in_the_same_memory(name):
    workload = Workload.draw(Case(8, 16, 32, variant=name), seed=6)
    tensor = getattr(workload, name)
    before, address = tensor.clone(), tensor.data_ptr()
    workload.refill(7)
    assert getattr(workload, name).data_ptr() == address
    assert not torch.equal(tensor, before)
    assert torch.equal(getattr(workload.as_float64("cpu"), name), tensor)
    if name == "lengths":
        assert (tensor.min() >= 1, tensor[0], tensor.max()) == (True, 32, 32)
        assert tensor.unique().numel() > 5
        assert torch.equal(workload.host_lengths, tensor)
    else:
        assert 0 < tensor.sum() < tensor.numel() / 5


# Who takes part


@pytest.mark.parametrize("name", NAMES)
def test_who_takes_part_on_a_cpu(name):
    torchs_own = [TORCH] if name in ("lengths", "weight_dropout") else []
    loops = [TEXTBOOK_LOOP, *(["textbook loop checkpointed"] if name == "recompute" else [])]
    yardsticks = ["torch.nn.LSTM plain", "fused_lstm reference plain", "fused_lstm torch plain"]
    ours = ["fused_lstm reference", "fused_lstm torch"]
    contenders = contenders_for(small(name), ["reference", "torch"])
    assert [c.name for c in contenders] == [*yardsticks, *torchs_own, *ours, *loops]
    assert [c.name for c in contenders if c.yardstick] == yardsticks
    assert [c.name for c in contenders if c.ours] == [*yardsticks[1:], *ours]
    more = contenders_for(small(name), ["reference", "torch"], compile_loop=True, loop=False)
    assert [c.name for c in more] == [*(c.name for c in contenders), "textbook loop compiled"]


def test_who_takes_part_on_cuda():
    contenders = contenders_for(small("zoneout", device="cuda"), ["stepwise"])
    assert [(c.name, c.ours, c.graph, c.yardstick) for c in contenders] == [
        ("torch.nn.LSTM plain", False, False, True),
        ("fused_lstm stepwise plain", True, False, True),
        ("torch.nn.LSTM graph plain", False, True, True),
        ("fused_lstm stepwise graph plain", True, True, True),
        ("fused_lstm stepwise", True, False, False),
        ("fused_lstm stepwise graph", True, True, False),
        (TEXTBOOK_LOOP, False, False, False),
    ]
    few = contenders_for(small("zoneout", device="cuda"), ["stepwise"], graphs=False)
    assert [c.name for c in few] == [name.replace("reference", "stepwise") for name in ORDINARY]


@pytest.mark.parametrize("name", NAMES)
def test_backends_are_asked_for_the_variant(name):
    """torch's own LSTM knows none of them; what it lacks is told."""
    [contender] = (c for c in contenders_for(small(name), ["torch"]) if c.name == "fused_lstm torch")
    lacking = {"lengths": "takes no lengths", "recompute": "keeps the gates"}
    words = lacking.get(name, "knows no " + re.sub(r"(layer_norm)_.*", r"\1", name))
    with pytest.raises(CannotRun, match=f"cannot run this: torch.nn.LSTM {words}"):
        contender.build(Workload.draw(small(name), seed=1))


def test_the_compiled_loop_is_compiled_but_for_its_draws(monkeypatch):
    """torch.compile draws in another way: what it compiles must not draw."""
    compiled = []

    def compile(function):
        def run(*inputs):
            before = torch.get_rng_state()
            results = function(*inputs)
            compiled.append(torch.equal(torch.get_rng_state(), before))
            return results

        return run

    monkeypatch.setattr(torch, "compile", compile)
    workload = Workload.draw(small("zoneout"), seed=1)
    contender = contenders_for(workload.case, [], compile_loop=True)[-1]
    results = Step(contender.build(workload), workload).checked(3)
    assert_near(results, results_of(TEXTBOOK_LOOP, workload), 0)
    assert compiled == [True, True]


# Checked and measured


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_passes_its_gate(name):
    case = wide(name)
    record = measured(case=case)
    assert problems(record) == []
    assert record["variant"] == name
    assert record["label"] == f"bf16 H=64 N=8 T=8 {name}"
    assert Case(**record["case"], variant=record["variant"]) == case
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    torchs_own = TORCH in [entry["name"] for entry in record["contenders"]]
    for entry in record["contenders"]:
        assert (entry["status"], entry["yardstick"]) == ("measured", entry["name"].endswith(" plain"))
        if entry["yardstick"]:
            assert entry["accuracy"] is entry["speedup"] is entry["over_plain"] is None
        else:
            assert entry["accuracy"]["passed"]
    ours, loop = entry_of(record, "fused_lstm reference"), entry_of(record, TEXTBOOK_LOOP)
    assert list(ours["speedup"]) == ([TORCH] if torchs_own else []) + [TEXTBOOK_LOOP]
    assert list(ours["over_plain"]) == ["torch.nn.LSTM plain", "fused_lstm reference plain"]
    assert list(loop["over_plain"]) == ["torch.nn.LSTM plain"]
    assert ours["accuracy"]["quantities"].keys() == {
        *("output", "h_n", "c_n"),
        *(f"gradient of {leaf}" for leaf in ("input", "h_0", "c_0", *Workload.draw(case, 1).weights)),
    }


def test_the_plain_record_has_its_variant_and_no_multiples():
    record = measure(wide(PLAIN), contenders_for(wide(PLAIN), ["reference"]), **OPTIONS)
    assert record["variant"] == PLAIN
    assert {(entry["yardstick"], entry["over_plain"]) for entry in record["contenders"]} == {(False, None)}


def wrong_cell(name, cell):
    """The textbook loop with another cell, said to be ours."""

    def build(workload):
        with mock.patch.dict(VARIANTS, {name: replace(VARIANTS[name], cell=cell)}):
            return module._textbook_loop(workload)

    return Contender("wrong", build, ours=True)


def wrong_options(name, **options):
    """Ours with other options."""

    def build(workload):
        with mock.patch.dict(VARIANTS, {name: replace(VARIANTS[name], options=options)}):
            return module._fused_lstm("reference")(workload)

    return Contender("wrong", build, ours=True)


def wrong_condition(name, change):
    """Ours, given something else each time."""

    def build(workload):
        lstm = workload.case.lstm(fused_lstm.LSTM, backend="reference")
        lstm.load_state_dict(workload.weights)

        def forward(input, h_0, c_0):
            output, state = lstm(input, (h_0, c_0), **{name: change(getattr(workload, name))})
            return output, *state

        return Model(forward, dict(lstm.named_parameters()))

    return Contender("wrong", build, ours=True)


def swapped_gates(w):
    """Norms that belong to other gates."""
    w = {**w, "norm_gates_weight": w["norm_gates_weight"].roll(64), "norm_gates_bias": w["norm_gates_bias"].roll(64)}
    return VARIANTS["layer_norm_gates"].cell(w)


def old_cell_peephole(w):
    """o sees nothing."""
    return peephole_cell({**w, "weight_ph": torch.cat((w["weight_ph"][:128], 0 * w["weight_ph"][128:]))})


def no_biases(w):
    return carried_norm_cell({**w, "norm_ih_bias": 0 * w["norm_ih_bias"], "norm_hh_bias": 0 * w["norm_hh_bias"]})


def raw_cell_carried(w):
    """Right up to c, of which the next step gets the one without its norm."""
    return projection_norm_cell({**w, "bias_ih": w["bias_ih"] + w["norm_ih_bias"] + w["norm_hh_bias"]})


def with_biases(w):
    return carried_norm_cell({**w, "norm_ih_bias": 0 * w["norm_ih_weight"], "norm_hh_bias": 0 * w["norm_hh_weight"]})


@pytest.mark.parametrize(
    ("name", "contender"),
    [
        ("layer_norm_gates", wrong_cell("layer_norm_gates", swapped_gates)),
        ("layer_norm_projections", wrong_cell("layer_norm_projections", with_biases)),
        ("layer_norm_projections_cell", wrong_cell("layer_norm_projections_cell", no_biases)),
        ("layer_norm_projections_cell", wrong_cell("layer_norm_projections_cell", raw_cell_carried)),
        ("peephole", wrong_cell("peephole", old_cell_peephole)),
        ("zoneout", wrong_options("zoneout", zoneout=(0.1, 0.0))),
        ("zoneout", wrong_options("zoneout", zoneout=(0.1, 0.12))),
        ("zoneout", wrong_options("zoneout")),
        ("recurrent_dropout", wrong_options("recurrent_dropout", recurrent_dropout=0.3)),
        ("recurrent_dropout", wrong_options("recurrent_dropout")),
        ("weight_dropout", wrong_options("weight_dropout", weight_dropout=0.4)),
        ("weight_dropout", wrong_options("weight_dropout", weight_dropout=0.5, recurrent_dropout=0.1)),
        ("reset", wrong_condition("reset", lambda reset: reset.roll(1, 0))),
        ("reset", wrong_condition("reset", torch.zeros_like)),
        ("lengths", wrong_condition("lengths", lambda lengths: (lengths + 1).clamp(max=8))),
        ("lengths", wrong_condition("lengths", lambda lengths: lengths.flip(0))),
    ],
)
def test_a_wrong_variant_fails_the_gate_and_shows_nothing(name, contender):
    record = measured(contender, case=wide(name))
    entry = entry_of(record, "wrong")
    assert entry["status"] == "measured"
    assert not entry["accuracy"]["passed"]
    assert entry["speedup"] is entry["over_plain"] is None
    [line] = problems(record)
    assert line.startswith(f"bf16 H=64 N=8 T=8 {name}: wrong: FAILED the accuracy check: ")
    [row] = (row for row in detail_rows(record) if row[0] == "wrong")
    shown = dict(zip(detail_header(record), row, strict=True))
    assert shown.pop("check") == "FAILED"
    assert set(list(shown.values())[3:]) == {"-"}
    assert re.search(r"\d FAILED$", overview([record]))


def test_without_the_loop_nothing_is_checked_but_yardsticks_are_timed():
    def broken(_):
        raise RuntimeError("no room")

    case = wide("peephole")
    record = measure(case, [*contenders_for(case, ["reference"])[:-1], Contender(TEXTBOOK_LOOP, broken)], **OPTIONS)
    ours = entry_of(record, "fused_lstm reference")
    assert (ours["status"], ours["reason"]) == ("failed", "nothing to check it against: textbook loop failed")
    assert entry_of(record, "torch.nn.LSTM plain")["status"] == "measured"
    assert len(problems(record)) == 2


def test_multiples_and_speedups_follow_the_clock(monkeypatch):
    """On a clock that takes 1 s for torch's plain step, 2 s for ours, 3 s for the variant, 12 s for the loop."""
    now = 0.0
    case = wide("lengths")
    seconds = dict(zip([*ORDINARY[:2], TORCH, *ORDINARY[2:]], (1.0, 2.0, 6.0, 3.0, 12.0), strict=True))

    def lasting(contender):
        def build(workload):
            model = contender.build(workload)

            def forward(*inputs):
                nonlocal now
                now += seconds[contender.name]
                return model.forward(*inputs)

            return model._replace(forward=forward)

        return replace(contender, build=build)

    monkeypatch.setattr(measuring, "timer_for", lambda _: ClockTimer(lambda: now))
    record = measure(case, [lasting(each) for each in contenders_for(case, ["reference"])], **OPTIONS)
    ours = entry_of(record, "fused_lstm reference")
    assert ours["speedup"] == {TORCH: 2.0, TEXTBOOK_LOOP: 4.0}
    assert ours["over_plain"] == {"torch.nn.LSTM plain": 3.0, "fused_lstm reference plain": 1.5}
    assert detail_header(record) == (
        *("contender", "ms", "±", "× torch", "× loop", "÷ torch\nplain", "÷ own\nplain", "MiB", "check"),
    )
    assert detail_rows(record) == [
        ("torch.nn.LSTM plain", "1000.000", "0%", "-", "-", "-", "-", "-", "-"),
        ("fused_lstm reference plain", "2000.000", "0%", "-", "-", "-", "-", "-", "-"),
        ("torch.nn.LSTM", "6000.000", "0%", "-", "2.00", "6.00", "6.00", "-", "passed"),
        ("fused_lstm reference", "3000.000", "0%", "2.00", "4.00", "3.00", "1.50", "-", "passed"),
        ("textbook loop", "12000.000", "0%", "0.50", "-", "12.00", "-", "-", "passed"),
    ]
    assert overview([record]).splitlines() == [
        "ms (times faster than the loop)  nn.LSTM plain  reference plain          nn.LSTM        reference       loop",
        "bf16 H=64 N=8 T=8 lengths             1000.000         2000.000  6000.000 (2.00)  3000.000 (4.00)  12000.000",
    ]


def test_the_overview_has_a_table_for_variants():
    case, plain = wide("peephole"), wide(PLAIN)
    records = [measured(case=case), measure(plain, contenders_for(plain, ["reference"]), **OPTIONS)]
    first, second = overview(records).split("\n\n")
    assert first.splitlines()[0].split() == ["ms", "(times", "faster)", "nn.LSTM", "reference", "loop"]
    assert first.splitlines()[1].startswith("bf16 H=64 N=8 T=8  ")
    assert second.splitlines()[1].startswith("bf16 H=64 N=8 T=8 peephole  ")
    broken = records[0] | {"error": "Traceback\nMemoryError: no room"}
    assert overview([broken]).splitlines()[1].split()[-1] == "error"
    assert remarks(broken) == ["the case failed: MemoryError: no room"]


# The command

TINY = ["bench", "--hidden-size", "64", "--batch-size", "4", "--steps", "4", "--repeats", "2", "--warmup", "1"]
TINY += ["--seed", "1", "--device", "cpu"]


def test_a_list_of_variants(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    path = tmp_path / "results.json"
    assert main([*TINY, "--variant", "plain,layer_norm_gates, lengths", "--json", str(path)]) == 0
    records = json.loads(path.read_text())["records"]
    assert [record["variant"] for record in records] == ["plain", "layer_norm_gates", "lengths"]
    assert [entry["name"] for entry in records[0]["contenders"]] == [TORCH, "fused_lstm reference", CELL_LOOP]
    assert [entry["name"] for entry in records[1]["contenders"]] == ORDINARY
    output = capsys.readouterr().out
    titles = ["fp32 H=64 N=4 T=4", "fp32 H=64 N=4 T=4 layer_norm_gates", "fp32 H=64 N=4 T=4 lengths"]
    assert [line.strip() for line in output.splitlines() if "N=4" in line] == titles
    ours = records[1]["contenders"][2]
    [row] = re.findall(
        r"^ *fused_lstm reference +(\d.*)$", output.split(titles[1])[1].split(titles[2])[0], re.MULTILINE
    )
    multiples = [f"{multiple:.2f}" for multiple in ours["over_plain"].values()]
    assert row.split()[2:] == [f"{ours['speedup'][TEXTBOOK_LOOP]:.2f}", *multiples, "-", "passed"]
    assert output.count("× torch") == 2  # the plain cell, and the lengths
    assert output.count("The rows called plain are yardsticks") == 1
    assert "÷ own" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "layernorm"], f"--variant is 'layernorm'; give one of {', '.join(VARIANTS)}"),
        (["--variant", "zoneout,"], "--variant is 'zoneout,'; give a value, or several with a comma between two"),
        (
            ["--variant", "plain,reset", "--bidirectional"],
            "--variant reset cannot be --bidirectional: the other direction comes from the future; leave one out",
        ),
        (["--variant", "zoneout", "--no-loop"], "--variant zoneout is checked against the loop; leave --no-loop out"),
        (
            ["--variant", "peephole", "--backend", "torch"],
            "backend 'torch' cannot run this: torch.nn.LSTM knows no peephole; leave --backend out for what can run",
        ),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fused-lstm: {message}")
    assert captured.err.count("\n") == 1


def test_a_backend_that_runs_one_of_the_variants_takes_part(tmp_path):
    path = tmp_path / "results.json"
    assert main([*TINY, "--variant", "plain,peephole", "--backend", "torch", "--no-graphs", "--json", str(path)]) == 0
    plain, peephole = json.loads(path.read_text())["records"]
    assert entry_of(plain, "fused_lstm torch")["status"] == "measured"
    assert entry_of(peephole, "fused_lstm torch")["status"] == "cannot run"
    assert entry_of(peephole, "fused_lstm torch plain")["status"] == "measured"


def test_a_failed_check_exits_with_1(monkeypatch, capsys):
    from fused_lstm.bench import benchmark

    def contenders(case, *_, **__):
        return [*contenders_for(case, []), wrong_options("zoneout")]

    monkeypatch.setattr(benchmark, "contenders_for", contenders)
    monkeypatch.setenv("COLUMNS", "110")
    assert main([*TINY, "--variant", "zoneout"]) == 1
    output = capsys.readouterr().out
    [row] = re.findall(r"^ *wrong +(.*)$", output, re.MULTILINE)
    assert row.split()[2:] == ["-", "-", "-", "-", "FAILED"]
    assert re.search(
        r"^wrong: FAILED the accuracy check: .*: error \S+, allowed \S+, torch's own", output, re.MULTILINE
    )


def test_help_names_every_variant(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["bench", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--variant" in words
    for name in VARIANTS:
        assert name in words


@pytest.mark.parametrize("name", ["layer_norm_gates", "zoneout", "lengths"])
def test_kernels_can_be_timed(name, device):
    """Interpreted where there is no GPU: the kernels, their backward, the gate."""
    case = Case(32, 4, 2, dtype="bfloat16", device=device, variant=name)
    contenders = [c for c in contenders_for(case, ["stepwise"], graphs=False) if not c.yardstick]
    record = measure(case, contenders, **OPTIONS | {"repeats": 1})
    ours = entry_of(record, "fused_lstm stepwise")
    assert (ours["status"], ours["backend"]["name"]) == ("measured", "stepwise"), ours
    assert ours["accuracy"]["passed"], remarks(record)
