"""The plots of a sweep: parallel coordinates, and the importance of each setting."""

import dataclasses
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from lightning_module.sweeps.jobs import COMPLETE, FAILED, Job
from lightning_module.sweeps.sweep import Sweep, short

# Dark is good; the lightest end of the map is invisible on white.
_COLOURS = colormaps["viridis"]
_LIGHTEST = 0.92
# With fewer complete jobs the importance is meaningless.
FEWEST = 4


@dataclasses.dataclass
class Axis:
    """One vertical axis: positions of values between 0 and 1, and labels.

    Attributes:
        name: of the parameter.
        places: position of each job's value, in the order of the jobs.
        ticks: position and label.
        discrete: whether jobs share positions, so that lines must be spread.
    """

    name: str
    places: list[float]
    ticks: list[tuple[float, str]]
    discrete: bool


def parameter_axis(name: str, described: dict[str, Any], values: list[str]) -> Axis:
    """The axis of one parameter, its search space from bottom to top.

    Choices are evenly spaced, numbers among them by size; intervals are linear, or logarithmic if
    they are searched so.
    """
    if "choices" in described:
        choices = list(dict.fromkeys(described["choices"]))
        try:
            choices.sort(key=float)
        except ValueError:
            choices.reverse()  # the first at the top
        step = 1 / max(1, len(choices) - 1)
        middle = 0.5 if len(choices) == 1 else 0.0
        ticks = [(middle + step * i, short(choice)) for i, choice in enumerate(choices)]
        places = [middle + step * choices.index(value) for value in values]
        return Axis(name, places, ticks, discrete=True)
    low, high, log = float(described["low"]), float(described["high"]), described["log"]

    def place(value: float) -> float:
        if high == low:
            return 0.5
        if log:
            return float(np.log(value / low) / np.log(high / low))
        return (value - low) / (high - low)

    numbers = _round_numbers(low, high, log)
    whole = described.get("step") == 1 and not log and high - low <= 10
    if whole:
        numbers = list(np.arange(low, high + 1))
    ticks = list(zip(map(place, numbers), _labels(numbers, log), strict=True))
    return Axis(name, [place(float(value)) for value in values], ticks, whole)


def _round_numbers(low: float, high: float, log: bool) -> list[float]:
    """About five round numbers within an interval, and its ends if they are far from these."""
    if log:
        steps = (1, 3) if high / low > 20 else (1, 2, 5)
        first, last = int(np.floor(np.log10(low))), int(np.ceil(np.log10(high)))
        found = [s * 10.0**e for e in range(first, last + 1) for s in steps]
        found = [n for n in found if low <= n <= high]
        return found if len(found) > 1 else [low, high]
    size = 10 ** np.floor(np.log10((high - low) or 1.0))
    for step in (size / 5, size / 2, size, 2 * size):
        found = list(np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step)
        if len(found) <= 6:
            return found
    return [low, high]


def _labels(numbers: list[float], log: bool) -> list[str]:
    """Each in its shortest form or, on a linear axis, all with as many decimals."""
    short = [f"{number:.4g}" for number in numbers]
    if not log and not any("e" in text for text in short):
        decimals = max(len(text.partition(".")[2]) for text in short)
        short = [f"{number:.{decimals}f}" for number in numbers]
    return [text.replace("e-0", "e-").replace("e+0", "e") for text in short]


def draw_parallel(sweep: "Sweep", path: Path) -> list[str]:
    """Draws each job as a line through its settings to its result; failed ones end in the margin.

    Returns:
        Messages for the user: why there is no plot.
    """
    jobs = [job for job in sweep.jobs if job.state in (COMPLETE, FAILED)]
    if not sweep.parameters or not sweep.complete:
        path.unlink(missing_ok=True)
        return ["No parallel coordinates: they need a swept setting and a complete job."]
    axes = [
        parameter_axis(name, described, [sweep.value(job, name) for job in jobs])
        for name, described in sweep.parameters.items()
    ]
    results = [_value(job) for job in sweep.complete]
    lowest, highest = min(results), max(results)
    room = 0.04 * (highest - lowest) or 0.1 * max(1, abs(lowest))
    lowest, highest = lowest - room, highest + room
    # The good end of the objective is up.
    up = sweep.direction == "maximize"

    def height(value: float) -> float:
        share = (value - lowest) / (highest - lowest)
        return share if up else 1 - share

    longest = max(len(text) for axis in axes for _, text in [*axis.ticks, (0, axis.name)])
    apart = max(1.75, 0.6 + 0.085 * longest)  # inches between two axes
    figure = Figure(figsize=(2.6 + apart * len(axes), 5.4), layout="constrained")
    plot = figure.subplots()
    spread = random.Random(0)
    order = sorted(range(len(jobs)), key=lambda i: -i)  # the best last, on top
    smooth = np.linspace(0, 1, 30)
    ease = smooth * smooth * (3 - 2 * smooth)
    shade = Normalize(0, 1)
    for i in order:
        job = jobs[i]
        ends = [_spread(axis, axis.places[i], spread) for axis in axes]
        failed = job.state == FAILED
        ends.append(-0.09 if failed else height(_value(job)))
        xs = np.concatenate([k + smooth for k in range(len(axes))])
        ys = np.concatenate([a + (b - a) * ease for a, b in itertools.pairwise(ends)])
        style: dict[str, Any]
        if failed:
            style = {"color": "0.6", "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
        else:
            colour = _COLOURS(shade(_LIGHTEST * (1 - height(_value(job)))))
            first = job is sweep.complete[0]
            style = {"color": colour, "linewidth": 3.2 if first else 1.4}
            style |= {
                "zorder": 5 if first else 2,
                "alpha": 1.0 if first or len(jobs) <= 40 else 0.5,
            }
        plot.plot(xs, ys, solid_capstyle="round", **style)
    round_numbers = _round_numbers(lowest, highest, log=False)
    labels = _labels(round_numbers, log=False)
    objective = list(zip(map(height, round_numbers), labels, strict=True))
    for x, axis in enumerate(axes):
        _draw_axis(plot, x, axis.name, axis.ticks, "on" if axis.discrete else "left")
    _draw_axis(plot, len(axes), sweep.objective, objective, "right")
    best = sweep.complete[0]
    plot.annotate(
        f"best {_value(best):.4f}\njob {best.number}",
        (len(axes), height(_value(best))),
        xytext=(44, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        fontweight="bold",
        color=_COLOURS(0.0),
        annotation_clip=False,
    )
    failures = sum(job.state == FAILED for job in jobs)
    if failures:
        plot.text(
            len(axes) + 0.04, -0.09, f"{failures} failed", color="0.45", va="center", fontsize=9
        )
    plot.set_xlim(-0.35, len(axes) + 0.55)
    plot.set_ylim(-0.14 if failures else -0.05, 1.2)
    plot.axis("off")
    figure.suptitle(
        f"{len(sweep.complete)} jobs of {sweep.directory.name}: "
        f"{'higher' if up else 'lower'} {sweep.objective} is better, and darker",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    return []


def _spread(axis: Axis, place: float, spread: random.Random) -> float:
    """A position near `place`, to separate lines through one value of a discrete axis."""
    if not axis.discrete:
        return place
    room = 0.22 / max(1, len(axis.ticks) - 1)
    return place + spread.uniform(-1, 1) * min(room, 0.02)  # about the height of a label


def _draw_axis(plot: Any, x: int, name: str, ticks: list[tuple[float, str]], where: str) -> None:
    """Draws an axis with its labels above the lines: to its left, to its right, or on it."""
    plot.plot([x, x], [-0.03, 1.03], color="0.25", linewidth=1.1, zorder=3)
    side, align = {"left": (-0.035, "right"), "right": (0.035, "left"), "on": (0.0, "center")}[
        where
    ]
    # Lines pass behind a label: they cross the box of a choice, and a number hides them.
    edge = {"edgecolor": "0.25", "linewidth": 0.8} if where == "on" else {"edgecolor": "none"}
    box = {"boxstyle": "round,pad=0.25" if where == "on" else "square,pad=0.1"}
    for place, label in ticks:
        plot.plot([x, x + side / 1.6], [place, place], color="0.25", linewidth=1.1, zorder=6)
        plot.text(
            x + side,
            place,
            label,
            ha=align,
            va="center",
            fontsize=9,
            zorder=7,
            bbox={"facecolor": "white", **edge, **box},
        )
    # optimizer.lr: the group small above the name
    group, mark, last = name.rpartition("." if "." in name else "/")
    plot.text(x, 1.09, last, ha="center", va="bottom", fontsize=10.5, fontweight="bold")
    plot.text(x, 1.155, group + mark, ha="center", va="bottom", fontsize=8.5, color="0.4")


def draw_importance(sweep: "Sweep", path: Path) -> list[str]:
    """Draws how much of the result each setting explains.

    Returns:
        Messages for the user: why there is no plot.
    """
    varied = [
        p for p in sweep.parameters if len({sweep.value(job, p) for job in sweep.complete}) > 1
    ]
    if len(sweep.complete) < FEWEST or len(varied) < 2:
        path.unlink(missing_ok=True)
        return [f"No importance: it needs {FEWEST} complete jobs and two settings that vary."]
    shares, method = importance(sweep, varied)
    names = sorted(shares, key=shares.__getitem__)
    figure = Figure(figsize=(7.2, 1.5 + 0.42 * len(names)), layout="constrained")
    plot = figure.subplots()
    values = [shares[name] for name in names]
    bars = plot.barh(names, values, color=_COLOURS(0.35), height=0.62)
    plot.bar_label(bars, [f"{v:.2f}" for v in values], padding=4, fontsize=9)
    plot.set_xlim(0, max(1.08 * max(values), 0.05) + 0.04)
    plot.set_xlabel(method, fontsize=9, color="0.35")
    plot.spines[["top", "right", "left"]].set_visible(False)
    plot.tick_params(axis="y", length=0)
    few = "; few jobs, read with care" if len(sweep.complete) < 10 * len(names) else ""
    plot.set_title(
        f"What moved {sweep.objective}: {len(sweep.complete)} jobs{few}", fontsize=11, loc="left"
    )
    figure.savefig(path, dpi=130)
    return []


def importance(sweep: "Sweep", parameters: list[str]) -> tuple[dict[str, float], str]:
    """The importance of each parameter, and the method.

    fANOVA (Hutter et al. 2014), the share of the variance over the search space, if Optuna and
    scikit-learn are installed; else by ranks, without interactions.
    """
    try:
        import sklearn  # noqa: F401
        from optuna.importance import FanovaImportanceEvaluator, get_param_importances
    except ImportError:
        return rank_importance(sweep, parameters), "strength of the rank correlation, 0 to 1"
    study = _study(sweep, parameters)
    found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    return dict(found), "share of the variance (fANOVA)"


def _study(sweep: "Sweep", parameters: list[str]) -> Any:
    """The complete jobs as an Optuna study."""
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(d["choices"])
        if "choices" in d
        else FloatDistribution(d["low"], d["high"], log=d["log"])
        for name, d in sweep.parameters.items()
        if name in parameters
    }

    def trial(job: Job) -> Any:
        values = {name: sweep.value(job, name) for name in space}
        numbers = {
            n: v if "choices" in sweep.parameters[n] else float(v) for n, v in values.items()
        }
        return optuna.create_trial(params=numbers, distributions=space, value=job.value)

    study = optuna.create_study(direction=optuna.study.StudyDirection[sweep.direction.upper()])
    study.add_trials([trial(job) for job in sweep.complete])
    return study


def rank_importance(sweep: "Sweep", parameters: list[str]) -> dict[str, float]:
    """By the ranks of the results: Spearman's correlation, for choices the correlation ratio."""
    results = _ranks([_value(job) for job in sweep.complete])
    found = {}
    for name in parameters:
        values = [sweep.value(job, name) for job in sweep.complete]
        if "choices" in sweep.parameters[name]:
            groups = [results[[v == choice for v in values]] for choice in set(values)]
            between = sum(len(g) * (g.mean() - results.mean()) ** 2 for g in groups)
            found[name] = float(np.sqrt(between / max(results.var() * len(results), 1e-12)))
        else:
            numbers = _ranks([float(v) for v in values])
            found[name] = abs(float(np.corrcoef(numbers, results)[0, 1]))
    return found


def _value(job: Job) -> float:
    """The value of a complete job."""
    assert job.value is not None
    return job.value


def _ranks(values: list[float]) -> np.ndarray:
    """Ranks from 0, ties at their mean."""
    array = np.asarray(values)
    return np.array([(array < v).sum() + ((array == v).sum() - 1) / 2 for v in array], float)
