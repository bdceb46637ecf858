import json
import os
from typing import Dict, List, Optional, Union

from transformers import PreTrainedTokenizer
from transformers.tokenization_utils_base import BatchEncoding, EncodedInput
from transformers.utils import PaddingStrategy


class CharPieces:
    """Reads one symbol per JSON entry; the special commands follow the symbols."""

    def __init__(self, path):
        with open(path, encoding="utf-8") as file:
            self.symbols = json.load(file)
        self.index = {symbol: i for i, symbol in enumerate(self.symbols)}
        self.n_words = len(self.symbols)
        self.special_tokens = {}
        for token in ["[gMASK]", "sop"]:
            self.special_tokens[token] = self.n_words
            self.n_words += 1

    def encode(self, text):
        return [c if c in self.index else "<unk>" for c in text]


class MiniGLMTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "symbols.json"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]

    def __init__(self, vocab_file, padding_side="left", clean_up_tokenization_spaces=False, **kwargs):
        self.name = "MiniGLMTokenizer"
        self.vocab_file = vocab_file
        self.tokenizer = CharPieces(vocab_file)
        self._pad_token = "<pad>"
        self._unk_token = "<unk>"
        self._eos_token = "</s>"
        self.special_ids = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
        super().__init__(padding_side=padding_side, clean_up_tokenization_spaces=clean_up_tokenization_spaces, **kwargs)

    def get_command(self, token):
        return self.tokenizer.special_tokens[token]

    @property
    def unk_token(self) -> str:
        return "<unk>"

    @property
    def pad_token(self) -> str:
        return "<pad>"

    @property
    def eos_token(self) -> str:
        return "</s>"

    @property
    def pad_token_id(self):
        return self.special_ids["<pad>"]

    @property
    def eos_token_id(self):
        return self.special_ids["<eos>"]

    @property
    def vocab_size(self):
        return self.tokenizer.n_words

    def get_vocab(self):
        vocab = {self._convert_id_to_token(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def _tokenize(self, text, **kwargs):
        return self.tokenizer.encode(text)

    def _convert_token_to_id(self, token):
        if token in self.tokenizer.special_tokens:
            return self.tokenizer.special_tokens[token]
        return self.tokenizer.index.get(token, 1)

    def _convert_id_to_token(self, index):
        if index < len(self.tokenizer.symbols):
            return self.tokenizer.symbols[index]
        return {v: k for k, v in self.tokenizer.special_tokens.items()}.get(index, "")

    def convert_tokens_to_string(self, tokens: List[str]) -> str:
        return "".join(tokens)

    def save_vocabulary(self, save_directory, filename_prefix=None):
        path = os.path.join(save_directory, self.vocab_files_names["vocab_file"])
        with open(path, "w", encoding="utf-8") as file:
            json.dump(self.tokenizer.symbols, file, ensure_ascii=False)
        return (path,)

    def get_prefix_tokens(self):
        return [self.get_command("[gMASK]"), self.get_command("sop")]

    def build_inputs_with_special_tokens(self, token_ids_0: List[int], token_ids_1: Optional[List[int]] = None) -> List[int]:
        token_ids_0 = self.get_prefix_tokens() + token_ids_0
        if token_ids_1 is not None:
            token_ids_0 = token_ids_0 + token_ids_1 + [self.special_ids["<eos>"]]
        return token_ids_0

    def _pad(
        self,
        encoded_inputs: Union[Dict[str, EncodedInput], BatchEncoding],
        max_length: Optional[int] = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: Optional[int] = None,
        return_attention_mask: Optional[bool] = None,
    ) -> dict:
        # Load from model defaults
        assert self.padding_side == "left"
        required_input = encoded_inputs[self.model_input_names[0]]
        seq_length = len(required_input)
        if padding_strategy == PaddingStrategy.LONGEST:
            max_length = len(required_input)
        needs = padding_strategy != PaddingStrategy.DO_NOT_PAD and len(required_input) != max_length
        if "attention_mask" not in encoded_inputs:
            encoded_inputs["attention_mask"] = [1] * seq_length
        if "position_ids" not in encoded_inputs:
            encoded_inputs["position_ids"] = list(range(seq_length))
        if needs:
            difference = max_length - len(required_input)
            encoded_inputs["attention_mask"] = [0] * difference + encoded_inputs["attention_mask"]
            encoded_inputs["position_ids"] = [0] * difference + encoded_inputs["position_ids"]
            encoded_inputs[self.model_input_names[0]] = [self.pad_token_id] * difference + required_input
        return encoded_inputs
