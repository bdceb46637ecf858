from typing import Dict

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, TokenClassifierOutput
from transformers.models.bert.modeling_bert import BertEmbeddings, BertEncoder, BertPooler


class MiniColBERTConfig(BertConfig):
    model_type = "mini_colbert"
    compression_dim: int = 8
    dropout: float = 0.0
    return_vecs: bool = False
    trainable: bool = True


class MiniColBERT(BertPreTrainedModel):
    """Late interaction: one short unit vector a token."""

    config_class = MiniColBERTConfig
    base_model_prefix = "bert_model"

    def __init__(self, cfg) -> None:
        super().__init__(cfg)
        self.bert_model = BertModel(cfg, add_pooling_layer=False)
        self._use_compressor = cfg.compression_dim > -1
        if self._use_compressor:
            self.compressor = nn.Linear(cfg.hidden_size, cfg.compression_dim)
        self.scale = torch.tensor(0.5)
        self.init_weights()

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, return_dict=None):
        vectors = self.bert_model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)[0]
        if self._use_compressor:
            vectors = self.compressor(vectors)
        vectors = nn.functional.normalize(vectors, dim=-1) * self.scale.to(vectors.device)
        if attention_mask is not None:
            vectors = vectors * attention_mask.unsqueeze(-1)
        return BaseModelOutput(last_hidden_state=vectors)


class Viterbi(nn.Module):
    """The best path of labels, by scores of labels and of steps between them."""

    def __init__(self, num_labels):
        super().__init__()
        self.transitions = nn.Parameter(torch.empty(num_labels, num_labels))
        forbidden = torch.zeros(num_labels, num_labels)
        forbidden[0, 2] = -100.0
        self.register_buffer("forbidden", forbidden, persistent=False)
        nn.init.uniform_(self.transitions, -0.1, 0.1)

    def forward(self, emissions):
        total = emissions[:, 0]
        for i in range(1, emissions.shape[1]):
            total = torch.logsumexp(total[:, :, None] + self.transitions + self.forbidden, dim=1) + emissions[:, i]
        return torch.logsumexp(total, dim=1)


class MiniTagger(BertPreTrainedModel):
    config_class = MiniColBERTConfig
    _keys_to_ignore_on_load_unexpected = [r"pooler"]

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        classifier_dropout = (
            config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        )
        self.dropout = nn.Dropout(classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.crf = Viterbi(config.num_labels)
        self.init_weights()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        head_mask=None,
        labels=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        outputs = self.bert(
            input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids, return_dict=return_dict
        )
        logits = self.classifier(self.dropout(outputs[0]))
        loss = None
        if labels is not None:
            chosen = logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).sum((1, 2))
            loss = (self.crf(logits) - chosen).mean()
        if not return_dict:
            return ((loss,) if loss is not None else ()) + (logits,)
        return TokenClassifierOutput(loss=loss, logits=logits)
