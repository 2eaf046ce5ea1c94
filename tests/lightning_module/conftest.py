import logging
import os
import random
import shutil
import subprocess
import sys

import hypothesis
import pytest
import torch

from lightning_module.run_files import BEST, CHECKPOINTS
from tests.lightning_module.forking import TIMEOUT, Forks

# A busy machine is no failure: what is slow shows in the durations.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

TINY = [
    "data=text_files",
    "data.batch_size=4",
    "data.seq_len=16",
    "model.hidden_size=32",
    "model.embedding_size=16",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=-1",
    "trainer.check_val_every_n_epoch=null",
    "trainer.val_check_interval=1000",
]


def made_text(characters: int, seed: int = 0) -> str:
    """Sentences of a few words: a model learns them in seconds, and chance does not."""
    choose = random.Random(seed).choice
    text = ""
    while len(text) < characters:
        who, does = choose(["The cat", "A dog", "My horse"]), choose(["sees", "hears", "wants"])
        text += f"{who} {does} {choose(['the moon', 'a bird', 'the old house'])}.\n"
    return text[:characters]


@pytest.fixture(scope="session")
def command(tmp_path_factory, engine_cache):
    """Runs the commands, each in a process, with a cache of their own.

    With environment variables of its own it is a new process, as some are read at the start of
    one; without, it is a fork of one that has torch imported.
    """
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(engine_cache, home / "cache")
    forks = Forks() if hasattr(os, "fork") else None

    def run(name, *arguments, cwd=home, stdin="", **environment):
        arguments = list(map(str, arguments))
        variables = {**os.environ, "TRITON_GRU_CACHE": str(home / "cache"), **environment}
        if forks and not environment:
            return forks.run(name, arguments, cwd, stdin, variables)
        return subprocess.run(
            [
                sys.executable,
                *("-c", f"from lightning_module.commands import {name}; {name}()"),
                *arguments,
            ],
            cwd=cwd,
            input=stdin,
            capture_output=True,
            text=True,
            errors="surrogateescape",  # "\udcff" in stdin is the byte 0xff
            timeout=TIMEOUT,
            env=variables,
        )

    run.home = home
    yield run
    if forks:
        forks.close()


@pytest.fixture
def train_here(monkeypatch, tmp_path, text_file):
    """Trains in this process, three steps of the smallest model unless told otherwise."""
    monkeypatch.setenv("TRITON_GRU_CACHE", str(tmp_path / "cache"))

    def run(*overrides, **how):
        from hydra import compose, initialize_config_dir

        from lightning_module import train
        from lightning_module.lightning_warnings import quiet
        from lightning_module.settings.config_folder import CONFIGS

        quiet()
        small = ["model.hidden_size=8", "model.embedding_size=4", "trainer.max_steps=3"]
        quick = ["callbacks.samples.max_tokens=3", f"data.paths=[{text_file}]"]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            config = compose("train", [*TINY, *small, *quick, *map(str, overrides)])
        return train.train(config, **how)

    return run


@pytest.fixture
def fails(monkeypatch, tmp_path, capsys):
    """Runs a command in this process, which has torch started already, and returns its errors."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    monkeypatch.chdir(tmp_path)

    def run(main, *command_line):
        monkeypatch.setattr(sys, "argv", [main.__module__, *command_line])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 1
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        return errors

    yield run
    root.handlers[:], root.level = before  # Hydra has set its own


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "made.txt"
    path.write_text(made_text(20_000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def trained(command, text_file):
    """A run directory that the real command filled, and what it printed."""
    run_dir = command.home / "runs" / "trained"
    done = command(
        "train",
        *TINY,
        f"data.paths=[{text_file}]",
        f"run_dir={run_dir}",
        "optimizer.lr=0.02",
        "trainer.max_steps=250",
        "trainer.val_check_interval=100",
    )
    assert done.returncode == 0, done.stderr
    run_dir.joinpath("output.txt").write_text(done.stdout)
    return run_dir


@pytest.fixture
def checkpoint(trained):
    return torch.load(trained / CHECKPOINTS / BEST, weights_only=True)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium or Chrome of this machine; tests that ask for it are skipped without."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(names)} is on the PATH")
    # Chromium's sandbox refuses root, which tests in containers often are.
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def browser_page(chromium):
    """A page that fails the test if a script on it failed."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors
