"""Checks that each entry of `auto_map` leads to the class that is meant: a config, a base, or the head of that name."""

import ast
import re
from collections.abc import Iterator

from .check_config import all_code, target
from .check_model import live_code
from .code_tree import Code, Klass, calls, constant, is_self
from .repo_snapshot import Finding, Folder

# what a head makes, by the end of the Auto class, the end of a class's name, and the output that forward returns
_HEADS = {
    "CausalLM": (r"(ForCausalLM|LMHeadModel)$", r"CausalLMOutput"),
    "MaskedLM": (r"ForMaskedLM$", r"MaskedLMOutput"),
    "SequenceClassification": (r"ForSequenceClassification$", r"SequenceClassifierOutput"),
    "TokenClassification": (r"ForTokenClassification$", r"TokenClassifierOutput"),
    "QuestionAnswering": (r"ForQuestionAnswering(Simple)?$", r"QuestionAnswering\w*Output"),
    "MultipleChoice": (r"ForMultipleChoice$", r"MultipleChoiceModelOutput"),
    "NextSentencePrediction": (r"ForNextSentencePrediction$", r"NextSentencePredictorOutput"),
    "Seq2SeqLM": (r"(ForConditionalGeneration|ForSeq2SeqLM)$", r"Seq2SeqLMOutput"),
    "ImageClassification": (r"ForImageClassification$", r"ImageClassifierOutput"),
    "AudioClassification": (r"ForAudioClassification$", r"^$"),
    "CTC": (r"ForCTC$", r"^$"),
    "ObjectDetection": (r"ForObjectDetection$", r"ObjectDetectionOutput"),
    "SemanticSegmentation": (r"ForSemanticSegmentation$", r"SemanticSegmenterOutput"),
    "MaskedImageModeling": (r"ForMaskedImageModeling$", r"MaskedImageModelingOutput"),
}
# generation of one kind is served under the Auto class of the other, and images are classified as sequences are
_ALIKE = [{"CausalLM", "Seq2SeqLM"}, {"SequenceClassification", "ImageClassification", "AudioClassification"}]
_OUTPUT = re.compile(r"^\w*Output\w*$")


def auto_classes(folder: Folder) -> Iterator[Finding]:
    """No two entries of `auto_map` are exchanged."""
    code = all_code(folder)
    found = {str(auto): klass for auto in folder.auto_map if (klass := target(folder, code, str(auto))) is not None}
    for auto, klass in found.items():
        where = f"config.json: auto_map.{auto}"
        kind = _kind(code, klass)
        if auto == "AutoConfig" and kind in ("model", "tokenizer"):
            what = f"AutoConfig names {klass.name}, which is a {kind}, not a config"
            yield Finding("failed", what, where, "name the config class")
        elif auto.startswith("AutoModel") and kind in ("config", "tokenizer"):
            what = f"{auto} names {klass.name}, which is a {kind}, not a model"
            yield Finding("failed", what, where, "name the model class")
        elif auto.startswith("AutoModel"):
            yield from _head(code, found, auto, klass, where)


def _kind(code: Code, klass: Klass) -> str:
    roots = code.roots(klass)
    if code.is_model(klass) or code.is_module(klass):
        return "model"
    if any(re.search(r"(^|\.)(?!\w*Audio)\w*Tokenizer(Fast|Base)?$", root) for root in roots):  # codecs are models
        return "tokenizer"
    return "config" if code.is_config(klass) else ""


def _head(code: Code, found: dict[str, Klass], auto: str, klass: Klass, where: str) -> Iterator[Finding]:
    wanted = auto.removeprefix("AutoModel").removeprefix("For")
    named, made = _named_head(klass), _made_heads(code, klass)
    remedy = "exchange the entries so that each Auto class names its own head"
    if auto == "AutoModel":
        bases = {other for other, base in found.items() if other.startswith("AutoModelFor") and _is_base(code, base)}
        if (named or made) and bases:
            what = f"AutoModel names the head {klass.name}, and {min(bases)} the base {found[min(bases)].name}"
            yield Finding("failed", what, where, remedy)
        elif named and (base := _inner_base(code, klass)) is not None and base in _served_bases(code):
            what = f"AutoModel names {klass.name}, which has a head; its base is {base}"
            yield Finding("warning", what, where, f"name {base}: engines take AutoModel for the model without a head")
        return
    if wanted not in _HEADS:
        return
    if named is None and not made and _is_base(code, klass):
        what = f"{auto} names {klass.name}, whose forward returns hidden states and no {wanted} output"
        yield Finding("failed", what, where, f"name the class that has the head for {wanted}")
        return
    kinds = made or ({named} if named else set())
    agrees = wanted in kinds or any(wanted in group and kinds & group for group in _ALIKE)
    if kinds and not agrees and not (named is not None and _fits(wanted, named)):
        does = f"returns {' or '.join(sorted(kinds))} outputs" if made else f"is for {named}"
        yield Finding("failed", f"{auto} names {klass.name}, which {does}", where, remedy)


def _fits(wanted: str, named: str) -> bool:
    return wanted == named or any({wanted, named} <= group for group in _ALIKE)


def _named_head(klass: Klass) -> str | None:
    return next((head for head, (name, _) in _HEADS.items() if re.search(name, klass.name)), None)


def _outputs(code: Code, klass: Klass) -> set[str]:
    """The names of the output classes that `forward` makes."""
    found = code.method(klass, "forward")
    if found is None:
        return set()
    names = {found[0].file.dotted(call.func).rpartition(".")[2] for call in calls(found[1])}
    return {name for name in names if _OUTPUT.match(name)}


def _made_heads(code: Code, klass: Klass) -> set[str]:
    outputs = _outputs(code, klass)
    return {
        head
        for head, (_, made) in _HEADS.items()
        if any(re.match(rf"\w*?{made}" if made != "^$" else made, o) for o in outputs)
    }


def _is_base(code: Code, klass: Klass) -> bool:
    """Whether a model is one without a head: its outputs say so."""
    outputs = _outputs(code, klass)
    return bool(outputs) and all(re.match(r"(BaseModel|Seq2SeqModel|\w*BaseModel)\w*Output", o) for o in outputs)


def _inner_base(code: Code, klass: Klass) -> str | None:
    """The class of the folder that a model with a head makes its base from."""
    found = code.method(klass, "__init__")
    if found is None:
        return None
    for node in ast.walk(found[1]):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and any(map(is_self, node.targets)):
            inner = code.find(found[0].file, found[0].file.dotted(node.value.func))
            if inner is not None and code.is_model(inner) and _is_base(code, inner):
                return inner.name
    return None


def _served_bases(code: Code) -> set[str]:
    return {klass.name for klass in code.classes if code.is_model(klass) and _is_base(code, klass)}


def no_split_modules(folder: Folder) -> Iterator[Finding]:
    """`_no_split_modules` names classes that the model has: a device map cuts through their middle otherwise."""
    code = live_code(folder)
    defined = {klass.name for klass in code.classes}
    for klass in code.classes:
        value = klass.value("_no_split_modules")
        if not isinstance(value, (ast.List, ast.Tuple, ast.Set)):
            continue
        names = [name for name in map(constant, value.elts) if isinstance(name, str)]
        imported = {meaning.rpartition(".")[2] for file in code.files.values() for meaning in file.names.values()}
        strange = [name for name in names if name not in defined | imported]
        if not strange or _holds_another(code):
            continue
        left = [name for name in names if name not in strange]
        what = f"{klass.name}._no_split_modules names {', '.join(strange)}, which is no class of this code"
        remedy = "name the class of the blocks, which a device map must keep on one device"
        yield Finding("warning" if left else "failed", what, klass.file.at(value), remedy)


def _holds_another(code: Code) -> bool:
    """Whether the code builds on a model of transformers, whose blocks may be meant."""
    return any(
        "AutoModel" in file.text
        or any(
            meaning.startswith("transformers") and re.search(r"(?<!PreTrained)(Model|For[A-Z]\w+)$", meaning)
            for meaning in file.names.values()
        )
        for file in code.files.values()
    )


CHECKS = {"auto classes": auto_classes, "no split modules": no_split_modules}
