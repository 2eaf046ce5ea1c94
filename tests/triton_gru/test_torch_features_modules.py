"""What is done to modules: copies, devices, hooks, reparametrisation, pruning."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.tolerances import assert_close
from tests.triton_gru.counterparts import IN, B, H, T, pair, results
from triton_gru import GRU, GRUCell

pytestmark = pytest.mark.parametrize("reset_after", [True, False])


@pytest.fixture
def x():
    return torch.randn(T, B, IN)


@pytest.mark.compat("modules", "copy.deepcopy, pickle, torch.save", "works")
def test_copies(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    expected = results(theirs, x)
    pickled = pickle.loads(pickle.dumps(ours))
    for twin in (copy.deepcopy(ours), pickled, torch.load(buffer, weights_only=False)):
        assert_close(results(twin, x), expected)
        assert (twin.backend, twin.reset_after) == (backend, reset_after)
        with torch.no_grad():
            twin.weight_hh_l0.zero_()
    assert_close(results(ours, x), expected)


@pytest.mark.compat("modules", "pickles of whole modules of older versions", "works")
def test_pickles_of_older_versions(reset_after, x):
    """They lack what was added since, and name GRUCell where it once stood."""
    del reset_after  # which was there from the first
    layer, cell = GRU(IN, H), GRUCell(IN, H)
    for module, given in ((layer, x), (cell, x[0])):
        new = {"backend", "save_gates", "recurrent_dropout", "zoneout", "layer_norm", "proj_size"}
        state = {name: value for name, value in vars(module).items() if name not in new}
        old = type(module).__new__(type(module))
        old.__setstate__(state)
        assert vars(old).keys() == vars(module).keys()
        assert_close(old(given), module(given))
        assert repr(old) == repr(module)
        assert_close(pickle.loads(pickle.dumps(old))(given), module(given))
    assert importlib.import_module("triton_gru.layer").GRUCell is GRUCell


@pytest.mark.compat("modules", "device='meta', to_empty, reset_parameters", "works")
def test_meta_device_and_to_empty(backend, reset_after, x):
    _, theirs = pair(backend, reset_after)
    meta = GRU(IN, H, backend=backend, reset_after=reset_after, device="meta")
    y, h_n = meta(torch.empty(T, B, IN, device="meta"))
    assert y.is_meta and y.shape == (T, B, H) and h_n.shape == (1, B, H)
    ours = meta.to_empty(device="cpu")
    ours.reset_parameters()
    assert all(p.isfinite().all() and p.abs().max() <= H**-0.5 for p in ours.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert_close(results(ours, x), results(theirs, x))
    with torch.device("meta"):
        assert GRUCell(IN, H, reset_after=reset_after).weight_ih.is_meta


@pytest.mark.compat("modules", "to(dtype), half, double, cpu, cuda", "works")
def test_conversions(reset_after, x):
    ours, theirs = pair("auto", reset_after)
    for dtype in (torch.float64, torch.bfloat16):
        assert_close(ours.to(dtype)(x.to(dtype)), theirs.to(dtype)(x.to(dtype)))


@pytest.mark.compat("modules", "share_memory", "works")
def test_share_memory(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    expected = results(theirs, x)
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert_close(results(ours, x), expected)


@pytest.mark.compat("modules", "weight_norm, spectral_norm and other parametrizations", "works")
def test_parametrizations(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    for module in (ours, theirs):
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrizations.orthogonal(module, "weight_ih_l0")
    theirs.load_state_dict(ours.state_dict())
    actual, expected = results(ours, x), results(theirs, x)
    assert [name for name, _ in ours.named_parameters()] == [
        n for n, _ in theirs.named_parameters()
    ]
    assert_close(actual, expected)
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert_close(ours(x), theirs(x))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm")
@pytest.mark.compat("modules", "nn.utils.weight_norm (the older one)", "works")
def test_the_older_weight_norm(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    for module in (ours, theirs):
        nn.utils.weight_norm(module, "weight_hh_l0")
    assert_close(results(ours, x), results(theirs, x))


@pytest.mark.compat("modules", "nn.utils.prune", "works")
def test_prune(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    for module in (ours, theirs):
        prune.l1_unstructured(module, "weight_hh_l0", amount=0.5)
        prune.ln_structured(module, "weight_ih_l0", amount=2, n=2, dim=1)
    assert (ours.weight_hh_l0 == 0).sum() == round(3 * H * H / 2)
    assert_close(results(ours, x), results(theirs, x))
    for module in (ours, theirs):
        prune.remove(module, "weight_hh_l0")
    assert_close(results(ours, x), results(theirs, x))


@pytest.mark.compat("modules", "forward, backward and tensor hooks", "works")
def test_hooks(backend, reset_after, x):
    outcomes = []
    for module in pair(backend, reset_after):
        seen = []
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
        module.register_forward_hook(lambda m, args, result: (result[0] + 1, result[1]))
        module.register_full_backward_pre_hook(lambda m, out, s=seen: s.append(out[0]))
        module.register_full_backward_hook(lambda m, into, out, s=seen: s.append(into[0]))
        module.weight_hh_l0.register_hook(lambda g: g * 3)
        module.weight_ih_l0.register_post_accumulate_grad_hook(lambda p, s=seen: s.append(p.grad))
        leaf = x.clone().requires_grad_()
        y, h_n = module(leaf)
        (y.sin().sum() + h_n.cos().sum()).backward()
        assert len(seen) == 3
        outcomes.append([y, h_n, leaf.grad, *(p.grad for p in module.parameters()), *seen])
    assert_close(outcomes[0], outcomes[1])


@pytest.mark.compat("modules", "parameters replaced or tied after construction", "works")
def test_replaced_and_tied_parameters(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    tied = nn.Parameter(torch.randn(3 * H))
    for module in (ours, theirs):
        module.bias_ih_l0 = module.bias_hh_l0 = tied
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    assert_close(results(ours, x), results(theirs, x))


@pytest.mark.compat("modules", "optimizers, clip_grad_norm_, zero_grad", "works")
def test_optimizers(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    for module in (ours, theirs):
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            module(x)[0].sin().sum().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
    assert_close([*ours.parameters()], [*theirs.parameters()])


@pytest.mark.compat("modules", "swa_utils.AveragedModel", "works")
def test_averaged_model(backend, reset_after, x):
    ours, theirs = pair(backend, reset_after)
    outcomes = []
    for module in (ours, theirs):
        average = torch.optim.swa_utils.AveragedModel(module)
        average.update_parameters(module)
        with torch.no_grad():
            module.weight_hh_l0.mul_(2)
        average.update_parameters(module)
        outcomes.append(average(x))
    assert_close(outcomes[0], outcomes[1])
