"""Faults of ids, lengths, tokenizers, templates, sizes, processors and of names in class attributes, with healthy twins."""

import json

from edits import (
    MODELING,
    Edit,
    Fault,
    append,
    attention_init,
    auto_map,
    both,
    config,
    in_forward,
    module,
    replace,
    unchanged,
    write,
)

TURNS = "{% for m in messages %}{{ m.role }}{{ m['content'] }}{% endfor %}{{ '>' if add_generation_prompt }}"
VOCABULARY = {"<pad>": 0, "</s>": 1, "a": 2, "b": 3}


def generation(**values: object) -> Edit:
    return config("generation_config.json", **values)


def tokens(vocab: dict | None = None, kind: str = "WordLevel", model: dict | None = None, **values: object) -> Edit:
    """A `tokenizer.json` of one kind of model, and a `tokenizer_config.json` with special tokens."""
    described = {"type": kind, "vocab": vocab or VOCABULARY, **({"unk_token": "a"} if model is None else model)}
    return both(
        write("tokenizer.json", json.dumps({"version": "1.0", "model": described, "added_tokens": []})),
        config(
            "tokenizer_config.json",
            **{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>", **values},
        ),
    )


def template(text: str) -> Edit:
    return both(tokens(), write("chat_template.jinja", text))


def image(**values: object) -> Edit:
    """A vision transformer for images of 32 × 32."""
    processor = {"image_processor_type": "ViTImageProcessor", **values}
    return both(
        config(architectures=["ViTForImageClassification"], model_type="vit", image_size=32, patch_size=8),
        write("preprocessor_config.json", json.dumps(processor)),
    )


def processor(auto: str, base: str, body: str = "    pass\n", file: str = "preprocessor_config.json") -> Edit:
    code = f"from transformers import {base}\n\n\nclass Tiny({base}):\n{body}"
    return both(config(file, auto_map={auto: "processing_tiny.Tiny"}), write("processing_tiny.py", code))


def parts(line: str) -> Edit:
    sdpa = "    _supports_sdpa = True\n"
    return replace(MODELING, sdpa, f"{sdpa}    {line}\n")


SIZE = {"size": {"height": 32, "width": 32}}
TIE = '{"lm_head.weight": "model.embed_tokens.weight"}'
PROCESSES = "    attributes = ['tokenizer']\n    tokenizer_class = "

VALUES: list[tuple[Fault, Edit]] = [
    # ids
    (
        Fault("bad word", generation(bad_words_ids=[[3], [5, 200]]), "token ids", "bad_words_ids", "200, outside"),
        generation(bad_words_ids=[[3], [5, 20]]),
    ),
    (
        Fault("forced id", generation(forced_decoder_ids=[[1, 150]]), "token ids", "forced_decoder_ids", "150"),
        generation(forced_decoder_ids=[[200, 15]]),
    ),
    (
        Fault("mask outside", config(mask_token_id=103), "token ids", "mask_token_id", "103", base="stock_bert"),
        config(mask_token_id=3),
    ),
    (
        Fault("image outside", config(image_token_index=320), "token ids", "image_token", "320", base="stock_llama"),
        config(image_token_index=-200),
    ),
    (
        Fault("pad as a list", config(pad_token_id=[0, 1]), "token ids", "pad_token_id", "it must be one id"),
        config(pad_token_id=0),
    ),
    (
        Fault("added token outside", both(tokens(), write("added_tokens.json", '{"<x>": 97}')), "token ids", "", "97"),
        both(tokens(), write("added_tokens.json", '{"<x>": 96}')),
    ),
    (
        Fault("one id twice", tokens({**VOCABULARY, "c": 3}), "token ids", "tokenizer.json", "the same id, 3"),
        tokens({**VOCABULARY, "c": 4}),
    ),
    (
        Fault("end not in the vocabulary", tokens(eos_token="<eos>"), "special tokens", "eos_token", "added as 4"),
        tokens(eos_token="</s>"),
    ),
    (
        Fault(
            "end of another tokenizer", both(tokens(), config(eos_token_id=3)), "special tokens", "eos_token_id", "is 1"
        ),
        both(tokens(), config(eos_token_id=3), generation(eos_token_id=[3, 1])),
    ),
    (
        Fault(
            "two pads",
            both(tokens(), write("special_tokens_map.json", '{"pad_token": "a"}')),
            "special tokens",
            "special_tokens_map.json",
            "says 'a'",
        ),
        both(tokens(), write("special_tokens_map.json", '{"pad_token": {"content": "<pad>"}}')),
    ),
    # generation
    (
        Fault("beyond the positions", generation(max_length=100), "generation config", "max_length", "64 positions"),
        generation(max_length=64),
    ),
    (
        Fault(
            "least above most",
            generation(min_new_tokens=30, max_new_tokens=20),
            "generation config",
            "min_new_tokens",
            "more than max_new_tokens",
        ),
        generation(min_new_tokens=3, max_new_tokens=20),
    ),
    (
        Fault("stop at a number", generation(stop_strings=5), "generation config", "stop_strings", "a list of texts"),
        generation(stop_strings=["\n"]),
    ),
    (
        Fault(
            "decoder without a start",
            both(config(is_encoder_decoder=True), generation(max_length=20)),
            "generation config",
            "decoder_start",
            "which token the decoder begins with",
        ),
        both(config(is_encoder_decoder=True, decoder_start_token_id=0), generation(max_length=20)),
    ),
    # tokenizer
    (
        Fault("class of another kind", tokens(tokenizer_class="BertTokenizerFast"), "tokenizer", "", "for WordPiece"),
        tokens(
            kind="WordPiece",
            model={"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9},
            tokenizer_class="BertTokenizerFast",
        ),
    ),
    (
        Fault("no such side", tokens(padding_side="centre"), "tokenizer", "padding_side", "left or right"),
        tokens(padding_side="left"),
    ),
    (
        Fault("file of the tokenizer", tokens(vocab_file="v.txt"), "tokenizer", "vocab_file", "not in the folder"),
        tokens(vocab_file="tokenizer.json"),
    ),
    (
        Fault("merge of nothing", tokens(kind="BPE", model={"merges": ["a c"]}), "tokenizer.json", "", "out of vocab"),
        tokens({**VOCABULARY, "ab": 4}, kind="BPE", model={"merges": ["a b"]}),
    ),
    (
        Fault("cut to 8", tokens(model_max_length=8), "lengths", "model_max_length", "cut to so few"),
        tokens(model_max_length=64),
    ),
    # templates
    (
        Fault("unknown function", template("{{ shout(1) }}" + TURNS), "chat template", "", "calls shout()"),
        template("{{ strftime_now('%d') }}" + TURNS),
    ),
    (
        Fault("include", template("{% include 'x' %}" + TURNS), "chat template", "", "an include of another file"),
        template("{% macro x() %}{% endmacro %}{{ x() }}" + TURNS),
    ),
    (
        Fault(
            "messages counted",
            template("{{ messages | length }}{{ add_generation_prompt }}"),
            "chat template",
            "",
            "content",
        ),
        template("{{ messages | tojson }}{{ add_generation_prompt }}"),
    ),
    (
        Fault("who spoke", template(TURNS.replace("m.role", "1")), "chat template", "", "who speaks", "warning"),
        template(TURNS),
    ),
    (
        Fault(
            "no prompt", template(TURNS.partition("{{ '>'")[0]), "chat template", "", "not asked to answer", "warning"
        ),
        template(TURNS),
    ),
    # labels and processors
    (
        Fault("no such problem", config(problem_type="classes"), "labels", "problem_type", "does not know"),
        config(problem_type="regression"),
    ),
    (
        Fault(
            "size of images",
            image(size={"height": 224, "width": 224}),
            "processor values",
            "size",
            "224",
            base="stock_bert",
        ),
        image(**SIZE),
    ),
    (
        Fault(
            "pixels to 255", image(**SIZE, image_mean=[123.7] * 3), "processor values", "", "to 255", base="stock_bert"
        ),
        image(**SIZE, image_mean=[123.7] * 3, do_rescale=False),
    ),
    (
        Fault(
            "processor is a model", processor("AutoImageProcessor", "PreTrainedModel"), "auto classes", "", "a model"
        ),
        processor("AutoImageProcessor", "CLIPImageProcessor"),
    ),
    (
        Fault(
            "part of a processor",
            processor("AutoProcessor", "ProcessorMixin", f"{PROCESSES}'MineTokenizer'\n", "processor_config.json"),
            "processor code",
            "processing_tiny.py",
            "MineTokenizer",
        ),
        processor("AutoProcessor", "ProcessorMixin", f"{PROCESSES}'AutoTokenizer'\n", "processor_config.json"),
    ),
    (
        Fault(
            "model is a plain module",
            both(
                append(MODELING, "\n\nclass Plain(nn.Module):\n    pass\n"),
                auto_map(AutoModel="modeling_tinymany.Plain"),
            ),
            "auto classes",
            "AutoModel",
            "not a PreTrainedModel",
        ),
        auto_map(AutoModel="modeling_tinymany.TinymanyModel"),
    ),
    # sizes
    (
        Fault("rows", config(vocab_size=98), "sizes", "vocab_size", "[98, 32]", base="stock_llama"),
        config(vocab_size=97),
    ),
    (
        Fault(
            "layers left over", config(num_hidden_layers=1), "sizes", "num_hidden_layers", "have 2", base="stock_bert"
        ),
        config(num_hidden_layers=2),
    ),
    (
        Fault("layers missing", config(n_layer=3), "sizes", "n_layer", "start at random", base="stock_gpt2"),
        config(n_layer=2),
    ),
    (
        Fault("width", config(num_attention_heads=5), "sizes", "config.json", "cannot build", base="stock_bert"),
        config(num_attention_heads=8),
    ),
    (
        Fault(
            "groups",
            config(num_key_value_heads=3),
            "sizes",
            "num_key_value_heads",
            "cannot share 3",
            base="stock_llama",
        ),
        config(num_key_value_heads=4),
    ),
    (
        Fault("no head", config(tie_word_embeddings=False), "sizes", "tie_word", "starts at random", base="stock_gpt2"),
        config(tie_word_embeddings=True),
    ),
    (Fault("own rows", config(vocab_size=50), "sizes", "vocab_size", "[50, 32]"), config(vocab_size=97)),
    (Fault("own layers", config(num_hidden_layers=3), "sizes", "num_hidden", "have 2"), config(num_hidden_layers=2)),
    (
        Fault("own positions", config(max_position_embeddings=65), "sizes", "max_position", "[65, 32]"),
        config(max_position_embeddings=64),
    ),
    (Fault("own heads", config(num_attention_heads=7), "sizes", "heads", "by 7"), config(num_attention_heads=8)),
    # class attributes
    (
        Fault(
            "text of blocks",
            replace(MODELING, '["TinymanyBlock"]', '"TinymanyBlock"'),
            "no split modules",
            "",
            "each letter",
        ),
        unchanged,
    ),
    (
        Fault("float32 of nothing", parts('_keep_in_fp32_modules = ["wo"]'), "named modules", MODELING, "'wo'"),
        parts('_keep_in_fp32_modules = ["o_proj"]'),
    ),
    (
        Fault(
            "every key left out", parts('_keys_to_ignore_on_load_missing = [".*"]'), "named modules", "", "every name"
        ),
        parts('_keys_to_ignore_on_load_missing = ["rotary"]'),
    ),
    (
        Fault(
            "tie of nothing", replace(MODELING, TIE, TIE.replace("embed_tokens", "wte")), "named modules", "", "'wte'"
        ),
        unchanged,
    ),
    (
        Fault(
            "base under another name",
            replace(MODELING, 'base_model_prefix = "model"', 'base_model_prefix = "transformer"'),
            "named modules",
            MODELING,
            "in self.model",
        ),
        unchanged,
    ),
    # devices
    (
        Fault(
            "type of CUDA", in_forward("x = torch.cuda.FloatTensor(1)"), "devices", MODELING, "torch.cuda.FloatTensor"
        ),
        in_forward("x = torch.FloatTensor(1)"),
    ),
    (
        Fault(
            "device in a name",
            both(module('PLACE = "cuda"'), in_forward("x = input_ids.to(PLACE)")),
            "devices",
            MODELING,
            "PLACE",
        ),
        both(module('PLACE = "cpu"'), in_forward("x = input_ids.to(PLACE)")),
    ),
    (
        Fault(
            "layer on CUDA", attention_init('self.extra = nn.Linear(2, 2, device="cuda")'), "devices", "layers", "cuda"
        ),
        attention_init("self.extra = nn.Linear(2, 2)"),
    ),
    (
        Fault("only CUDA waits", in_forward("torch.cuda.synchronize()"), "devices", MODELING, "synchronize"),
        in_forward("torch.cuda.empty_cache()"),
    ),
    (
        Fault(
            "autocast of CUDA", in_forward('torch.autocast("cuda")'), "devices", MODELING, "other devices", "warning"
        ),
        in_forward("torch.autocast(input_ids.device.type)"),
    ),
]
