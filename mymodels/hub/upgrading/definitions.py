"""What transformers no longer has: where it is now, or a definition that takes its place and does not depend on it."""

import re

from .mask_definitions import MASKS

# (module, name) → the module and the name that every supported release has
MOVED: dict[tuple[str, str], tuple[str, str]] = {
    **{
        ("transformers.modeling_utils", name): ("transformers.pytorch_utils", name)
        for name in ("prune_linear_layer", "apply_chunking_to_forward", "Conv1D")
    },
    ("transformers.modeling_utils", "GenerationMixin"): ("transformers.generation", "GenerationMixin"),
    ("transformers.modeling_utils", "PretrainedConfig"): ("transformers.configuration_utils", "PretrainedConfig"),
    ("transformers.utils", "cached_property"): ("functools", "cached_property"),
    ("transformers.utils", "LossKwargs"): ("transformers.utils", "TransformersKwargs"),
    ("transformers.utils", "deprecate_kwarg"): ("transformers.utils.deprecation", "deprecate_kwarg"),
    ("transformers.tokenization_utils", "BatchEncoding"): ("transformers.tokenization_utils_base", "BatchEncoding"),
    ("transformers.image_utils", "make_batched_videos"): ("transformers.video_utils", "make_batched_videos"),
    ("transformers.image_utils", "VideoInput"): ("transformers.video_utils", "VideoInput"),
    **{
        (module, "LogitsWarper"): ("transformers.generation.logits_process", "LogitsProcessor")
        for module in ("transformers", "transformers.generation", "transformers.generation.logits_process")
    },
    ("transformers", "AutoModelForVision2Seq"): ("transformers", "AutoModelForImageTextToText"),
    ("transformers", "CLIPFeatureExtractor"): ("transformers", "CLIPImageProcessor"),
    ("transformers", "ViTFeatureExtractor"): ("transformers", "ViTImageProcessor"),
    **{
        ("transformers.generation.utils", old): ("transformers.generation.utils", new)
        for new, olds in {
            "GenerateOutput": "GreedySearchOutput SampleOutput ContrastiveSearchOutput",
            "GenerateBeamOutput": "BeamSearchOutput BeamSampleOutput",
            "GenerateDecoderOnlyOutput": "GreedySearchDecoderOnlyOutput SampleDecoderOnlyOutput "
            "ContrastiveSearchDecoderOnlyOutput",
            "GenerateEncoderDecoderOutput": "GreedySearchEncoderDecoderOutput SampleEncoderDecoderOutput "
            "ContrastiveSearchEncoderDecoderOutput",
            "GenerateBeamDecoderOnlyOutput": "BeamSearchDecoderOnlyOutput BeamSampleDecoderOnlyOutput",
            "GenerateBeamEncoderDecoderOutput": "BeamSearchEncoderDecoderOutput BeamSampleEncoderDecoderOutput",
        }.items()
        for old in olds.split()
    },
}

# names that modules of models once passed on → where they are defined in every supported release
PASSED_ON: dict[str, str] = {
    **dict.fromkeys(
        [
            "AttentionMaskConverter",
            "_prepare_4d_attention_mask",
            "_prepare_4d_attention_mask_for_sdpa",
            "_prepare_4d_causal_attention_mask",
            "_prepare_4d_causal_attention_mask_for_sdpa",
        ],
        "transformers.modeling_attn_mask_utils",
    ),
    **dict.fromkeys(["Cache", "DynamicCache", "StaticCache", "EncoderDecoderCache"], "transformers.cache_utils"),
    **dict.fromkeys(
        ["ALL_LAYERNORM_LAYERS", "apply_chunking_to_forward", "prune_linear_layer"], "transformers.pytorch_utils"
    ),
    **dict.fromkeys(
        [
            "BaseModelOutput",
            "BaseModelOutputWithPast",
            "BaseModelOutputWithPooling",
            "BaseModelOutputWithPoolingAndCrossAttentions",
            "BaseModelOutputWithPastAndCrossAttentions",
            "CausalLMOutputWithPast",
            "CausalLMOutputWithCrossAttentions",
            "SequenceClassifierOutput",
            "SequenceClassifierOutputWithPast",
            "TokenClassifierOutput",
            "MaskedLMOutput",
        ],
        "transformers.modeling_outputs",
    ),
    "ACT2FN": "transformers.activations",
    "PreTrainedModel": "transformers.modeling_utils",
    "logging": "transformers.utils",
}

# a module that is gone → where all of it is now
MODULES: dict[str, str] = {
    "transformers.deepspeed": "transformers.integrations.deepspeed",
    "transformers.generation_utils": "transformers.generation.utils",
    "transformers.generation_logits_process": "transformers.generation.logits_process",
    "transformers.generation_stopping_criteria": "transformers.generation.stopping_criteria",
    "transformers.modeling_bert": "transformers.models.bert.modeling_bert",
    "transformers.configuration_bert": "transformers.models.bert.configuration_bert",
    "transformers.tokenization_bert": "transformers.models.bert.tokenization_bert",
}

# gone from one release in the middle only
MISSING_BETWEEN = {
    ("transformers.utils", "is_flash_attn_greater_or_equal_2_10"),
    ("transformers.activations", "PytorchGELUTanh"),
}

_YES = """
def {name}(*arguments):
    return True  # every torch that the supported releases of transformers run on
"""
_NO = """
def {name}(*arguments):
    return False  # transformers 5 runs on torch alone
"""
_GONE_WITH = '''
class {name}:
    """transformers 5 has no ONNX export of its own: optimum has one, by its own configs."""

    def __init__(self, *args, **kwargs):
        raise ImportError("transformers.onnx is gone: export with optimum")
'''

# name → source of a definition that is complete by itself
_SOURCES: dict[str, str] = {
    **{
        name: _YES.format(name=name)
        for name in ("is_torch_fx_available", "is_torch_bf16_available", "is_safetensors_available")
    },
    **{
        name: _NO.format(name=name)
        for name in ("is_tf_available", "is_flax_available", "is_tf_tensor", "is_jax_tensor")
    },
    **{
        name: _GONE_WITH.format(name=name) for name in ("OnnxConfig", "OnnxConfigWithPast", "OnnxSeq2SeqConfigWithPast")
    },
    "PatchingSpec": _GONE_WITH.format(name="PatchingSpec"),
    "DUMMY_INPUTS": "DUMMY_INPUTS = [[7, 6, 0, 0, 1], [1, 2, 3, 0, 0], [0, 0, 0, 4, 5]]",
    "DUMMY_MASK": "DUMMY_MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]",
    "TRANSFORMERS_CACHE": "from huggingface_hub.constants import HF_HUB_CACHE as TRANSFORMERS_CACHE",
    "TF_WEIGHTS_NAME": 'TF_WEIGHTS_NAME = "model.ckpt"',
    "TF2_WEIGHTS_NAME": 'TF2_WEIGHTS_NAME = "tf_model.h5"',
    "FLAX_WEIGHTS_NAME": 'FLAX_WEIGHTS_NAME = "flax_model.msgpack"',
    "is_torch_tpu_available": """
def is_torch_tpu_available(*arguments):
    from importlib.util import find_spec

    return find_spec("torch_xla") is not None
""",
    "is_flash_attn_greater_or_equal_2_10": """
def is_flash_attn_greater_or_equal_2_10():
    from transformers.utils import is_flash_attn_greater_or_equal

    return is_flash_attn_greater_or_equal("2.1.0")
""",
    "is_remote_url": """
def is_remote_url(url_or_filename):
    from urllib.parse import urlparse

    return urlparse(url_or_filename).scheme in ("http", "https")
""",
    "torch_int_div": """
def torch_int_div(tensor1, tensor2):
    import torch

    return torch.div(tensor1, tensor2, rounding_mode="floor")
""",
    "isin_mps_friendly": """
def isin_mps_friendly(elements, test_elements):
    import torch

    return torch.isin(elements, test_elements)
""",
    "get_parameter_device": """
def get_parameter_device(parameter):
    return next(parameter.parameters()).device
""",
    "get_parameter_dtype": """
def get_parameter_dtype(parameter):
    return next(parameter.parameters()).dtype
""",
    "no_init_weights": """
try:
    from transformers.modeling_utils import no_init_weights
except ImportError:  # 5.0 and newer
    from transformers.initialization import no_init_weights
""",
    "load_sharded_checkpoint": """
try:
    from transformers.modeling_utils import load_sharded_checkpoint
except ImportError:  # 5.0 and newer
    from transformers.trainer_utils import load_sharded_checkpoint
""",
    "PytorchGELUTanh": """
def PytorchGELUTanh():
    import torch

    return torch.nn.GELU(approximate="tanh")
""",
    "find_pruneable_heads_and_indices": '''
def find_pruneable_heads_and_indices(heads, n_heads, head_size, already_pruned_heads):
    """The heads that are still there, and the positions of the features of all heads but these."""
    import torch

    heads = set(heads) - already_pruned_heads
    keep = torch.ones(n_heads, head_size, dtype=torch.bool)
    for head in heads:
        keep[head - sum(pruned < head for pruned in already_pruned_heads)] = False
    return heads, keep.flatten().nonzero().flatten()
''',
    "get_device_map": '''
def get_device_map(n_layers, devices):
    """Layers for each device, in order and of equal number."""
    devices = list(devices)
    count = -(-n_layers // len(devices))
    return {device: list(range(n_layers))[i * count : (i + 1) * count] for i, device in enumerate(devices)}
''',
    "assert_device_map": '''
def assert_device_map(device_map, num_blocks):
    """Raises unless every block is on one device."""
    blocks = sorted(block for part in device_map.values() for block in part)
    if blocks != list(range(num_blocks)):
        raise ValueError(f"the device map has the blocks {blocks}, not each of {num_blocks} once")
''',
    "_compute_default_rope_parameters": '''
def _compute_default_rope_parameters(config=None, device=None, seq_len=None, **rope_kwargs):
    """Inverse frequencies of plain rotary positions, and the factor of attention, which is 1."""
    import torch

    if config is None:
        base, dim = rope_kwargs["base"], rope_kwargs["dim"]
    else:
        parameters = getattr(config, "rope_parameters", None) or {}
        base = parameters.get("rope_theta") or config.rope_theta
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dim = int(head * getattr(config, "partial_rotary_factor", 1.0))
    powers = torch.arange(0, dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / dim
    return 1.0 / (base**powers), 1.0
''',
    "_is_whitespace": """
def _is_whitespace(char):
    import unicodedata

    return char in " \\t\\n\\r" or unicodedata.category(char) == "Zs"
""",
    "_is_control": """
def _is_control(char):
    import unicodedata

    return char not in "\\t\\n\\r" and unicodedata.category(char).startswith("C")
""",
    "_is_punctuation": """
def _is_punctuation(char):
    import unicodedata

    symbol = 33 <= ord(char) <= 47 or 58 <= ord(char) <= 64 or 91 <= ord(char) <= 96 or 123 <= ord(char) <= 126
    return symbol or unicodedata.category(char).startswith("P")
""",
    **MASKS,
}

_PATTERNS: list[tuple[str, str]] = [
    (r"is_torch_greater_or_equal_than_\d+_\d+", "{name} = True"),
    (r"is_torch_less_than_\d+_\d+", "{name} = False"),
    (r"[A-Z0-9_]+_(INPUTS|START)_DOCSTRING|(DE)?PARALLELIZE_DOCSTRING", '{name} = ""'),
    (r"__HEAD_MASK_WARNING_MSG", '{name} = "head_mask has been split into head_mask and decoder_head_mask."'),
    (
        r"load_tf_weights_in_\w+",
        'def {name}(*arguments):\n    raise ImportError("transformers 5 reads no TensorFlow weights")',
    ),
]


def is_documentation(name: str) -> bool:
    """Whether a name stands for text of transformers' own documentation, which only doctests read."""
    return re.fullmatch(_PATTERNS[2][0], name) is not None


def definition(name: str) -> str | None:
    """Source that defines what transformers no longer has, or None."""
    if name in _SOURCES:
        return _SOURCES[name]
    found = (source for pattern, source in _PATTERNS if re.fullmatch(pattern, name))
    return next((source.format(name=name) for source in found), None)
