"""Checks that each entry of `auto_map` names the right kind of class: a config, a base model, or the named head."""

import ast
import re
from collections.abc import Iterator

from .check_config import all_code, target
from .code_tree import Code, Klass, calls, is_self, references
from .repo_snapshot import Finding, Folder
from .walking import walk

# kinds of heads: the end of the Auto class, the end of a class's name, and the output class of forward
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
# heads that are also loaded by another Auto class
_ALIKE = [{"CausalLM", "Seq2SeqLM"}, {"SequenceClassification", "ImageClassification", "AudioClassification"}]
_OUTPUT = re.compile(r"^\w*Output\w*$")


def auto_classes(folder: Folder) -> Iterator[Finding]:
    """No two entries of `auto_map` are swapped."""
    code = all_code(folder)
    found = {str(auto): klass for auto in folder.auto_map if (klass := target(folder, code, str(auto))) is not None}
    for auto, klass in found.items():
        where = f"config.json: auto_map.{auto}"
        kind = _kind(code, klass)
        if auto == "AutoConfig" and kind in ("model", "tokenizer"):
            what = f"AutoConfig names {klass.name}, which is {_a(kind)}, not a config"
            yield Finding("failed", what, where, "name the config class")
        elif auto.startswith("AutoModel") and kind in ("config", "tokenizer"):
            what = f"{auto} names {klass.name}, which is {_a(kind)}, not a model"
            yield Finding("failed", what, where, "name the model class")
        elif auto.startswith("AutoModel") and not kind and _is_complete(code, klass) and not _loads(code, klass):
            what = f"{auto} names {klass.name}, which is not a PreTrainedModel, so it has no from_pretrained"
            yield Finding("failed", what, where, "derive the class from PreTrainedModel")
        elif auto.startswith("AutoModel"):
            yield from _head(code, found, auto, klass, where)
    yield from _others(folder, code)
    yield from _no_classes(folder, code)


_KINDS = {
    "AutoProcessor": "processor",
    "AutoImageProcessor": "image processor",
    "AutoVideoProcessor": "video processor",
    "AutoFeatureExtractor": "feature extractor",
    "AutoTokenizer": "tokenizer",
}


def _others(folder: Folder, code: Code) -> Iterator[Finding]:
    """Entries for tokenizers and processors, in whichever file they are."""
    for name, auto, reference in references(folder):
        klass = _class_of(code, reference) if auto in _KINDS else None
        if klass is None:
            continue
        kind, wanted, where = _kind(code, klass), _KINDS[auto], f"{name}: auto_map.{auto}"
        if not kind and _is_complete(code, klass) and not _loads(code, klass):
            what = f"{auto} names {klass.name}, which is no {wanted}, so it has no from_pretrained"
            yield Finding("failed", what, where, f"derive the class from transformers' base of a {wanted}")
        elif kind and kind != wanted and {kind, wanted} != {"feature extractor", "image processor"}:
            # each of them can be loaded as a processor; other kinds are not interchangeable
            status = "warning" if auto == "AutoProcessor" and kind not in ("model", "config") else "failed"
            what = f"{auto} names {klass.name}, which is {_a(kind)}, not {_a(wanted)}"
            yield Finding(status, what, where, f"name the class of the {wanted}")
    for name, values in folder.values.items():
        table = values.get("auto_map")
        pair = table.get("AutoTokenizer") if isinstance(table, dict) else None
        if isinstance(pair, list) and len(pair) == 2:
            slow, fast = (_class_of(code, one) if isinstance(one, str) else None for one in pair)
            if slow is not None and fast is not None and _is_fast(code, slow) and not _is_fast(code, fast):
                what = f"AutoTokenizer names the fast {slow.name} first and the slow {fast.name} second"
                yield Finding("failed", what, f"{name}: auto_map.AutoTokenizer", "write [slow class, fast class]")


def _a(kind: str) -> str:
    return f"{'an' if kind.startswith('image') else 'a'} {kind}"


def _class_of(code: Code, reference: str) -> Klass | None:
    module, _, name = reference.rpartition(".")
    file = code.files.get(f"{module}.py")
    return code.find(file, name) if file is not None else None


def _is_fast(code: Code, klass: Klass) -> bool:
    return any(root.endswith(("TokenizerFast", "TokenizersBackend")) for root in code.roots(klass))


def _no_classes(folder: Folder, code: Code) -> Iterator[Finding]:
    """Entries that name a function."""
    for name, auto, reference in references(folder):
        module, _, last = reference.rpartition(".")
        file = code.files.get(f"{module}.py")
        body = file.tree.body if file is not None else []
        if any(isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == last for node in body):
            what = f"{auto} names {last}, which is a function, not a class"
            yield Finding("failed", what, f"{name}: auto_map.{auto}", "name the class")


def _is_complete(code: Code, klass: Klass) -> bool:
    """Whether all base classes are known: of the folder, plain Python, torch, or base classes of transformers."""
    return all(
        re.match(r"object$|torch\.nn\.|abc\.ABC$|typing\.Generic$|transformers\.PreTrainedModel$|$", root)
        for root in code.roots(klass)
    )


def _loads(code: Code, klass: Klass) -> bool:
    return code.method(klass, "from_pretrained") is not None


def _kind(code: Code, klass: Klass) -> str:
    """The kind of a class, from its base classes; empty if unknown."""
    roots = code.roots(klass)
    if code.is_model(klass):
        return "model"
    if any(
        re.search(r"(^|\.)(?!\w*Audio)\w*Tokenizer(Fast|Base)?$|TokenizersBackend$", root) for root in roots
    ):  # codecs are models
        return "tokenizer"
    for pattern, kind in (
        (r"(VideoProcessor)\w*$", "video processor"),
        (r"(ImageProcessor|ImageProcessingMixin|ImageProcessorFast)\w*$", "image processor"),
        (r"(FeatureExtractor|FeatureExtractionMixin)$", "feature extractor"),
        (r"(ProcessorMixin|Processor)$", "processor"),
    ):
        if any(root.startswith("transformers.") and re.search(pattern, root) for root in roots):
            return kind
    return "config" if code.is_config(klass) else ""


def _head(code: Code, found: dict[str, Klass], auto: str, klass: Klass, where: str) -> Iterator[Finding]:
    wanted = auto.removeprefix("AutoModel").removeprefix("For")
    named, made = _named_head(klass), _made_heads(code, klass)
    remedy = "swap the entries so that each Auto class names its own head"
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
    """The names of the output classes that `forward` creates."""
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
    """Whether a model has no head, according to its output class."""
    outputs = _outputs(code, klass)
    return bool(outputs) and all(re.match(r"(BaseModel|Seq2SeqModel|\w*BaseModel)\w*Output", o) for o in outputs)


def _inner_base(code: Code, klass: Klass) -> str | None:
    """The class of the folder that a model with a head uses as its base model."""
    found = code.method(klass, "__init__")
    if found is None:
        return None
    for node in walk(found[1]):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and any(map(is_self, node.targets)):
            inner = code.find(found[0].file, found[0].file.dotted(node.value.func))
            if inner is not None and code.is_model(inner) and _is_base(code, inner):
                return inner.name
    return None


def _served_bases(code: Code) -> set[str]:
    return {klass.name for klass in code.classes if code.is_model(klass) and _is_base(code, klass)}


CHECKS = {"auto classes": auto_classes}
