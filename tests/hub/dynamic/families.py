"""Small healthy folders with custom code of other kinds: encoder-decoder, pictures, sound; each with what it needs."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

TRANSLATE = """
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput, Seq2SeqModelOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny_translate"

    def __init__(self, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=64, is_encoder_decoder=True, tie_word_embeddings=True, pad_token_id=0,
                 eos_token_id=1, decoder_start_token_id=0, **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        super().__init__(is_encoder_decoder=is_encoder_decoder, tie_word_embeddings=tie_word_embeddings,
                         pad_token_id=pad_token_id, eos_token_id=eos_token_id,
                         decoder_start_token_id=decoder_start_token_id, **kwargs)


class TinyAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.layer_idx, self.heads = layer_idx, config.num_attention_heads
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(config.hidden_size, config.hidden_size))

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, source, mask, cache=None, computed=False):
        query = self.split(self.q_proj(x))
        if computed:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = self.split(self.k_proj(source)), self.split(self.v_proj(source))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.o_proj((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    def __init__(self, config, layer_idx, cross):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.self_attn = TinyAttention(config, layer_idx)
        self.cross_attn = TinyAttention(config, layer_idx) if cross else None
        self.up_proj = nn.Linear(config.hidden_size, 64)
        self.down_proj = nn.Linear(64, config.hidden_size)

    def forward(self, x, mask, source=None, source_mask=None, cache=None, computed=False):
        normed = self.norm(x)
        x = x + self.self_attn(normed, normed, mask, cache.self_attention_cache if cache is not None else None)
        if self.cross_attn is not None:
            own = cache.cross_attention_cache if cache is not None else None
            x = x + self.cross_attn(x, source, source_mask, own, computed)
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    _no_split_modules = ["TinyBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)


class TinyStack(TinyPreTrainedModel):
    def __init__(self, config, decoder):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        layers = [TinyBlock(config, i, decoder) for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.decoder = decoder
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, source=None, source_mask=None,
                past_key_values=None, **kwargs):
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        places = torch.arange(seen, seen + length, device=inputs_embeds.device)
        x = inputs_embeds + self.embed_positions(places)
        mask = None if attention_mask is None else attention_mask[:, None, None].bool()
        if self.decoder:
            causal = (torch.arange(seen + length, device=x.device)[None] <= places[:, None])[None, None]
            mask = causal if mask is None else causal & mask
        computed = past_key_values is not None and seen > 0
        across = None if source_mask is None else source_mask[:, None, None].bool()
        for layer in self.layers:
            x = layer(x, mask, source, across, past_key_values, computed)
        return BaseModelOutput(last_hidden_state=x)


class TinyModel(TinyPreTrainedModel):
    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.encoder = TinyStack(config, False)
        self.decoder = TinyStack(config, True)
        self.post_init()

    def get_encoder(self, *args, **kwargs):
        return self.encoder

    def get_input_embeddings(self):
        return self.encoder.embed_tokens

    def set_input_embeddings(self, new):
        self.encoder.embed_tokens = self.decoder.embed_tokens = new

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, past_key_values=None, inputs_embeds=None, use_cache=None, **kwargs):
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, inputs_embeds)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        source = encoder_outputs[0]
        made = self.decoder(decoder_input_ids, decoder_attention_mask, source=source, source_mask=attention_mask,
                            past_key_values=past_key_values)
        return Seq2SeqModelOutput(last_hidden_state=made.last_hidden_state, past_key_values=past_key_values,
                                  encoder_last_hidden_state=source)


class TinyForConditionalGeneration(TinyPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {
        "lm_head.weight": "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight": "model.encoder.embed_tokens.weight",
    }

    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_encoder(self, *args, **kwargs):
        return self.model.encoder

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(self, input_ids=None, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None,
                encoder_outputs=None, past_key_values=None, inputs_embeds=None, use_cache=None, labels=None,
                return_dict=None):
        if labels is not None and decoder_input_ids is None:
            start = torch.full_like(labels[:, :1], self.config.decoder_start_token_id)
            decoder_input_ids = torch.cat([start, labels[:, :-1]], 1).clamp(min=self.config.pad_token_id)
        outputs = self.model(input_ids, attention_mask, decoder_input_ids, decoder_attention_mask, encoder_outputs,
                             past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return Seq2SeqLMOutput(loss=loss, logits=logits, past_key_values=outputs.past_key_values,
                               encoder_last_hidden_state=outputs.encoder_last_hidden_state)
"""

PICTURES = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny_pictures"

    def __init__(self, hidden_size=32, num_hidden_layers=2, image_size=16, patch_size=4, num_channels=3, **kwargs):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        super().__init__(**kwargs)


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.mix = nn.Linear((config.image_size // config.patch_size) ** 2, (config.image_size // config.patch_size) ** 2)
        self.up_proj = nn.Linear(config.hidden_size, 64)
        self.down_proj = nn.Linear(64, config.hidden_size)

    def forward(self, x):
        x = x + self.mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down_proj(torch.relu(self.up_proj(x)))


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    _no_split_modules = ["TinyBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=0.02)


class TinyModel(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.patches = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        self.layers = nn.ModuleList([TinyBlock(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean(1))


class TinyForImageClassification(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = TinyModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(self.model(pixel_values).pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
"""
IMAGE_PROCESSOR = """
import numpy as np
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class TinyImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]

    def __init__(self, size=16, mean=0.5, std=0.25, **kwargs):
        super().__init__(**kwargs)
        self.size, self.mean, self.std = size, mean, std

    def preprocess(self, images, return_tensors=None, **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        return BatchFeature({"pixel_values": [self.one(np.asarray(image)) for image in images]}, tensor_type=return_tensors)

    def one(self, image):
        rows = np.arange(self.size) * image.shape[0] // self.size
        columns = np.arange(self.size) * image.shape[1] // self.size
        small = image[rows][:, columns].astype(np.float32) / 255
        return ((small - self.mean) / self.std).transpose(2, 0, 1)
"""

SOUND = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class TinyConfig(PretrainedConfig):
    model_type = "tiny_sound"

    def __init__(self, hidden_size=32, num_hidden_layers=2, num_mel_bins=8, **kwargs):
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_mel_bins = num_mel_bins
        super().__init__(**kwargs)


class TinyBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.conv = nn.Conv1d(config.hidden_size, config.hidden_size, 3, padding=1)

    def forward(self, x):
        return x + torch.relu(self.conv(self.norm(x).transpose(1, 2))).transpose(1, 2)


class TinyPreTrainedModel(PreTrainedModel):
    config_class = TinyConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    _no_split_modules = ["TinyBlock"]

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv1d)):
            nn.init.normal_(module.weight, std=0.02)


class TinyForAudioClassification(TinyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.project = nn.Linear(config.num_mel_bins, config.hidden_size)
        self.layers = nn.ModuleList([TinyBlock(config) for _ in range(config.num_hidden_layers)])
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_features, labels=None, **kwargs):
        x = self.project(input_features)
        for layer in self.layers:
            x = layer(x)
        logits = self.classifier(x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
"""
FEATURE_EXTRACTOR = """
import numpy as np
from transformers import BatchFeature
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor


class TinyFeatureExtractor(SequenceFeatureExtractor):
    model_input_names = ["input_features"]

    def __init__(self, feature_size=8, sampling_rate=800, padding_value=0.0, **kwargs):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)

    def __call__(self, raw_speech, sampling_rate=None, return_tensors=None, **kwargs):
        if sampling_rate not in (None, self.sampling_rate):
            raise ValueError(f"this model was trained on {self.sampling_rate} Hz, not on {sampling_rate}")
        sounds = raw_speech if isinstance(raw_speech, list) else [raw_speech]
        width = 2 * self.feature_size
        length = min(len(sound) for sound in sounds) // width * width
        frames = np.stack([np.asarray(sound, np.float32)[:length].reshape(-1, width) for sound in sounds])
        bins = np.log1p(np.abs(np.fft.rfft(frames, axis=-1))[..., 1:])
        return BatchFeature({"input_features": bins}, tensor_type=return_tensors)
"""
TASKS = {
    "translate": {
        "code": {"modeling_tiny.py": TRANSLATE},
        "class": "TinyForConditionalGeneration",
        "auto_map": {"AutoModel": "TinyModel", "AutoModelForSeq2SeqLM": "TinyForConditionalGeneration"},
        "tied": ("lm_head.weight", "model.decoder.embed_tokens.weight"),
    },
    "pictures": {
        "code": {"modeling_tiny.py": PICTURES, "image_processing_tiny.py": IMAGE_PROCESSOR},
        "class": "TinyForImageClassification",
        "auto_map": {"AutoModel": "TinyModel", "AutoModelForImageClassification": "TinyForImageClassification"},
        "config": {"id2label": {"0": "cat", "1": "dog", "2": "fox"}, "label2id": {"cat": 0, "dog": 1, "fox": 2}},
        "processor": {
            "image_processor_type": "TinyImageProcessor",
            "auto_map": {"AutoImageProcessor": "image_processing_tiny.TinyImageProcessor"},
            **{"size": 16, "mean": 0.5, "std": 0.25},
        },
    },
    "sound": {
        "code": {"modeling_tiny.py": SOUND, "feature_extraction_tiny.py": FEATURE_EXTRACTOR},
        "class": "TinyForAudioClassification",
        "auto_map": {"AutoModelForAudioClassification": "TinyForAudioClassification"},
        "config": {"id2label": {"0": "hum", "1": "hiss"}, "label2id": {"hum": 0, "hiss": 1}},
        "processor": {
            "feature_extractor_type": "TinyFeatureExtractor",
            "auto_map": {"AutoFeatureExtractor": "feature_extraction_tiny.TinyFeatureExtractor"},
            **{"feature_size": 8, "sampling_rate": 800, "padding_value": 0.0},
        },
    },
}


def family_repo(folder: Path, kind: str) -> Path:
    """A healthy folder of one of `TASKS`, its weights drawn from a seed."""
    task: dict[str, Any] = TASKS[kind]
    folder.mkdir(parents=True)
    for name, text in task["code"].items():
        (folder / name).write_text(text.lstrip())
    module = _module(folder / "modeling_tiny.py", f"family_{kind}")
    config = module.TinyConfig(**task.get("config", {}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = getattr(module, task["class"])(config).state_dict()
        held = {n: torch.randn(t.shape) * 0.2 for n, t in state.items() if n not in task.get("tied", ())}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    auto_map = {"AutoConfig": "TinyConfig", **task["auto_map"]}
    described = {"model_type": config.model_type, "architectures": [task["class"]], "dtype": "float32"}
    described["auto_map"] = {auto: f"modeling_tiny.{klass}" for auto, klass in auto_map.items()}
    if kind == "translate":
        described |= {"is_encoder_decoder": True, "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(described | task.get("config", {})))
    if "processor" in task:
        (folder / "preprocessor_config.json").write_text(json.dumps(task["processor"]))
    return folder


def _module(path: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
