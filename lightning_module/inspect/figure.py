"""An inspection as a PNG: predictions, loss, state kept and replaced, and gates of each token."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_module.inspect.inspection import Inspection, visible

if TYPE_CHECKING:  # takes 0.5 s to import
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage
    from matplotlib.patches import Rectangle
    from torch import Tensor

# Blue keeps the past and orange drops it, in every picture and on the page; white is half of each.
KEEP, HALF, DROP = "#1f5fa8", "#f6f4ef", "#e06c00"
DEFAULT_FONT = "DejaVu Sans"  # part of matplotlib
FONT_HINT = (
    "Install a font that has them, for Chinese for example: apt install fonts-noto-cjk (Debian, "
    "Ubuntu), dnf install google-noto-sans-cjk-fonts (Fedora), brew install --cask "
    "font-noto-sans-cjk (macOS). The HTML page uses the browser's fonts and needs none."
)


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Font families that together draw a text, and the characters that no font here has.

    Fonts are searched on the machine and not in matplotlib's list, which is made once and lacks
    fonts installed later.
    """
    from matplotlib import font_manager

    missing = {ord(character) for character in text if character.isprintable()}
    families = [DEFAULT_FONT]
    missing -= _characters(font_manager.findfont(DEFAULT_FONT))
    if missing:
        for path in sorted(font_manager.findSystemFonts(), key=_plainness):
            found = missing & _characters(path)
            if found:
                font_manager.fontManager.addfont(path)
                families.append(font_manager.get_font(path).family_name)
                missing -= found
            if not missing:
                break
    return families, {chr(code) for code in missing}


def _characters(path: str) -> set[int]:
    """The code points that a font has."""
    from matplotlib import font_manager

    try:
        return set(font_manager.get_font(path).get_charmap())
    except (
        RuntimeError,
        OSError,
    ):  # a bitmap font, such as colour emoji, or a damaged one
        return set()


def _plainness(path: str) -> tuple[bool, bool, str]:
    """Regular weights first, and fonts made for Chinese before others that have some."""
    name = Path(path).name.lower()
    chinese = any(part in name for part in ("cjk", "sc-", "hei", "pingfang", "yahei", "song"))
    styled = any(part in name for part in ("bold", "light", "thin", "black", "italic", "oblique"))
    return styled, not chinese, path


def draw_inspection(inspection: Inspection, path: Path, title: str) -> None:
    """Draw an inspection into a PNG, the tokens from left to right.

    A character that no font of this machine has is drawn as its code point, never as an empty box,
    and a warning on standard error says what to install.
    """
    import matplotlib
    from matplotlib.figure import Figure

    tokens = [visible(token) for token in inspection.tokens]
    candidates = [visible(token.text) for row in inspection.next_tokens for token in row]
    families, missing = fonts_for("".join([title, *tokens, *candidates]))
    if missing:
        shown = " ".join(sorted(missing)[:10]) + " …" * (len(missing) > 10)
        print(
            f"warning: no font on this machine draws {shown}; the PNG shows code points such as "
            f"U+{ord(min(missing)):04X} instead. {FONT_HINT}",
            file=sys.stderr,
        )

    def label(text: str) -> str:
        return "".join(f"U+{ord(c):04X}" if c in missing else c for c in text)

    columns = len(tokens) + 1  # the last one is the next token
    longest = max(len(label(token)) for token in tokens)
    upright = longest <= 2
    # Inches per token: readable for a short text, and no picture wider than about 7000 pixels.
    room, least = (8, 0.2) if upright else (60, 0.24)
    width = max(min(max(room / columns, least), 0.45), 7 / columns)
    with (
        matplotlib.rc_context({"font.family": families, "font.size": 9}),
        warnings.catch_warnings(),
    ):
        # "Failed to find font weight bold": Chinese fonts often have one weight, which will do.
        logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
        # An unprintable character, such as a control character, may still lack a glyph.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(3.3 + width * columns, 11.5), layout="constrained")
        grid = figure.add_gridspec(
            6, 2, height_ratios=(1.7, 0.8, 0.9, 0.9, 3.2, 3.2), width_ratios=(width * columns, 1.1)
        )
        rows = [figure.add_subplot(grid[i, 0]) for i in range(6)]
        expected, cost, replaced, remains, keeps, uses = rows
        memory = figure.add_subplot(grid[4, 1])
        head = figure.suptitle(label(title), x=0.01, ha="left", fontsize=12, fontweight="bold")
        head.set_fontsize(12 * min(1, 0.98 * figure.bbox.width / head.get_window_extent().width))
        _draw_expected(expected, inspection, label, letters=int(width / 0.045))
        _draw_cost(cost, inspection)
        _draw_replaced(replaced, inspection)
        _draw_remains(remains, inspection)
        gates = (
            (keeps, inspection.z, "1: keeps", "0: replaces"),
            (uses, inspection.r, "1: uses", "0: drops"),
        )
        for axes, gate, one, zero in gates:
            image = _draw_gate(axes, gate, inspection)
            # In the last column, where there are no gates: 0.12 inches wide.
            colours = axes.inset_axes(
                (len(tokens) - 0.5 + 0.06 / width, 0, 0.12 / width, 1),
                transform=axes.get_xaxis_transform(),
            )
            bar = figure.colorbar(image, cax=colours)
            bar.set_ticks([0, 0.5, 1], labels=[f"{zero}\nthe past", "0.5", f"{one}\nthe past"])
        _set_title(keeps, "Update gate z: blue keeps the unit's memory, orange replaces it")
        _set_title(uses, "Reset gate r: blue uses the past for the new content, orange does not")
        _draw_memory(memory, inspection)
        for axes in rows:
            axes.set_xlim(-0.5, columns - 0.5)
            names = [label(token) for token in tokens] if axes in (expected, remains, uses) else []
            axes.set_xticks(range(len(names)), names, rotation=0 if upright else 90, fontsize=9)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        figure.savefig(path, dpi=110)


def _set_title(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)


def _draw_expected(
    axes: Axes, inspection: Inspection, label: Callable[[str], str], letters: int
) -> None:
    k = max(1, len(inspection.next_tokens[0]))
    for column, (row, token) in enumerate(
        zip(inspection.next_tokens, [*inspection.tokens[1:], None], strict=True), start=1
    ):
        for rank, candidate in enumerate(row):
            right = candidate.text == token
            axes.add_patch(
                _rectangle(column, rank, KEEP if right else "0.35", candidate.probability)
            )
            axes.text(
                column,
                rank,
                label(visible(candidate.text))[:letters],
                ha="center",
                va="center",
                fontsize=8 if len(candidate.text) <= 2 else 5,
                fontweight="bold" if right else "normal",
                color="white" if candidate.probability > 0.55 else "black",
                in_layout=False,  # thousands, measured at every layout
            )
    axes.set_ylim(k - 0.5, -0.5)
    axes.set_yticks(range(k), [f"{rank + 1}." for rank in range(k)])
    _set_title(
        axes,
        "What the model expected here: its likeliest tokens, darker for more probable, blue for "
        "the one that came",
    )


def _rectangle(column: int, rank: int, color: str, alpha: float) -> Rectangle:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.46, rank - 0.46), 0.92, 0.92, color=color, alpha=alpha, lw=0)


def _draw_cost(axes: Axes, inspection: Inspection) -> None:
    bits = [0.0 if cost is None else cost for cost in inspection.surprise]
    axes.bar(range(len(bits)), bits, color="0.45", width=0.8)
    axes.set_ylabel("bits")
    _set_title(axes, "Surprise: what the token that came cost, in bits")


def _draw_replaced(axes: Axes, inspection: Inspection) -> None:
    share = 100 * inspection.forgotten
    most = set(inspection.forgets_most)
    colors = [DROP if t in most else "#f3c9a0" for t in range(len(share))]
    axes.bar(range(len(share)), share.tolist(), color=colors, width=0.8)
    for t in most:
        axes.annotate(
            f"{share[t]:.0f}", (t, share[t]), ha="center", va="bottom", fontsize=8, color=DROP
        )
    axes.margins(y=0.25)
    axes.set_ylabel("%")
    _set_title(axes, "Forgetting: the share of the memory that the token replaces, mean of 1 − z")


def _draw_remains(axes: Axes, inspection: Inspection) -> None:
    share = 100 * inspection.written[-1, :-1]  # the last token's share exceeds the others
    axes.bar(range(len(share)), share.tolist(), color=KEEP, width=0.8)
    axes.set_ylabel("%")
    _set_title(
        axes,
        f"Remembering: the share of the memory at the end that goes back to the token (the last: "
        f"{inspection.written[-1, -1]:.0%})",
    )


def _draw_gate(axes: Axes, gate: Tensor, inspection: Inspection) -> AxesImage:
    from matplotlib.colors import LinearSegmentedColormap

    order = inspection.memory.argsort(descending=True)
    image = axes.imshow(
        gate[:, order].T.float().numpy(),
        aspect="auto",
        vmin=0,
        vmax=1,
        cmap=LinearSegmentedColormap.from_list("past", [DROP, HALF, KEEP]),
        interpolation="nearest",
    )
    axes.set_yticks([])
    axes.set_ylabel(f"{len(order)} units\n← forget soon      remember long →")
    return image


def _draw_memory(axes: Axes, inspection: Inspection) -> None:
    memory = inspection.memory.sort(descending=True).values
    axes.fill_betweenx(range(len(memory)), 1, memory, color=KEEP, alpha=0.6, lw=0)
    axes.set_ylim(len(memory) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.set_xlim(left=1)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", labelsize=7)
    axes.set_yticks([])
    _set_title(axes, "Remembers for\n… tokens, mean\nof 1/(1 − z)")
    axes.spines[["top", "right"]].set_visible(False)
