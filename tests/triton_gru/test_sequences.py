"""lengths= and resets=: a sequence gives what it gives alone, whatever else stands in its row."""

import pytest
import torch

from tests.tolerances import assert_close
from triton_gru import GRU

T, B, I, H = 11, 3, 5, 7  # noqa: E741
# Where sequences begin in each row: one that starts anew at once, one of one step, none.
BEGINNINGS = [[0, 3, 4, 9], [5, 10], []]

every_variant = pytest.mark.parametrize("reset_after", [True, False])
every_direction = pytest.mark.parametrize("bidirectional", [False, True])


def make_layer(**options):
    options = {"num_layers": 2, "dtype": torch.float64, "backend": "reference", **options}
    return GRU(I, H, **options)


def make_resets():
    resets = torch.zeros(T, B, dtype=torch.bool)
    for row, beginnings in enumerate(BEGINNINGS):
        resets[beginnings, row] = True
    return resets


def one_by_one(layer, x, hx, lengths=None):
    """y and h_n of rows cut at BEGINNINGS, each sequence run alone."""
    D = 2 if layer.bidirectional else 1
    ys, last = [], []
    for row, beginnings in enumerate(BEGINNINGS):
        end = T if lengths is None else int(lengths[row])
        starts = sorted({0, *(b for b in beginnings if b < end)})
        pieces = []
        for start, stop in zip(starts, [*starts[1:], end], strict=True):
            first = torch.zeros_like(hx[:, row])
            # hx enters the first sequence forwards, the last one backwards.
            if start == 0 and 0 not in beginnings:
                first[0::D] = hx[0::D, row]
            if D == 2 and stop == end:
                first[1::2] = hx[1::2, row]
            pieces.append(layer(x[start:stop, row], first))
        y = torch.cat([piece for piece, _ in pieces])
        ys.append(torch.cat([y, y.new_zeros(T - end, y.shape[1])]))
        # Forwards the last state is that of the last sequence, backwards that of the first.
        h_n = pieces[-1][1].clone()
        if D == 2:
            h_n[1::2] = pieces[0][1][1::2]
        last.append(h_n)
    return torch.stack(ys, 1), torch.stack(last, 1)


def results(outputs, inputs):
    y, h_n = outputs
    return y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), inputs)


@every_variant
@every_direction
@pytest.mark.parametrize("lengths", [None, [10, 11, 4]])
def test_sequences_in_one_row_equal_the_sequences_alone(lengths, bidirectional, reset_after):
    layer = make_layer(bidirectional=bidirectional, reset_after=reset_after)
    D = 2 if bidirectional else 1
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    hx = torch.randn(2 * D, B, H, dtype=torch.float64, requires_grad=True)
    inputs = [x, hx, *layer.parameters()]
    lengths = None if lengths is None else torch.tensor(lengths)
    resets = make_resets()
    ours = results(layer(x, hx, lengths=lengths, resets=resets), inputs)
    assert_close(ours, results(one_by_one(layer, x, hx, lengths), inputs))
