"""`ModelBattery`: pytest tests for your own model, with the checks of `mymodels verify`."""

import contextlib
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ..forward_calls import takes
from ..hub.isolated import calls, comparing, generating, inputs, outputs, training
from ..hub.isolated.load_repo import accepts, tie
from ..hub.isolated.placement import half_on_disk
from ..hub.isolated.stages import Outcome


class _Events:
    """Replaces the event file of a clean process: a failed check fails the test at once."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.held = 0

    @contextlib.contextmanager
    def check(self, name: str, where: str = "") -> Iterator[Outcome]:
        outcome = Outcome()
        yield outcome
        if outcome.status == "failed":
            pytest.fail(f"{name}: {outcome.what}", pytrace=False)
        if outcome.status in ("skipped", "n/a"):
            self.skipped.append(f"{name}: {outcome.what}")
        else:
            self.held += 1

    def skip_if_none_held(self) -> None:
        if not self.held and self.skipped:
            pytest.skip("; ".join(self.skipped))


class ModelBattery:
    """The tests of a model: subclass it, define how to make the model, and run pytest.

    Tests that do not apply are skipped with a reason, such as generation for an encoder.

    Attributes:
        model_class: the class to test.
        packs: whether rows may hold several sequences, with `position_ids` that start again at 0.
        tolerance: maximum difference between two ways to compute a result, relative to its largest value or 1.

    Example:
        >>> class TestMyNet(ModelBattery):
        ...     model_class = MyNetForCausalLM
        ...
        ...     def make_config(self):
        ...         return MyNetConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2)
    """

    model_class: type[PreTrainedModel]
    packs = False
    tolerance = comparing.EQUAL

    def make_config(self) -> Any:
        """The config of a small model; override it."""
        raise NotImplementedError("override make_config: return the config of a small model")

    def make_model(self) -> PreTrainedModel:
        """A new model in eval mode, on the CPU in float32, the same each time."""
        torch.manual_seed(0)
        return self.model_class(self.make_config()).eval()

    def make_inputs(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        """The arguments of `forward` for two rows; override it if they cannot be generated from the config."""
        try:
            return inputs.make_inputs(model)
        except inputs.NoSuitableInputs as error:
            pytest.skip(f"{error}: override make_inputs")

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return self.make_model()

    @pytest.fixture
    def given(self, model: PreTrainedModel) -> dict[str, torch.Tensor]:
        return self.make_inputs(model)

    def difference(self, seen: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
        return comparing.difference(comparing.floating(seen), comparing.floating(expected), self.tolerance)

    # ---- the model itself

    def test_forward(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """Outputs are finite and the same in two runs; weights and inputs are not changed."""
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kept = {name: tensor.clone() for name, tensor in given.items()}
        first, second = (comparing.unpadded_outputs(model, given) for _ in range(2))
        assert not comparing.not_finite(first)
        assert not comparing.difference(second, first), "two runs on the same inputs differ in eval mode"
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), f"forward changes {name}"
        for name, tensor in given.items():
            assert torch.equal(tensor, kept[name]), f"forward writes into {name}"

    def test_return_dict(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """`return_dict=False` gives the same tensors as a tuple."""
        if not takes(model, "return_dict"):
            pytest.skip("forward takes no return_dict")
        with torch.no_grad():
            named, plain = model(**given), model(**given, return_dict=False)
        assert isinstance(plain, tuple)
        wanted = [tensor for _, tensor in comparing.flatten(tuple(named.values()))]
        for got, want in zip([tensor for _, tensor in comparing.flatten(plain)], wanted, strict=True):
            assert torch.equal(got, want)

    def test_ties(self, model: PreTrainedModel) -> None:
        """Head and embeddings are one tensor if, and only if, the config says so."""
        found = tie(model)
        if found is None:
            pytest.skip("the model has no head over its input embeddings")
        assert found["tied"] == found["wanted"], (
            f"tie_word_embeddings is {found['wanted']}, but tied is {found['tied']}"
        )

    # ---- save and load

    def test_save_and_load(self, model: PreTrainedModel, given: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """Every saved tensor is loaded, with the same outputs and ties."""
        model.save_pretrained(tmp_path)
        made: Any = self.model_class.from_pretrained(tmp_path, output_loading_info=True)
        loaded, account = made
        wrong = {kind: keys for kind, keys in account.items() if keys}
        assert not wrong, wrong
        after = loaded.state_dict()
        for name, tensor in model.state_dict().items():
            assert torch.equal(after[name], tensor), name
        for (name, want), (_, got) in zip(model.named_buffers(), loaded.named_buffers(), strict=True):
            assert torch.equal(got, want), f"the buffer {name} changes in saving and loading"
        assert tie(loaded) == tie(model)
        assert not comparing.difference(
            comparing.unpadded_outputs(loaded.eval(), given), comparing.unpadded_outputs(model, given)
        )

    def test_clean_process(self, tmp_path: Path) -> None:
        """Its Hub repo folder passes `mymodels verify --quick`, including golden outputs, in processes without your code."""
        from ..hub import build_repo
        from ..hub.testing import check_repo

        model = self.make_model()
        folder = tmp_path / f"{type(model).__name__.lower()}-battery"
        build_repo(model, None, folder, card=f"# {type(model).__name__}\n", golden=True)
        check_repo(folder, quick=True, allow_skipped=True)

    def test_golden(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """A second model of the same seed has the same weights and outputs: the result does not depend on earlier code."""
        torch.rand(7)
        second = self.make_model()
        for (name, want), (_, got) in zip(model.state_dict().items(), second.state_dict().items(), strict=True):
            assert torch.equal(got, want), f"{name} starts differently each time"
        assert not comparing.difference(
            comparing.unpadded_outputs(second, given), comparing.unpadded_outputs(model, given)
        )

    # ---- text

    def test_resize(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """Adding tokens does not change the outputs for old ones; head and tie are resized too."""
        events = _Events()
        with events.check("resize") as check:
            training.check_resize(check, model, given, self._labels(model, given))
        events.skip_if_none_held()

    def test_generation(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """Generation with a dynamic cache, a static cache and beams gives the same tokens as without a cache."""
        events = _Events()
        generating.check_generation(events, type(model).__name__, model, given)
        if not inputs.generates(model):
            pytest.skip("this model does not generate")

    def test_padding(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """A row gives the same outputs and tokens alone and padded in a batch with a longer one."""
        events = _Events()
        with events.check("padding") as check:
            outputs.check_padding(check, model, given, with_generation=inputs.generates(model))
        events.skip_if_none_held()

    def test_inputs_embeds(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """Embeddings passed as inputs_embeds give the same outputs as their ids."""
        events = _Events()
        with events.check("inputs_embeds") as check:
            calls.check_inputs_embeds(check, model, given)
        events.skip_if_none_held()

    def test_packing(self, model: PreTrainedModel) -> None:
        """Sequences packed into one row give the same outputs as alone."""
        if not self.packs:
            pytest.skip("the class does not set packs = True")
        if not accepts(model, "position_ids"):
            pytest.fail("packs is True, but forward takes no position_ids", pytrace=False)
        pieces = [inputs.make_token_ids(model, 1, length, seed=length) for length in (5, 3, 6)]
        positions = torch.cat([torch.arange(piece.shape[1]) for piece in pieces])[None]
        packed = comparing.run_model(model, {"input_ids": torch.cat(pieces, 1), "position_ids": positions})
        alone = [comparing.run_model(model, {"input_ids": piece}) for piece in pieces]
        compared = 0
        for name, tensor in packed.items():
            if tensor.shape[:2] == positions.shape:
                wanted = {name: torch.cat([one[name] for one in alone], 1)}
                wrong = self.difference({name: tensor}, wanted)
                assert not wrong, wrong
                compared += 1
        if not compared:
            pytest.skip("no output has a value for each token")

    def test_attention_implementations(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """eager and sdpa attention give the same outputs."""
        if not getattr(model, "_supports_sdpa", False):
            pytest.skip("the class does not set _supports_sdpa")
        seen = []
        for name in ("eager", "sdpa"):
            config = copy.deepcopy(model.config)
            other = type(model)._from_config(config, attn_implementation=name).eval()
            assert other.config._attn_implementation == name
            other.load_state_dict(model.state_dict())
            seen.append({n: t for n, t in comparing.unpadded_outputs(other, given).items() if "attentions" not in n})
        wrong = self.difference(*seen)
        assert not wrong, wrong

    # ---- training

    def _labels(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return training.make_labels(type(model).__name__, model, given)

    def test_training(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """The loss depends on the labels, all parameters it depends on get gradients, and a step of AdamW lowers it."""
        labels, events = self._labels(model, given), _Events()
        with events.check("training loss") as check:
            training.check_loss(check, model, given, labels)
        with events.check("backward") as check:
            training.check_backward(check, model, {**given, **labels})
        with events.check("optimizer step") as check:
            training.check_step(check, model, {**given, **labels})

    def test_gradient_checkpointing(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """Gradient checkpointing gives the same loss and gradients."""
        events = _Events()
        with events.check("gradient checkpointing") as check:
            training.check_checkpointing(check, model, {**given, **self._labels(model, given)})
        events.skip_if_none_held()

    # ---- placement and export

    def test_device_map(self, model: PreTrainedModel, given: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """With half of its blocks offloaded to disk, it gives the same outputs."""
        device_map = half_on_disk(model)
        if "disk" not in device_map.values():
            pytest.skip("the model has no list of blocks to split")
        if any(isinstance(part, torch.nn.MultiheadAttention) for part in model.modules()):
            pytest.skip("nn.MultiheadAttention reads weights of its submodules without accelerate's hooks")
        model.save_pretrained(tmp_path / "saved")
        split = self.model_class.from_pretrained(
            tmp_path / "saved", device_map=device_map, offload_folder=str(tmp_path / "offload")
        )
        wrong = self.difference(
            comparing.unpadded_outputs(split.eval(), given), comparing.unpadded_outputs(model, given)
        )
        assert not wrong, wrong

    def test_dtype(self, model: PreTrainedModel, given: dict[str, torch.Tensor], tmp_path: Path) -> None:
        """Saved and loaded in bfloat16, it runs with outputs close to those in float32."""
        want = comparing.floating(comparing.unpadded_outputs(model, given))
        model.save_pretrained(tmp_path)
        half = self.model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
        assert half.dtype == torch.bfloat16
        cast = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in given.items()}
        seen = {
            name: tensor.float() for name, tensor in comparing.floating(comparing.unpadded_outputs(half, cast)).items()
        }
        wrong = comparing.difference(seen, want, 0.1)
        assert not wrong, wrong

    def test_export(self, model: PreTrainedModel, given: dict[str, torch.Tensor]) -> None:
        """The program from `torch.export` gives the same outputs."""
        how = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        program = torch.export.export(_Exported(model, how), (), kwargs=given, strict=False)
        want = comparing.unpadded_outputs(_Exported(model, how), given)
        wrong = self.difference(comparing.unpadded_outputs(program.module(), given), want)
        assert not wrong, wrong


class _Exported(torch.nn.Module):
    """The model with a dictionary of tensors as its output, which `torch.export` takes."""

    def __init__(self, model: PreTrainedModel, how: dict[str, Any]):
        super().__init__()
        self.model, self.how = model, how

    def forward(self, **given: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(comparing.flatten(self.model(**given, **self.how)))
