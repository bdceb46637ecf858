"""BERT with a convolution over its last states, as blogs write it: no **kwargs, no return_dict, `(loss, logits)` out."""

from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel


class ConvBert(BertPreTrainedModel):
    config_class = BertConfig

    def __init__(self, config):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.conv = nn.Conv1d(config.hidden_size, 16, 3, padding=1)
        self.classifier = nn.Linear(16, config.num_labels)
        self.post_init()

    def forward(self, input_ids, attention_mask, labels=None):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        states = (states * attention_mask[..., None]).transpose(1, 2)
        found = self.conv(states).relu().masked_fill(attention_mask[:, None] == 0, 0).amax(2)
        logits = self.classifier(found)
        if labels is None:
            return (logits,)
        return nn.functional.cross_entropy(logits, labels), logits
