"""Buffers made persistent by hand, stock config classes, and one id in two files: faults with healthy twins."""

from edits import (
    CONFIGURATION,
    MODELING,
    Edit,
    Fault,
    attention_init,
    auto_map,
    both,
    config,
    remove,
    replace,
    unchanged,
)
from faults_values import generation

NORM = "        self.norm = nn.LayerNorm(config.hidden_size)\n        self.post_init()\n"
CLEAR = "._non_persistent_buffers_set.clear()"
REGISTER = 'self.register_buffer("inv_freq", torch.arange(8), persistent=False)'
BUFFER = attention_init(REGISTER)
TIE_WEIGHTS = "    def tie_weights("
LOOP = f"        for part in self.modules():\n            part{CLEAR}\n"
OWN_INIT = f"    def __init__(self, config):\n        super().__init__(config)\n{LOOP}\n"
OWN_POST_INIT = f"    def post_init(self):\n{LOOP}        super().post_init()\n\n"


def in_model(*lines: str) -> Edit:
    """A buffer of the attention, and lines at the end of the base model's `__init__`."""
    text = "".join(f"        {line}\n" for line in lines)
    return both(
        BUFFER, replace(MODELING, NORM, NORM.replace("        self.post_init()\n", f"{text}        self.post_init()\n"))
    )


def clears(source: str, test: str = "") -> Edit:
    step = f"part{CLEAR}"
    return in_model(f"for part in {source}:", *([f"    if {test}:", f"        {step}"] if test else [f"    {step}"]))


def buffer(name: str, fault: Edit, twin: Edit) -> tuple[Fault, Edit]:
    return Fault(name, fault, "buffers", "layers_tinymany.py", "the buffer inv_freq of TinymanyAttention"), twin


# the config class is transformers' own; the model class is the folder's
STOCK = both(
    config(model_type="bert", architectures=["TinymanyForCausalLM"]),
    auto_map(AutoConfig=None),
    replace(MODELING, "config_class = TinymanyConfig", "config_class = BertConfig"),
    replace(MODELING, "from .configuration_tinymany import TinymanyConfig", "from transformers import BertConfig"),
    remove(CONFIGURATION),
)

PAIRS: list[tuple[Fault, Edit]] = [
    buffer("cleared of the model itself", in_model(f"self{CLEAR}"), clears("self.modules()")),
    buffer("cleared of another part", clears("self.norm.modules()"), clears("self.layers.modules()")),
    buffer(
        "cleared of another class",
        clears("self.modules()", "isinstance(part, nn.LayerNorm)"),
        clears("self.modules()", "isinstance(part, nn.Module)"),
    ),
    buffer("cleared of children only", clears("self.children()"), clears("self.modules()")),
    buffer("cleared of the blocks only", clears("self.layers"), clears("self.layers.modules()")),
    buffer("cleared too early", attention_init(f"self{CLEAR}; {REGISTER}"), attention_init(f"{REGISTER}; self{CLEAR}")),
    buffer(
        "cleared before the parts are there",
        both(BUFFER, replace(MODELING, TIE_WEIGHTS, OWN_INIT + TIE_WEIGHTS)),
        both(BUFFER, replace(MODELING, TIE_WEIGHTS, OWN_POST_INIT + TIE_WEIGHTS)),
    ),
    (
        Fault(
            "start outside, in both files",
            both(config(decoder_start_token_id=500), generation(decoder_start_token_id=500)),
            "token ids",
            "config.json: decoder_start_token_id, generation_config.json: decoder_start_token_id",
            "500, outside",
            base="stock_t5",
        ),
        both(config(decoder_start_token_id=5), generation(decoder_start_token_id=5)),
    ),
    (
        Fault(
            "start outside, where generation alone names it",
            both(config(decoder_start_token_id=None), generation(decoder_start_token_id=500)),
            "token ids",
            "generation_config.json: decoder_start_token_id",
            "500, outside",
            base="stock_t5",
        ),
        unchanged,
    ),
]
