import os
from shutil import copyfile

from transformers.tokenization_utils import AddedToken, PreTrainedTokenizer


class MiniBaichuanTokenizer(PreTrainedTokenizer):
    """Letters, one a line of vocab.txt."""

    vocab_files_names = {"vocab_file": "vocab.txt"}
    pretrained_vocab_files_map = {}
    max_model_input_sizes = {}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token=None,
        add_bos_token=True,
        add_eos_token=False,
        **kwargs,
    ):
        bos_token = AddedToken(bos_token, lstrip=False, rstrip=False) if isinstance(bos_token, str) else bos_token
        eos_token = AddedToken(eos_token, lstrip=False, rstrip=False) if isinstance(eos_token, str) else eos_token
        with open(vocab_file, encoding="utf-8") as file:
            self.pieces = [line.rstrip("\n") for line in file]
        self.ids = {piece: i for i, piece in enumerate(self.pieces)}
        super().__init__(
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            **kwargs,
        )
        self.vocab_file = vocab_file
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        vocab = {self.convert_ids_to_tokens(i): i for i in range(self.vocab_size)}
        vocab.update(self.added_tokens_encoder)
        return vocab

    def _tokenize(self, text):
        return ["▁" if c == " " else c for c in text]

    def _convert_token_to_id(self, token):
        return self.ids.get(token, self.ids["<unk>"])

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens).replace("▁", " ")

    def save_vocabulary(self, save_directory, filename_prefix=None):
        out = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + "vocab.txt")
        if os.path.abspath(self.vocab_file) != os.path.abspath(out):
            copyfile(self.vocab_file, out)
        return (out,)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        bos_token_id = [self.bos_token_id] if self.add_bos_token else []
        eos_token_id = [self.eos_token_id] if self.add_eos_token else []
        output = bos_token_id + token_ids_0 + eos_token_id
        if token_ids_1 is not None:
            output = output + bos_token_id + token_ids_1 + eos_token_id
        return output

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        first = self.build_inputs_with_special_tokens(token_ids_0)
        second = self.build_inputs_with_special_tokens(token_ids_1) if token_ids_1 is not None else []
        return [0] * len(first) + [1] * len(second)
