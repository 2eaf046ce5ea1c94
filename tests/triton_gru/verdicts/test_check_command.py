"""`python -m triton_gru check`: what it measures, prints and exits with."""

import subprocess
import sys

import pytest
import torch

from triton_gru import check_command
from triton_gru.verdicts import checks, store
from triton_gru.verdicts.measuring import DEADLINE, MODES, Outcome
from triton_gru.verdicts.shapes import LONG, SHORT, ShapeClass, Verdict

WHERE = "a GPU | versions | kernels"


def passed(us, other_us):
    times = [(us * SHORT, us * LONG), (other_us * SHORT, other_us * LONG)]
    return Outcome({mode: Verdict("2026-01-01", None, *times) for mode in MODES})


FAILED = Outcome(dict.fromkeys(MODES, Verdict("2026-01-01", "wrong dh0 (seed 5)")))


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    monkeypatch.setattr(check_command, "_obstacle", lambda name: None)
    for module in (check_command, checks):
        monkeypatch.setattr(module, "environment", lambda device: WHERE)


def check(*arguments, measure):
    return check_command.main(["check", *arguments], measure)


def test_a_grid_or_one_class_or_what_is_named():
    seen = []

    def measure(shape, device):
        seen.append(shape)
        return passed(1.0, 2.0)

    def classes(*arguments):
        seen.clear()
        assert check(*arguments, measure=measure) == 0
        return list(seen)

    H, B, dtypes = check_command.HIDDEN_SIZES, check_command.BATCH_SIZES, check_command.DTYPES
    assert len(set(classes())) == len(H) * len(B) * len(dtypes)
    assert classes("--quick") == [ShapeClass(True, "bfloat16", 512, 1, 32)]
    assert classes("--quick", "--hidden-size", "650", "--dtype", "float16") == [
        ShapeClass(True, "float16", 650, 1, 32)
    ]
    named = ["--hidden-size", "650", "--batch-size", "20", "30", "--dtype", "tf32"]
    expected = ShapeClass(False, "tf32", 650, 2, 32)
    assert classes(*named, "--bidirectional", "--reset-before") == [expected]
    assert classes(*expected.command().split()[4:]) == [expected]


def test_a_table_and_the_verdicts_on_disk(capsys):
    def measure(shape, device):
        return passed(1.0, 2.5) if shape.batch == 16 else Outcome({}, "out of memory")

    assert check("--quick", "--batch-size", "16", "64", measure=measure) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == WHERE
    rows = [line for line in out.splitlines() if line.startswith("bfloat16 H 512")]
    assert [" ".join(row.split()) for row in rows] == [
        "bfloat16 H 512 B 16 inference 1.00 2.50 the kernels, from 16 steps on",
        "bfloat16 H 512 B 16 training 1.00 2.50 the kernels, from 16 steps on",
        "bfloat16 H 512 B 64 not measured: out of memory",
    ]
    assert "paste" not in out
    assert err.count("checking the Triton kernels:") == 2, "a line for each class"
    shape = ShapeClass(True, "bfloat16", 512, 1, 16)
    assert set(store.known(WHERE)) == {shape.key(True), shape.key(False)}


def test_a_failure_is_reported_and_stored(capsys):
    assert check("--quick", measure=lambda *a: FAILED) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "To report it, paste:" in lines[-2]
    for part in ("triton_gru ", WHERE, "bfloat16 H 512 B 32: wrong dh0 (seed 5)"):
        assert part in lines[-1]
    assert {v.failure for v in store.known(WHERE).values()} == {"wrong dh0 (seed 5)"}


def test_what_takes_longer_is_left_to_cudnn(capsys):
    assert check("--quick", measure=lambda *a: passed(1.9, 2.0)) == 0
    assert capsys.readouterr().out.rstrip().endswith("cuDNN")


def test_nothing_measured_at_all():
    assert check("--quick", measure=lambda *a: Outcome({}, "no memory")) == 2


def test_an_interrupted_check_keeps_what_it_measured():
    def measure(shape, device):
        if shape.batch == 64:
            raise KeyboardInterrupt
        return passed(1.0, 2.0)

    with pytest.raises(KeyboardInterrupt):
        check("--quick", "--batch-size", "16", "64", measure=measure)
    assert len(store.known(WHERE)) == len(MODES)


@pytest.mark.parametrize("arguments", [["--hidden-size", "0"], ["--dtype", "int8"], ["--fast"]])
def test_wrong_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        check(*arguments, measure=None)
    assert exit.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_without_a_gpu_it_says_so_in_a_line(monkeypatch):
    process = subprocess.run(
        [sys.executable, "-m", "triton_gru", "check"], capture_output=True, text=True
    )
    assert process.returncode == 2 and process.stdout == ""
    (line,) = process.stderr.splitlines()
    assert line.startswith("nothing to measure: ")


def test_time_left():
    assert checks.time_left(0, 3, 5.0) == f"at most {3 * DEADLINE / 60:.0f} min left"
    assert checks.time_left(1, 3, 20.0) == "about 40 s left"
    assert checks.time_left(2, 8, 60.0) == "about 3 min left"


def test_a_bar_where_rich_is_and_somebody_looks(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shapes = [ShapeClass(True, "bfloat16", 512, 1, B) for B in (16, 32)]
    assert list(checks.progress([])) == [] and capsys.readouterr().err == ""
    assert list(checks.progress(shapes)) == shapes
    assert "checking the Triton kernels: " not in capsys.readouterr().err
