import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_module.data.chunks import IGNORE
from lightning_module.errors import SettingsError, UsageError
from lightning_module.memory import study as memory_study
from lightning_module.memory.command import measure
from lightning_module.memory.plots import GRADIENT, SUCCESS, draw_gradients, draw_success
from lightning_module.memory.study import Study, gradient_norms, remember
from lightning_module.memory.tasks import COPIED, DIGITS, SYMBOLS, TASKS, Sequences
from lightning_module.model import LAYER_TYPES, SentencePredictor
from lightning_module.settings.config_folder import CONFIGS
from lightning_module.settings.table import check
from tests.lightning_module.conftest import made_text
from triton_gru import equations

STUDY = Study("copy", "gru", {3: 4}, 4, 8, 6, 5, 0.01, 1)


@pytest.mark.parametrize("delay", [3, 7, 50])
def test_what_is_to_be_copied_was_read_delay_steps_before(delay):
    chunk = next(iter(Sequences("copy", delay, 9, seed=3)))
    assert chunk.inputs.shape == chunk.targets.shape == (delay + COPIED, 9)
    due = chunk.targets != IGNORE
    assert due.nonzero()[:, 0].unique().tolist() == list(range(delay, delay + COPIED))
    assert torch.equal(chunk.targets[delay:], chunk.inputs[:COPIED])
    assert (chunk.inputs[:COPIED] < SYMBOLS).all()
    assert (chunk.inputs == SYMBOLS + 1).nonzero()[:, 0].unique().tolist() == [delay]
    assert chunk.fresh.all()


@pytest.mark.parametrize("delay", [3, 5, 64])
def test_the_sum_is_of_the_two_marked_digits(delay):
    chunk = next(iter(Sequences("adding", delay, 33, seed=3)))
    assert chunk.inputs.shape == (delay, 33)
    for row in range(33):
        tokens = chunk.inputs[:, row].tolist()
        marked = [(place, token - DIGITS) for place, token in enumerate(tokens) if token >= DIGITS]
        assert len(marked) == 2
        assert marked[0][0] < max(1, delay // 10) <= marked[1][0] < max(2, delay // 2)
        assert chunk.targets[-1, row] == marked[0][1] + marked[1][1]
    assert (chunk.targets[:-1] == IGNORE).all()


def test_sequences_are_new_in_each_batch_and_the_same_for_the_same_seed():
    batches = list(Sequences("adding", 9, 4, seed=1, batches=3))
    assert len(batches) == 3
    assert not torch.equal(batches[0].inputs, batches[1].inputs)
    again = list(Sequences("adding", 9, 4, seed=1, batches=3))
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(batches, again, strict=True))
    with pytest.raises(ValueError, match="copy needs a delay of 3 or more; got 2"):
        Sequences("copy", 2, 4, seed=1)


def probe(layer_type, steps=7, batch_size=3, hidden_size=5):
    torch.manual_seed(0)
    model = SentencePredictor(
        11, layer_type={"name": layer_type}, embedding_size=4, hidden_size=hidden_size
    )
    return model, torch.randint(11, (steps, batch_size)), torch.randint(11, (batch_size,))


@pytest.mark.parametrize("reset_after", [True, False])
def test_norms_are_those_of_the_derivative_by_the_equations(reset_after):
    model, inputs, last = probe("gru" if reset_after else "gru_reset_before")
    found = gradient_norms(model, inputs, last)
    assert found["k"] == list(range(7))

    # The derivative in closed form: by a product with the step's Jacobian for each step back.
    net = model.double()
    core = net.core
    x = net.embedding(inputs).detach() @ core.weight_ih_l0.T + core.bias_ih_l0
    weights = core.weight_hh_l0.detach(), core.bias_hh_l0.detach()
    states = [torch.zeros(3, 5, dtype=torch.float64)]
    for gates_t in x.detach():
        states.append(equations.step(gates_t, states[-1], *weights, reset_after))
    h = states[-1].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(net.output(h), last, reduction="none")
    by_h = torch.autograd.grad(loss.sum(), h)[0]
    norms = [by_h.norm(dim=1)]
    for t in range(6, 0, -1):
        for row in range(3):
            jacobian = torch.autograd.functional.jacobian(
                lambda h, t=t, row=row: equations.step(
                    x[t, row : row + 1], h[None], *weights, reset_after
                )[0],
                states[t][row],
            )
            by_h[row] = jacobian.T @ by_h[row]
        norms.append(by_h.norm(dim=1))
    norms = torch.stack(norms)
    torch.testing.assert_close(torch.tensor(found["norm"]).double(), norms.median(1).values)
    shares = (norms / norms[0]).median(1).values
    torch.testing.assert_close(torch.tensor(found["share"]).double(), shares)


@pytest.mark.parametrize("layer_type", ["gru", "gru_reset_before"])
def test_a_gru_that_keeps_everything_passes_the_whole_gradient_on(layer_type):
    model, inputs, last = probe(layer_type, steps=301)
    with torch.no_grad():
        model.core.bias_ih_l0[5:10] = 1e3  # z = 1
    shares = gradient_norms(model, inputs, last)["share"]
    assert len(shares) > 40
    assert set(shares) == {1.0}


def test_the_gradient_of_a_linear_rnn_falls_by_its_eigenvalue_at_each_step():
    model, inputs, last = probe("rnn", steps=40)
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.zero_()  # states stay at zero, where tanh has the slope 1
        model.core.weight_hh_l0.copy_(0.5 * torch.eye(5))
    found = gradient_norms(model, inputs, last)
    expected = [0.5**k for k in found["k"]]
    assert found["share"] == pytest.approx(expected, rel=1e-9)


def test_the_state_of_an_lstm_is_h_and_c():
    model, inputs, last = probe("lstm", steps=9)
    with torch.no_grad():
        for parameter in model.core.parameters():
            parameter.zero_()
        model.core.bias_ih_l0[5:10] = 1e3  # forget gate 1: c is kept, and h passes nothing on
    shares = gradient_norms(model, inputs, last)["share"]
    # The output gate is 1/2 and c is 0, so that half of the gradient by h arrives at c.
    assert shares == pytest.approx([1.0] + [0.5] * 8, rel=1e-9)


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("task", TASKS)
def test_a_study_measures_every_delay_and_the_gradient_at_both_ends(task, layer_type):
    study = replace(STUDY, task=task, layer_type=layer_type, steps={3: 3, 12: 2})
    told, found = [], []
    outcome = remember(study, lambda *said: told.append(said), lambda r: found.append(str(r)))
    assert "3: " in outcome
    assert "12: " in outcome
    last = found[-1]
    assert "'start'" in last
    assert "'end'" in last
    assert len(found) == 4  # the beginning, two delays, the end


@pytest.mark.slow
def test_a_gru_learns_and_continues_from_learnt_weights(monkeypatch):
    monkeypatch.setattr(memory_study, "LEARNED", 0.7)
    monkeypatch.setattr(memory_study, "SOLVED", 0.7)
    study = replace(STUDY, steps={3: 2000, 6: 1000}, hidden_size=32, batch_size=32)
    found = {}
    remember(study, lambda *_: None, found.update)
    success = found["success"]
    assert success[3]["right"] >= 0.7
    assert success[6]["right"] >= 0.7
    assert success[6]["steps"] <= success[3]["steps"] < 2000


ARGUMENTS = [
    "delays=[3,6]",
    "steps=[30,30]",
    "text_steps=10",
    "hidden_size=8",
    "data=text_files",
    "data.batch_size=4",
    "data.seq_len=16",
]


@pytest.fixture
def measured(command, text_file, tmp_path):
    """Runs the command and returns what it wrote to memory.json, but for the times."""

    def run(workers):
        run_dir = tmp_path / str(workers)
        done = command(
            "memory",
            *ARGUMENTS,
            "layer_types=[gru,lstm]",
            f"data.paths=[{text_file}]",
            f"run_dir={run_dir}",
            f"workers={workers}",
        )
        assert done.returncode == 0, done.stderr
        assert "copy, GRU: right after 3:" in done.stdout
        assert (run_dir / SUCCESS).read_bytes().startswith(b"\x89PNG")
        assert (run_dir / GRADIENT).read_bytes().startswith(b"\x89PNG")
        record = json.loads((run_dir / "memory.json").read_text())
        assert record["finished"]
        for by_type in record["results"].values():
            for found in by_type.values():
                for success in found["success"].values():
                    success.pop("cpu_seconds", None)
        return record["results"]

    return run


@pytest.mark.slow
def test_the_command_leaves_results_and_figures(measured, command, tmp_path):
    for by_type in measured(workers=2).values():
        assert list(by_type) == ["gru", "lstm"]
        for found in by_type.values():
            assert list(found["success"]) == ["3", "6"]
            assert set(found["gradient"]) == {"start", "end"}
    done = command("memory", f"run_dir={tmp_path / '2'}")
    assert done.returncode == 1
    assert "exists and is not empty" in done.stderr


@pytest.mark.soak
def test_studies_give_the_same_whatever_runs_beside_them(measured):
    assert measured(workers=1) == measured(workers=2)


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_keeps_what_it_measured(tmp_path, number):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-c",
                "from lightning_module.commands import memory; memory()",
                "tasks=[copy]",
                "layer_types=[gru]",
            ),
            *("delays=[3,2000]", "steps=[5,5000]", f"run_dir={run_dir}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_GRU_CACHE": str(tmp_path / "cache")},
    )

    def success():
        file = run_dir / "memory.json"
        if not file.is_file():
            return {}
        return json.loads(file.read_text())["results"]["copy"].get("gru", {}).get("success", {})

    while not success() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert list(success()) == ["3"]
    assert not json.loads((run_dir / "memory.json").read_text())["finished"]
    assert sorted(p.name for p in run_dir.iterdir()) == [GRADIENT, "memory.json", SUCCESS]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (
            "layer_types=[mamba]",
            "layer_types must be a list of some of gru, gru_reset_before, lstm, rnn",
        ),
        ("tasks=[]", "tasks must be a list of some of copy, adding, text"),
        (
            "delays=[2,10,30,100,300,1000]",
            "delays must be a list, each a whole number of at least 3",
        ),
        ("delays=[10]", "steps must give one number for each of the delays; got 6 for 1"),
        ("hidden_size=0", "hidden_size must be a whole number of at least 1"),
        ("workers=0.5", "workers must be a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(tmp_path, argument, expected):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("memory", [argument, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises((SettingsError, UsageError), match=re.escape(expected)):
        check(config, "memory")
        measure(config)
    assert not (tmp_path / "run").exists()


def test_figures_of_partial_results(tmp_path):
    found = {
        "success": {"5": {"right": 0.5}},
        "gradient": {"start": {"k": [0, 1], "share": [1, 0]}},
    }
    results = {"copy": {"gru": found}, "adding": {"rnn": {"success": {}, "gradient": {}}}}
    draw_success(results, tmp_path / SUCCESS)
    draw_gradients(results, tmp_path / GRADIENT)
    assert (tmp_path / SUCCESS).stat().st_size > 5_000
    assert (tmp_path / GRADIENT).stat().st_size > 5_000


def test_text_is_read_with_contexts_of_every_length(tmp_path):
    text = torch.tensor(list(made_text(3_000).encode()))
    torch.manual_seed(0)
    model = SentencePredictor(128, hidden_size=8).eval()
    places = torch.randint(100, 2_900, (21,))
    found = memory_study.context_loss(model, text, places, 7)
    losses = []
    for place in places.tolist():  # one at a time, from the definition
        window = text[place - 7 : place + memory_study.CONTEXT_TARGETS]
        scores = model(window[:-1, None])[0][7 - 1 :, 0].log_softmax(-1)
        losses.append(-scores.gather(1, window[7:, None]).mean() / torch.log(torch.tensor(2.0)))
    assert found == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
