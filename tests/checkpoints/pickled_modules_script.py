"""Run as a script: pickle whole modules whose classes lie in `__main__`, and save their state dicts beside."""

import copy
import logging
import os
import pickle
import sys

import torch
import torch.nn.utils.prune
from torch import nn
from torch.optim.swa_utils import AveragedModel


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("positions", torch.arange(3))
        self.register_buffer("cache", torch.ones(3), persistent=False)
        self.register_parameter("absent", None)
        self.activation = torch.nn.functional.relu
        self.method = self.forward
        self.plain = torch.zeros(2)
        self.attention = nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return x

    def __setstate__(self, state):
        with open("ran.txt", "a") as file:
            file.write("ran")
        super().__setstate__(state)


class Slots:
    __slots__ = ("inner",)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.list = nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))])
        self.dict = nn.ParameterDict({"a": nn.Parameter(torch.randn(1))})
        self.table = nn.ModuleDict({"x": nn.Identity(), "y": nn.BatchNorm1d(3)})
        self.norm = torch.nn.utils.weight_norm(nn.Linear(3, 3))
        self.spectral = torch.nn.utils.spectral_norm(nn.Linear(3, 3))
        self.pruned = torch.nn.utils.prune.l1_unstructured(nn.Linear(3, 3), "weight", 2)
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.unregistered = [nn.Linear(2, 2)]  # which is not a state of a module

    def forward(self, x):
        return x


class Ema:
    def __init__(self, model):
        self.shadow = {name: value.clone() + 1 for name, value in model.state_dict().items()}
        self.decay, self.owner = 0.9, self


class Child(Net):
    """As people write it to keep a file small."""

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "unregistered"}


class OwnPickle(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def __getstate__(self):
        return {"packed": self.weight.detach() * 16}


class Renames(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self._register_state_dict_hook(rename)


def rename(module, state_dict, prefix, local_metadata):
    state_dict[f"{prefix}other"] = state_dict.pop(f"{prefix}weight")


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    ema = Ema(net)
    beside = {"opt": optimizer, "sched": scheduler, "logger": logging.getLogger("x"), "epoch": 3}
    cases = {
        "bare": (net, {"": net.state_dict()}),
        "half": (copy_ := Child().bfloat16(), {"": copy_.state_dict()}),
        "named": ({"model": net, "epoch": 3}, {"model": net.state_dict()}),
        "parallel": (parallel := nn.DataParallel(net), {"": parallel.state_dict()}),
        "training": ({"model": net, "ema": ema, **beside}, {"model": net.state_dict(), "ema.shadow": ema.shadow}),
        "average": (average := AveragedModel(nn.Linear(3, 2)), {"": average.state_dict()}),
        "compiled": (compiled := torch.compile(copy.deepcopy(nn.Linear(3, 2))), {"": compiled.state_dict()}),
        "two": ({"g": nn.Linear(2, 2), "d": net}, None),
    }
    cases["two"] = (cases["two"][0], {key: one.state_dict() for key, one in cases["two"][0].items()})
    for name, (saved, _) in cases.items():
        torch.save(saved, f"{name}.pt")
        torch.save(saved, f"{name}-legacy.pt", _use_new_zipfile_serialization=False)
        for protocol in (2, 5):
            with open(f"{name}-{protocol}.pkl", "wb") as file:
                pickle.dump(saved, file, protocol)
    torch.save({name: truth for name, (_, truth) in cases.items()} | {"optimizer": optimizer.state_dict()}, "truth")
    torch.save(scheduler.state_dict(), "scheduler")
    torch.save({"model": OwnPickle()}, "own.pt")
    torch.save({"model": nn.Sequential(OwnPickle())}, "inner.pt")
    torch.save(Renames(), "renames.pt")
    torch.save(nn.LazyLinear(2), "lazy.pt")
    torch.save(torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 3))), "packed.pt")
    loop = nn.Sequential(nn.Linear(2, 2))
    loop._modules["1"] = loop
    torch.save(loop, "loop.pt")
