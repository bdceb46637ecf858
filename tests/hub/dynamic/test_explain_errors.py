"""Errors as they are really raised, and the sentences that name their cause, with the file."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub.healthy_folders import LFS_POINTER, make_multi_file, make_with_tokenizer

from mymodels.hub.checks import Check
from mymodels.hub.explain_errors import explain, point_to_cause
from mymodels.hub.isolated.stages import sentence
from mymodels.hub.results_to_checks import DYNAMIC

MODELING = "modeling_tinymany.py"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_with_tokenizer(tmp_path_factory.mktemp("made") / "explained")


def edited(file: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        text = (folder / file).read_text()
        assert old in text
        (folder / file).write_text(text.replace(old, new))

    return edit


def without_mixin(folder: Path) -> None:
    head = "class TinymanyForCausalLM(TinymanyPreTrainedModel, GenerationMixin):\n"
    method = "\n    def prepare_inputs_for_generation(self, input_ids, **kwargs):\n        return {'input_ids': input_ids}\n\n"
    edited(MODELING, head, head.replace(", GenerationMixin", "") + method)(folder)


def written(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def configured(file: str, **values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def load_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def load_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def read_attribute(name: str) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        class OwnConfig(transformers.PretrainedConfig):
            model_type = "own"

        return getattr(OwnConfig(), name)

    return read


NOTHING: Callable[[Path], None] = lambda folder: None  # noqa: E731
# what is wrong, what raises it, and the sentence
ERRORS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], str]] = {
    "a field by another name": (NOTHING, read_attribute("num_hidden_layers"), r"OwnConfig has no num_hidden_layers.*attribute_map"),
    "pad_token_id": (NOTHING, read_attribute("pad_token_id"), r"no pad_token_id, which transformers 5\.0 and newer do not set"),
    "forced_bos_token_id": (NOTHING, read_attribute("forced_bos_token_id"), r"no forced_bos_token_id, which transformers 5\.0"),
    "no GenerationMixin": (
        without_mixin,
        lambda folder: pickle.dumps(load_model(folder)),
        r"does not derive from GenerationMixin.*class TinymanyForCausalLM\(TinymanyPreTrainedModel, GenerationMixin\)",
    ),
    "pad beyond the embeddings": (
        configured("config.json", pad_token_id=500, vocab_size=97),
        lambda folder: torch.nn.Embedding(97, 2)(torch.tensor([500])),
        r"pad_token_id in config\.json is 500.*vocab_size is 97",
    ),
    "some other index": (
        configured("config.json", vocab_size=97, max_position_embeddings=64),
        lambda folder: torch.nn.Embedding(64, 2)(torch.tensor([64])),
        r"token id beyond the vocabulary \(97 tokens\), or a position beyond the last \(64 positions\)",
    ),
    "tokenizer entry": (
        configured("tokenizer_config.json", auto_map={"AutoTokenizer": "tokenization_tinymany.TinymanyTokenizer"}),
        load_tokenizer,
        r"auto_map\.AutoTokenizer in tokenizer_config\.json is a string: write a pair",
    ),
    "class without its file": (
        configured("tokenizer_config.json", auto_map={"AutoTokenizer": ["TinymanyTokenizer", None]}),
        load_tokenizer,
        r"auto_map\.AutoTokenizer in tokenizer_config\.json is 'TinymanyTokenizer', which is not file\.Class",
    ),
    "vocabulary missing": (lambda f: (f / "vocab.json").unlink(), load_tokenizer, r"no vocabulary file \(vocab\.json\)"),
    "LFS pointer": (written("vocab.json", LFS_POINTER), load_tokenizer, r"vocab\.json is a Git LFS pointer"),
    "BOM": (written("vocab.json", b"\xef\xbb\xbf{}"), load_tokenizer, r"vocab\.json begins with a byte order mark"),
    "empty": (written("vocab.json", b""), load_tokenizer, r"vocab\.json is empty"),
    "saved without its code": (
        edited("config.json", '"auto_map"', '"former_auto_map"'),
        lambda folder: transformers.AutoModel.from_pretrained(folder, trust_remote_code=True),
        r"in config\.json model_type '\w+' is unknown to this .* no auto_map names the folder's code: save the model",
    ),
    "no logits": (NOTHING, lambda folder: (1,).logits, r"forward returns a plain tuple, without \.logits"),  # type: ignore[attr-defined]
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_named_for_what_it_is(name: str, made: Path, tmp_path: Path) -> None:
    breaks, raises, says = ERRORS[name]
    folder = Path(shutil.copytree(made, tmp_path / f"explained_{re.sub(r'[^a-z]', '_', name.lower())}"))
    breaks(folder)
    with pytest.raises(Exception) as raised:
        raises(folder)
    plain = sentence(raised.value)
    told = explain(plain, folder)
    assert re.search(says, told) and plain[:100] in told and str(tmp_path) not in told, (plain, told)


@pytest.mark.parametrize(
    "plain",
    [
        "AttributeError: 'OwnConfig' object has no attribute 'flavour'",
        "ValueError: not enough values to unpack (expected 2, got 1)",
        "JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
        "PicklingError: Can't pickle <class 'x.TinymanyForCausalLM'>: it's not the same object as x.TinymanyForCausalLM",
        "logits differs by up to 0.1, more than 1e-05",
    ],
)
def test_what_the_folder_does_not_bear_out_is_not_claimed(plain: str, made: Path) -> None:
    assert explain(plain, made) == plain


def test_a_first_line_that_ends_with_a_colon_goes_on() -> None:
    assert (
        sentence(ValueError("Found errors:\n\n  in the file:\n  a.json\n  more"))
        == "ValueError: Found errors: in the file: a.json"
    )
    assert sentence(ValueError("One line.\nCall for help.")) == "ValueError: One line."
    assert sentence(ValueError("Only:")) == "ValueError: Only:"


STATIC = [
    Check(
        "post_init", "failed", "TinyModel.__init__ does not call self.post_init()", "m.py:10", "end __init__ with it"
    ),
    Check(
        "transformers names",
        "failed",
        "is_torch_fx_available of transformers.utils does not exist",
        "m.py:3",
        "define it",
    ),
    Check("paths", "failed", "all_tied_weights_keys", "m.py:10", "no"),
]


@pytest.mark.parametrize(
    ("name", "what", "where", "remedy"),
    [
        ("load", "AttributeError: 'TinyModel' object has no attribute 'all_tied_weights_keys'", "", "see 'post_init' above (m.py:10)"),
        ("load", "ImportError: cannot import name 'is_torch_fx_available' from 'transformers.utils'", "", "(m.py:3): define it"),
        ("load", "RuntimeError: whatever", "m.py:3", "see 'transformers names' above (m.py:3)"),
        ("load", "ImportError: cannot import name 'another' from 'here'", "m.py:4", ""),
        ("load", "RuntimeError: whatever", "m.py:4", ""),
        ("golden", "all_tied_weights_keys", "m.py:3", ""),
    ],
)  # fmt: skip
def test_a_failure_points_to_the_line_that_explains_it(name: str, what: str, where: str, remedy: str) -> None:
    (check,) = point_to_cause([Check(name, "failed", what, where, DYNAMIC[name])], STATIC)
    assert remedy in check.remedy if remedy else check.remedy == DYNAMIC[name]


def test_healthy_code_pickles(tmp_path: Path) -> None:
    """The twin of the model without `GenerationMixin`."""
    folder = make_multi_file(tmp_path / "explained_pickles")
    assert pickle.loads(pickle.dumps(load_model(folder)))
