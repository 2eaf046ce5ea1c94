"""The plots of a record: steps against sizes, speed-ups, kernels against their plans, the exchange.

matplotlib is imported only when a plot is drawn: the tables do not need it.
"""

import math
from pathlib import Path

from benchmarks.metrics import MODES, NAMES, lower_bound_us, median_ms, speedup
from benchmarks.suites import CUDNN, LSTM, OURS

COLORS = {OURS: "#1b6ca8", CUDNN: "#d1495b", LSTM: "#8d96a3", "compiled loop": "#edae49"}


def plots(record: dict, directory: Path) -> list[Path]:
    """Every plot for which there is data, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    written = []
    with plt.rc_context({**style, "svg.hashsalt": "triton_gru"}):
        for name, draw in {
            "step_against_hidden_size": lambda: _lines(record, "H", "B", (16, 64)),
            "step_against_batch": lambda: _lines(record, "B", "H", (256, 768, 1024)),
            "speedup": lambda: _heat_maps(record),
            "lower_bound": lambda: _lower_bound(record),
            "exchange": lambda: _exchange(record),
        }.items():
            figure = draw()
            if figure is None:
                continue
            place = record["environment"] or {}
            figure.text(
                0.995,
                0.005,
                f"{place.get('device', '')}, torch {place.get('torch', '')}, commit "
                f"{str(place.get('commit', ''))[:8]}",
                ha="right",
                va="bottom",
                fontsize=7,
                color="#777777",
            )
            for kind in ("png", "svg"):
                path = directory / f"{name}.{kind}"
                metadata = {"Date": None} if kind == "svg" else None
                figure.savefig(path, dpi=150, metadata=metadata)
                written.append(path)
            plt.close(figure)
    return written


def _grid_cells(record: dict) -> list[dict]:
    """The cells over H and B: bf16, one direction, reset after, at the most frequent T."""
    cells = [
        cell
        for cell in record["cells"].values()
        if cell["dtype"] == "bfloat16"
        and cell["reset_after"]
        and cell["directions"] == 1
        and cell["lengths"] == "full"
        and median_ms(cell, OURS) is not None
    ]
    counts: dict[int, int] = {}
    for cell in cells:
        counts[cell["T"]] = counts.get(cell["T"], 0) + 1
    usual = max(counts, key=counts.get, default=None)
    return [cell for cell in cells if cell["T"] == usual]


def _lines(record: dict, over: str, fixed: str, values: tuple[int, ...]):
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    cells = _grid_cells(record)
    values = [v for v in values if len({c[over] for c in cells if c[fixed] == v}) > 1]
    if not values:
        return None
    size = (4.2 * len(values), 6.2)
    figure, axes = plt.subplots(2, len(values), figsize=size, squeeze=False, sharex=True)
    for row, mode in zip(axes, MODES, strict=True):
        for axis, value in zip(row, values, strict=True):
            some = [c for c in cells if c[fixed] == value and c["mode"] == mode]
            some.sort(key=lambda c: c[over])
            for name in (OURS, CUDNN, LSTM):
                points = [(c[over], 1e3 * m / c["T"]) for c in some if (m := median_ms(c, name))]
                if points:
                    axis.plot(*zip(*points, strict=True), "o-", color=COLORS[name], label=name)
            points = [(c[over], f) for c in some if (f := lower_bound_us(c))]
            if points:
                axis.plot(*zip(*points, strict=True), ":", color="#555555", label="lower bound")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(sorted({c[over] for c in cells}))
            axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
            axis.tick_params(axis="x", labelsize=8, rotation=45)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.set_title(f"{MODES[mode]}, {fixed} = {value}", fontsize=10)
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel({"H": "hidden size H", "B": "batch B"}[over])
    for axis in axes[:, 0]:
        axis.set_ylabel("time per step, µs")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Whole layer, bf16, T = {cells[0]['T']}; lower is better")
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    return figure


def _heat_maps(record: dict):
    import matplotlib.pyplot as plt
    from matplotlib.colors import TwoSlopeNorm

    cells = [c for c in _grid_cells(record) if speedup(c) is not None]
    if not cells:
        return None
    hidden, batches = (sorted({c[key] for c in cells}) for key in "HB")
    size = (2.4 + 1.5 * len(hidden), 1.6 + 0.55 * len(batches))
    figure, axes = plt.subplots(1, 2, figsize=size, sharey=True)
    top = max(1.5, math.log2(max(speedup(c) for c in cells)))
    norm = TwoSlopeNorm(0, -top, top)
    for axis, mode in zip(axes, MODES, strict=True):
        table = [[math.nan] * len(hidden) for _ in batches]
        for cell in cells:
            if cell["mode"] == mode:
                gain = speedup(cell)
                at = hidden.index(cell["H"]), batches.index(cell["B"])
                table[at[1]][at[0]] = math.log2(gain)
                dark = abs(math.log2(gain)) > 0.65 * top
                color = "white" if dark else "black"
                axis.text(*at, f"{gain:.2f}", ha="center", va="center", color=color, fontsize=9)
        axis.imshow(table, norm=norm, cmap="RdBu", aspect="auto", origin="lower")
        axis.set_xticks(range(len(hidden)), hidden)
        axis.set_yticks(range(len(batches)), batches)
        axis.set_xlabel("hidden size H")
        axis.set_title(MODES[mode], fontsize=10)
        for side in ("left", "bottom"):
            axis.spines[side].set_visible(False)
        axis.tick_params(length=0)
    axes[0].set_ylabel("batch B")
    T = cells[0]["T"]
    figure.suptitle(f"Speed-up over nn.GRU (cuDNN), bf16, T = {T}; blue: triton_gru is faster")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def _kernel_rows(record: dict) -> list[dict]:
    rows = record["probes"].get("kernels", {}).get("rows", [])
    return [row for row in rows if "step_us" in row]


def _lower_bound(record: dict):
    import matplotlib.pyplot as plt

    rows = _kernel_rows(record)
    if not rows:
        return None
    names = []
    for row in rows:
        name = f"B{row['B']} H{row['H']} {NAMES[row['dtype']]} {row['direction']}"
        names.append(name + ("" if row["reset_after"] else ", reset before"))
    figure, axis = plt.subplots(figsize=(8, 1.7 + 0.27 * len(rows)))
    at = range(len(rows))
    axis.barh(at, [r["step_us"] for r in rows], color=COLORS[OURS], height=0.62, label="measured")
    for key, mark, color in (("lower_bound_us", "|", "black"), ("estimate_us", "d", "#edae49")):
        values = [row["plan"][key] for row in rows]
        name = key.removesuffix("_us") + " of the plan"
        axis.scatter(values, at, marker=mark, s=70, color=color, label=name, zorder=3)
    longest = max(max(r["step_us"], r["plan"]["estimate_us"]) for r in rows)
    for i, row in enumerate(rows):
        share = row["step_us"] / row["plan"]["lower_bound_us"]
        end = max(row["step_us"], row["plan"]["estimate_us"]) + 0.015 * longest
        axis.text(end, i, f"{share:.1f}x lower bound", va="center", fontsize=8)
    axis.set_xlim(0, 1.14 * longest)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlabel("time per step of the kernel alone, µs")
    figure.suptitle("Kernels against the predictions of their plans")
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3)
    figure.tight_layout(rect=(0, 0.015, 1, 1))
    return figure


def _exchange(record: dict):
    import matplotlib.pyplot as plt

    probes = [record["probes"].get(f"exchange {name}", {}) for name in ("sentinel", "counter")]
    probes = [probe for probe in probes if probe.get("status") == "ok"]
    if not probes:
        return None
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for probe, color in zip(probes, (COLORS[OURS], COLORS[CUDNN]), strict=False):
        points = [(row["programs"], row["step_us"]) for row in probe["rows"]]
        axis.plot(*zip(*points, strict=True), "o-", color=color, label=probe["protocol"])
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted({row["programs"] for p in probes for row in p["rows"]}))
    axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axis.tick_params(axis="x", labelsize=8)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.set_xlabel("programs that exchange")
    axis.set_ylabel("time per exchange, µs")
    axis.legend(frameon=False)
    axis.set_title("Exchange alone: 16 words from each program to all", fontsize=10)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure
