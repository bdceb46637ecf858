"""Faults of ids, labels, processors, Auto classes and devices, each with a twin that differs in that one thing."""

import json
from collections.abc import Callable
from pathlib import Path

from edits import (
    INIT_NORMAL,
    LAYERS,
    MODELING,
    Edit,
    Fault,
    auto_map,
    both,
    config,
    in_forward,
    init_weights,
    module,
    prepend,
    remove,
    replace,
    write,
)
from hub.healthy_folders import LFS_POINTER

LABELS = ["no", "yes", "maybe"]
TURNS = "{% for message in messages %}{{ message.role }}: {{ message.content }}{% endfor %}"
TEMPLATE = TURNS + "{% if add_generation_prompt %}assistant:{% endif %}"
CLASSIFIED = {"id2label": {str(i): name for i, name in enumerate(LABELS)}, "label2id": {"no": 0, "yes": 1, "maybe": 2}}
IMAGES = {"architectures": ["ViTForImageClassification"], "model_type": "vit"}


def tokenizer_json(**vocabulary: int) -> Edit:
    value = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}, "added_tokens": []}
    return both(
        write("tokenizer.json", json.dumps(value)),
        config("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"),
    )


def generation(**values: object) -> Edit:
    return config("generation_config.json", **values)


def tokenizer(**values: object) -> Edit:
    return both(tokenizer_json(a=0, b=1), config("tokenizer_config.json", **values))


def labelled(**changes: object) -> Edit:
    return config(**{**CLASSIFIED, **changes})


def head(kind: str, output: str) -> Edit:
    """A second head of the modeling file."""
    text = f"""

class TinymanyFor{kind}(TinymanyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = TinymanyModel(config)
        self.score = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids=None, **kwargs):
        return {output}(logits=self.score(self.model(input_ids, **kwargs).last_hidden_state))
"""
    return lambda folder: write(MODELING, (folder / MODELING).read_text() + text)(folder)


def auto(name: str) -> str:
    return f"modeling_tinymany.{name}"


HEADS = both(
    head("SequenceClassification", "SequenceClassifierOutput"),
    module("from transformers.modeling_outputs import SequenceClassifierOutput"),
)
SEQUENCE = auto_map(AutoModelForSequenceClassification=auto("TinymanyForSequenceClassification"))
DATA = init_weights("module.weight.data.normal_(std=0.02)")
CAUSAL = "class TinymanyForCausalLM(TinymanyPreTrainedModel"
PREPARES = (
    "    def prepare_inputs_for_generation(self, input_ids, **kwargs):\n        return {'input_ids': input_ids}\n\n"
)
MASK = "create_causal_mask(config=1, inputs_embeds=2, cache_position=3)"


# a fault, and the edit that differs in the one thing and is healthy
PAIRS: list[tuple[Fault, Edit]] = [
    # tokenizer and ids
    (
        Fault("eos outside", config(eos_token_id=97, vocab_size=97), "token ids", "config.json: eos", "outside of the"),
        config(eos_token_id=96, vocab_size=97),
    ),
    (
        Fault("pad outside, default size", config(pad_token_id=200), "token ids", "pad_token_id", "vocabulary of 97"),
        config(pad_token_id=-1),
    ),
    (
        Fault("one of several", generation(eos_token_id=[1, 500]), "token ids", "generation_config", "500"),
        generation(eos_token_id=[1, 50]),
    ),
    (
        Fault("start outside", generation(decoder_start_token_id=97), "token ids", "decoder_start", "97"),
        generation(decoder_start_token_id=0),
    ),
    (
        Fault("id as a text", config(bos_token_id="1"), "token ids", "bos_token_id", "not a token id"),
        config(bos_token_id=1),
    ),
    (
        Fault("more tokens than rows", tokenizer_json(a=0, b=97), "token ids", "tokenizer.json", "vocab_size is 97"),
        tokenizer_json(a=0, b=96),
    ),
    (
        Fault(
            "no vocabulary",
            config("tokenizer_config.json", tokenizer_class="GPT2Tokenizer"),
            "tokenizer",
            "tokenizer_config.json",
            "no vocabulary",
        ),
        tokenizer_json(a=0, b=1),
    ),
    (
        Fault(
            "own vocabulary missing",
            remove("vocab.json"),
            "tokenizer",
            "",
            "reads vocab.json",
            base="with_tokenizer",
            also=("file access",),
        ),
        write("notes.txt", ""),
    ),
    (
        Fault(
            "vocabulary is a pointer",
            both(tokenizer_json(a=0), write("tokenizer.json", LFS_POINTER)),
            "json files",
            "tokenizer.json",
            "Git LFS pointer",
        ),
        tokenizer_json(a=0),
    ),
    (
        Fault(
            "byte order mark",
            write("generation_config.json", b"\xef\xbb\xbf{}"),
            "json files",
            "generation_config.json",
            "byte order mark",
        ),
        write("generation_config.json", "{}"),
    ),
    (
        Fault(
            "tokenizer.json cut off",
            both(tokenizer_json(a=0), write("tokenizer.json", '{"model":')),
            "tokenizer.json",
            "tokenizer.json",
            "not valid JSON",
        ),
        tokenizer_json(a=0),
    ),
    (
        Fault(
            "tokenizer entry is a text",
            config("tokenizer_config.json", auto_map={"AutoTokenizer": "tokenization_tinymany.TinymanyTokenizer"}),
            "auto_map",
            "AutoTokenizer",
            "a pair",
            base="with_tokenizer",
            also=("file access",),
        ),
        config("tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_tinymany.TinymanyTokenizer", None]}),
    ),
    (
        Fault(
            "template does not parse",
            tokenizer(chat_template="{% for m in messages %}{{ m.content }}"),
            "chat template",
            "tokenizer_config.json",
            "does not parse",
        ),
        tokenizer(chat_template=TEMPLATE),
    ),
    (
        Fault("unknown filter", write("chat_template.jinja", "{{ messages | shout }}"), "chat template", "", "shout"),
        write("chat_template.jinja", "{{ messages | tojson }}{{ raise_exception('no') if add_generation_prompt }}"),
    ),
    (
        Fault(
            "template without messages",
            write("chat_template.jinja", "{{ bos_token }}Hello"),
            "chat template",
            "chat_template.jinja",
            "does not read `messages`",
        ),
        write("chat_template.jinja", TEMPLATE),
    ),
    (
        Fault("too long", tokenizer(model_max_length=65), "lengths", "model_max_length", "the model has 64 positions"),
        tokenizer(model_max_length=64),
    ),
    (
        Fault("no length", tokenizer(model_max_length=0), "lengths", "model_max_length", "cut to nothing"),
        tokenizer(model_max_length=int(1e30)),
    ),
    (
        Fault(
            "too long for rotary positions",
            both(tokenizer(model_max_length=4096), config(max_position_embeddings=2048)),
            "lengths",
            "model_max_length",
            "2048 positions",
            "warning",
            base="stock_llama",
        ),
        both(tokenizer(model_max_length=2048), config(max_position_embeddings=2048)),
    ),
    # generation config
    (
        Fault("refused by validate", generation(max_new_tokens=0), "generation config", "max_new_tokens", "1 or more"),
        generation(max_new_tokens=1),
    ),
    (
        Fault(
            "more sequences than beams",
            generation(num_beams=2, num_return_sequences=3),
            "generation config",
            "num_return_sequences",
            "smaller or equal",
        ),
        generation(num_beams=3, num_return_sequences=3),
    ),
    (
        Fault(
            "temperature below 0",
            generation(do_sample=True, temperature=-0.5),
            "generation config",
            "temperature",
            "above 0",
        ),
        generation(do_sample=True, temperature=0.5),
    ),
    (
        Fault(
            "sampling without do_sample",
            generation(temperature=0.5),
            "generation config",
            "temperature",
            "cannot be saved",
            releases=("4.57.6",),
        ),
        generation(do_sample=True, temperature=0.5),
    ),
    # labels
    (
        Fault(
            "labels with a gap",
            labelled(id2label={"0": "no", "1": "yes", "3": "maybe"}, label2id=None),
            "labels",
            "",
            "none for 2",
        ),
        labelled(label2id=None),
    ),
    (
        Fault("label twice", labelled(id2label={"0": "no", "1": "no"}, label2id=None), "labels", "", "both 'no'"),
        labelled(id2label={"0": "no", "1": "yes"}, label2id=None),
    ),
    (
        Fault("label key", labelled(id2label={"no": 0, "yes": 1}, label2id=None), "labels", "", "not a number"),
        labelled(id2label={"0": "no", "1": "yes"}, label2id=None),
    ),
    (
        Fault("num_labels", labelled(num_labels=2), "labels", "num_labels", "id2label has 3"),
        labelled(num_labels=3),
    ),
    (
        Fault(
            "labels exchanged", labelled(label2id={"no": 1, "yes": 0, "maybe": 2}), "labels", "label2id", "gives it 1"
        ),
        labelled(),
    ),
    (
        Fault("id as text", labelled(label2id={"no": "0", "yes": 1, "maybe": 2}), "labels", "", "a text", "warning"),
        labelled(label2id={"no": 0, "yes": 1, "maybe": 2}),
    ),
    (
        Fault(
            "rows of the head",
            labelled(),
            "labels",
            "id2label",
            "classifier.weight has 2 rows",
            base="stock_bert",
            also=("sizes",),
        ),
        labelled(id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}),
    ),
    # processors
    (
        Fault(
            "processor unknown",
            write("preprocessor_config.json", '{"image_processor_type": "MineImageProcessor"}'),
            "processors",
            "image_processor_type",
            "MineImageProcessor",
        ),
        write("preprocessor_config.json", '{"image_processor_type": "ViTImageProcessor"}'),
    ),
    (
        Fault(
            "processor promised",
            both(config(**IMAGES), write("README.md", "AutoImageProcessor.from_pretrained(folder)")),
            "processors",
            "preprocessor_config.json",
            "the README uses AutoImageProcessor",
            base="stock_bert",
        ),
        both(config(**IMAGES), write("preprocessor_config.json", '{"image_processor_type": "ViTImageProcessor"}')),
    ),
    (
        Fault(
            "no processor",
            config(**IMAGES),
            "processors",
            "preprocessor_config.json",
            "takes pixel_values",
            "warning",
            base="stock_bert",
        ),
        both(config(**IMAGES), write("preprocessor_config.json", '{"image_processor_type": "ViTImageProcessor"}')),
    ),
    # auto_map
    (
        Fault(
            "base and head exchanged",
            auto_map(AutoModel=auto("TinymanyForCausalLM"), AutoModelForCausalLM=auto("TinymanyModel")),
            "auto classes",
            "auto_map.AutoModel",
            "names the head TinymanyForCausalLM",
            also=("custom loading",),
        ),
        auto_map(AutoModel=auto("TinymanyModel"), AutoModelForCausalLM=auto("TinymanyForCausalLM")),
    ),
    (
        Fault(
            "heads exchanged",
            both(
                HEADS,
                auto_map(
                    AutoModelForSequenceClassification=auto("TinymanyForCausalLM"),
                    AutoModelForCausalLM=auto("TinymanyForSequenceClassification"),
                ),
            ),
            "auto classes",
            "AutoModelFor",
            "SequenceClassification",
            also=("custom loading",),
        ),
        both(HEADS, SEQUENCE),
    ),
    (
        Fault(
            "config exchanged",
            auto_map(AutoConfig=auto("TinymanyModel"), AutoModel="configuration_tinymany.TinymanyConfig"),
            "auto classes",
            "AutoConfig",
            "which is a model, not a config",
            also=("auto_map",),
        ),
        auto_map(AutoModel=auto("TinymanyModel")),
    ),
    (
        Fault(
            "AutoModel names a head",
            auto_map(AutoModel=auto("TinymanyForCausalLM")),
            "auto classes",
            "auto_map.AutoModel",
            "its base is TinymanyModel",
            "warning",
        ),
        auto_map(AutoModel=auto("TinymanyModel")),
    ),
    (
        Fault(
            "generates without GenerationMixin",
            replace(MODELING, f"{CAUSAL}, GenerationMixin):\n", f"{CAUSAL}):\n{PREPARES}"),
            "custom loading",
            MODELING,
            "cannot be pickled",
            "warning",
        ),
        replace(MODELING, f"{CAUSAL}, GenerationMixin):\n", f"{CAUSAL}, GenerationMixin):\n{PREPARES}"),
    ),
    (
        Fault(
            "blocks of another name",
            replace(MODELING, '["TinymanyBlock"]', '["TinymanyLayer"]'),
            "no split modules",
            MODELING,
            "TinymanyLayer, which is not a class",
        ),
        replace(MODELING, '["TinymanyBlock"]', '["TinymanyBlock", "TinymanyAttention"]'),
    ),
    # devices
    (
        Fault("cuda()", in_forward("input_ids = input_ids.cuda()"), "devices", MODELING, "input_ids.cuda()"),
        in_forward("input_ids = input_ids.to(self.embed_tokens.weight.dtype).long()"),
    ),
    (
        Fault("device by name", in_forward('extra = torch.ones(1, device="cuda:0")'), "devices", MODELING, "cuda:0"),
        in_forward("extra = torch.ones(1, device=input_ids.device)"),
    ),
    (
        Fault("torch.device", in_forward('place = torch.device("cuda")'), "devices", MODELING, "torch.device"),
        in_forward('place = torch.device("cpu")'),
    ),
    (
        Fault("to a name", in_forward('input_ids = input_ids.to("cuda")'), "devices", MODELING, "input_ids.to"),
        in_forward('input_ids = input_ids.to("cpu")'),
    ),
    (
        Fault(
            "device of the parameters",
            in_forward("extra = torch.ones(1, device=next(self.parameters()).device)"),
            "devices",
            MODELING,
            "under a device map",
            "warning",
        ),
        in_forward("extra = torch.ones(1, device=self.device)"),
    ),
    (
        Fault(
            "only with CUDA",
            in_forward("input_ids = input_ids.cuda() if torch.cuda.is_available() else input_ids"),
            "devices",
            MODELING,
            "input_ids.cuda()",
            "warning",
        ),
        in_forward("input_ids = input_ids if torch.cuda.is_available() else input_ids"),
    ),
    # imports behind an `if`: transformers excuses `try` and its own tests only
    (
        Fault(
            "import behind an if",
            module("import os\nif os.environ.get('FAST'):\n    import xformers"),
            "other imports",
            MODELING,
            "even if the import is inside an `if`",
        ),
        module("try:\n    import xformers\nexcept ImportError:\n    xformers = None"),
    ),
    (
        Fault(
            "a test of its own making",
            module("def is_xformers_there():\n    return False\n\n\nif is_xformers_there():\n    import xformers"),
            "other imports",
            MODELING,
            "even if the import is inside an `if`",
        ),
        module("from transformers.utils import is_scipy_available\n\nif is_scipy_available():\n    import xformers"),
    ),
    (
        Fault(
            "import in a function",
            in_forward("if input_ids is None:\n            import xformers"),
            "other imports",
            MODELING,
            "xformers",
        ),
        in_forward("try:\n            import xformers\n        except ImportError:\n            pass"),
    ),
    # code that bridges releases
    (
        Fault("no bridge", in_forward(MASK), "masks and caches", MODELING, "inputs_embeds", releases=("4.57.6",)),
        in_forward(
            f"try:\n            {MASK}\n        except TypeError:\n            {MASK.replace('inputs_embeds', 'input_embeds')}"
        ),
    ),
    (
        Fault(
            "an if about something else",
            in_forward(f"if getattr(self.config, 'use_cache', True):\n            {MASK}"),
            "masks and caches",
            MODELING,
            "inputs_embeds",
            releases=("4.57.6",),
        ),
        in_forward(f'if "inputs_embeds" in inspect.signature(create_causal_mask).parameters:\n            {MASK}'),
    ),
    (
        Fault(
            "try for something else",
            in_forward(f"try:\n            {MASK}\n        finally:\n            pass"),
            "masks and caches",
            MODELING,
            "inputs_embeds",
            releases=("4.57.6",),
        ),
        both(
            module('import transformers\n\nNEW = int(transformers.__version__.split(".")[0]) >= 5'),
            in_forward(f"if NEW:\n            {MASK}"),
        ),
    ),
    (
        Fault(
            "old cache without a bridge",
            in_forward("past = past_key_values.get_usable_length(1)"),
            "transformers names",
            MODELING,
            "get_usable_length",
        ),
        in_forward(
            "try:\n            past = past_key_values.get_usable_length(1)\n        except AttributeError:\n            past = 0"
        ),
    ),
    # `_init_weights`
    (
        Fault(".data where nothing guards it", DATA, "init weights", MODELING, "weights are lost", releases=("5.2.0",)),
        init_weights(INIT_NORMAL),
    ),
    (
        Fault(
            "a parent with a buffer of its own",
            both(
                init_weights(
                    f"{INIT_NORMAL}\n        elif hasattr(module, 'o_proj'):\n            module.scale = torch.ones(1)\n"
                    "            module.o_proj.weight.data.normal_()"
                ),
                replace(
                    LAYERS,
                    "        self.layer_idx = layer_idx\n",
                    '        self.layer_idx = layer_idx\n        self.register_buffer("scale", torch.ones(1), persistent=False)\n',
                ),
            ),
            "init weights",
            MODELING,
            "module.o_proj.weight.data",
        ),
        init_weights(INIT_NORMAL),
    ),
]
QUIET: list[tuple[str, Edit, str, tuple[str, ...] | None]] = [
    # what was an alarm and is none: name, edit, the check, releases
    ("data behind the loader's guard", DATA, "init weights", ("5.3.0",)),
    ("no model_type, found by auto_map", config(model_type=None), "config", None),
    ("trust in the tokenizer's config", tokenizer(trust_remote_code=True), "config keys", None),
    (
        "a family that transformers adopted",
        both(
            prepend("configuration_tinymany.py", ""),
            config(
                model_type="phi3",
                auto_map={"AutoConfig": "configuration_tinymany.Phi3Config", "AutoModel": auto("TinymanyModel")},
            ),
            replace("configuration_tinymany.py", "TinymanyConfig", "Phi3Config"),
            replace(MODELING, "TinymanyConfig", "Phi3Config"),
            replace("configuration_tinymany.py", '"tinymany"', '"phi3"'),
        ),
        "config",
        None,
    ),
]
READING = [fault for fault, _ in PAIRS]
TWINS: list[tuple[Fault, Callable[[Path], None]]] = PAIRS
