"""Tables and plots of a record: `python -m benchmarks.report FILE.json [--out DIR]`.

Prints the table in Markdown; with --out writes it to DIR/report.md beside the plots, each
as PNG and SVG. Only the plots need matplotlib.
"""

import argparse
import json
from pathlib import Path

from benchmarks.measurements import Record
from benchmarks.metrics import (
    MODES,
    NAMES,
    geometric_mean,
    goals,
    is_half,
    median_ms,
    noise,
    speedup,
    speedups,
    worst_error_ratio,
)
from benchmarks.plots import plots
from benchmarks.suites import CUDNN, LSTM, OURS


def one_line(result: dict) -> str:
    """A short result for the log."""
    if result["status"] != "ok":
        return f"{result['status']}: {result.get('reason', '')}".rstrip(": ")
    if "rows" in result:
        steps = [f"{row['step_us']:.2f}" for row in result["rows"] if "step_us" in row]
        return "us per step: " + " ".join(steps)
    rate = [f", {result[key]:,.0f} {key}" for key in ("GB_s", "TFLOP_s") if key in result]
    step = f", {result['step_us']:.2f} us per step" if "step_us" in result else ""
    return f"{result['median_ms']:.3f} ms{step}{''.join(rate)}"


def label(cell: dict) -> str:
    """Short shape and kind of a cell."""
    words = [f"T{cell['T']} B{cell['B']} H{cell['H']}", NAMES[cell["dtype"]], cell["mode"]]
    words += [] if cell["reset_after"] else ["reset before"]
    words += ["2 directions"] if cell["directions"] == 2 else []
    words += [] if cell["lengths"] == "full" else [cell["lengths"]]
    return " ".join(words)


def text(record: dict) -> str:
    """The short table at the end of a run."""
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


def brief(record: dict) -> str:
    """Twenty lines at most: rates, a line for each shape with the times of both modes, goals."""
    rates = [
        f"{name} {probe[key]:,.0f} {key.replace('_', '/')}"
        for name, probe in record["probes"].items()
        for key in ("GB_s", "TFLOP_s")
        if key in probe
    ]
    lines = [", ".join(rates) or "no rates"]
    lines += [
        f"{name}: {one_line(probe)}"[:100]
        for name, probe in record["probes"].items()
        if name.startswith("exchange")
    ]
    lines.append(
        f"{'shape':20} {'forward us/step':>16} {'x nn.GRU':>9} {'x nn.LSTM':>9}"
        f" {'train us/step':>14} {'x nn.GRU':>9} {'x nn.LSTM':>9}"
    )
    shapes: dict[tuple, dict[str, dict]] = {}
    for cell in record["cells"].values():
        key = (cell["dtype"], cell["T"], cell["B"], cell["H"], cell["reset_after"])
        shapes.setdefault((*key, cell["directions"], cell["lengths"]), {})[cell["mode"]] = cell
    for modes in shapes.values():
        cells = [modes.get(mode) for mode in MODES]
        first = next(cell for cell in cells if cell is not None)
        line = f"T{first['T']} B{first['B']} H{first['H']}"
        line = f"{line:20}"
        for cell, width in zip(cells, (16, 14), strict=True):
            ours = cell and median_ms(cell, OURS)
            step = ours and cell and 1e3 * ours / cell["T"]
            line += f" {_number(step, f'{width}.2f')}"
            line += "".join(
                f" {_number(cell and speedup(cell, over), '9.2f')}" for over in (CUDNN, LSTM)
            )
        lines.append(line)
    reached = [f"{value:8.2f} {unit:2}  {goal}" for goal, value, unit in goals(record)]
    return "\n".join([*lines[: 20 - len(reached)], *reached])


def _number(value: float | None, form: str) -> str:
    width = int(form.split(".")[0])
    return " " * (width - 1) + "-" if value is None else format(value, form)


def _probe_row(row: dict) -> str:
    if "plan" not in row:
        return f"{row['programs']:4} programs {row['step_us']:7.3f} us per step"
    plan = row["plan"]
    where = f"T{row['T']} B{row['B']} H{row['H']} {NAMES[row['dtype']]} {row['direction']}"
    where += "" if row["reset_after"] else " reset before"
    how = f"{plan['block_m']}x{plan['block_n']} {plan['groups']}x{plan['group']} programs"
    how += f" {plan['warps']} warps" + (f" {plan['protocol']}" if plan["group"] > 1 else "")
    measured = f"{row['step_us']:7.3f}" if "step_us" in row else f"failed: {row['failed'][:60]}"
    predicted = f"lower bound {plan['lower_bound_us']:.2f} estimate {plan['estimate_us']:.2f}"
    return f"{where:42} {how:38} {predicted}: {measured}"


def markdown(record: dict) -> str:
    """The table in Markdown: the environment, then a row per cell."""
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
        values = speedups(record, lambda c, mode=mode: c["mode"] == mode and is_half(c))
        if values:
            mean = geometric_mean(values)
            means.append(f"{MODES[mode]} {mean:.2f}x over {len(values)} cells")
    if means:
        lines += [f"Geometric mean of the speed-up in 16 bit: {'; '.join(means)}.", ""]
    measured = [c for c in record["cells"].values() if median_ms(c, OURS)]
    if measured:
        apart = sorted(100 * noise(cell) for cell in measured)
        lines += [
            f"Two rounds of one implementation differ by {apart[len(apart) // 2]:.0f} % in the "
            f"median cell, {apart[-1]:.0f} % in the worst: smaller differences are noise.",
            "",
        ]
    others = [LSTM, "compiled loop", "gru-qat", "torchrl", "flashrnn"]
    others = [name for name in others if any(median_ms(c, name) for c in record["cells"].values())]
    head = [
        "T",
        "B",
        "H",
        "dtype",
        "timed",
        "triton_gru ms",
        "us per step",
        "nn.GRU ms",
        "speed-up",
    ]
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path, help="file written by benchmarks.run")
    parser.add_argument("--out", type=Path, help="directory for report.md and the plots")
    parser.add_argument("--brief", action="store_true", help="twenty lines, and nothing else")
    options = parser.parse_args(arguments)
    record = json.loads(options.record.read_text())
    if options.brief:
        print(brief(record))
        return 0
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
