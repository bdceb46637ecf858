"""Faults of encoder-decoders, of models of pictures and sound with their processors, and of one call after another."""

import json
from collections.abc import Callable
from pathlib import Path

from faults import config
from pairs import TRAINING_STAGES, TRAINS, Pair, Step, edit, extra
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIDE_EFFECTS = ["outputs", "side effects"]
IMAGE, SOUND = "image_processing_tiny.py", "feature_extraction_tiny.py"


def edit_in(file: str, old: str, new: str) -> list[Step]:
    def apply(folder: Path) -> None:
        text = (folder / file).read_text()
        assert text.count(old) == 1, (old, text.count(old))
        (folder / file).write_text(text.replace(old, new))

    return [apply]


def processor(**values: object) -> list[Step]:
    def apply(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return [apply]


def golden_without(*starts: str, tokens: bool = True) -> list[Step]:
    """A golden file as an earlier version wrote it: without these tensors, or without the tokenizer's ids."""

    def apply(folder: Path) -> None:
        path = folder / "golden.safetensors"
        with safe_open(path, framework="pt") as file:
            made = json.loads(file.metadata()["golden"])
        if not tokens:
            del made["tokens"]
        held = {name: tensor for name, tensor in load_file(path).items() if not name.startswith(starts or ("\0",))}
        save_file(held, path, metadata={"golden": json.dumps(made)})

    return [apply]


def of(kind: str) -> Callable[..., Pair]:
    def make(fault: list[Step], check: str, says: str, stages: list[str] | None = None, **how: object) -> Pair:
        return Pair([], fault, check, says, stages or ["outputs"], kind=kind, **how)  # type: ignore[arg-type]

    return make


translate, pictures, sound = of("translate"), of("pictures"), of("sound")
LOSS = "nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())"
CLASSES = "nn.functional.cross_entropy(logits, labels)"
EMBED = "            inputs_embeds = self.embed_tokens(input_ids)\n        if use_cache"


def loss(new: str, says: str, **how: object) -> Pair:
    return Pair(TRAINS, edit((LOSS, new)), "training loss", says, TRAINING_STAGES, **how)  # type: ignore[arg-type]


FAMILY_PAIRS: dict[str, Pair] = {
    "translate: padding of the source": translate(
        edit(("source_mask=attention_mask,", "source_mask=None,")), "padding", "padding on the right changes"
    ),
    "translate: positions of the decoder": translate(
        edit(("places = torch.arange(seen, seen + length,", "places = torch.arange(length,")),
        "cached generation",
        "generation with the cache differs from generation without it",
    ),
    "translate: labels copied": translate(
        edit(("torch.cat([start, labels[:, :-1]], 1)", "labels")),
        "training loss",
        "the decoder gets the labels as they are",
        TRAINING_STAGES,
    ),
    "translate: labels without decoder inputs": translate(
        edit(
            ("if labels is not None and decoder_input_ids is None:", "if labels is None and decoder_input_ids is None:")
        ),
        "training loss",
        "labels without decoder_input_ids raise",
        TRAINING_STAGES,
    ),
    "translate: encoder without gradient": translate(
        edit(
            (
                "            encoder_outputs = self.encoder(",
                "            with torch.no_grad():\n                encoder_outputs = self.encoder(",
            )
        ),
        "backward",
        "changes the loss, but gets no gradient",
        TRAINING_STAGES,
    ),
    "translate: sizes": translate(
        [config(vocab_size=120)],
        "load",
        r"sizes in config\.json differ from those of the weights: .* is \(97, 32\) in the files",
    ),
    "translate: beams on a cache that stays": translate(
        edit(
            (
                "    def get_encoder(self, *args, **kwargs):\n        return self.model.encoder",
                "    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *rest, **more):\n"
                "        if generation_config.use_cache:\n"
                "            model_kwargs['past_key_values'] = Stays(DynamicCache(), DynamicCache())\n\n"
                "    def get_encoder(self, *args, **kwargs):\n        return self.model.encoder",
            ),
            after="\n\nclass Stays(EncoderDecoderCache):\n    def reorder_cache(self, beam_idx):\n        return None\n",
        ),
        "beams",
        "the cache is not reordered",
    ),
    "pictures: other size": pictures(processor(size=32), "processor", "on which forward raises"),
    "pictures: other names": pictures(
        edit_in(IMAGE, 'BatchFeature({"pixel_values"', 'BatchFeature({"images"'),
        "processor",
        "none of which forward takes",
    ),
    "pictures: processor that raises": pictures(
        edit_in(IMAGE, "        small = image", "        small = self.lost[image]\n        small = image"),
        "processor",
        "lost",
    ),
    "pictures: red and blue exchanged": pictures(
        edit_in(IMAGE, "[:, columns]", "[:, columns, ::-1]"), "processor", "returns other pixel_values", golden=True
    ),
    "pictures: rows mixed": pictures(
        edit(
            (
                "        return BaseModelOutputWithPooling(",
                "        x = x * x.softmax(0)\n        return BaseModelOutputWithPooling(",
            )
        ),
        "batch",
        "row 0 alone gives other outputs",
    ),
    "pictures: softmax twice": pictures(
        edit((CLASSES, CLASSES.replace("logits,", "logits.softmax(-1),"))),
        "training loss",
        "of the softmax",
        TRAINING_STAGES,
    ),
    "pictures: working directory": pictures(
        edit(("        self.patches =", "        import os; os.chdir('/')\n        self.patches =")),
        "side effects",
        "the working directory",
        SIDE_EFFECTS,
    ),
    "pictures: inputs pile up": pictures(
        edit(("        x = self.patches(", "        SEEN.append(1)\n        x = self.patches("), before="SEEN = []\n"),
        "forward",
        "modeling_tiny.SEEN grows with every call",
    ),
    "sound: other bins": sound(processor(feature_size=12), "processor", "on which forward raises"),
    "sound: extractor that raises": sound(
        edit_in(SOUND, "        width = 2", "        width = self.lost\n        width = 2"), "processor", "lost"
    ),
    "sound: normalised over the batch": sound(
        edit(("        logits = self", "        x = x / x.std()\n        logits = self")),
        "batch",
        "forward mixes the rows",
    ),
    "sound: the call before": sound(
        edit(
            (
                "        x = self.project(input_features)\n",
                "        x = self.project(input_features)\n        old = getattr(self, 'old', x.mean())\n"
                "        self.old, x = x.mean(), x + old\n",
            )
        ),
        "batch",
        "row 1 alone gives other outputs|calls on other inputs",
    ),
    "sound: half the loss": sound(
        edit((CLASSES, CLASSES + " / 2")), "training loss", "the loss is 0.5 times", TRAINING_STAGES
    ),
    "sound: raises whatever it is given": sound(
        edit(("self.project(input_features)", "self.project(input_features * self.lost)")), "forward", "lost"
    ),
    "loss doubled": loss(f"{LOSS} * 2", "the loss is 2 times"),
    "loss summed": loss(LOSS.replace("flatten())", "flatten(), reduction='sum')"), "the sum over the 17 labels"),
    "loss with a term of its own": loss(
        f"{LOSS} + 0.01 * logits.square().mean()", "as a loss of its own it was not checked", status="warning"
    ),
    "loss divided twice": loss(
        f"{LOSS} / kwargs.get('num_items_in_batch', 1)", "with num_items_in_batch=34 the loss is"
    ),
    "golden without tokens": Pair(
        [], golden_without("greedy."), "generation", "has no generated tokens", golden=True, status="skipped"
    ),
    "first token at other positions": Pair(
        [],
        edit(
            (
                "    def get_output_embeddings",
                "    def prepare_inputs_for_generation(self, input_ids, **kwargs):\n"
                "        made = super().prepare_inputs_for_generation(input_ids, **kwargs)\n"
                "        made['position_ids'] = made['position_ids'] + 1\n"
                "        return made\n\n    def get_output_embeddings",
            )
        ),
        "cached generation",
        "generate computes other logits for the first token than forward does",
    ),
    "a number that is not a tensor": Pair(
        extra("score", "pooled.mean().item()"),
        edit(('output["score"] = pooled.mean()', 'output["score"] = pooled.sum()')),
        "golden",
        "score differs",
        golden=True,
    ),
    "one entry less": Pair(
        extra("parts", "[pooled[:, :3], pooled[:, :5]]"),
        edit((", pooled[:, :5]]", "]")),
        "golden",
        r"output 'parts\.1' is missing",
        golden=True,
    ),
}
