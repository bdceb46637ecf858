from transformers import BertConfig as TransformersBertConfig


class MiniDnaBertConfig(TransformersBertConfig):
    def __init__(self, alibi_starting_size: int = 512, attention_probs_dropout_prob: float = 0.0, **kwargs):
        """`alibi_starting_size` is the length of text that the biases are made for at first; they grow when needed."""
        super().__init__(attention_probs_dropout_prob=attention_probs_dropout_prob, **kwargs)
        self.alibi_starting_size = alibi_starting_size
