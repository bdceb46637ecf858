"""Run in the box as `serve.py JOB.json`: load a model with its folder's code, and answer requests until the pipe closes.

The other side is `hub/isolated_process.py`. Nothing here trusts or distrusts: the box does.
"""

import contextlib
import ctypes
import importlib.util
import json
import shutil
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

JOB = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
sys.modules["mymodels"] = None  # type: ignore[assignment]  # `import mymodels` fails from here on, even if installed
sys.dont_write_bytecode = True

_spec = importlib.util.spec_from_file_location(
    "mymodels_clean", Path(__file__).with_name("__init__.py"), submodule_search_locations=[str(Path(__file__).parent)]
)
assert _spec is not None and _spec.loader is not None
sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_spec.name])

import torch  # noqa: E402
import transformers  # noqa: E402
from mymodels_clean import exchange, stages  # type: ignore[import-not-found]  # noqa: E402

_NO_COMPILER = "torch.compile needs a compiler, and the box runs no programs: use the model without it"


class Server:
    """A model, and the objects of it that the other side has handles of."""

    def __init__(self, model: Any):
        self.model = model
        self.kept: dict[int, Any] = {}
        self.numbers, self.busy = 0, False

    def answer(self, request: dict[str, Any]) -> Any:
        for number in request.get("released", ()):
            self.kept.pop(number, None)
        if "state" in request:
            torch.set_rng_state(request["state"])
        what = getattr(self, f"do_{request['what']}")
        try:
            self.busy = True
            with torch.no_grad():
                return self.to_send(what(*self.received(request["args"]), **self.received(request["kwargs"])))
        finally:
            self.busy = False

    def interrupt(self, number: int, frame: Any) -> None:
        """Ctrl-C on the other side: stop computing, but finish a message."""
        if self.busy:
            raise KeyboardInterrupt

    def do_forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*on_device(args, self.model), **on_device(kwargs, self.model))

    def do_generate(self, *args: Any, generation_config: Any = None, **kwargs: Any) -> Any:
        if generation_config is not None:
            kwargs["generation_config"] = transformers.GenerationConfig.from_dict(generation_config)
        return self.model.generate(*on_device(args, self.model), **on_device(kwargs, self.model))

    def do_names(self) -> Any:
        """Name → (bytes, the first name of the same tensor) of the state dict."""
        first: dict[Any, str] = {}
        table = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            place = (tensor.untyped_storage().data_ptr() if not tensor.is_meta else id(tensor), tensor.storage_offset())
            same = first.setdefault((*place, tensor.shape, tensor.stride()), name)
            table[name] = (tensor.numel() * tensor.element_size(), same)
        return table

    def do_tensors(self, names: list[str]) -> Any:
        state = self.model.state_dict()
        if any(tensor.is_meta for tensor in state.values()):  # offloaded
            from accelerate.utils.modeling import get_state_dict_offloaded_model

            state = get_state_dict_offloaded_model(self.model)
        return {name: state[name] for name in names}

    def do_save(self, **kwargs: Any) -> Any:
        self.do_forget_saved()
        self.model.save_pretrained(JOB["saved"], **kwargs)

    def do_forget_saved(self) -> Any:
        shutil.rmtree(JOB["saved"], ignore_errors=True)

    def received(self, value: Any) -> Any:
        """A value with the objects that its handles stand for."""
        if isinstance(value, exchange.Handle):
            return self.kept[value.number]
        if isinstance(value, dict):
            return {key: self.received(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.received(item) for item in value)
        return value

    def to_send(self, value: Any) -> Any:
        """A value in which objects that cannot be sent are kept here, behind handles."""
        if isinstance(value, transformers.utils.ModelOutput):
            fields = {name: self.to_send(item) for name, item in value.items()}
            return {"class": type(value).__name__, "fields": fields}
        if isinstance(value, dict):
            return {key if isinstance(key, (str, int)) else str(key): self.to_send(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return (list if isinstance(value, list) else tuple)(self.to_send(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str, torch.Tensor, torch.dtype)):
            return value
        self.numbers += 1
        self.kept[self.numbers] = value
        return exchange.Handle(self.numbers)


def on_device(value: Any, model: Any) -> Any:
    """Tensors in a value on the model's device."""
    if isinstance(value, torch.Tensor):
        return value.to(model.device)
    if isinstance(value, dict):
        return {key: on_device(item, model) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, model) for item in value)
    return value


def describe(model: Any) -> dict[str, Any]:
    """What the other side shows of a model without asking."""
    config = model.config
    generation = getattr(model, "generation_config", None)
    return {
        "class": type(model).__name__,
        "config": plain(config.to_dict()),
        "attribute_map": plain(dict(getattr(config, "attribute_map", None) or {})),
        "generation_config": plain(generation.to_dict()) if generation is not None else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "can_generate": bool(model.can_generate()),
    }


def plain(value: Any) -> Any:
    """A value of a config with what cannot be sent as its text."""
    if isinstance(value, dict):
        return {key if isinstance(key, (str, int)) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def failure(error: BaseException) -> dict[str, Any]:
    """An exception as an answer."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 10:
        chain.append(cause)
    compiling = any(type(one).__module__.startswith(("torch._dynamo", "torch._inductor")) for one in chain)
    needs_program = any(isinstance(one, PermissionError) for one in chain) or "compiler" in str(error)
    text = _NO_COMPILER if compiling and needs_program else stages.sentence(error)
    return {"error": text, "where": stages.innermost(error), "kind": type(error).__name__}


def keep_freed_memory() -> None:
    """Let malloc reuse what tensors leave, as it does in a process that has run for a while; each page given back costs.

    These are the largest values that glibc comes to by itself; elsewhere nothing is changed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        libc.mallopt(mmap, 2**25)
        libc.mallopt(trim, 2**28)


def main() -> None:
    keep_freed_memory()
    stages.pass_tensors_by_value()
    torch.set_num_threads(JOB["threads"])
    transformers.utils.logging.set_verbosity_error()
    channel = exchange.Channel(*JOB["descriptors"])
    try:
        options = channel.receive()
        auto = getattr(transformers, JOB["auto_class"])
        model = auto.from_pretrained(JOB["folder"], trust_remote_code=True, **options).eval()
        channel.send(describe(model))
    except BaseException as error:
        traceback.print_exc()
        channel.send(failure(error))
        return
    server = Server(model)
    signal.signal(signal.SIGINT, server.interrupt)
    while True:
        number = 0
        try:
            request = channel.receive()
            number = request["number"]
            answer = {"number": number, "value": server.answer(request)}
            channel.send(answer)
        except exchange.Closed:
            return
        except BaseException as error:
            traceback.print_exc()
            channel.send({"number": number, **failure(error)})


if __name__ == "__main__":
    main()
