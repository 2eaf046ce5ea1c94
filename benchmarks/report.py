"""Tables and plots of a record: `python -m benchmarks.report FILE.json [--out DIR]`.

Prints the README's table in Markdown; with --out writes it to DIR/report.md beside the plots, each
as PNG and SVG. matplotlib is needed for the plots alone.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.record import Record
from benchmarks.suites import CUDNN, LSTM, OURS

NAMES = {"bfloat16": "bf16", "float16": "fp16", "tf32": "tf32", "float32": "fp32"}
MODES = {"forward": "forward", "train": "forward + backward"}
# The cells that the goal of a mean speed-up is stated for.
GOAL_H, GOAL_B, GOAL_T = (256, 1024), (8, 128), 128


# -- numbers ------------------------------------------------------------------------------------


def median_ms(cell: dict, name: str) -> float | None:
    """A contestant's median in a cell, or None where it has none."""
    result = cell["results"].get(name, {})
    return result["median_ms"] if result.get("status") == "ok" else None


def speedup(cell: dict, over: str = CUDNN) -> float | None:
    """How many times as fast ours is."""
    ours, theirs = median_ms(cell, OURS), median_ms(cell, over)
    return theirs / ours if ours and theirs else None


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def in_goal(cell: dict) -> bool:
    """Whether the cell is one over which the mean speed-up is promised."""
    return (
        cell["mode"] == "train"
        and cell["dtype"] in ("bfloat16", "float16")
        and cell["lengths"] == "full"
        and cell["directions"] == 1
        and GOAL_H[0] <= cell["H"] <= GOAL_H[1]
        and GOAL_B[0] <= cell["B"] <= GOAL_B[1]
        and cell["T"] >= GOAL_T
    )


def speedups(record: dict, wanted: Callable[[dict], bool]) -> list[float]:
    every = (speedup(cell) for cell in record["cells"].values() if wanted(cell))
    return [value for value in every if value is not None]


def worst_error_ratio(cell: dict) -> float | None:
    """The largest of our errors against nn.GRU's, over y and the gradients."""
    ours, theirs = (cell["results"].get(name, {}).get("error") for name in (OURS, CUDNN))
    if not ours or not theirs:
        return None
    ratios = [ours[k] / theirs[k] for k in ours.keys() & theirs.keys() if theirs[k] > 0]
    return max(ratios, default=None)


def floor_us(cell: dict) -> float | None:
    """What the plans of a cell say a step cannot be shorter than."""
    plans = cell["results"].get(OURS, {}).get("plans")
    return sum(plan["floor_us"] for plan in plans.values()) if plans else None


def noise(cell: dict) -> float:
    """Largest distance between two rounds of one contestant, as a share."""
    shares = []
    for result in cell["results"].values():
        rounds = result.get("round_medians_ms", [])
        if rounds and min(rounds) > 0:
            shares.append(max(rounds) / min(rounds) - 1)
    return max(shares, default=0.0)


def goals(record: dict) -> list[tuple[str, float, str]]:
    """What is promised for an H200, as (goal, measured, unit), where it was measured."""
    found = []
    half = [v for c in record["cells"].values() if _is_half(c) and (v := speedup(c)) is not None]
    if half:
        found.append(
            ("smallest speed-up over nn.GRU, 16 bit (goal 1.0 under auto)", min(half), "x")
        )
    mean = geometric_mean(speedups(record, in_goal))
    if mean:
        found.append(("mean speed-up, H 256-1024, B 8-128, T >= 128 (goal 3)", mean, "x"))
    tf32 = geometric_mean(speedups(record, lambda c: c["dtype"] == "tf32" and c["mode"] == "train"))
    if tf32:
        found.append(("mean speed-up, tf32 (goal 2)", tf32, "x"))
    for mode, goal in (("forward", 1.5), ("train", 4.0)):
        cell = _cell(record, T=1024, B=16, H=768, mode=mode, dtype="bfloat16", lengths="full")
        ours = cell and median_ms(cell, OURS)
        if ours:
            label = f"{MODES[mode]} a step at B16 H768, bf16, whole layer (goal {goal})"
            found.append((label, 1e3 * ours / cell["T"], "us"))
    for lengths in ("packed", "lengths"):
        shares = []
        for cell in record["cells"].values():
            full = cell["lengths"] == lengths and _cell(
                record,
                **{k: cell[k] for k in ("T", "B", "H", "dtype", "mode", "reset_after")},
                directions=cell["directions"],
                lengths="full",
            )
            ours, padded = median_ms(cell, OURS), full and median_ms(full, OURS)
            if ours and padded:
                shares.append(ours / padded)
        if shares:
            label = f"variable length ({lengths}) over full length, worst (goal 1.2)"
            found.append((label, max(shares), "x"))
    memory = []
    for cell in record["cells"].values():
        peaks = [cell["results"].get(name, {}).get("peak_bytes") for name in (OURS, CUDNN)]
        if cell["mode"] == "train" and all(peaks):
            memory.append(peaks[0] / peaks[1])
    if memory:
        found.append(("peak memory over nn.GRU's, worst (goal 1)", max(memory), "x"))
    errors = [v for c in record["cells"].values() if (v := worst_error_ratio(c)) is not None]
    if errors:
        found.append(("error over nn.GRU's, worst (goal 1.5)", max(errors), "x"))
    return found


def _is_half(cell: dict) -> bool:
    return cell["dtype"] in ("bfloat16", "float16")


def _cell(record: dict, **wanted) -> dict | None:
    wanted = {"reset_after": True, "directions": 1} | wanted
    for cell in record["cells"].values():
        if all(cell[key] == value for key, value in wanted.items()):
            return cell
    return None


# -- text ---------------------------------------------------------------------------------------


def one_line(result: dict) -> str:
    """A result in a few words, for the log."""
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}".rstrip(": ")
    if "rows" in result:
        steps = [f"{row['step_us']:.2f}" for row in result["rows"] if "step_us" in row]
        return "us a step: " + " ".join(steps)
    rate = [f", {result[key]:,.0f} {key}" for key in ("GB_s", "TFLOP_s") if key in result]
    step = f", {result['step_us']:.2f} us a step" if "step_us" in result else ""
    return f"{result['median_ms']:.3f} ms{step}{''.join(rate)}"


def label(cell: dict) -> str:
    """Shape and kind of a cell in a few words."""
    words = [f"T{cell['T']} B{cell['B']} H{cell['H']}", NAMES[cell["dtype"]], cell["mode"]]
    words += [] if cell["reset_after"] else ["reset before"]
    words += ["2 directions"] if cell["directions"] == 2 else []
    words += [] if cell["lengths"] == "full" else [cell["lengths"]]
    return " ".join(words)


def text(record: dict) -> str:
    """The short table that a run ends with."""
    lines = []
    for name, probe in record["probes"].items():
        lines.append(f"{name:20} {one_line(probe)}"[:160])
        for row in probe.get("rows", []):
            lines.append("    " + _probe_row(row))
    lines.append(f"{'cell':48} {'ours ms':>9} {'us/step':>8} {'nn.GRU':>9} {'x':>6} {'error':>6}")
    for cell in record["cells"].values():
        statuses = {result["status"] for result in cell["results"].values()}
        if statuses == {"not run"}:
            continue
        ours, theirs = median_ms(cell, OURS), median_ms(cell, CUDNN)
        step = ours and 1e3 * ours / cell["T"]
        numbers = [
            _number(ours, "9.3f"),
            _number(step, "8.2f"),
            _number(theirs, "9.3f"),
            _number(speedup(cell), "6.2f"),
            _number(worst_error_ratio(cell), "6.2f"),
        ]
        why = cell["results"].get(OURS, {})
        tail = "" if ours or "reason" not in why else f"  {why['status']}: {why['reason'][:60]}"
        lines.append(f"{label(cell):48} {' '.join(numbers)}{tail}")
    for goal, value, unit in goals(record):
        lines.append(f"{value:8.2f} {unit:2}  {goal}")
    counts = Record(Path(), record).counts()
    lines.append(", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return " " * (width - 1) + "-" if value is None else format(value, form)


def _probe_row(row: dict) -> str:
    if "plan" not in row:
        return f"{row['programs']:4} programs {row['step_us']:7.3f} us a step"
    plan = row["plan"]
    where = f"T{row['T']} B{row['B']} H{row['H']} {NAMES[row['dtype']]} {row['direction']}"
    where += "" if row["reset_after"] else " reset before"
    how = f"{plan['rows']}x{plan['columns']} {plan['groups']}x{plan['group']} programs"
    how += f" {plan['warps']} warps" + (f" {plan['protocol']}" if plan["group"] > 1 else "")
    measured = f"{row['step_us']:7.3f}" if "step_us" in row else f"failed: {row['failed'][:60]}"
    promise = f"floor {plan['floor_us']:.2f} estimate {plan['estimate_us']:.2f}"
    return f"{where:42} {how:38} {promise}: {measured}"


def markdown(record: dict) -> str:
    """The README's table: where it was measured, then a row a cell."""
    place = record["environment"] or {}
    lines = [
        f"{place.get('device', 'unknown device')}, driver {place.get('driver', 'none')}, torch "
        f"{place.get('torch')}, Triton {place.get('triton')}, cuDNN {place.get('cudnn')}; commit "
        f"{str(place.get('commit'))[:12]}.",
        "Medians of the whole layer, input projection included; speed-up is nn.GRU's time over",
        "triton_gru's; error is the worst of y and the gradients against float64, over nn.GRU's.",
        "",
    ]
    means = []
    for mode in MODES:
        values = speedups(record, lambda c, mode=mode: c["mode"] == mode and _is_half(c))
        if values:
            mean = geometric_mean(values)
            means.append(f"{MODES[mode]} {mean:.2f}x over {len(values)} cells")
    if means:
        lines += [f"Geometric mean of the speed-up in 16 bit: {'; '.join(means)}.", ""]
    measured = [c for c in record["cells"].values() if median_ms(c, OURS)]
    if measured:
        apart = sorted(100 * noise(cell) for cell in measured)
        lines += [
            f"Two rounds of the same contestant lie {apart[len(apart) // 2]:.0f} % apart in the "
            f"median cell, {apart[-1]:.0f} % in the worst: less than that says nothing.",
            "",
        ]
    others = [LSTM, "compiled loop", "gru-qat", "torchrl", "flashrnn"]
    others = [name for name in others if any(median_ms(c, name) for c in record["cells"].values())]
    head = ["T", "B", "H", "dtype", "timed", "triton_gru ms", "us a step", "nn.GRU ms", "speed-up"]
    head += [f"{name} ms" for name in others] + ["error", "memory"]
    lines += [_row(head), _row(["---"] * len(head))]
    for cell in record["cells"].values():
        ours, theirs = median_ms(cell, OURS), median_ms(cell, CUDNN)
        if ours is None and theirs is None:
            continue
        timed = label(cell).split(" ", 4)[-1]
        gain = speedup(cell)
        peaks = [cell["results"].get(name, {}).get("peak_bytes") for name in (OURS, CUDNN)]
        row = [str(cell[key]) for key in "TBH"] + [NAMES[cell["dtype"]], timed]
        row += [
            _plain(ours, ".3f"),
            _plain(ours and 1e3 * ours / cell["T"], ".2f"),
            _plain(theirs, ".3f"),
            _plain(gain, ".2f", "x"),
        ]
        row += [_plain(median_ms(cell, name), ".3f") for name in others]
        row += [_plain(worst_error_ratio(cell), ".2f", "x")]
        row += [_plain(peaks[0] / peaks[1] if all(peaks) else None, ".2f", "x")]
        lines.append(_row(row))
    failed = []
    for cell in record["cells"].values():
        for name, result in cell["results"].items():
            if result["status"] in ("failed", "lost"):
                reason = " ".join(result.get("reason", "").split())[:160]
                failed.append(f"- {label(cell)}, {name}: {result['status']}: {reason}")
    missing = {
        name: result["reason"]
        for cell in record["cells"].values()
        for name, result in cell["results"].items()
        if result["status"] == "missing"
    }
    failed += [f"- {name}: not installed" for name in sorted(missing)]
    if failed:
        lines += ["", "Not in the table:", "", *failed]
    return "\n".join(lines) + "\n"


def _row(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _plain(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else format(value, form) + unit


# -- plots --------------------------------------------------------------------------------------

COLORS = {OURS: "#1b6ca8", CUDNN: "#d1495b", LSTM: "#8d96a3", "compiled loop": "#edae49"}


def plots(record: dict, directory: Path) -> list[Path]:
    """Every plot for which there are numbers, as PNG and SVG."""
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
            "floor": lambda: _floor(record),
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
    """The cells over H and B: bf16, one direction, reset after, at the T that most of them have."""
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
            points = [(c[over], f) for c in some if (f := floor_us(c))]
            if points:
                axis.plot(*zip(*points, strict=True), ":", color="#555555", label="floor")
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
        axis.set_ylabel("time a step, µs")
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


def _floor(record: dict):
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
    for key, mark, color in (("floor_us", "|", "black"), ("estimate_us", "d", "#edae49")):
        values = [row["plan"][key] for row in rows]
        name = key.removesuffix("_us") + " of the plan"
        axis.scatter(values, at, marker=mark, s=70, color=color, label=name, zorder=3)
    longest = max(max(r["step_us"], r["plan"]["estimate_us"]) for r in rows)
    for i, row in enumerate(rows):
        share = row["step_us"] / row["plan"]["floor_us"]
        end = max(row["step_us"], row["plan"]["estimate_us"]) + 0.015 * longest
        axis.text(end, i, f"{share:.1f}x floor", va="center", fontsize=8)
    axis.set_xlim(0, 1.14 * longest)
    axis.set_yticks(at, names)
    axis.invert_yaxis()
    axis.set_xlabel("time a step of the kernel alone, µs")
    figure.suptitle("Kernels against what their plans promise")
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
    axis.set_ylabel("time an exchange, µs")
    axis.legend(frameon=False)
    axis.set_title("Exchange alone: 16 words from each program to all", fontsize=10)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="what benchmarks.run wrote")
    parser.add_argument("--out", type=Path, help="directory for report.md and the plots")
    options = parser.parse_args(arguments)
    record = json.loads(options.record.read_text())
    table = markdown(record)
    print(table)
    for goal, value, unit in goals(record):
        print(f"{value:8.2f} {unit:2}  {goal}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.md").write_text(table)
        for path in plots(record, options.out):
            print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
