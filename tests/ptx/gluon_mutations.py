"""Changes that break a Gluon kernel, and the ways in which each may show."""

import functools
import re

from tests.ptx import mutations
from tests.ptx.errors import PtxError
from tests.ptx.program import Program
from triton_gru.kernel_errors import KernelTimeout

Target = functools.cache(mutations.Target)


def dropped(pattern, which=0):
    """Leaves out one of the matches."""

    def change(ptx):
        found = list(re.finditer(pattern, ptx))[which]
        return ptx[: found.start()] + ptx[found.end() :]

    return change


def replaced(pattern, by, count=0):
    return lambda ptx: re.sub(pattern, by, ptx, count=count)


def not_polling(ptx):
    """A look is taken, and nobody says that it lacked anything."""
    ptx = ptx.replace("bra.uni LOOK;", "")
    return re.sub(r"(selp\.b32 %r\d+), t, (%r\d+), again;", r"\1, \2, \2, again;", ptx)


RELOAD = r"@lacks ld\.relaxed[^;]*;"
TEST = r"max\.u16x2 lacking[^;]*;"
ORDER = ("Deadlock", "KernelTimeout", "values")
BARRIERS = {
    "the first barrier": (dropped(r"bar\.sync\s+0;"), ("Race", "Uninitialised")),
    "the second barrier": (dropped(r"bar\.sync\s+0;", 1), ("Race", "Uninitialised")),
}
BROKEN = BARRIERS | {
    "no poll": (not_polling, ("values",)),
    "a reload": (dropped(RELOAD), ("KernelTimeout",)),
    "a word that is not tested": (dropped(TEST, 2), ("values",)),
    "low halves alone tested": (
        replaced(r"and\.b32 lacking, lacking, 0x80008000", "and.b32 lacking, lacking, 0x00008000"),
        ("values",),
    ),
    "plain loads": (replaced(r"ld\.relaxed\.gpu", "ld"), ORDER),
    "each lane for itself": (
        replaced(r"vote\.sync\.any\.pred any, lacks, 0xffffffff", "setp.ne.s32 any, lacking, 0"),
        ("Divergence",),
    ),
    "a wait without a bound": (
        lambda ptx: dropped(RELOAD)(ptx).replace("add.s32 looks, looks, 1", "mov.b32 looks, 0"),
        ("Deadlock",),
    ),
    "a wait given up that nobody hears of": (
        lambda ptx: re.sub(r"(selp\.b32 %r\d+), t,( %r\d+,)", r"\1,\2\2", dropped(RELOAD)(ptx)),
        ("values",),
    ),
    "a store of rows that are not": (replaced(r"@stored st", "st"), ("OutOfBounds", "values")),
    "NaN stored as the sentinel": (replaced("0x7E00", "0xFFFF"), ("KernelTimeout",)),
    "words of an operand exchanged": (
        replaced(r"(ld\.relaxed\.gpu\.global\.v4\.b32 \{)(%r\d+), (%r\d+)", r"\1\3, \2"),
        ("values",),
    ),
}


def how_it_shows(target: mutations.Target, change) -> str | None:
    """How a target with a change fails, or None."""
    text = change(target.ptx)
    assert text != target.ptx
    return target.fails(text, mutations.SEEDS["barrier"])


def all_show(run, changes: dict) -> None:
    """Asserts that every change of the Gluon kernel that `run` launches shows in the way it has.

    Args:
        run: `run_forward` or `run_backward` of a `cases.Scan`.
        changes: The ways, by the changes.
    """
    own = next(launch for launch in run().launches if "gluon" in launch.name)
    for change, way in changes.items():
        text = change(own.ptx)
        assert text != own.ptx
        found, instead = set(), {own.name: Program(text)}
        for seed in range(4):
            try:
                found |= {"values"} if run(seed=seed, instead=instead).wrong() else set()
            except (PtxError, KernelTimeout) as error:
                found.add(type(error).__name__)
        assert way in found
