"""What the commands answer or refuse before torch is imported."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import lightning_module
import triton_gru
from lightning_module import commands
from lightning_module.terminal.signals import handled_by, interrupt
from lightning_module.terminal.standard_streams import LastingOutput

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "predict", "evaluate", "prepare", "memory", "inspect", "sweep_report")
MODULES = ("train", "predict", "evaluate")  # which python -m runs
# Calls commands one after another in a process whose `torch` cannot be imported, and prints each
# one's exit code. A module in HIDDEN is as good as not installed.
CHILD = """
import json, sys
from lightning_module import commands
from lightning_module.terminal.standard_streams import LastingOutput
from lightning_module.terminal.signals import handled_by, interrupt

calls, hidden = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(hidden))
codes = []
for name, *arguments in calls:
    sys.argv = [name, *arguments]
    try:
        getattr(commands, name)()
        codes.append(0)
    except SystemExit as ended:
        codes.append(ended.code)
print("codes", json.dumps(codes))
"""


def run_without(modules, calls, cwd):
    """The exit codes of commands that run without some modules, and what they printed."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps([calls, modules])],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    output, _, codes = done.stdout.rpartition("codes ")
    return json.loads(codes), output, done.stderr


def test_arguments_are_answered_or_refused_without_torch(tmp_path):
    answered = [[name, flag] for name in COMMANDS for flag in ("--help", "--version")]
    refused = [[name, "--hepl"] for name in COMMANDS]
    refused += [[name, "no.such=1"] for name in COMMANDS if name != "sweep_report"]
    refused += [
        ["train", "experiment=quikstart"],
        ["train", "triner.max_steps=3"],
        ["train", "model/layer_type=gru,mamba", "-m"],
        ["train", "-m", "optimizer.lrr=1,2"],
        ["train", "--cfg", "jb"],
        ["memory", "tokenizer=chr"],
        ["sweep_report", "nowhere"],
    ]
    hidden = ["torch", "lightning", "triton", "torchmetrics"]
    codes, output, errors = run_without(hidden, answered + refused, tmp_path)
    assert codes[: len(answered)] == [0] * len(answered)
    assert set(codes[len(answered) :]) <= {1, 2}, errors
    assert output.count(f" {triton_gru.__version__}\n") == len(COMMANDS)
    for expected in ("quikstart", "triner", "mamba", "optimizer.lr", "chr", "nowhere holds no"):
        assert expected in errors
    assert "Traceback" not in errors
    assert "not installed" not in errors
    assert list(tmp_path.iterdir()) == []


def test_python_m_is_the_same_as_the_console_script():
    scripts = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[2]
    programs = {
        name: f"triton-gru-{'eval' if name == 'evaluate' else name.replace('_', '-')}"
        for name in COMMANDS
    }
    for name, program in programs.items():
        assert f'{program} = "lightning_module.commands:{name}"' in scripts
    for name in MODULES:
        done = subprocess.run(
            [sys.executable, "-m", f"lightning_module.{name}", "--version"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.stdout == f"{programs[name]} {triton_gru.__version__}\n", done.stderr


@pytest.mark.parametrize(
    ("module", "calls"),
    [
        ("hydra", [[name, "--help"] for name in COMMANDS if name != "sweep_report"]),
        ("lightning", [["train"]]),
        ("rich", [["sweep_report", "."]]),
    ],
)
def test_without_the_extra_it_is_named(tmp_path, module, calls):
    codes, _, errors = run_without([module], calls, tmp_path)
    assert codes == [1] * len(calls)
    line = f"error: the module {module} is not installed: pip install 'triton-gru[train]'"
    assert errors.splitlines() == [line] * len(calls)


def test_without_optuna_a_search_names_its_extra(tmp_path):
    call = ["train", "-m", "sweep=optuna", "optimizer.lr=0.1,0.2"]
    codes, _, errors = run_without(["optuna", "torch"], [call], tmp_path)
    assert codes == [1]
    assert errors == "error: sweep=optuna needs Optuna: pip install 'triton-gru[sweep]'\n"


def test_the_extras_are_those_of_the_project():
    """Each requirement of an extra brings a module that the table names."""
    module_of = {"hydra-core": "hydra", "scikit-learn": "sklearn"}
    text = (ROOT / "pyproject.toml").read_text()
    for extra, modules in commands.EXTRAS.items():
        (listed,) = re.findall(rf"^{extra} = \[(.*?)\]$", text, re.M | re.S)
        for requirement in re.findall(r'"([\w-]+)', listed):
            if not requirement.startswith("hydra-") or requirement in module_of:
                assert module_of.get(requirement, requirement) in modules


def test_a_module_that_is_missing_inside_a_package_is_no_missing_package():
    for name in ("json.no_such", "lightning_module.no_such"):
        with pytest.raises(ModuleNotFoundError) as raised:
            import_module(name)
        assert commands._how_to_install(raised.value) is None
    with pytest.raises(ModuleNotFoundError) as raised:
        import_module("no_such_package.part")
    assert "pip install no_such_package" in commands._how_to_install(raised.value)


def test_what_the_package_exports_is_imported_when_it_is_asked_for():
    for name in lightning_module.__all__:
        assert getattr(lightning_module, name).__name__ == name
        assert name in dir(lightning_module)
    with pytest.raises(AttributeError, match="no_such"):
        _ = lightning_module.no_such


# Sends a signal to itself, once while it imports and once while it works.
INTERRUPTED = """
import os, sys, time
from lightning_module import commands
from lightning_module.terminal.standard_streams import LastingOutput
from lightning_module.terminal.signals import handled_by, interrupt

when, number = sys.argv[1], int(sys.argv[2])
sys.argv = ["predict"]

def interrupted(*_):
    os.kill(os.getpid(), number)
    time.sleep(60)

def load():
    if when == "importing":
        try:
            interrupted()
        except BaseException:  # as numpy does around an import
            raise ImportError("numpy.core.multiarray failed to import")
    return interrupted

with commands._command("triton-gru-predict"):
    commands._compose_and_run("predict", load)
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["importing", "working"])
def test_a_signal_ends_a_command_in_one_line(tmp_path, when, number):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, when, str(int(number))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 128 + number, done.stderr
    assert done.stderr == f"\nstopped by {number.name}\n"


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_a_rank_whose_launcher_is_gone_ends_while_it_imports():
    """A machine with little memory may import for minutes; `sleep` stands for that."""
    program = (
        "import sys, time\n"
        "from lightning_module import commands\n"
        "class Slow:\n"
        "    def find_spec(self, name, *_):\n"
        "        time.sleep(60 * (name == 'lightning_module.distributed.worker'))\n"
        "sys.meta_path.insert(0, Slow())\n"
        "commands.rank()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == -signal.SIGKILL


def test_a_signal_that_is_ignored_or_handled_otherwise_stays_so():
    before = signal.getsignal(signal.SIGTERM)
    try:
        for present in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGTERM, present)
            with handled_by(interrupt):
                assert signal.getsignal(signal.SIGTERM) is present
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    ("of_the_user", "expected"),
    [
        ({}, commands.WAITING),
        ({"OMP_NUM_THREADS": "3"}, commands.WAITING),
        *(({name: "1"}, {}) for name in commands._WAITING_OF_THE_USER),
    ],
)
def test_waiting_threads_sleep_unless_the_user_decides(monkeypatch, of_the_user, expected):
    environment = {"HOME": "/", **of_the_user}
    monkeypatch.setattr(commands.os, "environ", dict(environment))
    commands._let_waiting_threads_sleep()
    assert commands.os.environ == environment | expected


def shell(line, cwd):
    """Runs a line of bash in which `command NAME ARGUMENTS` is one of the commands."""
    call = 'name=$1; shift; "{}" -c "from lightning_module.commands import $name; $name()" "$@"'
    prelude = f"command() {{ {call.format(sys.executable)}; }}; set -o pipefail; "
    return subprocess.run(
        ["bash", "-c", prelude + line],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    ("line", "code", "errors"),
    [
        ("command predict --help > /dev/full", 1, "error: the output cannot be written"),
        ("command predict --cfg job >&-", 0, ""),
        ("command inspect --help | true", 0, ""),
        ("command train --help > /dev/full", 0, "standard output cannot be written"),
    ],
)
def test_output_that_cannot_be_written_is_one_line_or_none(tmp_path, line, code, errors):
    done = shell(line, tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == bool(errors)
    assert errors in done.stderr


def test_a_training_continues_without_its_output(capsys):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    output = LastingOutput(Full())
    for _ in range(2):
        print("step 1", file=output, flush=True)
    assert not output.isatty()
    assert capsys.readouterr().err == (
        "standard output cannot be written (No space left on device); the run continues "
        "without it\n"
    )
