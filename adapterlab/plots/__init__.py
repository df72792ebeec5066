"""Pictures of the lab's frames: a DataFrame goes in, matplotlib Axes or a Figure come out. Nothing here sees a model."""

from __future__ import annotations

from adapterlab.plots.all import make_figure, plot_parameters, plot_ranks, plot_training

__all__ = ["make_figure", "plot_parameters", "plot_ranks", "plot_training"]
