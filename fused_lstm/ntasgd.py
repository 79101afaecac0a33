"""The optimiser of the AWD-LSTM: SGD that averages its iterates once validation stops getting better."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# One value for the whole optimiser, but kept in every group: there state_dict, pickle and the tools that gather or
# reshape an optimiser's state take it along.
_SHARED = ("n", "losses", "averaging", "swapped")


class NTASGD(Optimizer):
    """Non-monotonically triggered averaged SGD (Merity et al. 2017, Algorithm 1).

    Plain SGD: w ← w - lr (∇ + weight_decay · w). `log` takes the validation losses, and at one of them it starts the
    averaging for good: from then on each parameter has beside it the mean of its values after each `step` since. The
    steps themselves go on as before. `swap` puts the averages into the parameters for an evaluation and takes them out
    again:

        for epoch in range(epochs):
            train(model, optimizer)
            optimizer.swap()  # before averaging has begun, no number changes: no `if` is needed
            optimizer.log(evaluate(model))
            optimizer.swap()
        optimizer.swap()  # the averages are the result

    The trigger: with the losses logged before in `losses`, a loss starts the averaging if `len(losses) > n` and
    `loss > min(losses[:-n])`, the best of all but the last n of them; n = 0 leaves none out. So no loss before the
    (n + 2)th can. Each loss is logged whether it does or not.

    `step` reads lr and weight_decay anew each time: they may change from step to step. All there is, the losses, the
    averages and whether they are swapped in, is in `state_dict`; take the model's at the same moment. Averages of
    half-precision parameters are kept in float32.

    Args:
        params: parameters, named parameters or groups, as every torch.optim.Optimizer's
        lr: the learning rate
        n: how many of the last logged losses the trigger leaves out of its comparison
        weight_decay: L2 penalty

    Attributes:
        averaging: whether `log` has started it
        swapped: whether the averages are in the parameters

    Raises:
        ValueError: lr or weight_decay is negative or NaN, or n no integer of at least 0, or another one in a group
    """

    def __init__(self, params: Any, lr: float | Tensor, *, n: int = 5, weight_decay: float = 0) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"Invalid n: {n!r}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "n": n, "losses": (), "averaging": False, "swapped": False}
        super().__init__(params, defaults)

    @property
    def averaging(self) -> bool:
        return self._shared()["averaging"]

    @property
    def swapped(self) -> bool:
        return self._shared()["swapped"]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of each parameter that has a gradient, and of all averages.

        Args:
            closure: computes the loss and the gradients anew

        Returns:
            what closure returns, or None

        Raises:
            RuntimeError: the averages are swapped in, or a gradient is sparse; no parameter has changed
        """
        if self.swapped:
            raise RuntimeError("NTASGD cannot step while the averages are swapped in: call swap() first")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None and p.grad.layout != torch.strided for p in self._parameters()):
            raise RuntimeError("NTASGD does not support sparse gradients")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                grads = [p.grad for p in params]
                if group["weight_decay"] != 0:
                    grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
                torch._foreach_add_(params, grads, alpha=-group["lr"])
        if self.averaging:
            for param in self._parameters():
                self._average(param)
        return loss

    def log(self, validation_loss: float | Tensor) -> None:
        """Take note of a validation loss; start averaging if it is above the best of all but the last n before it.

        Perplexities serve as well: only their order counts. Call it as often as you validate; the weights in use, or
        their averages, are no concern of it. An infinite loss is a bad one.

        Raises:
            ValueError: the loss is NaN, which is neither above nor below any; nothing has changed
            TypeError: it is not a number, nor a tensor of one element
        """
        if isinstance(validation_loss, Tensor) and validation_loss.numel() == 1:
            validation_loss = validation_loss.item()
        if isinstance(validation_loss, bool) or not isinstance(validation_loss, numbers.Real):
            raise TypeError(f"validation_loss should be a number, got: {type(validation_loss).__name__}")
        loss = float(validation_loss)
        if math.isnan(loss):
            raise ValueError("Expected validation_loss to be a number, got nan")
        shared = self._shared()
        losses, n = shared["losses"], shared["n"]
        worse = len(losses) > n and loss > min(losses[: len(losses) - n])
        self._share(losses=(*losses, loss), averaging=shared["averaging"] or worse)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the parameters' values and their averages, in place; twice is the identity, to the bit.

        A parameter that has no average yet keeps its value; but `step` refuses until the next `swap` all the same, so
        that one forgotten shows in the first epoch and not in the one where averaging begins.
        """
        back = self.swapped
        for param in self._parameters():
            state = self.state.get(param, {})
            if back and "weights" in state:
                param.copy_(state.pop("weights"))
            elif not back and "average" in state:
                state["weights"] = param.clone()
                param.copy_(state["average"])
        self._share(swapped=not back)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; where averaging has begun, its averages begin with the next step."""
        if isinstance(param_group, dict):
            options = {**self.defaults, **param_group}
            if not options["lr"] >= 0:
                raise ValueError(f"Invalid learning rate: {options['lr']}")
            if not options["weight_decay"] >= 0:
                raise ValueError(f"Invalid weight_decay value: {options['weight_decay']}")
            shared = self._shared()
            if options["n"] != shared["n"] and "n" in param_group:
                raise ValueError(f"Expected one n for all groups, {shared['n']}, got {options['n']}")
            param_group.update(shared)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, as every torch.optim.Optimizer does."""
        super().load_state_dict(state_dict)
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, param in zip(saved, self._parameters(), strict=True):
            if "average" in self.state.get(param, {}):
                # Torch has cast it to the parameter's dtype, and where that changes nothing it has not copied it.
                average = state_dict["state"][index]["average"]
                self.state[param]["average"] = average.to(param.device, _average_dtype(param), copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # another optimiser's state_dict, SGD's for instance, knows nothing of these
            for name in _SHARED:
                group.setdefault(name, self.defaults[name])

    def _parameters(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _shared(self) -> dict[str, Any]:
        group = self.param_groups[0] if self.param_groups else self.defaults
        return {name: group[name] for name in _SHARED}

    def _share(self, **values: Any) -> None:
        for group in self.param_groups:
            group.update(values)

    def _average(self, param: Tensor) -> None:
        """Takes param's present value into its running mean."""
        state = self.state[param]
        state["count"] = state.get("count", 0) + 1
        if state["count"] == 1:
            state["average"] = param.to(_average_dtype(param), copy=True)
        else:
            state["average"].lerp_(param.to(state["average"].dtype), 1 / state["count"])


def _average_dtype(param: Tensor) -> torch.dtype:
    # A mean of many half-precision numbers stands still: each new one changes it by less than its last bit.
    return torch.promote_types(param.dtype, torch.float32)
