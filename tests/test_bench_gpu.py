"""What of the benchmarks needs a GPU: events, graphs, memory, the worker."""

import os
import sys
import time

import pytest
import torch

from fused_lstm.bench.contenders import TORCH, Contender, GraphStep, Model, Step, chosen_backends, contenders_for
from fused_lstm.bench.machine import describe_machine
from fused_lstm.bench.measure import measure, problems
from fused_lstm.bench.supervisor import Supervisor
from fused_lstm.bench.timing import CudaTimer
from fused_lstm.bench.variants import VARIANTS
from fused_lstm.bench.workload import Case, Workload

pytestmark = pytest.mark.gpu

OPTIONS = {"repeats": 3, "warmup": 2, "seed": 1, "sample_seconds": 0.001}


def case(dtype="bfloat16", **sizes):
    return Case(**{"hidden_size": 128, "batch_size": 16, "steps": 16} | sizes, dtype=dtype, device="cuda")


def test_events_time_the_gpu_and_not_the_launch():
    timer = CudaTimer("cuda")
    cycles = 20_000_000  # 10 ms and more at any clock up to 2 GHz; the launch takes microseconds

    def step():
        torch.cuda._sleep(cycles)

    timer(step, 1)
    seconds = timer(step, 3)
    assert 0.005 < seconds < 0.5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("layers", [1, 2])
def test_every_contender_is_measured(dtype, layers):
    sizes = case(dtype, layers=layers, bidirectional=layers == 2)
    backends = chosen_backends(None, "cuda")
    record = measure(sizes, contenders_for(sizes, backends, others=False), **OPTIONS)
    assert problems(record) == []
    for entry in record["contenders"]:
        if entry["status"] == "cannot run":
            assert entry["ours"]
            continue
        assert entry["status"] == "measured", entry
        assert entry["time"]["median_s"] > 0
        assert entry["peak_memory_bytes"] > 0
        assert (entry["speedup"] is not None) == entry["accuracy"]["passed"]
    [graph] = (entry for entry in record["contenders"] if entry["name"] == f"{TORCH} graph")
    assert graph["accuracy"]["passed"]
    assert record["exact"] == "float64 on cuda"


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_contender_of_a_variant_is_measured(name, dtype):
    """Also from a graph, which draws under the same seed what the loop draws without one."""
    sizes = case(dtype, variant=name)
    record = measure(sizes, contenders_for(sizes, chosen_backends(None, "cuda")), **OPTIONS)
    assert problems(record) == []
    for entry in record["contenders"]:
        if entry["status"] == "cannot run":
            assert entry["ours"]
            continue
        assert entry["status"] == "measured", entry
        assert entry["yardstick"] or entry["accuracy"]["passed"], entry
    stepwise = [entry["name"] for entry in record["contenders"] if entry["over_plain"] and entry["ours"]]
    assert {"fused_lstm stepwise", "fused_lstm stepwise graph"} <= set(stepwise)


def test_a_graph_reads_fresh_numbers():
    sizes = case("float32")
    workload = Workload.draw(sizes, seed=1)
    step = Step(contenders_for(sizes, [])[0].build(workload), workload)
    graph = GraphStep(step)
    workload.refill(2)
    replayed = graph.checked()
    for name, value in zip(step.names, step(), strict=True):
        torch.testing.assert_close(replayed[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_an_unwritten_result_is_nan_in_the_check():
    workload = Workload.draw(case(), seed=1)

    def forward(input, h_0, c_0):
        unwritten = torch.empty_like(input)  # shaped as the output, and the first to ask: it gets the output's block
        return unwritten + 0 * input.sum(), h_0 * 1, c_0 * 1

    assert Step(Model(forward, {}), workload).checked()["output"].isnan().all()


def test_a_capture_that_fails_stops_nobody():
    sizes = case()

    def build(workload):
        model = contenders_for(sizes, [])[0].build(workload)

        def forward(*inputs):
            output, h_n, c_n = model.forward(*inputs)
            assert not output.isnan().any().item()  # the host cannot look while the graph is captured
            return output, h_n, c_n

        return Model(forward, model.parameters)

    contenders = [*contenders_for(sizes, [], loop=False), Contender("looks", build, graph=True)]
    contenders.append(Contender("after", contenders[0].build))
    record = measure(sizes, contenders, **OPTIONS)
    statuses = {entry["name"]: entry["status"] for entry in record["contenders"]}
    assert statuses == {TORCH: "measured", f"{TORCH} graph": "measured", "looks": "failed", "after": "measured"}
    assert record["device_lost"] is None


def test_the_machine():
    facts = describe_machine("cuda")
    assert facts["gpu"] == torch.cuda.get_device_name()
    assert facts["driver"]
    assert facts["cudnn"] == torch.backends.cudnn.version()
    assert facts["cuda"] == torch.version.cuda


def test_a_worker_that_loses_the_device(tmp_path):
    """A device-side assertion makes the device unusable to the worker; the case is measured again without its maker."""
    breaker = """
import torch
from fused_lstm.bench import case_worker, contenders

def build(workload):
    model = contenders.contenders_for(workload.case, [])[0].build(workload)
    def forward(*inputs):
        torch.zeros(2, device="cuda")[torch.tensor([5], device="cuda")]
        return model.forward(*inputs)
    return contenders.Model(forward, model.parameters)

found = contenders.contenders_for
def with_breaker(case, backends, **options):
    return [*found(case, backends, **options), contenders.Contender("breaker", build, ours=True)]

case_worker.contenders_for = with_breaker
case_worker.main()
"""
    script = tmp_path / "worker.py"
    script.write_text(breaker)
    command = [sys.executable, str(script), "cuda"]
    supervisor = Supervisor(command, os.environ, tmp_path / "worker.log", silence=60.0)
    few = {"backends": [], "graphs": False, "loop": False, "others": False}
    try:
        record = supervisor.measure(case(), few, OPTIONS, time.monotonic() + 120)
    finally:
        supervisor.close()
    assert [entry["name"] for entry in record["contenders"]] == [TORCH, "breaker"]
    assert record["contenders"][0]["status"] == "measured"
    assert record["contenders"][1]["status"] == "failed"
    assert record["contenders"][1]["reason"].startswith("left the device unusable: ")
