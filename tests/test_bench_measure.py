"""A case from the first number to the record, with contenders that are wrong, slow, broken or absent."""

import json
import re

import pytest
import torch

from fused_lstm.bench import measure as module
from fused_lstm.bench.contenders import CELL_LOOP, TORCH, CannotRun, Contender, Model, contenders_for
from fused_lstm.bench.measure import measure, problems
from fused_lstm.bench.results_table import DETAIL_HEADER, detail_rows, machine_line, overview, plain_table, remarks
from fused_lstm.bench.timing import ClockTimer
from fused_lstm.bench.workload import Case

# Wide enough for the largest of many errors to be steady: see the gate.
CASE = Case(hidden_size=64, batch_size=8, steps=8, dtype="bfloat16")
OPTIONS = {"repeats": 3, "warmup": 1, "seed": 1, "sample_seconds": 0.0}


class Scaled(torch.autograd.Function):
    """The identity, with a gradient that is a tenth too large."""

    @staticmethod
    def forward(_, tensor):
        return tensor.view_as(tensor)

    @staticmethod
    def backward(_, gradient):
        return gradient * 1.1


def planted(name, change=lambda *results: results, before=lambda *inputs: inputs):
    """torch.nn.LSTM with something done to its inputs and results, said to be ours."""

    def build(workload):
        model = contenders_for(workload.case, [])[0].build(workload)

        def forward(*inputs):
            return change(*model.forward(*before(*inputs)))

        return Model(forward, model.parameters)

    return Contender(name, build, ours=True)


def entry_of(record, name):
    [entry] = (entry for entry in record["contenders"] if entry["name"] == name)
    return entry


def measured(*contenders, case=CASE, **options):
    return measure(case, [*contenders_for(case, ["reference"]), *contenders], **OPTIONS | options)


@pytest.fixture(scope="module")
def record():
    return measured(
        planted("wrong output", change=lambda output, h, c: (output * 1.1, h, c)),
        planted("wrong gradient", before=lambda x, h, c: (Scaled.apply(x), h, c)),
        planted("NaN", change=lambda output, h, c: (output, h, c * torch.nan)),
        planted("raises", change=lambda *_: 1 / 0),
        Contender("absent", cannot_run, ours=True),
    )


def cannot_run(_):
    raise CannotRun("not in this case")


def test_what_is_right_passes_and_has_a_speedup(record):
    for name in (TORCH, "fused_lstm reference", CELL_LOOP):
        entry = entry_of(record, name)
        assert entry["status"] == "measured"
        assert entry["reason"] is entry["traceback"] is None
        assert entry["accuracy"]["passed"]
        assert len(entry["time"]["samples_s"]) == 3
        assert entry["time"]["median_s"] > 0
        assert entry["peak_memory_bytes"] is None  # on a CPU nothing counts it
    medians = {name: entry_of(record, name)["time"]["median_s"] for name in (TORCH, CELL_LOOP)}
    ours = entry_of(record, "fused_lstm reference")
    assert ours["speedup"] == {name: pytest.approx(m / ours["time"]["median_s"]) for name, m in medians.items()}
    assert list(entry_of(record, TORCH)["speedup"]) == [CELL_LOOP]
    assert ours["backend"]["name"] == "reference"


def test_the_gate_covers_all_results_and_gradients(record):
    names = [name for name, _ in torch.nn.LSTM(64, 64).named_parameters()]
    gradients = [f"gradient of {name}" for name in ("input", "h_0", "c_0", *names)]
    assert list(entry_of(record, "fused_lstm reference")["accuracy"]["quantities"]) == [
        *("output", "h_n", "c_n"),
        *gradients,
    ]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("wrong output", "output"), ("wrong gradient", "gradient of input"), ("NaN", "c_n")],
)
def test_a_planted_error_fails_the_gate_and_has_no_speedup(record, name, wrong):
    entry = entry_of(record, name)
    assert entry["status"] == "measured"
    assert not entry["accuracy"]["passed"]
    assert not entry["accuracy"]["quantities"][wrong]["passed"]
    assert entry["speedup"] is None
    [line] = (line for line in problems(record) if f": {name}:" in line)
    assert re.search(r"FAILED the accuracy check: .*: error .*, allowed .*, torch's own", line)


def test_only_the_wrong_gradient_fails(record):
    quantities = entry_of(record, "wrong gradient")["accuracy"]["quantities"]
    assert [name for name, entry in quantities.items() if not entry["passed"]] == ["gradient of input"]


def test_one_that_raises_is_recorded_and_stops_nobody(record):
    entry = entry_of(record, "raises")
    assert (entry["status"], entry["reason"]) == ("failed", "ZeroDivisionError: division by zero")
    assert entry["traceback"].startswith("Traceback (most recent call last):")
    assert entry["accuracy"] is entry["time"] is entry["speedup"] is None


def test_one_that_cannot_run_is_no_problem(record):
    entry = entry_of(record, "absent")
    assert (entry["status"], entry["reason"]) == ("cannot run", "not in this case")
    assert len(problems(record)) == 4
    assert not any("absent" in line for line in problems(record))


@pytest.mark.parametrize(
    ("text", "status"), [("backend 'x' cannot run this: no room", "cannot run"), ("expected 2, got 3", "failed")]
)
def test_a_backend_may_see_late_that_it_cannot_run(text, status):
    def refuse(*_):
        raise ValueError(text)

    entry = entry_of(measured(planted("late", change=refuse)), "late")
    assert entry["status"] == status
    assert entry["reason"] in (text, f"ValueError: {text}")
    assert (entry["traceback"] is None) == (status == "cannot run")


def test_the_record_is_complete_and_json(record):
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record["case"] == {
        **{"hidden_size": 64, "batch_size": 8, "steps": 8, "input_size": None, "layers": 1, "bidirectional": False},
        **{"dtype": "bfloat16", "device": "cpu", "tf32": True},
    }
    assert (record["label"], record["seed"], record["repeats"], record["warmup"]) == ("bf16 H=64 N=8 T=8", 1, 3, 1)
    assert record["exact"] == "float64 on cpu"
    assert record["error"] is record["device_lost"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["date"])
    wanted = {"gpu", "driver", "torch", "triton", "cudnn", "cuda", "python", "commit", "dirty", "cpu", "device"}
    assert wanted <= set(record["machine"])
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["gpu"] is None


def test_the_table_shows_a_speedup_beside_a_passed_check_only(record):
    rows = {row[0]: dict(zip(DETAIL_HEADER, row, strict=True)) for row in detail_rows(record)}
    assert re.fullmatch(r"\d+\.\d\d", rows["fused_lstm reference"]["× torch"])
    assert rows["fused_lstm reference"]["check"] == "passed"
    assert rows["wrong output"] | {"ms": "", "±": ""} == {
        **{"contender": "wrong output", "ms": "", "±": "", "× torch": "-", "× loop": "-", "MiB": "-"},
        "check": "FAILED",
    }
    assert rows["raises"]["ms"] == "failed"
    assert rows["absent"]["ms"] == "cannot run"
    assert [line.split(":")[0] for line in remarks(record)] == [
        *("wrong output", "wrong gradient", "NaN", "raises", "absent")
    ]
    head, line = overview([record]).splitlines()
    assert head.split() == [
        *("ms", "(times", "faster)", "nn.LSTM", "reference", "loop"),
        *("wrong", "output", "wrong", "gradient", "NaN", "raises", "absent"),
    ]
    cells = line.removeprefix("bf16 H=64 N=8 T=8").split()
    assert [cell for cell in cells if cell in ("FAILED", "error", "n/a")] == ["FAILED"] * 3 + ["error", "n/a"]


def test_speedups_follow_the_clock(monkeypatch):
    """On a clock that takes 6 s for torch's step and 2 s for ours, ours is 3 times faster."""
    now = 0.0

    def lasting(seconds, name, ours):
        def build(workload):
            model = contenders_for(workload.case, [])[0].build(workload)

            def forward(*inputs):
                nonlocal now
                now += seconds
                return model.forward(*inputs)

            return Model(forward, model.parameters)

        return Contender(name, build, ours=ours)

    monkeypatch.setattr(module, "timer_for", lambda _: ClockTimer(lambda: now))
    record = measure(CASE, [lasting(6.0, TORCH, False), lasting(2.0, "fused_lstm x", True)], **OPTIONS)
    assert entry_of(record, "fused_lstm x")["speedup"] == {TORCH: 3.0}
    assert entry_of(record, TORCH)["time"]["samples_s"] == [6.0, 6.0, 6.0]
    assert entry_of(record, TORCH)["speedup"] == {}
    assert detail_rows(record)[1] == ("fused_lstm x", "2000.000", "0%", "3.00", "-", "-", "passed")
    assert overview([record]).splitlines()[1].split()[-3:] == ["6000.000", "2000.000", "(3.00)"]


def test_without_torchs_result_nothing_is_checked_or_timed():
    def broken(_):
        raise RuntimeError("no such cuDNN")

    record = measure(CASE, [Contender(TORCH, broken), *contenders_for(CASE, ["reference"])[1:]], **OPTIONS)
    assert entry_of(record, TORCH)["reason"] == "RuntimeError: no such cuDNN"
    for name in ("fused_lstm reference", CELL_LOOP):
        entry = entry_of(record, name)
        assert entry["status"] == "failed"
        assert entry["reason"] == f"nothing to check it against: {TORCH} failed"
        assert entry["time"] is entry["speedup"] is None
    assert len(problems(record)) == 2


def test_a_torch_step_that_breaks_in_the_check_is_no_measure():
    steps = 0

    def break_third(*results):
        nonlocal steps
        steps += 1
        if steps > 2:  # built and warm, then checked
            raise RuntimeError("out of memory")
        return results

    torch_like = planted(TORCH, change=break_third)
    record = measure(CASE, [torch_like, *contenders_for(CASE, ["reference"])[1:]], **OPTIONS)
    assert entry_of(record, TORCH)["reason"] == "RuntimeError: out of memory"
    assert entry_of(record, "fused_lstm reference")["accuracy"] is None


def test_one_that_breaks_while_timed_drops_out():
    steps = 0

    def break_late(*results):
        nonlocal steps
        steps += 1
        if steps > 7:
            raise RuntimeError("out of memory")
        return results

    record = measured(planted("tired", change=break_late))
    entry = entry_of(record, "tired")
    assert (entry["status"], entry["reason"]) == ("failed", "RuntimeError: out of memory")
    assert entry["accuracy"]["passed"]
    assert entry["time"] is entry["speedup"] is None
    assert entry_of(record, TORCH)["status"] == "measured"


def test_a_case_that_fails_as_a_whole_is_a_record_too(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room for the inputs")

    monkeypatch.setattr(module.Workload, "draw", no_room)
    record = measured()
    assert "no room for the inputs" in record["error"]
    [line] = problems(record)
    assert line.startswith("bf16 H=64 N=8 T=8: ")
    assert line.endswith("no room for the inputs")
    assert remarks(record)[0].startswith("the case failed: ")
    assert "error" in overview([record]).splitlines()[1]
    assert {entry["status"] for entry in record["contenders"]} == {"failed"}


def test_after_a_lost_device_nobody_runs(monkeypatch):
    monkeypatch.setattr(module, "_usable", lambda _: False)
    built = []

    def build(workload):
        built.append(workload)
        raise AssertionError("must not run")

    record = measure(
        CASE,
        [contenders_for(CASE, [])[0], planted("breaker", change=lambda *_: 1 / 0), Contender("next", build, ours=True)],
        **OPTIONS,
    )
    assert record["device_lost"] == "breaker"
    assert entry_of(record, "next")["reason"] == "not run: breaker left the device unusable"
    assert not built


def test_excluded_contenders_are_failed_and_not_run():
    record = measured(excluded={"fused_lstm reference": "hung before"})
    entry = entry_of(record, "fused_lstm reference")
    assert (entry["status"], entry["reason"], entry["time"]) == ("failed", "hung before", None)
    assert entry_of(record, CELL_LOOP)["status"] == "measured"


def test_turns_are_announced():
    turns = []
    measure(CASE, contenders_for(CASE, [], loop=False), on_turn=lambda *turn: turns.append(turn), **OPTIONS)
    assert turns == [(TORCH, "build"), (TORCH, "float64"), (TORCH, "accuracy"), *[(TORCH, "time")] * 5]


def test_the_check_is_on_other_numbers_than_the_build():
    seen = []

    def note(x, h, c):
        seen.append(x.detach().clone())
        return x, h, c

    measured(planted("watched", before=note))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_every_dtype_passes_its_own_gate(dtype):
    record = measured(case=Case(64, 16, 16, dtype=dtype))
    assert entry_of(record, "fused_lstm reference")["accuracy"]["passed"]
    assert problems(record) == []


@pytest.mark.parametrize(
    ("case", "label"),
    [
        (Case(8, 2, 3, device="cuda"), "tf32 H=8 N=2 T=3"),
        (Case(8, 2, 3, device="cuda", tf32=False), "fp32 (no TF32) H=8 N=2 T=3"),
        (Case(8, 2, 3), "fp32 H=8 N=2 T=3"),
        (Case(8, 2, 3, 5, 2, True, "float16"), "fp16 H=8 N=2 T=3 I=5 2 layers bidirectional"),
    ],
)
def test_labels(case, label):
    assert case.label == label


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_one_switch_for_an_lstm_and_a_product_and_is_put_back(tf32):
    cudnn = torch.backends.cudnn

    def switches():
        lstm = cudnn.rnn.fp32_precision == "tf32" if hasattr(cudnn, "rnn") else cudnn.allow_tf32
        return lstm, torch.get_float32_matmul_precision()

    before = switches()
    with module.float32_precision(Case(8, 2, 3, device="cuda", tf32=tf32)):
        assert switches() == ((True, "high") if tf32 else (False, "highest"))
    assert switches() == before
    with module.float32_precision(Case(8, 2, 3, device="cpu", tf32=not tf32)):
        assert switches() == before


def test_machine_line():
    machine = dict.fromkeys(("gpu", "driver", "triton", "cuda", "cudnn", "commit", "dirty"))
    assert machine_line(machine | {"cpu": "Slow", "torch": "2.7"}) == "Slow, torch 2.7"
    full = {"gpu": "Fast", "cpu": "Slow", "torch": "2.7", "triton": "3.3", "driver": "580", "cuda": "13.0"}
    full |= {"cudnn": 91000, "commit": "abc", "dirty": True}
    assert (
        machine_line(full) == "Fast, torch 2.7, Triton 3.3, driver 580, CUDA 13.0, cuDNN 91000, commit abc with changes"
    )


def test_plain_table():
    assert plain_table(("a", "bb"), [("ccc", "d"), ("e", "ffff")]) == "a      bb\nccc     d\ne    ffff"
