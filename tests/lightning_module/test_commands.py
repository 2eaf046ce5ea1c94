"""The commands as a user runs them, each in a process of its own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from omegaconf import OmegaConf

from lightning_module import commands
from lightning_module.run_files import BEST, CHECKPOINTS, LAST, TOKENIZER
from lightning_module.settings.config_folder import CONFIGS
from tests.lightning_module.conftest import TINY, made_text

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_directory_holds_what_it_should(trained):
    summary = json.loads((trained / "summary.json").read_text())
    for name in ("val_loss", "val_perplexity", "val_bits_per_char", "val_top1", "val_top5"):
        assert summary[name] > 0
    assert summary["val_loss"] < 1.0  # the made sentences have about 0.25 nats a character
    assert summary["tokens_per_second"] > 0
    assert summary["steps"] == 250
    assert summary["wall_seconds"] > 0
    assert summary["versions"]["torch"] == metadata.version("torch")
    checkpoint = torch.load(trained / CHECKPOINTS / BEST, weights_only=True)
    assert summary["parameters"] == sum(w.numel() for w in checkpoint["state_dict"].values())
    assert (trained / CHECKPOINTS / LAST).is_file()
    assert (trained / CHECKPOINTS / TOKENIZER).is_file()
    config = OmegaConf.load(trained / "config.yaml")
    assert config.trainer.max_steps == 250
    assert config.optimizer.lr == 0.02
    assert (trained / "curves.png").read_bytes().startswith(PNG)
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))


def test_metrics_are_logged_at_each_validation(trained):
    with (trained / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # every 100 steps and, because 250 is no multiple of 100, at the end
    assert [int(r["step"]) + 1 for r in rows if r["val_loss"]] == [100, 200, 250]
    assert sum(bool(r["train_loss"]) for r in rows) == 25
    assert all(float(r["tokens_per_second"]) > 0 for r in rows if r["train_loss"])
    samples = (trained / "samples.txt").read_text()
    assert [f"== step {s}," in samples for s in (100, 200, 250)] == [True] * 3


def test_output_without_a_terminal_is_plain_lines(trained):
    output = (trained / "output.txt").read_text()
    assert "step 250: validation loss" in output
    assert "\x1b" not in output
    assert "\r" not in output


def test_predict_shows_bars_and_sentences(command, trained):
    done = command("predict", 'prompt=The cat "sees", no', f"checkpoint={trained}", "k=3")
    assert "does not know" in done.stderr  # the comma and the quotes are in no made sentence
    assert done.returncode == 1
    done = command("predict", "prompt=The cat ", f"checkpoint={trained}", "k=3", "num_sentences=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("%") == 3
    assert "█" in done.stdout
    sentences = [line for line in done.stdout.splitlines() if line.startswith("The cat ")][1:]
    assert len(sentences) == 2
    assert all(sentence.rstrip().endswith(".") for sentence in sentences)


def test_predict_reads_prompts_from_standard_input_and_writes_json(command, trained):
    done = command(
        "predict",
        "format=json",
        f"runs={trained.parent}",
        "num_sentences=1",
        "temperature=0",
        stdin="\ufeffThe cat \r\n\n${é}\nno \udcff\nA dog \n",
        PYTHONIOENCODING="ascii",
    )
    # A line that cannot be answered is named, and the others are answered; JSON is UTF-8.
    assert done.returncode == 1
    assert "error: line 3: The tokenizer does not know" in done.stderr
    assert "error: line 4: not UTF-8: byte 0xff is byte 4 of it" in done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [f["prompt"] for f in found] == ["The cat ", "${é}", "no \ufffd", "A dog "]
    assert "does not know" in found[1]["error"] and "not UTF-8" in found[2]["error"]
    for f in (found[0], found[3]):
        assert [t["probability"] for t in f["next"]] == sorted(
            (t["probability"] for t in f["next"]), reverse=True
        )
        assert {t["text"] for t in f["next"][:3]} == {"s", "h", "w"}  # sees, hears, wants
        assert f["continuations"][0].endswith(".")


def test_chinese_end_to_end(command, tmp_path):
    sentences = ["却说曹操大怒，", "孔明笑曰：", "玄德大喜。", "关公曰：“不可！”"]
    (tmp_path / "三国.txt").write_text("\n".join(sentences * 200), encoding="utf-8")
    done = command(
        "train",
        *TINY,
        "data.paths=[三国.txt]",
        "run_dir=跑",
        "trainer.max_steps=150",
        "optimizer.lr=0.02",
        "model/layer_type=gru_reset_before",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    done = command(
        "predict", "prompt=关公曰：", "checkpoint=跑", "temperature=0", "format=json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["continuations"][0] == "“不可！”"
    assert "关公曰：" in done.stdout


@pytest.mark.parametrize("tokenizer", ["bpe", "word"])
@pytest.mark.parametrize("layer_type", ["lstm", "rnn"])
def test_other_tokenizers_and_layer_types(
    train_here, tmp_path, tokenizer, layer_type, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    train_here(
        f"tokenizer={tokenizer}",
        "tokenizer.vocab_size=300",
        f"model/layer_type={layer_type}",
        f"run_dir={run_dir}",
    )
    asked = ["prompt=The cat sees", f"checkpoint={run_dir}", "num_sentences=1", "seed=0"]
    monkeypatch.setattr(sys, "argv", ["triton-gru-predict", *asked])
    commands.predict()
    assert "The cat sees" in capsys.readouterr().out


def run_arguments(text_file, run_dir, *more):
    return [
        *TINY,
        f"data.paths=[{text_file}]",
        f"run_dir={run_dir}",
        "model.dropout=0.1",
        "trainer.max_steps=600",
        "trainer.val_check_interval=250",
        *more,
    ]


@pytest.fixture(scope="module")
def whole_run(command, text_file):
    """A run of `run_arguments` that nothing stopped."""
    run_dir = command.home / "runs" / "whole"
    done = command("train", *run_arguments(text_file, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "after"), [(signal.SIGINT, "Tokens"), (signal.SIGTERM, "step 250:")]
)
def test_a_stopped_run_resumes_to_the_same_weights(
    command, text_file, whole_run, tmp_path, number, after
):
    run_dir = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_module.train", *run_arguments(text_file, run_dir)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_GRU_CACHE": str(command.home / "cache")},
    )
    if after == "Tokens":  # before the first validation: soon after the loggers have begun
        while not (run_dir / "tensorboard").exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(1.0)
    else:
        for line in process.stdout:
            if line.startswith(after):
                break
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert f"resume={run_dir}" in errors
    stopped_at = torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)["global_step"]
    assert 0 < stopped_at < 600

    resumed = command("train", f"resume={run_dir}")
    assert resumed.returncode == 0, resumed.stderr
    expected = torch.load(whole_run / CHECKPOINTS / LAST, weights_only=True)
    got = torch.load(run_dir / CHECKPOINTS / LAST, weights_only=True)
    assert got["global_step"] == 600
    for name, weight in expected["state_dict"].items():
        assert torch.equal(got["state_dict"][name], weight), name

    def validations(folder):
        with (folder / "metrics.csv").open() as file:
            return [(r["step"], r["val_loss"]) for r in csv.DictReader(file) if r["val_loss"]]

    assert validations(run_dir) == validations(whole_run)


def test_resume_takes_new_values_but_no_new_groups(command, trained, tmp_path, text_file):
    run_dir = tmp_path / "short"
    arguments = run_arguments(text_file, run_dir, "trainer.max_steps=20")
    assert command("train", *arguments).returncode == 0
    done = command("train", f"resume={run_dir}", "model/layer_type=lstm")
    assert done.returncode == 1
    assert "cannot be changed in a resumed run" in done.stderr
    tokenizer = run_dir / CHECKPOINTS / TOKENIZER
    whole = tokenizer.read_text()
    tokenizer.unlink()  # the data knows it as well
    done = command("train", f"resume={run_dir}", "trainer.max_steps=30")
    assert tokenizer.read_text() == whole
    assert done.returncode == 0, done.stderr
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 30
    before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
    done = command("train", f"resume={run_dir}", "model.hidden_size=33")
    assert done.returncode == 1
    assert "does not fit the model" in done.stderr
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before

    # A moved run goes on where it is now, and leaves the place where it was alone.
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    checkpoint = f"resume={moved / CHECKPOINTS / BEST}"
    done = command("train", checkpoint, "trainer.max_steps=40", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((moved / "summary.json").read_text())["steps"] == 40
    assert {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()} == before
    assert str(run_dir) not in (moved / "config.yaml").read_text()


BAD = {
    "a file that is not there": (["data.paths=[no.txt]"], "no.txt"),
    "an empty file": (["data.paths=[empty.txt]"], "empty.txt"),
    "not UTF-8": (["data.paths=[latin.txt]"], "latin.txt"),
    "too short for the rows": (["data.paths=[short.txt]", "data.batch_size=64"], "data.batch_size"),
    "a run directory that exists": (["data.paths=[good.txt]", "run_dir=used"], "used exists"),
    "a size that is none": (["data.paths=[good.txt]", "model.hidden_size=0"], "hidden_size"),
    "an unknown layer type": (
        ["data.paths=[good.txt]", "model.layer_type.name=x"],
        "model.layer_type.name",
    ),
    "an unknown backend": (["data.paths=[good.txt]", "model.layer_type.backend=x"], "backend"),
    "an unknown group": (["data.paths=[good.txt]", "model/layer_type=mamba"], "mamba"),
    "an unknown key": (["data.paths=[good.txt]", "trainer.max_step=3"], "max_step"),
    "no paths": ([], "data.paths"),
    "rows that are no number": (["data.paths=[good.txt]", "data.batch_size=abc"], "batch_size"),
    "a learning rate below 0": (["data.paths=[good.txt]", "optimizer.lr=-1"], "optimizer.lr must"),
    "a precision that is none": (["data.paths=[good.txt]", "trainer.precision=x"], "precision"),
    "kernels on a CPU": (["data.paths=[good.txt]", "model.layer_type.backend=triton"], "CUDA GPU"),
    "several processes": (["data.paths=[good.txt]", "trainer.devices=2"], "trainer.devices=1"),
    "no metrics": (["data.paths=[good.txt]", "logger.csv=null"], "logger.csv cannot"),
    "an unknown prompt": (
        ["data.paths=[good.txt]", "callbacks.samples.prompts=[ß]"],
        "does not know",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(
    fails, command, tmp_path, case, monkeypatch
):
    monkeypatch.setenv("TRITON_GRU_CACHE", str(command.home / "cache"))
    arguments, expected = BAD[case]
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("Käse ".encode("latin-1") * 100)
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "good.txt").write_text(made_text(5_000))
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious").write_text("data")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    errors = fails(commands.train, *TINY, "trainer.max_steps=2", *arguments)
    assert expected in errors
    assert "Traceback" not in errors
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert after == before
    assert not list(tmp_path.glob("runs/*"))


def test_a_run_shorter_than_its_validation_interval_keeps_what_it_learnt(command, tmp_path):
    (tmp_path / "a.txt").write_text(made_text(3_000))
    short = ["data.paths=[a.txt]", "trainer.max_epochs=1", "run_dir=run"]
    done = command("train", *TINY, *short, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / CHECKPOINTS / BEST).is_file()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_loss"] > 0
    short[-1] = "run_dir=unjudged"
    done = command("train", *TINY, *short, "trainer.limit_val_batches=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "unjudged" / CHECKPOINTS / LAST).is_file()


def test_a_diverging_run_stops_and_names_the_step(command, text_file, tmp_path):
    run_dir = tmp_path / "run"
    done = command(
        "train",
        *run_arguments(text_file, run_dir, "optimizer.lr=1e38"),
    )
    assert done.returncode == 1
    assert "the training loss of step" in done.stderr
    assert "diverged" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_dir / CHECKPOINTS / LAST).exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["prompt=a", "checkpoint=nowhere"], "nowhere does not exist"),
        (["prompt=a", "runs=nowhere"], "Train one first"),
        (["prompt=a", "format=xml"], "format must be text, json or web; got 'xml'"),
        (["prompt=a", "temperature=-1"], "temperature must be a number of at least 0; got -1"),
        (["prompt=a", "top_p=2"], "top_p must be a number from 0 to 1; got 2"),
        (["prompt=a", "device=abacus"], "device 'abacus' cannot be used here"),
        (["prompt=a", "k=2.5"], "k must be a whole number of at least 0; got 2.5"),
        (["prompt=a", "num_sentences=true"], "num_sentences must be a whole number"),
        (["prompt=a", "temperature=nan"], "temperature must be a number of at least 0; got nan"),
        (["prompt=a", "seed=abc"], "seed must be a whole number"),
    ],
)
def test_predict_refuses_bad_settings(fails, trained, arguments, expected):
    if not any(a.startswith(("checkpoint", "runs")) for a in arguments):
        arguments = [*arguments, f"checkpoint={trained}"]
    assert expected in fails(commands.predict, *arguments)


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("experiment/*.yaml")))
def test_experiments_compose(name):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("train", [f"experiment={name}"])
    assert config.trainer.max_time is not None
