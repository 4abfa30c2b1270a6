"""What every figure shares: colours, axes, and SVG text that is the same for the same content."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, OURS, CLOUD, MUTED, WRONG = "#1d2733", "#0b6e99", "#c4541d", "#8a94a0", "#a3244b"


def axes(width: float, height: float, count: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with one axis, or several side by side, in so many rows; sizes in inches."""
    # The object interface: no global backend is chosen and nothing is left open.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    made = figure.subplots(rows, count)
    for axis in np.atleast_1d(made).flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK)
        axis.grid(axis="y", color="#e4e8ec", linewidth=0.8)
        axis.set_axisbelow(True)
    return figure, made


def svg(figure: Figure) -> str:
    """A figure as an SVG element."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "selfroute", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
