"""Run an exported graph on recorded inputs, in a process that imports neither mymodels nor transformers.

`python run_graph.py KIND GRAPH INPUTS OUTPUTS`. INPUTS and OUTPUTS are safetensors files with names such as
`3/1/input_ids`: case 3, its second call. With a cache, each call gets the keys and values of the one before it.
"""

import sys

if not sys.flags.isolated:
    sys.path.pop(0)  # this folder, whose files must not shadow libraries

import json
from collections.abc import Callable
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


def onnx_runner(path: str) -> Callable[[Arrays], Arrays]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), kinds[entry.type])
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }

    def run(inputs: Arrays) -> Arrays:
        rows = len(next(iter(inputs.values())))
        empty = {name: np.repeat(value, rows, axis=0) for name, value in past.items()}
        return dict(zip(outputs, session.run(None, {**empty, **inputs})))

    return run


def torch_runner(kind: str, path: str) -> Callable[[Arrays], Arrays]:
    import torch

    graph: Any
    if kind == "pt2":
        graph = torch.export.load(path).module()
    elif kind == "aoti":
        from torch._inductor import cpu_vec_isa

        # torch compares the processor with that of the graph, and warns; it would ask a compiler, and the box runs none
        cpu_vec_isa.VecISA.check_build = lambda self, code: True  # type: ignore[method-assign]
        graph = torch._inductor.aoti_load_package(path)
    else:
        graph = torch.jit.load(path)

    def run(inputs: Arrays) -> Arrays:
        with torch.no_grad():
            outputs = graph(**{name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: value.float().numpy() for name, value in outputs.items()}

    return run


def main(kind: str, graph: str, inputs: str, outputs: str) -> None:
    from safetensors.numpy import load_file, save_file

    run = onnx_runner(graph) if kind == "onnx" else torch_runner(kind, graph)
    calls: dict[tuple[int, int], Arrays] = {}
    for name, value in load_file(inputs).items():
        number, step, entry = name.split("/")
        calls.setdefault((int(number), int(step)), {})[entry] = value
    found: Arrays = {}
    results: Arrays = {}
    for (case, call), given in sorted(calls.items()):
        past = {name.replace("present", "past_key_values"): results[name] for name in results if "present" in name}
        results = run({**given, **past} if call else given)
        found |= {f"{case}/{call}/{name}": np.ascontiguousarray(value) for name, value in results.items()}
    unwanted = {"mymodels", "transformers"} & set(sys.modules)
    save_file(found, outputs, metadata={"unwanted": json.dumps(sorted(unwanted))})


if __name__ == "__main__":
    main(*sys.argv[1:])
