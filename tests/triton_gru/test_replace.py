"""replace_gru: what is swapped, what is shared and kept, what is left, and the way back."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.tolerances import assert_close
from triton_gru import GRU, GRUCell, replace_gru


class Tagger(nn.Module):
    """GRUs in every kind of place, one of them in two."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.encoder = nn.GRU(6, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.2)
        self.towers = nn.ModuleList([nn.GRU(10, 10, batch_first=True) for _ in range(2)])
        self.again = self.towers[0]
        self.cells = nn.ModuleDict({"refine": nn.GRUCell(10, 10, bias=False)})
        self.output = nn.Sequential(nn.Linear(10, 11), nn.LogSoftmax(-1))

    def forward(self, tokens):
        x, _ = self.encoder(self.embedding(tokens))
        for rnn in (*self.towers, self.again):
            x = x + rnn(x)[0]
        return self.output(self.cells["refine"](x.mean(1)))


NAMES = {
    "encoder": GRU,
    "towers.0": GRU,
    "towers.1": GRU,
    "again": GRU,
    "cells.refine": GRUCell,
}


@pytest.fixture
def model():
    return Tagger().double()


@pytest.fixture
def tokens():
    return torch.randint(0, 11, (3, 7))


def results(model, tokens):
    torch.manual_seed(5)
    y = model(tokens)
    return [y, *torch.autograd.grad(y.sin().sum(), [*model.parameters()])]


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.compat("beyond", "replace_gru(model)", "works", "in place; `undo()` restores nn.GRU")
def test_swaps_every_gru_wherever_it_is_and_changes_no_result(model, tokens, backend):
    expected = results(model, tokens)
    replacement = replace_gru(model, backend=backend)
    assert {name: type(module) for name, module in replacement.swapped.items()} == NAMES
    assert all(module.backend == backend for module in replacement.swapped.values())
    assert replacement.swapped["again"] is replacement.swapped["towers.0"] is model.again
    assert not replacement.left
    assert_close(results(model, tokens), expected)


def test_modules_parameters_modes_and_names_stay_what_they_are(model):
    model.towers.eval()
    model.encoder.weight_hh_l1.requires_grad_(False)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    modes = {name: module.training for name, module in modules.items()}
    flat = list(model.encoder._flat_weights)
    state = model.state_dict()
    replace_gru(model)
    assert list(dict(model.named_modules())) == list(modules)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert list(dict(model.named_parameters())) == list(parameters)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.requires_grad is (name != "encoder.weight_hh_l1")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(a is b for a, b in zip(model.encoder._flat_weights, flat, strict=True))
    assert model.state_dict().keys() == state.keys()
    nn.Module.load_state_dict(model, state, strict=True)
    Tagger().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("cls", [nn.GRU, nn.GRUCell])
def test_a_swapped_module_holds_what_one_of_ours_holds(cls):
    module = cls(3, 5)
    before = set(vars(module))
    replacement = replace_gru(module)
    fresh = type(module)(3, 5)
    assert vars(module).keys() == vars(fresh).keys()
    for name in vars(module).keys() - before:
        assert getattr(module, name) == getattr(fresh, name)
    assert repr(module) == repr(fresh)
    replacement.undo()
    assert set(vars(module)) == before


def test_the_model_itself_may_be_a_gru():
    rnn, x = nn.GRU(3, 5), torch.randn(4, 2, 3)
    expected = rnn(x)
    replacement = replace_gru(rnn)
    assert type(rnn) is GRU and list(replacement.swapped) == [""]
    assert str(replacement) == "Swapped for triton_gru's: the model itself."
    assert_close(rnn(x)[0], expected[0])


def test_an_optimizer_and_tied_weights_go_on(model, tokens):
    model.output[0].weight = nn.Parameter(torch.randn(11, 10, dtype=torch.float64))
    model.towers[1].weight_hh_l0 = model.towers[0].weight_hh_l0
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (model, twin)]
    for step in range(3):
        if step == 1:
            replace_gru(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            torch.manual_seed(step)
            optimizer.zero_grad()
            m(tokens).sin().sum().backward()
            optimizer.step()
    assert model.towers[1].weight_hh_l0 is model.towers[0].weight_hh_l0
    assert_close([*model.parameters()], [*twin.parameters()])


def test_hooks_go_on(model, tokens):
    called = []
    rnn = model.towers[1]
    rnn.register_forward_pre_hook(lambda module, args: called.append("before"))
    rnn.register_forward_hook(lambda module, args, result: called.append("after"))
    rnn.register_full_backward_hook(lambda module, into, out: called.append("backward"))
    rnn.weight_hh_l0.register_hook(lambda grad: called.append("gradient"))
    rnn.register_state_dict_post_hook(lambda module, state, prefix, meta: called.append("state"))
    replace_gru(model)
    model(tokens).sum().backward()
    model.state_dict()
    assert sorted(called) == ["after", "backward", "before", "gradient", "state"]


def test_parametrizations_go_on(model, tokens):
    for rnn in (model.encoder, model.towers[0]):
        parametrizations.weight_norm(rnn, "weight_hh_l0")
    expected = results(model, tokens)
    names = [name for name, _ in model.named_parameters()]
    replacement = replace_gru(model, backend="reference")
    assert [name for name, _ in model.named_parameters()] == names
    assert parametrize.type_before_parametrizations(model.encoder) is GRU
    assert_close(results(model, tokens), expected)
    model.encoder.parametrizations.weight_hh_l0.original1.data.mul_(2)
    assert not torch.equal(results(model, tokens)[0], expected[0])
    parametrize.remove_parametrizations(model.encoder, "weight_hh_l0")
    assert type(model.encoder) is GRU
    replacement.undo()
    assert type(model.encoder) is nn.GRU
    assert parametrize.type_before_parametrizations(model.towers[0]) is nn.GRU


def test_pruning_continues(model, tokens):
    prune.l1_unstructured(model.towers[1], "weight_hh_l0", amount=0.5)
    expected = results(model, tokens)
    replace_gru(model, backend="reference")
    assert_close(results(model, tokens), expected)
    prune.remove(model.towers[1], "weight_hh_l0")
    assert (model.towers[1].weight_hh_l0 == 0).sum() == 150


def test_a_model_compiled_before_is_compiled_again(model, tokens):
    compiled = torch.compile(model.eval(), backend="eager")
    expected = compiled(tokens)
    replace_gru(model, backend="reference")
    ran = []
    model.encoder.register_forward_hook(lambda module, *_: ran.append(type(module)))
    assert_close(compiled(tokens), expected)
    assert ran == [GRU]


def test_undo_keeps_trained_parameters(model, tokens):
    replacement = replace_gru(model)
    with torch.no_grad():
        model.encoder.weight_hh_l0.zero_()
    prune.random_unstructured(model.towers[1], "weight_ih_l0", amount=3)
    parametrizations.weight_norm(model.towers[0], "weight_hh_l0")  # after the swap
    expected = results(model, tokens)
    replacement.undo()
    assert type(model.encoder) is nn.GRU and type(model.cells["refine"]) is nn.GRUCell
    assert_close(results(model, tokens), expected)
    replacement.undo()  # there is nothing left to do
    assert replace_gru(model).swapped.keys() == NAMES.keys()


def test_undo_changes_nothing_where_one_module_cannot_be(model):
    replacement = replace_gru(model)
    # What fully_shard does.
    model.encoder.__class__ = type("FSDPGRU", (GRU,), {})
    with pytest.raises(RuntimeError, match=r"but encoder is a FSDPGRU; first undo"):
        replacement.undo()
    assert type(model.cells["refine"]) is GRUCell


def test_whole_models_are_saved_and_copied(model, tokens):
    model.eval()
    replace_gru(model, backend="reference")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert type(twin.encoder) is GRU and twin.encoder.backend == "reference"
        assert twin.again is twin.towers[0]
        assert_close(twin(tokens), model(tokens))


class Widened(nn.GRU):
    def forward(self, input, hx=None):
        y, h = super().forward(input, hx)
        return torch.cat([y, input], -1), h


def test_what_may_compute_something_else_is_left_and_named():
    model = nn.ModuleDict({"widened": Widened(3, 5), "plain": nn.GRU(3, 5), "other": nn.LSTM(3, 5)})
    model["patched"] = nn.GRUCell(3, 5)
    model["patched"].forward = lambda x: x
    model["scripted"] = torch.jit.script(nn.GRU(3, 5))
    model["ours"] = GRU(3, 5, reset_after=False)
    model["our cell"] = GRUCell(3, 5, reset_after=False)
    x = torch.randn(4, 2, 3)
    replacement = replace_gru(model, backend="reference")
    assert list(replacement.swapped) == ["plain"]
    assert replacement.left == {
        "widened": f"{__name__}.Widened, a subclass, whose forward may be another",
        "patched": "its forward was replaced on the instance",
        "scripted": "compiled by TorchScript",
        "ours": "already ours, backend='auto'",
        "our cell": "already ours, backend='auto'",
    }
    assert "Left alone: widened (tests.triton_gru.test_replace.Widened, a" in str(replacement)
    assert type(model["widened"]) is Widened and model["widened"](x)[0].shape[-1] == 8
    assert model["patched"](x) is x
    assert model["ours"].backend == "auto" and not model["ours"].reset_after


def test_nothing_to_swap():
    model = nn.Linear(3, 5)
    replacement = replace_gru(model)
    assert str(replacement) == "Swapped for triton_gru's: nothing."
    assert not replacement.swapped and not replacement.left
    replacement.undo()


def test_a_second_time_swaps_nothing(model):
    replace_gru(model, backend="reference")
    again = replace_gru(model)
    assert not again.swapped
    assert again.left == dict.fromkeys(NAMES, "already ours, backend='reference'")
    assert str(again).startswith("Swapped for triton_gru's: nothing. Left alone: encoder (already")
    assert model.encoder.backend == "reference"


def test_bad_arguments_change_nothing(model):
    with pytest.raises(ValueError, match=r"backend should be one of .* got: 'cuda'"):
        replace_gru(model, backend="cuda")
    assert type(model.encoder) is nn.GRU
    with pytest.raises(TypeError, match=r"expects a torch\.nn\.Module, got: list"):
        replace_gru([model])


def test_explain_and_print(model):
    replacement = replace_gru(model)
    text = "encoder, towers.0, towers.1, again, cells.refine"
    assert str(replacement) == f"Swapped for triton_gru's: {text}."
    assert replacement.explain() == {
        name: module.explain() for name, module in replacement.swapped.items()
    }
    assert "Backend 'torch' will run" in replacement.explain()["encoder"]


def test_random_numbers_are_left_alone(model):
    state = torch.get_rng_state()
    replace_gru(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.compat(
    "attributes", "isinstance(module, nn.GRU)", "differs", "False; test for `nn.RNNBase`"
)
def test_a_swapped_gru_is_an_rnn_base_and_no_nn_gru(model):
    replace_gru(model)
    assert isinstance(model.encoder, nn.RNNBase) and not isinstance(model.encoder, nn.GRU)
    assert isinstance(model.cells["refine"], nn.GRUCell)
