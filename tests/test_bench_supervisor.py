"""Measuring in a process apart: workers that answer, hang, die, or lose the device."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from fused_lstm.bench import supervisor as supervising
from fused_lstm.bench.contenders import TORCH
from fused_lstm.bench.supervisor import OutOfTime, Supervisor
from fused_lstm.bench.workload import Case

CASE = Case(hidden_size=64, batch_size=4, steps=4, dtype="bfloat16")
CONTENDERS = {"backends": ["reference"], "loop": False}
OPTIONS = {"repeats": 2, "warmup": 1, "sample_seconds": 0.0, "seed": 1}

# A worker that speaks the protocol, and does to contender "bad" what its argument says.
FAKE = """
import json, os, sys, time

def say(**message):
    print(json.dumps(message), flush=True)

say(machine={"gpu": "fake"})
for line in sys.stdin:
    request = json.loads(line)
    excluded = request["measure"]["excluded"]
    lost = None
    for name in ("torch.nn.LSTM", "bad", "good"):
        if name in excluded:
            continue
        say(turn=[name, "time"])
        if name == sys.argv[2]:
            if sys.argv[1] == "hang":
                time.sleep(60)
            if sys.argv[1] == "die":
                print("Segmentation fault", file=sys.stderr)
                os._exit(9)
            if sys.argv[1] == "half":
                sys.stdout.write('{"record": {"device_')
                sys.stdout.flush()
                os._exit(0)
            if sys.argv[1] == "lose":
                lost = name
                break
    entries = [{"name": "bad", "reason": "CUDA error"}]
    say(record={"device_lost": lost, "excluded": excluded, "pid": os.getpid(), "contenders": entries})
    if lost:
        break
"""


@pytest.fixture
def supervise(tmp_path):
    """Makes supervisors of the fake worker and ends them."""
    supervisors = []

    def make(*arguments, silence=30.0, source=FAKE):
        command = [sys.executable, "-c", source, *arguments]
        supervisors.append(Supervisor(command, os.environ, tmp_path / "worker.log", silence))
        return supervisors[-1]

    yield make
    for supervisor in supervisors:
        supervisor.close()


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_a_worker_serves_many_cases(supervise):
    supervisor = supervise("nothing", "")
    assert supervisor.machine(soon()) == {"gpu": "fake"}
    first, second = (supervisor.measure(CASE, CONTENDERS, OPTIONS, soon()) for _ in range(2))
    assert first["pid"] == second["pid"]
    assert first["excluded"] == {}


@pytest.mark.parametrize(
    ("deed", "reason"),
    [
        ("hang", "hung: not a word for 1 s during bad: time"),
        ("die", "the process ended with status 9 during bad: time: Segmentation fault"),
        ("half", "the process ended with status 0 during bad: time: it says nothing"),
        ("lose", "left the device unusable: CUDA error"),
    ],
)
def test_a_culprit_is_left_out_and_the_case_measured_again(supervise, deed, reason):
    supervisor = supervise(deed, "bad", silence=1.0)
    assert supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())["excluded"] == {"bad": reason}
    # it has one more chance, and then none
    assert supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())["excluded"] == {"bad": reason}
    before = time.monotonic()
    third = supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())
    assert third["excluded"] == {"bad": "left out: it brought the process down in 2 cases before"}
    assert time.monotonic() - before < 1.0


def test_a_culprit_has_its_chances_in_each_variant(supervise):
    supervisor = supervise("die", "bad")
    reasons = [
        supervisor.measure(replace(CASE, variant=name), CONTENDERS, OPTIONS, soon())["excluded"]["bad"]
        for name in ("peephole", "peephole", "zoneout", "peephole", "zoneout")
    ]
    assert [reason.startswith("left out") for reason in reasons] == [False, False, False, True, False]


@pytest.mark.parametrize(("variant", "standard"), [("plain", TORCH), ("zoneout", "good")])
def test_without_the_standard_there_is_no_case(supervise, variant, standard, monkeypatch):
    monkeypatch.setattr(supervising, "standard_of", {"plain": TORCH, "zoneout": "good"}.__getitem__)
    record = supervise("die", standard).measure(replace(CASE, variant=variant), CONTENDERS, OPTIONS, soon())
    assert record["error"].startswith(f"the process ended with status 9 during {standard}: time")
    assert record["contenders"] == []


def test_without_torch_there_is_no_case(supervise):
    record = supervise("die", TORCH).measure(CASE, CONTENDERS, OPTIONS, soon())
    assert record["error"].startswith(f"the process ended with status 9 during {TORCH}: time")
    assert record["contenders"] == []
    assert record["machine"] == {"gpu": "fake"}
    assert record["label"] == CASE.label


def test_the_deadline_stops_a_case(supervise):
    supervisor = supervise("hang", "bad")
    supervisor.machine(soon())
    before = time.monotonic()
    with pytest.raises(OutOfTime, match="the time for all cases ended during bad: time"):
        supervisor.measure(CASE, CONTENDERS, OPTIONS, soon(0.5))
    assert 0.4 < time.monotonic() - before < 5.0
    with pytest.raises(OutOfTime):
        supervisor.measure(CASE, CONTENDERS, OPTIONS, soon(-1.0))


def test_a_worker_that_does_not_start(supervise):
    supervisor = supervise(source="import sys; sys.exit('no CUDA driver')")
    assert supervisor.machine(soon()) is None
    record = supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())
    assert record["error"] == "the process ended with status 1: no CUDA driver"


def test_closing_ends_the_worker(supervise):
    supervisor = supervise("nothing", "")
    pid = supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())["pid"]
    supervisor.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_real_worker(tmp_path):
    command = [sys.executable, "-m", "fused_lstm.bench.case_worker", "cpu"]
    supervisor = Supervisor(command, os.environ | {"OMP_NUM_THREADS": "1"}, tmp_path / "worker.log", silence=60.0)
    try:
        record = supervisor.measure(CASE, CONTENDERS, OPTIONS, soon())
    finally:
        supervisor.close()
    assert record["error"] is None, record
    assert [entry["name"] for entry in record["contenders"]] == [TORCH, "fused_lstm reference"]
    assert all(entry["status"] == "measured" and entry["accuracy"]["passed"] for entry in record["contenders"])
    assert record["machine"]["device"] == "cpu"
    assert record["seed"] == 1


def test_what_a_library_prints_stays_out_of_the_answers():
    """What is printed while measuring goes to stderr; the answers keep the pipe to themselves."""
    loud = """
import os, sys
from fused_lstm.bench import case_worker

def measure(*_, **__):
    os.write(1, b"from C\\n")
    print("from Python", flush=True)
    return {"device_lost": None}

case_worker.measure = measure
sys.argv = ["case_worker", "cpu"]
case_worker.main()
"""
    request = {"case": vars(CASE), "contenders": CONTENDERS, "measure": OPTIONS | {"excluded": {}}}
    done = subprocess.run(
        [sys.executable, "-c", loud], input=json.dumps(request), capture_output=True, text=True, timeout=60, check=True
    )
    assert [list(json.loads(line)) for line in done.stdout.splitlines()] == [["machine"], ["record"]]
    assert done.stderr == "from C\nfrom Python\n"
