"""The loss curves as a picture."""

import io
from typing import Any

from fused_lstm.bench.errors import UserError
from fused_lstm.bench.learners import OURS
from fused_lstm.bench.record import bits


def require_matplotlib() -> None:
    """Finds out before a run what would fail after it.

    Raises:
        UserError: matplotlib is not installed
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("--plot needs matplotlib", "pip install 'fused-lstm[cli]'") from error


def as_png(results: dict[str, Any]) -> bytes:
    """Draws the losses of `record.collect` over the steps, in bits per character or word."""
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, learner) in enumerate(results["learners"].items()):
        # The curves of two learners coincide: a broad one shows beneath a narrow one.
        width = 1.0 if name == OURS else 4.0
        style = {"color": f"C{index}", "alpha": 1.0 if name == OURS else 0.4}
        losses = [bits(loss) for loss in learner["losses"]]
        axes.plot(range(1, len(losses) + 1), losses, linewidth=width, label=f"{name}, training", **style)
        axes.plot(
            results["validation_steps"],
            learner["validation_bits"],
            marker="o",
            markersize=3 + width,
            linestyle="none",
            label=f"{name}, validation",
            **style,
        )
        if learner["averaging_from"] is not None:
            axes.axvline(learner["averaging_from"], color="gray", linestyle=":", linewidth=1, label="averaging begins")
    axes.axhline(results["unigram_bits"], color="gray", linestyle="--", linewidth=1, label="unigram entropy")
    axes.set_title(results["text"]["name"], parse_math=False)  # a $ in a file's name is no formula
    axes.set(xlabel="step", ylabel=f"bits per {results['text']['unit']}", ylim=(0, None))
    axes.margins(x=0.02)
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
