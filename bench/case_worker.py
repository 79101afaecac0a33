"""A process that measures cases for another: one JSON line in, JSON lines out.

It first writes {"machine": ...}. To each request, which holds the fields of a `Case` and the arguments of
`contenders_for` and `measure`, it answers {"turn": [contender, stage]} before each turn, and then {"record": ...}.
It ends with its input, or once the device is lost to it.
"""

import json
import os
import sys
from typing import TextIO

from fused_lstm.bench.contenders import contenders_for
from fused_lstm.bench.machine import describe_machine
from fused_lstm.bench.measure import measure
from fused_lstm.bench.workload import Case


def main() -> None:
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not come between the lines
        _say(answers, machine=describe_machine(sys.argv[1]))
        for line in sys.stdin:
            request = json.loads(line)
            case = Case(**request["case"])
            record = measure(
                case,
                contenders_for(case, **request["contenders"]),
                **request["measure"],
                on_turn=lambda name, stage: _say(answers, turn=[name, stage]),
            )
            _say(answers, record=record)
            if record["device_lost"] is not None:
                return


def _say(answers: TextIO, **message: object) -> None:
    answers.write(json.dumps(message, allow_nan=False) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
