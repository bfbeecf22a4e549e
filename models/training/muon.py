"""Muon: momentum whose step is made orthogonal, for matrices and convolution kernels.

K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024). The step is
scaled by 0.2 sqrt(max(rows, columns)) to AdamW's usual size (J. Liu et al., arXiv:2502.16982),
so both optimisers share one learning rate.
"""

from collections import defaultdict

import torch


def orthogonal(g, steps=5):
    """U V^T of g's singular value decomposition, nearly: quintic Newton-Schulz, [N, rows, cols];
    bfloat16 is precise enough."""
    flip = g.size(1) > g.size(2)
    x = (g.transpose(1, 2) if flip else g).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.transpose(1, 2)
        b = -4.7750 * a + 2.0315 * a @ a
        x = 3.4445 * x + b @ x
    return (x.transpose(1, 2) if flip else x).float()


class Muon(torch.optim.Optimizer):
    """Takes parameters of two or more dimensions; a kernel [O, I, 3, 3] counts as [O, 9 I]."""

    def __init__(self, parameters, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            momentum, alike = group["momentum"], defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.flatten(1).shape].append(p)
            for (rows, columns), same in alike.items():
                moves = []
                for p in same:
                    state = self.state[p]
                    mean = state.setdefault("mean", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - momentum)
                    moves.append(p.grad.lerp(mean, momentum).flatten(1))
                size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for p, move in zip(same, orthogonal(torch.stack(moves)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(size * move.view_as(p))


ENDS = ("conv_in", "conv_out", "quant_conv", "time_embedding", "token_embedding", "position_embedding")


def optimisers(model, peak):
    """Muon for inner matrices and kernels; AdamW for tables, ends, norms and biases."""
    inner = [p for n, p in model.named_parameters() if p.ndim >= 2 and not any(e in n for e in ENDS)]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(inner, lr=peak), torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.99), weight_decay=0)]
