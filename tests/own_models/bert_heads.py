"""Heads of one's own on BERT: labels of tokens as a tuple, spans as a dictionary; neither class is named after its task."""

from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel


class WordBertConfig(BertConfig):
    model_type = "word_bert_of_one_file"


class WordBert(BertPreTrainedModel):
    config_class = WordBertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.bert(input_ids, attention_mask=attention_mask)[0])
        if labels is None:
            return (logits,)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class SpanBert(BertPreTrainedModel):
    config_class = WordBertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.ends = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, start_positions=None, end_positions=None):
        states = self.bert(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        start, end = self.ends(states).unbind(-1)
        found = {"start_logits": start, "end_logits": end}
        if start_positions is not None:
            losses = [nn.functional.cross_entropy(a, b) for a, b in ((start, start_positions), (end, end_positions))]
            found = {"loss": sum(losses) / 2, **found}
        return found
