"""Pictures of the lab's frames: a DataFrame goes in, matplotlib Axes or a Figure come out. Nothing here sees a model."""

from __future__ import annotations

from adapterlab.plots.memory import plot_memory
from adapterlab.plots.norms import plot_delta_norms, plot_overlap
from adapterlab.plots.parameters import plot_parameters
from adapterlab.plots.ranks import plot_ranks
from adapterlab.plots.style import make_figure
from adapterlab.plots.svg import draw_svg, figure_svg
from adapterlab.plots.training import plot_training
from adapterlab.plots.words import plot_divergence

__all__ = [
    "draw_svg",
    "figure_svg",
    "make_figure",
    "plot_delta_norms",
    "plot_divergence",
    "plot_memory",
    "plot_overlap",
    "plot_parameters",
    "plot_ranks",
    "plot_training",
]
