import torch.nn as nn
from transformers import BertModel, BertPreTrainedModel


class BertForCLS(BertPreTrainedModel):
    """BERT, mean of the tokens and a two-layer classifier."""

    def __init__(self, config, args):
        super(BertForCLS, self).__init__(config)
        self.num_classes = args.num_classes
        self.bert = BertModel(config)
        self.dropout = nn.Dropout(args.dropout)
        self.dense = nn.Linear(config.hidden_size, args.cls_hidden)
        self.classifier = nn.Linear(args.cls_hidden, args.num_classes)
        self.loss_fct = nn.CrossEntropyLoss()

        self.post_init()

    def forward(self, batch_inputs, labels=None):
        outputs = self.bert(**batch_inputs)
        hidden = outputs[0]
        mask = batch_inputs["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        x = nn.functional.relu(self.dense(self.dropout(pooled)))
        logits = self.classifier(x)
        loss = None
        if labels is not None:
            loss = self.loss_fct(logits.view(-1, self.num_classes), labels.view(-1))
        return loss, logits
