"""Commands that start at once: forks of a process that has imported torch and Lightning.

To import them takes 6.5 s of CPU time, and the tests run about 80 commands, which start 60 ranks
and jobs of sweeps. What a fork cannot show (the order of imports, variables that Python and OpenMP
read when they start, signals at any time) is tested with real processes: test_entry.py, and each
test that calls `subprocess` itself.
"""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # s
# What commands start themselves, as python -m: the entry points in lightning_module.commands.
STARTED = {"lightning_module.train": "train", "lightning_module.distributed.worker": "rank"}
# As Python opens them for files, in a UTF-8 locale: descriptor, mode, buffering, errors.
_STREAMS = [(0, "r", -1, "strict"), (1, "w", -1, "strict"), (2, "w", 1, "backslashreplace")]


class Forks:
    """A process that waits for commands and runs each in a fork of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.lightning_module.forking"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, name: str, arguments: list[str], cwd: Path, stdin: str, environment: dict[str, str]
    ) -> subprocess.CompletedProcess:
        """As `subprocess.run` of the entry point `lightning_module.commands.<name>`."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, stream) for stream in ("stdin", "stdout", "stderr")]
            # "\udcff" in stdin is the byte 0xff.
            files[0].write_text(stdin, encoding="utf-8", errors="surrogateescape")
            job = {
                "name": name,
                "argv": [name, *arguments],
                "cwd": str(cwd),
                "environment": environment,
                "files": [str(path) for path in files],
            }
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            out, err = (
                path.read_text(encoding="utf-8", errors="surrogateescape") for path in files[1:]
            )
        return subprocess.CompletedProcess(job["argv"], code, out, err)

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


class _Fork(subprocess.Popen):
    """What a command starts is a fork too, where it is one of `STARTED`."""

    def _execute_child(self, args: Any, *options: Any) -> None:
        if args[:2] != [sys.executable, "-m"] or args[2] not in STARTED:
            super()._execute_child(args, *options)
            return
        cwd, environment, pipes = options[4], options[5], options[9:15]
        child_in, parent_in, parent_out, child_out, parent_err, child_err = pipes
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            for end in {parent_in, parent_out, parent_err} - {-1}:
                os.close(end)
            for number, end in enumerate((child_in, child_out, child_err)):
                if end != -1:
                    os.dup2(end, number)
            os.chdir(cwd or ".")
            _become(STARTED[args[2]], args[2:], environment)
        self._close_pipe_fds(*pipes)


def _serve() -> NoReturn:
    """Runs jobs, one after the other, until the end of standard input."""
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            signal.alarm(TIMEOUT)  # ends the process if it hangs
            subprocess.Popen = _Fork
            os.chdir(job["cwd"])
            for number, path in enumerate(job["files"]):
                file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
                os.dup2(file, number)
                os.close(file)
            _become(job["name"], job["argv"], job["environment"])
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    raise SystemExit


def _become(name: str, argv: list[str], environment: dict[str, str]) -> NoReturn:
    """Runs an entry point in a fork, which keeps nothing of what the process had set up."""
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = argv
    sys.stdin, sys.stdout, sys.stderr = (
        os.fdopen(number, mode, buffering, encoding="utf-8", errors=errors, closefd=False)
        for number, mode, buffering, errors in _STREAMS
    )
    logging.getLogger().handlers.clear()
    GlobalHydra.instance().clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 0
    try:
        getattr(commands, name)()
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # without atexit, by which the process's temporary directories would be removed


if __name__ == "__main__":
    from lightning_module import commands

    commands._let_waiting_threads_sleep()
    gc.disable()
    from hydra.core.global_hydra import GlobalHydra

    import lightning_module.distributed.worker
    import lightning_module.evaluate
    import lightning_module.inspect.command
    import lightning_module.memory.command
    import lightning_module.predict
    import lightning_module.sweeps.jobs
    import lightning_module.sweeps.report
    import lightning_module.train  # noqa: F401
    from triton_gru.engines.cpu import library

    library.obstacle()  # each fork would build it for its own cache
    gc.freeze()  # what all forks share is not looked through, and so not copied
    gc.enable()
    _serve()
