"""What the tests of torch's features compare a GRU with."""

import torch
from torch import nn

from triton_gru import GRU, equations

T, B, IN, H = 4, 3, 5, 7


class PlainGRU(nn.RNNBase):
    """One layer and direction of the equations, differentiated by torch itself; both variants."""

    def __init__(self, *sizes, reset_after):
        super().__init__("GRU", *sizes)
        self.reset_after = reset_after

    def forward(self, x, h=None):
        h = x.new_zeros(x.shape[1], self.hidden_size) if h is None else h[0]
        states = []
        for gates_x in x @ self.weight_ih_l0.t() + self.bias_ih_l0:
            h = equations.step(gates_x, h, self.weight_hh_l0, self.bias_hh_l0, self.reset_after)
            states.append(h)
        return torch.stack(states), h.unsqueeze(0)


def pair(backend, reset_after, **settings):
    """A GRU and what takes its place: nn.GRU, or the plain equations where torch has no GRU."""
    ours = GRU(IN, H, backend=backend, reset_after=reset_after, **settings)
    theirs = nn.GRU(IN, H, **settings) if reset_after else PlainGRU(IN, H, reset_after=False)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def results(module, x, hx=None):
    """Output, last state, and the gradients of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    y, h_n = module(x, hx)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y, h_n, *torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), leaves)]
