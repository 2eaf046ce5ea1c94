"""A layer as the ONNX operator GRU, for `torch.onnx.export`, both variants.

ONNX has one operator for both formulas: its attribute `linear_before_reset` is our reset_after. Its
gates are in the order z, r, n, torch's are r, z, n
(https://onnx.ai/onnx/operators/onnx__GRU.html).
"""

import torch
from torch import Tensor

from triton_gru.equations import LayerWeights, ScanOptions


def layer(
    x: Tensor,
    h0: Tensor,
    weights: LayerWeights,
    options: ScanOptions,
) -> tuple[Tensor, Tensor]:
    """A layer in one node, arguments as in `engines.autograd`; past a row's end, y is zero.

    Raises:
        ValueError: There are resets, which the operator does not support.
    """
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    reset_after, lengths, resets = options
    if resets is not None:
        raise ValueError(
            "resets cannot be exported to ONNX: its operator GRU has lengths and no resets; "
            "give each sequence its own row, with lengths"
        )
    T, B, _ = x.shape
    D, _, H = h0.shape
    bias = None
    if bias_ih is not None and bias_hh is not None:
        bias = torch.cat([_in_onnx_order(bias_ih), _in_onnx_order(bias_hh)], 1)
    inputs = (
        x,
        _in_onnx_order(weight_ih),
        _in_onnx_order(weight_hh),
        bias,
        None if lengths is None else lengths.to(torch.int32),
        h0,
    )
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "::GRU",
        inputs,
        {
            "hidden_size": H,
            "direction": "bidirectional" if D == 2 else "forward",
            "linear_before_reset": int(reset_after),
        },
        dtypes=(x.dtype, x.dtype),
        shapes=((T, D, B, H), (D, B, H)),
    )
    return y.transpose(1, 2).flatten(2), h_n


def _in_onnx_order(weight: Tensor) -> Tensor:
    r, z, n = weight.chunk(3, 1)
    return torch.cat([z, r, n], 1)
