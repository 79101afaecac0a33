"""The cells beyond torch.nn.LSTM's that can be timed, each beside the loop that people write for it today."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fused_lstm.bench import textbook
from fused_lstm.bench.textbook import Cell

PLAIN = "plain"


@dataclass(frozen=True)
class Variant:
    """
    Attributes:
        options: of `fused_lstm.LSTM`
        cell: the step of its textbook loop
        given: "reset" or "lengths", if its forward is given one
    """

    options: Mapping = field(default_factory=dict)
    cell: Cell = textbook.torch_cell
    given: str | None = None

    @property
    def differences(self) -> tuple[str, ...]:
        """What torch.nn.LSTM does not have, as `fused_lstm.select_backend` takes it beside its own keywords."""
        own = ("layer_norm", "recompute")
        return (*(name for name in self.options if name not in own), *(["reset"] if self.given == "reset" else []))


VARIANTS = {
    PLAIN: Variant(),
    "layer_norm_gates": Variant({"layer_norm": "gates"}, textbook.gate_norm_cell),
    "layer_norm_projections": Variant({"layer_norm": "projections"}, textbook.projection_norm_cell),
    "layer_norm_projections_cell": Variant({"layer_norm": "projections_cell"}, textbook.carried_norm_cell),
    "peephole": Variant({"peephole": True}, textbook.peephole_cell),
    "zoneout": Variant({"zoneout": (0.1, 0.1)}),
    "recurrent_dropout": Variant({"recurrent_dropout": 0.25}),
    "weight_dropout": Variant({"weight_dropout": 0.5}),
    "reset": Variant(given="reset"),
    "lengths": Variant(given="lengths"),
    "recompute": Variant({"recompute": True}),
}
