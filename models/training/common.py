"""What both trainings share: a clock that survives restarts, averaged weights, checkpoints."""

import csv
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist


class Clock:
    """Training time in seconds, counted over all restarts, against a budget."""

    def __init__(self, budget_seconds, already=0.0):
        self.budget, self.already, self.start = budget_seconds, already, time.time()

    @property
    def seconds(self):
        return self.already + time.time() - self.start

    @property
    def fraction(self):
        return min(1.0, self.seconds / self.budget)


def learning_rate(peak, step, fraction, warmup=200, floor=0.01):
    """Linear warm-up, then flat for half of the time, then a cosine down to ``floor * peak``."""
    decay = max(0.0, (fraction - 0.5) / 0.5)
    cosine = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * decay))
    return peak * min(1.0, (step + 1) / warmup) * cosine


class Average:
    """Exponential moving average of a module's parameters.

    The decay grows as (1 + n) / (10 + n) so that early averages are not stale.
    """

    def __init__(self, module, decay=0.999):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module):
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.shadow[name].lerp_(value, 1 - decay)


def save_atomically(state, path):
    """Write beside and rename, so that a reader or a crash never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    torch.save(state, beside)
    os.replace(beside, path)


class Workers:
    """Processes that share every batch, started by ``torchrun --nproc_per_node N``; else one.

    On a CPU that others use too, one single-threaded process per core is much faster than one
    process of many threads: it waits once a step, not once an operation.
    """

    def __init__(self):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        if self.count > 1:
            dist.init_process_group("gloo")

    def agree(self, parameters, number):
        """Average the gradients over the processes; returns the first process's number."""
        if self.count == 1:
            return number
        grads = [p.grad for p in parameters if p.grad is not None]
        own = torch.tensor([number if self.rank == 0 else 0.0])
        flat = torch.cat([g.flatten() for g in grads] + [own])
        dist.all_reduce(flat)
        for g, part in zip(grads, flat[:-1].split([g.numel() for g in grads]), strict=True):
            g.copy_(part.view_as(g) / self.count)
        return flat[-1].item()

    def wait(self):
        """Until every process is here."""
        if self.count > 1:
            dist.barrier()


def append_row(path, seconds, step, loss, quality):
    """One more line of a training curve (csv)."""
    with open(path, "a", newline="") as file:
        csv.writer(file).writerow([f"{seconds:.0f}", step, f"{loss:.5f}", f"{quality:.3f}"])
