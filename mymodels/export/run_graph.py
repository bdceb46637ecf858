"""Run an exported graph on recorded inputs, in a process that imports neither mymodels nor transformers.

`python run_graph.py KIND GRAPH INPUTS OUTPUTS`. INPUTS and OUTPUTS are safetensors files with names such as
`3/1/input_ids`: case 3, its second call. With a cache, each call gets the keys and values of the one before it; INPUTS'
metadata then has `past`: for each, the number of heads and the width of one.
"""

import sys

if not sys.flags.isolated:
    sys.path.pop(0)  # this folder, whose files must not shadow libraries

import json
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


class OnnxGraph:
    def __init__(self, kind: str, path: str) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.past = [entry.name for entry in self.session.get_inputs() if entry.name.startswith("past_key_values.")]

    def empty(self, shape: list[int], dtype: str) -> Any:
        return np.zeros(shape, dtype)

    def __call__(self, inputs: Arrays, past: list[Any]) -> dict[str, Any]:
        return dict(zip(self.outputs, self.session.run(None, {**inputs, **dict(zip(self.past, past))})))

    def array(self, output: Any) -> np.ndarray:
        return output


class TorchGraph:
    def __init__(self, kind: str, path: str) -> None:
        import torch

        torch.set_grad_enabled(False)
        self.torch: Any = torch
        self.graph: Any
        if kind == "pt2":
            self.graph = torch.export.load(path).module()
        elif kind == "aoti":
            from torch._inductor import cpu_vec_isa

            # torch compares the processor with that of the graph, and warns; it would ask a compiler, and the box runs none
            cpu_vec_isa.VecISA.check_build = lambda self, code: True  # type: ignore[method-assign]
            self.graph = torch._inductor.aoti_load_package(path)
        else:
            self.graph = torch.jit.load(path)

    def empty(self, shape: list[int], dtype: str) -> Any:
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype))

    def __call__(self, inputs: Arrays, past: list[Any]) -> dict[str, Any]:
        given = {name: self.torch.from_numpy(value) for name, value in inputs.items()}
        return self.graph(**given, **({"past_key_values": past} if past else {}))

    def array(self, output: Any) -> np.ndarray:
        return output.float().numpy()


def main(kind: str, path: str, inputs: str, outputs: str) -> None:
    from safetensors import safe_open
    from safetensors.numpy import save_file

    graph = OnnxGraph(kind, path) if kind == "onnx" else TorchGraph(kind, path)
    calls: dict[tuple[int, int], Arrays] = {}
    with safe_open(inputs, "numpy") as file:
        about = file.metadata() or {}
        for name in list(file.keys()):
            number, step, entry = name.split("/")
            calls.setdefault((int(number), int(step)), {})[entry] = file.get_tensor(name)
    heads = json.loads(about.get("past", "[]"))
    found: Arrays = {}
    past: list[Any] = []
    for (case, call), given in sorted(calls.items()):
        if not call:  # the first of a case
            rows = len(next(iter(given.values())))
            past = [graph.empty([rows, count, 0, width], about["dtype"]) for count, width in heads]
        results = graph(given, past)
        past = [value for name, value in results.items() if name.startswith("present.")]
        found |= {f"{case}/{call}/{name}": np.ascontiguousarray(graph.array(value)) for name, value in results.items()}
    unwanted = {"mymodels", "transformers"} & set(sys.modules)
    save_file(found, outputs, metadata={"unwanted": json.dumps(sorted(unwanted))})


if __name__ == "__main__":
    main(*sys.argv[1:])
