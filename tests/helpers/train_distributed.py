"""Train some steps on two processes, with gloo.

Run `torchrun -m tests.helpers.train_distributed FILE`. Each process takes its part of every batch,
once in every setup. Process 0 leaves in FILE what it has seen, by setup.
"""

import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sdgp_fx import graph_pass

OPTIONS = {"sdgp.inner": "aot_eager", "sdgp.targets": "conv,linear"}


class Body(nn.Module):
    """Two convolutions outside of nn.Sequential.

    Dynamo runs torch's own modules eagerly where they have FSDP's hooks.
    """

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 16, 3)
        self.second = nn.Conv2d(16, 8, 3)

    def forward(self, x):
        return F.gelu(self.second(F.gelu(self.first(x))))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(8, 16)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        return self.head(self.hidden(x).relu())


class Network(nn.Module):
    """Network without BatchNorm, whose statistics would cover a process's part of the batch."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.body = Body()
        self.classifier = Classifier()

    def forward(self, x):
        return self.classifier(self.body(self.stem(x)).mean((2, 3)))


PRUNED = ["body.first", "body.second", "classifier.head", "classifier.hidden"]


def make():
    torch.manual_seed(0)
    return Network()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 3, 12, 12, generator=generator)
        yield x, torch.randint(8, (8,), generator=generator)


def compiled(model):
    return torch.compile(model, backend="sdgp", options=OPTIONS)


def sharded(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.body, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def compiled_in_regions(model):
    for part in (model.body, model.classifier):
        part.compile(backend="sdgp", options=OPTIONS)
    return model


SETUPS = {
    "compiled ddp": lambda model: compiled(DistributedDataParallel(model)),
    "ddp of compiled": lambda model: DistributedDataParallel(compiled(model)),
    "compiled fsdp": lambda model: compiled(sharded(model)),
    "fsdp of regions": lambda model: sharded(compiled_in_regions(model)),
}


def train(model, run, part=slice(None)):
    """Train for three steps, and return their losses."""
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
    for x, y in batches():
        loss = F.cross_entropy(run(x[part]), y[part])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def seen_in(setup):
    """Train in a setup; return the losses, the parameters and the pruned layers' names."""
    decided = []
    graph_pass._report = lambda graph, decisions: decided.extend(decisions)
    torch._dynamo.reset()
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = make()
    losses = train(model, SETUPS[setup](model), slice(rank, None, processes))
    dist.all_reduce(losses)
    state = {
        name: p.full_tensor() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    for parameter in state.values():
        of_all = [torch.empty_like(parameter) for _ in range(processes)]
        dist.all_gather(of_all, parameter.contiguous())
        assert all(torch.equal(other, parameter) for other in of_all)
    pruned = sorted(decision.module for decision in decided if decision.pruned)
    return {"state": state, "losses": losses / processes, "pruned": pruned}


def main():
    (file,) = sys.argv[1:]
    dist.init_process_group("gloo")
    seen = {setup: seen_in(setup) for setup in SETUPS}
    if dist.get_rank() == 0:
        torch.save(seen, file)
    dist.destroy_process_group()
    # gloo's threads can still hold tensors, which aborts an interpreter that finalizes.
    os._exit(0)


if __name__ == "__main__":
    main()
