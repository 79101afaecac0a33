"""`fused-lstm bench` as a user runs it."""

import json
import re

import pytest
from command import run

import fused_lstm
from fused_lstm.bench import benchmark
from fused_lstm.bench.cli import main
from fused_lstm.bench.contenders import CELL_LOOP, TORCH, Contender, Model, contenders_for
from fused_lstm.bench.machine import describe_machine
from fused_lstm.bench.measure import new_record

TINY = ["bench", "--hidden-size", "64", "--batch-size", "4", "--steps", "4", "--dtype", "bfloat16"]
TINY += ["--repeats", "2", "--warmup", "1", "--seed", "1", "--device", "cpu"]


def test_a_grid_with_json(tmp_path):
    path = tmp_path / "results.json"
    done = run([*TINY, "--batch-size", "4,8", "--json", str(path)], COLUMNS="100")
    assert (done.returncode, done.stderr) == (0, "")
    records = json.loads(path.read_text())["records"]
    assert [record["label"] for record in records] == ["bf16 H=64 N=4 T=4", "bf16 H=64 N=8 T=4"]
    for record in records:
        assert [entry["name"] for entry in record["contenders"]] == [TORCH, "fused_lstm reference", CELL_LOOP]
        assert {entry["status"] for entry in record["contenders"]} == {"measured"}
        assert {"gpu", "cpu", "driver", "torch", "triton", "cudnn", "commit", "dirty"} <= set(record["machine"])
        assert record["seed"] == 1
    [median] = (
        entry["time"]["median_s"] for entry in records[1]["contenders"] if entry["name"] == "fused_lstm reference"
    )
    speedup = records[1]["contenders"][1]["speedup"]
    [row] = re.findall(r"^ *fused_lstm reference +(.*)$", done.stdout.split("N=8")[1], re.MULTILINE)
    shown = row.split()
    assert shown[0] == f"{median * 1e3:.3f}"
    assert shown[2:] == [f"{speedup[TORCH]:.2f}", f"{speedup[CELL_LOOP]:.2f}", "-", "passed"]
    assert done.stdout.rstrip().endswith("Peak memory is measured on CUDA only.")


def test_options_reach_the_measurement(tmp_path):
    path = tmp_path / "results.json"
    sizes = ["--layers", "2", "--bidirectional", "--input-size", "5"]
    status = main([*TINY, *sizes, "--backend", "auto", "--no-loop", "--no-tf32", "--json", str(path)])
    assert status == 0
    [record] = json.loads(path.read_text())["records"]
    assert record["case"] == {
        **{"hidden_size": 64, "batch_size": 4, "steps": 4, "input_size": 5, "layers": 2, "bidirectional": True},
        **{"dtype": "bfloat16", "device": "cpu", "tf32": False},
    }
    assert [entry["name"] for entry in record["contenders"]] == [TORCH, "fused_lstm auto"]
    assert (record["repeats"], record["warmup"], record["seed"]) == (2, 1, 1)


def test_a_failed_check_shows_no_speedup_and_exits_with_1(monkeypatch, capsys):
    def wrong(workload):
        model = contenders_for(workload.case, [])[0].build(workload)
        return Model(lambda *inputs: tuple(2 * result for result in model.forward(*inputs)), model.parameters)

    def contenders(case, *_, **__):
        return [contenders_for(case, [])[0], Contender("fused_lstm wrong", wrong, ours=True)]

    monkeypatch.setattr(benchmark, "contenders_for", contenders)
    assert main(TINY) == 1
    output = capsys.readouterr().out
    [row] = re.findall(r"^ *fused_lstm wrong +(.*)$", output, re.MULTILINE)
    assert row.split()[2:] == ["-", "-", "-", "FAILED"]
    assert re.search(
        r"^fused_lstm wrong: FAILED the accuracy check: .*: error \S+, allowed \S+, torch's own \S+$",
        output,
        re.MULTILINE,
    )


def empty_record(case):
    return new_record(case, describe_machine("cpu"), {"seed": 1, "repeats": 2, "warmup": 1})


def test_a_lost_device_ends_the_grid(monkeypatch, capsys):
    cases = []

    def measure(case, *_, **__):
        cases.append(case)
        record = empty_record(case)
        record["device_lost"] = "fused_lstm x"
        return record

    monkeypatch.setattr(benchmark, "measure", measure)
    main([*TINY, "--batch-size", "4,8"])
    assert len(cases) == 1
    assert "fused_lstm x left the device unusable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden-size", "0"], "--hidden-size is 0; give a whole number from 1 to 1048576"),
        (["--hidden-size", "64,-2"], "--hidden-size is -2; give a whole number from 1 to 1048576"),
        (["--batch-size", "many"], "--batch-size is 'many'; give whole numbers, as in 256,512"),
        (["--steps", "4,,8"], "--steps is '4,,8'; give a value, or several with a comma between two"),
        (["--input-size", "0"], "--input-size is 0; give a whole number from 1 to 1048576"),
        (["--layers", "-1"], "--layers is -1; give a whole number from 1 to 1048576"),
        (["--repeats", "0"], "--repeats is 0; give a whole number from 1 to 1048576"),
        (["--warmup", "0"], "--warmup is 0; give a whole number from 1 to 1048576"),
        (["--seed", "-1"], "--seed is -1; give a whole number from 0 to 2**63 - 1"),
        (["--dtype", "float63"], "--dtype is 'float63'; give one of bfloat16, float16, float32"),
        (["--dtype", "float64"], "--dtype is 'float64'; give one of bfloat16, float16, float32"),
        (["--device", "tpu9"], "--device tpu9 is no device; give cpu, cuda or cuda:0"),
        (["--device", "meta"], "--device meta is not supported; give cpu, cuda or cuda:0"),
        (["--backend", "fast"], "--backend is 'fast'; give one of auto, "),
        (["--json", "no/such/folder.json"], "cannot write no/such/folder.json: No such file or directory; "),
        (["--hidden", "4"], "No such option: --hidden"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"fused-lstm: {message}")
    assert captured.err.count("\n") == 1


def test_a_backend_that_can_run_nowhere_here(monkeypatch, capsys):
    asked = []

    def refuse(backend, **options):
        asked.append((backend, options["batch_size"]))
        raise ValueError("it needs a GPU")

    monkeypatch.setattr(fused_lstm, "select_backend", refuse)
    assert main([*TINY, "--batch-size", "4,8", "--backend", "stepwise"]) == 2
    assert asked == [("stepwise", 4), ("stepwise", 8)]
    assert capsys.readouterr().err == "fused-lstm: it needs a GPU; leave --backend out for what can run here\n"


def test_kernels_can_be_timed(device, tmp_path):
    """Interpreted where there is no GPU: the kernels, their backward, the gate."""
    path = tmp_path / "results.json"
    options = ["--steps", "2", "--backend", "stepwise", "--no-loop", "--device", device]
    assert main([*TINY, *options, "--json", str(path)]) == 0
    [record] = json.loads(path.read_text())["records"]
    ours = record["contenders"][1]
    assert (ours["name"], ours["status"], ours["backend"]["name"]) == ("fused_lstm stepwise", "measured", "stepwise")
    assert ours["accuracy"]["passed"]


def test_help_names_every_option(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["bench", "--help"]) == 0
    output = capsys.readouterr().out
    names = (
        "hidden-size batch-size steps input-size layers bidirectional variant dtype device backend repeats warmup seed "
    )
    for name in (names + "tf32 no-tf32 graphs no-graphs loop no-loop compile-loop json").split():
        assert f"--{name}" in output
