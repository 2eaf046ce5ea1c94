import copy
import math
import pickle
from functools import partial

import lightning as L
import pytest
import torch
import torch.nn.functional as F

from lightning_module import model as predictor
from lightning_module import schedules
from lightning_module.data.chunks import IGNORE, Chunk
from lightning_module.model import LAYER_TYPES, LockedDropout, SentencePredictor
from tests.tolerances import assert_close

V, T, B = 11, 5, 3


def model(**settings):
    torch.manual_seed(0)
    return SentencePredictor(V, **{"embedding_size": 6, "hidden_size": 8, **settings})


def chunks(n, fresh_at=(0,), batch_size=B):
    stream = torch.randint(V, (n * T + 1, batch_size))
    return [
        Chunk(
            stream[k * T : (k + 1) * T],
            stream[k * T + 1 : (k + 1) * T + 1],
            torch.full((batch_size,), k in fresh_at),
        )
        for k in range(n)
    ]


@pytest.mark.parametrize("layer_type", LAYER_TYPES)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_carried_state_equals_one_long_pass(layer_type, num_layers):
    net = model(layer_type={"name": layer_type}, num_layers=num_layers).eval()
    pieces = chunks(4)
    whole, _ = net(torch.cat([c.inputs for c in pieces]))
    losses = []
    for i, chunk in enumerate(pieces):
        losses.append(net.training_step(chunk, i))
    expected = F.cross_entropy(
        whole.flatten(0, 1), torch.cat([c.targets for c in pieces]).flatten()
    )
    torch.testing.assert_close(torch.stack(losses).mean(), expected)


def test_gradient_does_not_leave_the_chunk():
    net = model()
    first, second = chunks(2)
    net.training_step(first, 0)
    assert not net.carried["train"].requires_grad
    net.training_step(second, 1).backward()


def test_a_fresh_lane_starts_from_zero_and_the_others_go_on():
    net = model().eval()
    first, second = chunks(2)
    net.training_step(first, 0)
    carried = net.carried["train"].clone()
    net.carried["train"][:, 1] = torch.inf  # what the fresh row forgets must not matter at all
    mixed = second._replace(fresh=torch.tensor([False, True, False]))
    loss = net.training_step(mixed, 1)
    carried[:, 1] = 0
    logits, _ = net(second.inputs, carried)
    torch.testing.assert_close(
        loss, F.cross_entropy(logits.flatten(0, 1), second.targets.flatten())
    )


def test_ignored_targets_do_not_count():
    net = model()
    chunk = chunks(1)[0]
    targets = chunk.targets.clone()
    targets[2:, 0] = IGNORE
    loss = net.training_step(chunk._replace(targets=targets), 0)
    logits, _ = net(chunk.inputs)
    kept = targets != IGNORE
    torch.testing.assert_close(loss, F.cross_entropy(logits[kept], targets[kept]))


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="not in this torch")
def test_the_fused_loss_is_the_plain_loss(monkeypatch):
    net = model()
    chunk = chunks(1)[0]
    targets = chunk.targets.clone()
    targets[0, 0] = IGNORE
    chunk = chunk._replace(targets=targets)
    plain = net.training_step(chunk, 0)
    gradients = torch.autograd.grad(plain, net.parameters())
    calls = []
    fused = F.linear_cross_entropy
    monkeypatch.setattr(predictor, "FUSED_LOSS_VOCABULARY", V)
    monkeypatch.setattr(
        F, "linear_cross_entropy", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    net.carried["train"] = None
    loss = net.training_step(chunk, 0)
    assert calls
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, net.parameters()), gradients)


@pytest.mark.parametrize("layer_type", ["gru", "lstm"])
def test_an_accumulated_step_is_the_mean_over_its_tokens(layer_type):
    """Also the incomplete accumulation at the end of a pass, and of chunks with few tokens."""
    pieces = chunks(5)
    for k, empty in ((1, 2), (4, 3)):
        targets = pieces[k].targets.clone()
        targets[empty:, :2] = IGNORE
        pieces[k] = pieces[k]._replace(targets=targets)
    net = model(layer_type={"name": layer_type}, optimizer=partial(torch.optim.SGD, lr=1.0))
    expected, state, losses = copy.deepcopy(net), None, []
    for step in (pieces[:4], pieces[4:]):
        nll = 0
        for chunk in step:
            logits, state = expected(chunk.inputs, state)
            state = predictor.map_state(state, torch.detach)
            chunk_nll = F.cross_entropy(
                logits.flatten(0, 1), chunk.targets.flatten(), reduction="sum"
            )
            losses.append(chunk_nll.item() / chunk.token_count())
            nll = nll + chunk_nll
        mean = nll / sum(chunk.token_count() for chunk in step)
        gradients = torch.autograd.grad(mean, expected.parameters())
        with torch.no_grad():
            for weight, gradient in zip(expected.parameters(), gradients, strict=True):
                weight -= gradient
    logged = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.callback_metrics["train_loss"].item())

    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(net, _loader(pieces))
    assert trainer.global_step == 2
    assert_close(list(net.parameters()), list(expected.parameters()))
    assert logged == pytest.approx(losses)  # each the mean of its chunk, whatever its weight


def test_tied_weights_are_one_tensor_and_learn_with_unequal_sizes():
    net = model(tie_weights=True)
    assert net.output.weight is net.embedding.weight
    assert net(chunks(1)[0].inputs)[0].shape == (T, B, V)
    names = dict(net.named_parameters())
    assert "output.weight" not in names
    assert "to_embedding.weight" in names


def test_locked_dropout_drops_the_same_features_at_every_step():
    dropout = LockedDropout(0.25)
    x = torch.ones(50, 40, 30)
    y = dropout(x)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert torch.equal(y, y[:1].expand_as(y))
    assert not torch.equal(y[0, 0], y[0, 1])
    assert (y[0] == 0).double().mean() == pytest.approx(0.25, abs=0.05)
    assert dropout.eval()(x) is x


def test_validation_metrics_against_their_definitions():
    net = model(chars_per_token=2.5).double()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    pieces = chunks(3)
    targets = pieces[-1].targets.clone()
    targets[1:, 1] = IGNORE
    pieces[-1] = pieces[-1]._replace(targets=targets)
    got = trainer.validate(net, _loader(pieces), verbose=False)[0]

    logits, _ = net(torch.cat([c.inputs for c in pieces]))
    targets = torch.cat([c.targets for c in pieces])
    kept = targets != IGNORE
    logits, targets = logits[kept], targets[kept]
    nll = F.cross_entropy(logits, targets).item()
    top5 = (logits.topk(5).indices == targets[:, None]).any(1).double().mean().item()
    assert got["val_loss"] == pytest.approx(nll, rel=1e-6)
    assert got["val_perplexity"] == pytest.approx(math.exp(nll), rel=1e-6)
    assert got["val_bits_per_char"] == pytest.approx(nll / math.log(2) / 2.5, rel=1e-6)
    assert got["val_top1"] == pytest.approx((logits.argmax(-1) == targets).double().mean().item())
    assert got["val_top5"] == pytest.approx(top5)


def test_a_model_of_nan_scores_nothing_right():
    net = model()
    torch.nn.init.constant_(net.output.bias, torch.nan)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    got = trainer.validate(net, _loader(chunks(1)), verbose=False)[0]
    assert math.isnan(got["val_loss"])
    assert got["val_top1"] == got["val_top5"] == 0


def test_the_schedule_rises_and_falls_to_its_end():
    net = model(schedule=partial(schedules.cosine, warmup=0.1, final_lr=0.1))
    net.optimizer_factory = partial(torch.optim.SGD, lr=1.0)
    rates = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=100,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Watch()],
    )
    trainer.fit(net, _loader(chunks(100)))
    assert rates[0] == 0
    assert max(rates) == rates[10]
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"layer_type": {"name": "transformer"}},
            "gru, gru_reset_before, lstm, rnn; got 'transformer'",
        ),
        ({"hidden_size": 0}, "model.hidden_size must be a whole number of at least 1; got 0"),
        ({"num_layers": 1.5}, "model.num_layers must be a whole number"),
        ({"dropout": 1.0}, "model.dropout must be at least 0 and below 1; got 1.0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        model(**settings)


def _loader(pieces):
    return torch.utils.data.DataLoader(pieces, batch_size=None)


@pytest.mark.filterwarnings("ignore:lightning_module.predictor is called:FutureWarning")
@pytest.mark.parametrize("name", ["SentencePredictor", "LockedDropout"])
def test_a_pickle_that_names_the_former_module_loads(name):
    pickled = f"clightning_module.predictor\n{name}\n.".encode()
    assert pickle.loads(pickled) is getattr(predictor, name)
