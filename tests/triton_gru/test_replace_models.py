"""replace_gru on models of other packages: the outputs, gradients and updates of before.

Each test skips itself where its package is not installed. `torch-geometric` comes with the extra
`test`; for all of them:

    pip install torch-geometric torchaudio speechbrain deepfilternet recbole pytorch-forecasting
"""

import copy
import importlib
import importlib.util
import sys
import types

import pytest
import torch
from torch import nn

from tests.tolerances import MODEL_TOLERANCE
from triton_gru import GRU, GRUCell, replace_gru


def module_of(package, name):
    """importorskip, also where a package does not load on this machine."""
    pytest.importorskip(package.partition(".")[0])
    try:
        return getattr(importlib.import_module(package), name)
    except (ImportError, OSError) as error:  # torchaudio's library may want another torch
        pytest.skip(f"{package} cannot be imported: {error}")


def wavernn():
    """A vocoder: two GRUs after a convolutional upsampling (torchaudio)."""
    model = module_of("torchaudio.models.wavernn", "WaveRNN")(
        upsample_scales=[2, 2, 3],
        n_classes=16,
        hop_length=12,
        n_res_block=2,
        n_rnn=32,
        n_fc=32,
        n_hidden=16,
        n_output=16,
    )
    return model, [torch.randn(2, 1, 12 * 6), torch.randn(2, 1, 128, 10)], {"rnn1", "rnn2"}


def crdnn():
    """A speech recogniser's encoder: convolutions, a bidirectional GRU, dense (speechbrain)."""
    gru = module_of("speechbrain.nnet.RNN", "GRU")
    model = module_of("speechbrain.lobes.models.CRDNN", "CRDNN")(
        input_shape=(3, 20, 24),
        cnn_channels=[4, 8],
        rnn_class=gru,
        rnn_layers=2,
        rnn_neurons=32,
        rnn_bidirectional=True,
        dnn_neurons=16,
    )
    return model, [torch.randn(3, 20, 24)], {"RNN.rnn"}


def attentional_decoder():
    """A speech recogniser's decoder: GRU cells with attention (speechbrain)."""
    model = module_of("speechbrain.nnet.RNN", "AttentionalRNNDecoder")(
        rnn_type="gru",
        attn_type="content",
        hidden_size=16,
        attn_dim=12,
        num_layers=2,
        enc_dim=20,
        input_size=10,
    )
    inputs = [torch.randn(3, 4, 10), torch.randn(3, 7, 20), torch.tensor([1.0, 0.6, 0.9])]
    return model, inputs, {"rnn.rnn_cells.0", "rnn.rnn_cells.1"}


def attentive_fp():
    """A predictor of molecules' properties: a GRU cell a layer (torch-geometric)."""
    model = module_of("torch_geometric.nn", "AttentiveFP")(
        in_channels=9,
        hidden_channels=16,
        out_channels=2,
        edge_dim=3,
        num_layers=3,
        num_timesteps=2,
        dropout=0.2,
    )
    edges = torch.randint(0, 11, (2, 30))
    inputs = [torch.randn(11, 9), edges, torch.randn(30, 3), torch.tensor([0] * 5 + [1] * 6)]
    return model, inputs, {"gru", "atom_grus.0", "atom_grus.1", "mol_gru"}


def gated_graph():
    """Message passing with a GRU cell for the update (torch-geometric)."""
    model = module_of("torch_geometric.nn", "GatedGraphConv")(out_channels=16, num_layers=3)
    return model, [torch.randn(11, 16), torch.randint(0, 11, (2, 30))], {"rnn"}


def gru4rec():
    """A recommender: embedding, GRU without biases, dense (recbole)."""
    base = module_of("recbole.model.sequential_recommender", "GRU4Rec")
    config = {
        "USER_ID_FIELD": "user",
        "ITEM_ID_FIELD": "item",
        "LIST_SUFFIX": "_list",
        "ITEM_LIST_LENGTH_FIELD": "length",
        "NEG_PREFIX": "neg_",
        "MAX_ITEM_LIST_LENGTH": 9,
        "device": "cpu",
        "embedding_size": 12,
        "hidden_size": 16,
        "loss_type": "CE",
        "num_layers": 2,
        "dropout_prob": 0.3,
    }
    model = base(config, types.SimpleNamespace(num=lambda field: 40))
    return model, [torch.randint(0, 40, (5, 9)), torch.tensor([9, 4, 1, 7, 3])], {"gru_layers"}


def deep_filter_net():
    """Speech enhancement on a spectrogram: five GRUs in three stages (DeepFilterNet)."""
    if importlib.util.find_spec("df") is None:
        pytest.skip("could not import 'df'")
    module_of("torchaudio", "__version__")
    # df reads audio files with what torchaudio has dropped since; the model needs none of it.
    common = types.ModuleType("torchaudio.backend.common")
    common.AudioMetaData = object
    sys.modules.setdefault("torchaudio.backend", types.ModuleType("torchaudio.backend"))
    sys.modules.setdefault("torchaudio.backend.common", common)
    config = module_of("df.config", "config")
    net = module_of("df.deepfilternet3", "DfNet")
    params = module_of("df.deepfilternet3", "ModelParams")
    config.use_defaults(allow_reload=True)
    p = params()
    bins = p.fft_size // 2 + 1
    model = net(torch.rand(bins, p.nb_erb), torch.rand(p.nb_erb, bins))
    spec = torch.randn(2, 1, 7, bins, 2)
    inputs = [spec, torch.randn(2, 1, 7, p.nb_erb), torch.randn(2, 1, 7, p.nb_df, 2)]
    return model, inputs, {"enc.emb_gru.gru", "erb_dec.emb_gru.gru", "df_dec.df_gru.gru"}


MODELS = [
    wavernn,
    crdnn,
    attentional_decoder,
    attentive_fp,
    gated_graph,
    gru4rec,
    deep_filter_net,
]


def tensors(result):
    if isinstance(result, torch.Tensor):
        return [result] if result.is_floating_point() or result.is_complex() else []
    return [t for part in result for t in tensors(part)] if isinstance(result, tuple | list) else []


def run(model, inputs, optimizer):
    """Outputs, gradients of inputs and parameters, and the parameters after an update."""
    torch.manual_seed(5)
    leaves = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in inputs]
    outputs = tensors(model(*leaves))
    assert outputs
    sum(output.sin().sum() for output in outputs if output.requires_grad).backward()
    grads = {f"input {i}": leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    grads |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return outputs, grads, [p.detach().clone() for p in model.parameters()]


def largest(actual, expected):
    """The largest difference, as a share of the largest element."""
    assert len(actual) == len(expected) > 0
    return max(
        ((a - e).abs().max() / e.abs().max().clamp_min(1e-30)).item()
        for a, e in zip(actual, expected, strict=True)
    )


def compare(build, dtype, training, backend):
    torch.manual_seed(1)
    model, inputs, names = build()
    model = model.to(dtype).train(training)
    inputs = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    theirs = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, theirs)]
    replacement = replace_gru(model, backend=backend)
    assert set(replacement.swapped) == names
    assert not any(type(m) in (nn.GRU, nn.GRUCell) for m in model.modules())
    assert all(type(m) in (GRU, GRUCell) for m in replacement.swapped.values())
    ours, expected = run(model, inputs, optimizers[0]), run(theirs, inputs, optimizers[1])
    assert ours[1].keys() == expected[1].keys()
    # A gradient of rounding errors alone (a bias before a normalisation) is no measure of itself.
    scale = max(g.abs().max() for g in expected[1].values())
    grads = max(((ours[1][n] - g).abs().max() / scale).item() for n, g in expected[1].items())
    for name in names:
        assert any(n.startswith(name) for n in ours[1])
    return {
        "outputs": largest(ours[0], expected[0]),
        "gradients": grads,
        "parameters after a step": largest(ours[2], expected[2]),
    }


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("build", MODELS)
def test_models_compute_what_they_did(build, training, backend):
    differences = compare(build, torch.float64, training, backend)
    assert max(differences.values()) < MODEL_TOLERANCE, differences


def test_a_subclass_of_a_package_is_left_and_named():
    """pytorch-forecasting's GRU takes lengths and hands its input to super().forward()."""
    subclass = module_of("pytorch_forecasting.models.nn.rnn", "GRU")
    replacement = replace_gru(nn.Sequential(subclass(3, 4)))
    assert not replacement.swapped
    assert replacement.left["0"].startswith("pytorch_forecasting.models.nn.rnn.GRU, a subclass")
