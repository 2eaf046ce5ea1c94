"""The two figures of `triton-gru-memory`, drawn from its results alone."""

from pathlib import Path
from typing import Any

from lightning_module.memory.tasks import TASKS

SUCCESS = "memory.png"
GRADIENT = "gradient.png"

NAMES = {"gru": "GRU", "gru_reset_before": "GRU, reset before", "lstm": "LSTM", "rnn": "RNN"}
COLOURS = {"gru": "#0072b2", "gru_reset_before": "#56b4e9", "lstm": "#e69f00", "rnn": "#d55e00"}
STYLES = {"gru": "o-", "gru_reset_before": "s--", "lstm": "^-", "rnn": "v-"}
TITLES = {"copy": "Copying", "adding": "Adding", "text": "Real text"}
# Lower end of the axis. Smaller shares of a gradient are below float32's rounding.
LOWEST = 1e-12

# The results of a study for each task and layer type:
# {"copy": {"gru": {"success": ..., "gradient": ...}}}.
Results = dict[str, dict[str, dict[str, Any]]]


def draw_success(results: Results, path: Path) -> None:
    """Share of right answers against the delay; of text, bits per character against the context."""
    figure, panels = _panels(results, 1)
    for axes, (task, by_type) in zip(panels[0], results.items(), strict=True):
        for layer_type, found in by_type.items():
            points = sorted((int(delay), value) for delay, value in found["success"].items())
            measure = "bits_per_char" if task == "text" else "right"
            axes.plot(
                [delay for delay, _ in points],
                [value[measure] for _, value in points],
                STYLES[layer_type],
                color=COLOURS[layer_type],
                label=NAMES[layer_type],
                markersize=5,
            )
        delays = sorted({int(delay) for found in by_type.values() for delay in found["success"]})
        axes.set_xscale("log")
        axes.set_xticks(delays, map(str, delays))
        axes.minorticks_off()
        axes.set_title(TITLES[task])
        if task == "text":
            axes.set_xlabel("characters read before")
            axes.set_ylabel("bits per character")
        else:
            axes.axhline(TASKS[task].chance, color="0.5", linestyle=":")
            axes.annotate(
                "chance",
                (0.01, TASKS[task].chance),
                xycoords=("axes fraction", "data"),
                xytext=(0, -11),
                textcoords="offset points",
                color="0.4",
                fontsize="small",
            )
            axes.set_ylim(0, 1.05)
            axes.set_xlabel("delay, steps")
            axes.set_ylabel("answers right")
            axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    _finish(figure, panels, path)


def draw_gradients(results: Results, path: Path) -> None:
    """Share of the gradient that reaches k steps back, before and after training, log-log."""
    figure, panels = _panels(results, 2)
    for row, when in zip(panels, ("start", "end"), strict=True):
        for axes, (task, by_type) in zip(row, results.items(), strict=True):
            for layer_type, found in by_type.items():
                curve = found["gradient"].get(when)
                if curve is None:
                    continue
                points = [(k, s) for k, s in zip(curve["k"], curve["share"], strict=True) if k > 0]
                axes.plot(
                    [k for k, _ in points],
                    [max(share, LOWEST / 1e6) for _, share in points],
                    STYLES[layer_type][1:],
                    color=COLOURS[layer_type],
                    label=NAMES[layer_type],
                )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_ylim(LOWEST, 1e3)
            axes.axhline(1.0, color="0.8", linewidth=0.8)
            when_title = {"start": "before training", "end": "after training"}[when]
            axes.set_title(f"{TITLES[task]}, {when_title}")
            axes.set_xlabel("k, steps back")
        row[0].set_ylabel("‖∂L(t)/∂h(t−k)‖ / ‖∂L(t)/∂h(t)‖")
    _finish(figure, panels, path)


def _panels(results: Results, rows: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # takes 0.5 s to import

    size = (3.6 * len(results) + 0.4, 3.2 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, len(results), squeeze=False)


def _finish(figure: Any, panels: Any, path: Path) -> None:
    labels: dict[str, Any] = {}
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(
            labels.values(),
            labels.keys(),
            loc="outside upper center",
            ncols=len(labels),
            frameon=False,
        )
    figure.savefig(path, dpi=130)
