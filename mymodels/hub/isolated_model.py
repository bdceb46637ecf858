"""`mymodels.load(path, isolated=True)`: a model whose code lives in a confined process.

The process runs `isolated/serve.py` in the box of `sandbox`. This side never executes the folder's code and never
unpickles: requests and answers are JSON in pipes and tensors in shared memory, see `isolated/exchange.py`.
"""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PretrainedConfig

from ..checkpoints.atomic_write import replace_folder
from ..checkpoints.opening import locate, weight_files
from ..checkpoints.safetensors_files import inside
from ..messages import one_line
from ..sandbox import available, command, end, results, why_ended
from .clean_process import environment
from .isolated import exchange

_SERVE = Path(__file__).parent / "isolated" / "serve.py"
_MEMORY, _OF_WEIGHTS = 8 * 10**9, 4  # bytes of memory: these, and so many times the weights
_SCRATCH, _COPIES = 4 * 10**9, 4
_BATCH = 2**28  # bytes of tensors in one answer
_PATIENCE = 5.0  # seconds to wait for code that was interrupted
_OF_CUDA = ("nvidia*", "nvidia-caps/*", "kfd", "dri/renderD*")


class IsolatedError(RuntimeError):
    """What a model in the box raised, or why its process has ended."""


class IsolatedOutput(OrderedDict):
    """The output of a forward, by name, as attribute or entry; by position as a tuple of what is not None."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the output has no {name!r}, but {', '.join(map(str, self))}") from None

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The values, without names."""
        return tuple(self.values())


class IsolatedObject:
    """An object that stays in the box, such as a cache of keys and values; to be passed back as an argument."""

    def __init__(self, model: "IsolatedModel", number: int):
        self.number = number
        weakref.finalize(self, model._released.append, number)


class IsolatedModel:
    """A model in the box: `forward`, `generate`, `config`, `state_dict` and `save_pretrained`, for inference.

    Tensors are on the CPU on this side, wherever the model is. A config is a copy: changing it changes nothing in the
    box. `close`, the end of a `with` block or of this process end the process in the box, and so does whatever exceeds
    a limit; each later call raises `IsolatedError`.

    Attributes:
        config: the model's config.
        generation_config: its generation config, None if it does not generate.
        dtype, device: of the parameters, in the box.
        isolation: what confines it.

    Examples:
        >>> with mymodels.load("me/strange-model", isolated=True, auto_class="AutoModelForCausalLM") as model:
        ...     tokens = model.generate(input_ids=torch.tensor([[1, 2, 3]]), max_new_tokens=20)
    """

    def __init__(self, process: "_Process", facts: Mapping[str, Any], name: str):
        self._process, self._lock = process, threading.RLock()
        self._released: list[int] = []
        self._number, self._owner = 0, os.getpid()
        self.isolation = process.isolation
        try:
            self.class_name = str(facts["class"])
            self.config: Any = _config(facts["config"], facts["attribute_map"])
            self.config.name_or_path = name
            generation = facts["generation_config"]
            self.generation_config = GenerationConfig.from_dict(generation) if generation is not None else None
            self.dtype = exchange.DTYPES[facts["dtype"]]
            self.device = torch.device(facts["device"])
            self._parameters, self._generates = int(facts["parameters"]), bool(facts["can_generate"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            process.close()
            raise IsolatedError(f"{name}: its code describes no model ({one_line(error, 200)})") from None

    def __repr__(self) -> str:
        return f"<{one_line(self.class_name, 80)} in a process of its own; {self.isolation}>"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `forward`, without gradients.

        Args:
            args, kwargs: as the model's own `forward` takes them; tensors of any device.

        Returns:
            The output, with tensors on the CPU; a cache of keys and values as an `IsolatedObject`.

        Raises:
            IsolatedError: `forward` raised, or the process has ended; the message says why.
            TypeError: an argument cannot be sent, such as a function.
        """
        return self._ask("forward", *args, **kwargs)

    __call__ = forward

    def generate(self, *args: Any, generation_config: GenerationConfig | None = None, **kwargs: Any) -> Any:
        """The model's `generate`; the random numbers of sampling are those of this process's generator.

        Args:
            args, kwargs: as `generate` takes them, without functions (`logits_processor`, `streamer` and so on).
            generation_config: replaces the model's own.

        Raises:
            IsolatedError, TypeError: as `forward`.
        """
        if generation_config is not None:
            kwargs["generation_config"] = generation_config.to_dict()
        state = torch.get_rng_state()
        torch.rand(1)  # the next call shall draw other numbers
        return self._ask("generate", *args, _state=state, **kwargs)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights by name, on the CPU; tied ones are the same tensor.

        Raises:
            IsolatedError: as `forward`.
        """
        table = self._ask("names")
        found: dict[str, torch.Tensor] = {}
        try:
            first = {name: entry[1] for name, entry in table.items()}
            wanted = [name for name, same in first.items() if same == name]
            for batch in _batches({name: table[name][0] for name in wanted}):
                found |= {name: tensor for name, tensor in self._ask("tensors", batch).items() if name in batch}
            return {name: found[same] for name, same in first.items()}
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise self._tampered(error) from None

    def save_pretrained(self, folder: str | os.PathLike, **kwargs: Any) -> None:
        """Save the model as its own `save_pretrained` does, into a new folder or in place of an older one.

        Args:
            folder: the folder. It gets the files that the model's code wrote, none of which was opened here.
            kwargs: as `save_pretrained` takes them, such as `max_shard_size`.

        Raises:
            IsolatedError: as `forward`.
            FileExistsError: the folder exists and holds something else than a saved model.
        """
        target = Path(folder)
        if target.exists() and (
            not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").exists())
        ):
            raise FileExistsError(f"{target} exists and holds no saved model: choose another folder")
        saved = self._process.scratch / "saved"
        results.delete(saved)
        saved.mkdir()
        self._ask("save", **kwargs)
        try:
            with replace_folder(target) as new:
                results.copy_folder(saved, new, self._process.scratch_size)
        except results.UntrustedResult as error:
            raise self._tampered(error) from None
        finally:
            results.delete(saved)

    def num_parameters(self) -> int:
        """The number of parameters."""
        return self._parameters

    def can_generate(self) -> bool:
        """Whether the model has `generate`."""
        return self._generates

    def eval(self) -> "IsolatedModel":
        """This model, which is always in evaluation mode."""
        return self

    def train(self, mode: bool = True) -> "IsolatedModel":
        """Raises for `mode=True`: a model in the box is for inference."""
        if mode:
            raise IsolatedError("a model in the box cannot be trained: its gradients stay in another process")
        return self

    def close(self) -> None:
        """End the process in the box."""
        self._process.close()

    def __enter__(self) -> "IsolatedModel":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _ask(self, what: str, *args: Any, _state: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if os.getpid() != self._owner:
            raise IsolatedError("a model in the box answers only the process that loaded it: load it in this one too")
        with self._lock:
            released, self._released[:] = self._released[:], []
            self._number += 1
            request = {"what": what, "number": self._number, "args": _sent(args), "kwargs": _sent(kwargs)}
            request |= {"released": released} if released else {}
            request |= {"state": _state} if _state is not None else {}
            answer = self._process.answer(request, self._number)
        try:
            return self._received(answer["value"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._tampered(error) from None

    def _received(self, value: Any) -> Any:
        if isinstance(value, exchange.Handle):
            return IsolatedObject(self, value.number)
        if isinstance(value, dict) and set(value) == {"class", "fields"}:
            return _output(str(value["class"]), {str(k): self._received(v) for k, v in value["fields"].items()})
        if isinstance(value, dict):
            return {key: self._received(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._received(item) for item in value)
        return value

    def _tampered(self, error: Exception) -> IsolatedError:
        self.close()
        return IsolatedError(f"the code of {self.config.name_or_path} sent an invalid answer: {one_line(error, 200)}")


class _Process:
    """The confined process of a model, and the way to it."""

    def __init__(self, folder: Path, auto_class: str, options: dict[str, Any], limits: dict[str, Any], name: str):
        self.isolation = available()
        self.isolation.require()
        self.name, self.time_limit, self._why = name, limits["time_limit"], ""
        control = Path(tempfile.mkdtemp(prefix="mymodels-isolated-")).resolve()
        self.control, self.scratch = control, control / "scratch"
        self.scratch.mkdir()
        asked, ask = os.pipe()
        answered, answer = os.pipe()
        memories = exchange.shared_memory("requests"), exchange.shared_memory("answers")
        theirs = [asked, answer, *memories]
        size = sum(file.stat().st_size for file in weight_files(folder))
        self.scratch_size = _SCRATCH + _COPIES * size
        memory = limits["memory_limit"] or _MEMORY + _OF_WEIGHTS * size
        job = {
            "folder": str(folder),
            "auto_class": auto_class,
            "saved": str(self.scratch / "saved"),
            "threads": torch.get_num_threads(),
            "descriptors": [asked, answer, *memories],
        }
        (control / "job.json").write_text(json.dumps(job), encoding="utf-8")
        started = command(
            [_SERVE, control / "job.json"],
            control=control,
            scratch=self.scratch,
            readable=[_SERVE.parent, control / "job.json", folder, *_links(folder)],
            memory=memory,
            scratch_size=self.scratch_size,
            devices=limits["devices"],
            keep=theirs,
            isolation=self.isolation,
        )
        own = environment(self.scratch)
        for variable in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            *(["CUDA_VISIBLE_DEVICES"] if limits["devices"] else []),
        ):
            own.pop(variable, None)
            own |= {variable: os.environ[variable]} if variable in os.environ else {}
        with (control / "stderr").open("wb") as errors:
            self.process = subprocess.Popen(
                started,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env=own,
                cwd=self.scratch,
                start_new_session=True,
                pass_fds=theirs,
            )
        for descriptor in (asked, answer):
            os.close(descriptor)
        self.channel = exchange.Channel(answered, ask, memories[1], memories[0], largest=memory)
        mine = (answered, ask, *memories)
        self._finalizer = weakref.finalize(self, _end, self.process, mine, control, os.getpid())
        try:
            self.channel.send(options)
        except TypeError as error:
            self.close()
            raise TypeError(f"an option of from_pretrained cannot be used with isolated=True: {error}") from None
        except exchange.Closed:
            pass  # `receive` says why

    def receive(self) -> Any:
        """The next message; whatever is wrong with it ends the process."""
        try:
            return self.channel.receive(self.time_limit)
        except exchange.Closed:
            why = self._reason()
        except exchange.InvalidMessage as error:
            why = f"its code sent {one_line(error, 200)}"
        except TimeoutError:
            why = f"it did not answer within {self.time_limit:g} s"
        self.close(why)
        raise IsolatedError(f"{self.name}: the process in the box has ended: {why}")

    def answer(self, request: dict[str, Any], number: int) -> dict[str, Any]:
        """The answer to a request, those to requests that were interrupted left out."""
        if not self._finalizer.alive:
            raise IsolatedError(f"{self.name}: the process in the box has ended{': ' * bool(self._why)}{self._why}")
        try:
            with contextlib.suppress(exchange.Closed):  # `receive` says why
                self.channel.send(request)
            while True:
                answer = self.receive()
                if not isinstance(answer, dict) or answer.get("number") == number or "number" not in answer:
                    break
        except KeyboardInterrupt:
            self._interrupt()
            raise
        if isinstance(answer, dict) and "error" in answer:
            raise IsolatedError(failure_sentence(answer))
        if not isinstance(answer, dict) or "value" not in answer:
            self.close("its code sent no answer")
            raise IsolatedError(f"{self.name}: the process in the box has ended: {self._why}")
        return answer

    def _interrupt(self) -> None:
        """Let the code in the box raise KeyboardInterrupt; end it if it does not."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid, signal.SIGINT)
        try:
            self.channel.receive(_PATIENCE)
        except (exchange.Closed, exchange.InvalidMessage, TimeoutError, KeyboardInterrupt):
            self.close("it was interrupted")

    def _reason(self) -> str:
        """Why the process has ended by itself."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if why := why_ended(self.control):
            return why
        with (self.control / "stderr").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 10_000))
            printed = file.read().decode("utf-8", errors="replace").strip().splitlines()
        how = f"it ended with exit code {self.process.returncode}"
        return one_line(f"{how}: {printed[-1]}" if printed else how, 300)

    def close(self, why: str = "it was closed") -> None:
        if self._finalizer.alive:
            self._why = why
            self._finalizer()


def load_isolated(
    path_or_repo_id: str | os.PathLike,
    auto_class: str,
    *,
    memory_limit: int | None = None,
    time_limit: float | None = None,
    cuda: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> IsolatedModel:
    """Load a model in a confined process; see `mymodels.load`.

    Args:
        memory_limit: bytes of memory; default 8 GB and four times the weights.
        time_limit: seconds for loading, and for each call; default no limit.
        cuda: pass the GPUs through.
    """
    folder = locate(path_or_repo_id, revision=revision, token=token, everything=True).resolve()
    if not folder.is_dir() or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{path_or_repo_id} has no config.json: name the folder of a model")
    options.pop("trust_remote_code", None)
    limits = {"memory_limit": memory_limit, "time_limit": time_limit, "devices": _gpus() if cuda else []}
    process = _Process(folder, auto_class, options, limits, str(path_or_repo_id))
    try:
        facts = process.receive()
        if not isinstance(facts, dict) or "error" in facts:
            raise IsolatedError(f"{path_or_repo_id} does not load in the box: {failure_sentence(facts)}")
        return IsolatedModel(process, facts, str(path_or_repo_id))
    except BaseException:
        process.close()
        raise


def failure_sentence(answer: Any) -> str:
    """The sentence of an answer that reports an exception."""
    if not isinstance(answer, dict):
        return "it sent no answer"
    where = one_line(answer.get("where") or "", 100)
    return one_line(answer.get("error", "it sent no answer"), 600) + (f" ({where})" if where else "")


def _end(process: subprocess.Popen, descriptors: Iterable[int], control: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork, which must not end the process of its parent
        return
    end(process)
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    results.delete(control)


def _links(folder: Path) -> list[Path]:
    """The files in a folder that are links, followed; as in the Hub's cache.

    Raises:
        CheckpointError: a link leads out of the folder.
    """
    names = [Path(base, name).relative_to(folder).as_posix() for base, _, files in os.walk(folder) for name in files]
    return [inside(folder, name, folder).resolve() for name in names if (folder / name).is_symlink()]


def _gpus() -> list[Path]:
    found = [path for pattern in _OF_CUDA for path in Path("/dev").glob(pattern)]
    if not found:
        raise ValueError("cuda=True needs a GPU, and /dev has none")
    return found


def _sent(value: Any) -> Any:
    """Arguments with handles instead of objects that stay in the box."""
    if isinstance(value, IsolatedObject):
        return exchange.Handle(value.number)
    if isinstance(value, Mapping):
        return {key: _sent(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(_sent(item) for item in value)
    return value


def _output(name: str, fields: dict[str, Any]) -> Any:
    """An output of transformers' own class if it has these fields, else an `IsolatedOutput`."""
    kind = getattr(transformers.modeling_outputs, name, None)
    known = getattr(kind, "__dataclass_fields__", {})
    if isinstance(kind, type) and known and set(fields) <= set(known):
        return kind(**fields)
    return IsolatedOutput(fields)


def _config(values: Mapping[str, Any], attribute_map: Mapping[str, str]) -> PretrainedConfig:
    """A config with the values of one whose class is unknown here; names that would hide a method are left out."""
    hidden = {name for name in dir(PretrainedConfig) if callable(getattr(PretrainedConfig, name, None))}
    names = {str(old): str(new) for old, new in attribute_map.items() if old not in hidden}
    kind = type(
        "IsolatedConfig", (PretrainedConfig,), {"attribute_map": names, "model_type": str(values["model_type"])}
    )
    fields = {
        str(name): value
        for name, value in values.items()
        if str(name).isidentifier() and not str(name).startswith("_") and name not in hidden and name != "model_type"
    }
    return kind(**fields)


def _batches(sizes: Mapping[str, int]) -> Iterable[list[str]]:
    batch: list[str] = []
    total = 0
    for name, size in sizes.items():
        if batch and total + size > _BATCH:
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size
    if batch:
        yield batch
