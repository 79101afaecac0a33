"""One case from the first number to the record: accuracy, time and memory of every contender."""

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict

import torch
from torch import Tensor

from fused_lstm.bench.accuracy import Gate, failed_check
from fused_lstm.bench.contenders import (
    CELL_LOOP,
    TEXTBOOK_LOOP,
    TORCH,
    CannotRun,
    Contender,
    GraphStep,
    Step,
    exact_step,
    plain_of,
    standard_of,
)
from fused_lstm.bench.machine import describe_machine, now
from fused_lstm.bench.timing import round_robin, timer_for
from fused_lstm.bench.workload import Case, Workload

# What became of a contender.
MEASURED, CANNOT_RUN, FAILED = "measured", "cannot run", "failed"

# A speed-up is over one of these.
BASELINES = TORCH, CELL_LOOP, TEXTBOOK_LOOP


def measure(
    case: Case,
    contenders: Sequence[Contender],
    *,
    repeats: int,
    warmup: int,
    seed: int,
    sample_seconds: float = 0.02,
    excluded: Mapping[str, str] | None = None,
    on_turn: Callable[[str, str], None] = lambda name, stage: None,  # noqa: ARG005
) -> dict:
    """Checks and times the training step of every contender on one case.

    A contender that raises is recorded with its traceback, and the others go on. Where it left the GPU unusable to
    this process, nobody can go on: `device_lost` then names it, and the rest have failed for that reason.

    Args:
        case: the sizes
        contenders: `standard_of` the case's variant among them: its error is the measure of the others'
        repeats, warmup, sample_seconds: of `round_robin`
        seed: of weights, inputs and what a step draws while it is checked
        excluded: reasons by contender; those are recorded as failed, and not run
        on_turn: told a contender's name and the stage ("build", "accuracy", "time") before it begins

    Returns:
        JSON-ready: `case` (the sizes), `variant`, `label`, `date`, `machine`, `seed`, `repeats`, `warmup`, `exact`
        (what the float64 results come from), `error` (a traceback where the whole case failed, else null),
        `device_lost`, and `contenders`: for each `name`, `ours`, `yardstick` (see `Contender`), `backend` (`name` and
        `reason` of the one that ran, for ours), `status` (measured, cannot run, failed), `reason` and `traceback` (null
        unless something went wrong), `accuracy` (see `Gate.check`), `time` (see `Timing.to_json`), `peak_memory_bytes`
        (over what was held before the step; null on a CPU, where nothing counts it), `speedup`: by baseline how many
        times faster; and `over_plain`: in a variant's case, the time as a multiple of torch.nn.LSTM's and of the
        contender's own plain step, by the yardstick's name; both only where the accuracy check passed. What was not
        measured is null, as is a yardstick's accuracy.
    """
    record = new_record(case, describe_machine(case.device), {"seed": seed, "repeats": repeats, "warmup": warmup})
    run = _Run(case, record, contenders, dict(excluded or {}), on_turn)
    try:
        with torch.cuda.device(case.device) if case.on_cuda else nullcontext(), float32_precision(case):
            run.check_accuracy(Workload.draw(case, seed), seed + 1)
            run.take_times(repeats, warmup, sample_seconds)
    except Exception:
        record["error"] = traceback.format_exc()
    run.add_speedups()
    del run
    _release_memory(case)
    return record


def new_record(case: Case, machine: dict | None, options: Mapping[str, object]) -> dict:
    """A record in the form of `measure`, in which nothing has been measured yet.

    Args:
        case: the sizes
        machine: of `describe_machine`
        options: `seed`, `repeats` and `warmup` of `measure`
    """
    sizes = asdict(case)
    return {
        "variant": sizes.pop("variant"),
        "case": sizes,
        "label": case.label,
        "date": now(),
        "machine": machine,
        **{name: options[name] for name in ("seed", "repeats", "warmup")},
        "exact": None,
        "error": None,
        "device_lost": None,
        "contenders": [],
    }


def problems(record: dict) -> list[str]:
    """What went wrong in a record for which a run must not end well, a line each: a failure of ours or of the case."""
    if record["error"] is not None:
        return [f"{record['label']}: {last_line(record['error'])}"]
    standard = standard_of(record["variant"])
    judged = (entry for entry in record["contenders"] if entry["ours"] or entry["name"] == standard)
    return [f"{record['label']}: {remark(entry)}" for entry in judged if _went_wrong(entry)]


def remark(entry: dict) -> str | None:
    """What a reader must know of a contender beside its numbers, in a line, or None."""
    if entry["status"] != MEASURED:
        return f"{entry['name']}: {entry['status']}: {entry['reason']}"
    if _failed_check(entry):
        return f"{entry['name']}: FAILED the accuracy check: {failed_check(entry['accuracy'])}"
    return None


def last_line(text: str) -> str:
    """The last line of text that says something: of a traceback, the exception."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


@contextmanager
def float32_precision(case: Case) -> Iterator[None]:
    """Inside, float32 products on CUDA use TF32 as the case says, in an LSTM's cuDNN as in a plain product."""
    if not (case.on_cuda and case.dtype == "float32"):
        yield
        return
    cudnn = torch.backends.cudnn
    if hasattr(cudnn, "rnn"):  # since torch 2.9, where reading the older flag can raise
        switch, name, value = cudnn.rnn, "fp32_precision", "tf32" if case.tf32 else "ieee"
    else:
        switch, name, value = cudnn, "allow_tf32", case.tf32
    found = getattr(switch, name), _matmul_precision()
    setattr(switch, name, value)
    _matmul_precision("high" if case.tf32 else "highest")
    try:
        yield
    finally:
        setattr(switch, name, found[0])
        _matmul_precision(found[1])


def _matmul_precision(value: str | None = None) -> str:
    """Sets the precision of plain products where a value is given; returns the one that holds."""
    with warnings.catch_warnings():
        # torch 2.9 recommends the new switch, but its compiler reads the old one, and only this sets both
        warnings.simplefilter("ignore", UserWarning)
        if value is not None:
            torch.set_float32_matmul_precision(value)
        return torch.get_float32_matmul_precision()


def _went_wrong(entry: dict) -> bool:
    return entry["status"] == FAILED or _failed_check(entry)


def _failed_check(entry: dict) -> bool:
    return entry["status"] == MEASURED and not entry["yardstick"] and not entry["accuracy"]["passed"]


class _Run:
    """The state of one `measure`: the steps that still take part, and the record that grows."""

    def __init__(
        self,
        case: Case,
        record: dict,
        contenders: Sequence[Contender],
        excluded: dict[str, str],
        on_turn: Callable[[str, str], None],
    ) -> None:
        self._case = case
        self._standard = standard_of(case.variant)
        self._record = record
        self._on_turn = on_turn
        self._contenders = contenders
        self._excluded = excluded
        self._entries = {contender.name: _entry(contender) for contender in contenders}
        self._steps: dict[str, Step | GraphStep] = {}
        record["contenders"] = list(self._entries.values())

    def check_accuracy(self, workload: Workload, seed: int) -> None:
        for contender in self._contenders:
            self._build(contender, workload)
        workload.refill(seed)  # a graph was captured on other numbers: it must not have kept them
        seed += 1  # for draws that have nothing in common with the numbers
        gate = self._gate(workload, seed)
        for name in list(self._steps):
            if self._entries[name]["yardstick"]:
                continue
            if gate is None:
                self._fail(name, f"nothing to check it against: {self._standard} failed")
                continue
            if name == self._standard:
                continue
            self._on_turn(name, "accuracy")
            try:
                self._entries[name]["accuracy"] = gate.check(self._steps[name].checked(seed))
            except Exception as error:
                self._fail(name, error)

    def take_times(self, repeats: int, warmup: int, sample_seconds: float) -> None:
        timings = round_robin(
            dict(self._steps),
            timer_for(self._case.device),
            repeats=repeats,
            warmup=warmup,
            sample_seconds=sample_seconds,
            on_turn=lambda name: self._on_turn(name, "time"),
            on_error=self._fail,
        )
        for name, timing in timings.items():
            self._entries[name] |= {"status": MEASURED, "reason": None, "time": timing.to_json()}

    def add_speedups(self) -> None:
        medians = {
            name: entry["time"]["median_s"] for name, entry in self._entries.items() if entry["time"] is not None
        }
        for name, median in medians.items():
            entry = self._entries[name]
            if not entry["yardstick"] and entry["accuracy"]["passed"]:
                others = (baseline for baseline in BASELINES if baseline in medians and baseline != name)
                entry["speedup"] = {baseline: medians[baseline] / median for baseline in others}
                yardsticks = dict.fromkeys((plain_of(TORCH), plain_of(name)))
                multiples = {plain: median / medians[plain] for plain in yardsticks if plain in medians}
                entry["over_plain"] = multiples or None

    def _build(self, contender: Contender, workload: Workload) -> None:
        name = contender.name
        if name in self._excluded:
            self._fail(name, self._excluded[name])
            return
        if self._record["device_lost"] is not None:
            self._fail(name, f"not run: {self._record['device_lost']} left the device unusable")
            return
        self._on_turn(name, "build")
        try:
            step = Step(contender.build(workload), workload)
            if step.backend is not None:
                self._entries[name]["backend"] = step.backend._asdict()
            step()  # whatever is allocated once only is not counted
            with _peak_memory(self._case) as peak:
                if contender.graph:
                    self._steps[name] = GraphStep(step)
                else:
                    step()
                    self._steps[name] = step
            self._entries[name]["peak_memory_bytes"] = peak()
        except CannotRun as reason:
            self._entries[name] |= {"status": CANNOT_RUN, "reason": str(reason)}
        except ValueError as error:
            if not (contender.ours and "cannot run this" in str(error)):
                self._fail(name, error)
            else:  # one of our backends that sees only now that it has no room
                self._entries[name] |= {"status": CANNOT_RUN, "reason": str(error)}
        except Exception as error:
            self._fail(name, error)

    def _gate(self, workload: Workload, seed: int) -> Gate | None:
        """Made of the standard's results, which are checked here; None where it fails. seed: of what it draws."""
        if self._standard not in self._steps:
            return None
        exact = self._exact(workload, seed)
        self._on_turn(self._standard, "accuracy")
        try:
            results = self._steps[self._standard].checked(seed)
            gate = Gate(exact, results)
            self._entries[self._standard]["accuracy"] = gate.check(results)
            return gate
        except Exception as error:
            self._fail(self._standard, error)
            return None

    def _exact(self, workload: Workload, seed: int) -> dict[str, Tensor]:
        """The results in float64, on the CPU where the device has no room for them or no kernels."""
        self._on_turn(self._standard, "float64")
        devices = [self._case.device, "cpu"] if self._case.on_cuda else [self._case.device]
        for device in devices:
            try:
                step = exact_step(workload, device, seed)
                results = {name: tensor.detach() for name, tensor in zip(step.names, step(), strict=True)}
            except RuntimeError:
                if device == devices[-1]:
                    raise
            else:
                self._record["exact"] = f"float64 on {device}"
                return results
        raise AssertionError("one of the devices returns or raises")

    def _fail(self, name: str, error: Exception | str) -> None:
        self._steps.pop(name, None)
        if isinstance(error, str):
            self._entries[name] |= {"status": FAILED, "reason": error}
            return
        text = "".join(traceback.format_exception(error))
        self._entries[name] |= {"status": FAILED, "reason": last_line(text), "traceback": text}
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of a step that ran out of memory
        if self._record["device_lost"] is None and not _usable(self._case):
            self._record["device_lost"] = name


def _entry(contender: Contender) -> dict:
    return {
        "name": contender.name,
        "ours": contender.ours,
        "yardstick": contender.yardstick,
        "backend": None,
        "status": FAILED,
        "reason": "not reached",
        "traceback": None,
        "accuracy": None,
        "time": None,
        "peak_memory_bytes": None,
        "speedup": None,
        "over_plain": None,
    }


@contextmanager
def _peak_memory(case: Case) -> Iterator[Callable[[], int | None]]:
    """Gives a function that says, afterwards, the most memory in bytes that was held inside over what was before."""
    if not case.on_cuda:
        yield lambda: None
        return
    torch.cuda.synchronize(case.device)
    before = torch.cuda.memory_allocated(case.device)
    torch.cuda.reset_peak_memory_stats(case.device)
    yield lambda: torch.cuda.max_memory_allocated(case.device) - before


def _usable(case: Case) -> bool:
    """Does the device still compute? After an illegal access, nothing in the process does."""
    if not case.on_cuda:
        return True
    try:
        torch.cuda.synchronize(case.device)
        return torch.ones(2, device=case.device).sum().item() == 2
    except RuntimeError:
        return False


def _release_memory(case: Case) -> None:
    gc.collect()
    if case.on_cuda:
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # the device is lost; the record says so
            return
