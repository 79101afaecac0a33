"""torch.compile and our modules."""

import functools
from typing import Any


@functools.cache
def let_dynamo_trace(module_type: type) -> None:
    """Let torch.compile trace modules of this type, which is a subclass of torch.nn.LSTM.

    Dynamo breaks the graph at any torch.nn.LSTM, subclasses included, since tracing torch's own would unroll it; ours
    puts two opaque nodes into the graph. Its switch, `torch._dynamo.config.allow_rnn`, is for the process: it is turned
    on only while one of ours is being wrapped, so that nobody else's recurrent modules compile differently.

    Importing dynamo takes a second; a process that creates an optimiser has imported it anyway.
    """
    from torch._dynamo import config
    from torch._dynamo.variables import builder

    wrap_module = builder.VariableBuilder.wrap_module

    @functools.wraps(wrap_module)
    def wrap_ours(self: Any, value: Any) -> Any:
        if not isinstance(value, module_type):
            return wrap_module(self, value)
        with config.patch(allow_rnn=True):
            return wrap_module(self, value)

    builder.VariableBuilder.wrap_module = wrap_ours
