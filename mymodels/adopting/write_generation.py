"""The parts of a wrapper that generation needs."""

import textwrap

from .probing import Probe

CAUSAL = """\
@classmethod
def _supports_default_dynamic_cache(cls) -> bool:
    return False  # the module keeps no keys and values

def prepare_inputs_for_generation(
    self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    return {"input_ids": input_ids, "attention_mask": attention_mask}"""

SHIFT = """\
def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
    \"\"\"The start token and the labels up to the last but one.\"\"\"
    start, pad = (getattr(self.config, name, None) for name in ("decoder_start_token_id", "pad_token_id"))
    if start is None:
        raise ValueError("config.decoder_start_token_id is None: set it to the token that a target starts with")
    begun = nn.functional.pad(labels[:, :-1], (1, 0), value=start)
    return begun.masked_fill(begun == -100, start if pad is None else pad)"""

FROM_SOURCE = """\
@classmethod
def _supports_default_dynamic_cache(cls) -> bool:
    return False  # the module keeps no keys and values

def get_encoder(self, *args: Any, **kwargs: Any) -> nn.Module:
    return Encoder(self)

def prepare_inputs_for_generation(
    self,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_outputs: EncoderOutput | None = None,
    **kwargs: Any,
) -> dict[str, Any]:
    return {
        "decoder_input_ids": input_ids,
        "attention_mask": attention_mask,
        "encoder_outputs": encoder_outputs,
    }"""

_OUTPUT = '''\
@dataclass
class EncoderOutput(BaseModelOutput):
    """The encoder's states, and the source, of which forward makes its masks."""

    input_ids: torch.Tensor | None = None


'''
_KEPT = '''\
class Encoder(nn.Module):
    """What generation runs once for each source."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.models = [model]  # in a list, which makes it no part of this module

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> EncoderOutput:
        """Run the whole module on one token of the target, and keep what its encoder returns."""
        model, states = self.models[0], []
        start = torch.full_like(input_ids[:, :1], getattr(model.config, "decoder_start_token_id", None) or 0)
        handle = model.net.ENCODER.register_forward_hook(lambda part, args, output: states.append(output))
        try:
            model(input_ids, attention_mask=attention_mask, decoder_input_ids=start)
        finally:
            handle.remove()
        return EncoderOutput(last_hidden_state=states[0], input_ids=input_ids)


@contextlib.contextmanager
def output_kept(module: nn.Module, output: torch.Tensor | None) -> Iterator[None]:
    """Within it, the module returns `output` and computes nothing; without one, it runs."""
    before = vars(module).get("forward")
    try:
        if output is not None:
            module.forward = lambda *args, **kwargs: output
        yield
    finally:
        if before is not None:
            module.forward = before
        elif "forward" in vars(module):
            del module.forward
'''
_RUN_AGAIN = '''\
class Encoder(nn.Module):
    """Generation asks for an encoder; the module has none apart, and each step runs the source again."""

    def __init__(self, model: nn.Module):
        super().__init__()

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> EncoderOutput:
        return EncoderOutput(input_ids=input_ids)
'''


def encoder_classes(probe: Probe, dotted: str) -> str:
    """The text of the classes before the wrapper; `dotted` is the encoder as an attribute of the module."""
    text = _KEPT.replace("model.net.ENCODER", f"model.net.{dotted}") if probe.encoder else _RUN_AGAIN
    return _OUTPUT + text


def encoder_imports(probe: Probe) -> list[str]:
    kept = ["import contextlib", "from collections.abc import Iterator"] if probe.encoder else []
    return [*kept, "from dataclasses import dataclass"]


def write_generation(probe: Probe) -> str:
    """The methods of the wrapper, not indented."""
    if probe.kind == "causal":
        return CAUSAL
    if probe.kind == "seq2seq":
        return f"{SHIFT}\n\n{FROM_SOURCE}" if probe.generates else SHIFT
    return ""


def within_encoder_kept(lines: list[str], dotted: str) -> list[str]:
    """Lines that call the module, within `output_kept`."""
    kept = "None if encoder_outputs is None else encoder_outputs.last_hidden_state"
    return [
        f"with output_kept(self.net.{dotted}, {kept}):",
        *textwrap.indent("\n".join(lines), "    ").split("\n"),
    ]
