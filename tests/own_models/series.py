"""A forecaster of time series: inputs of names and shapes that no config says."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput


class SeriesConfig(PretrainedConfig):
    model_type = "series_of_one_file"

    def __init__(self, lags=7, horizon=3, **kwargs):
        super().__init__(**kwargs)
        self.lags, self.horizon = lags, horizon


class SeriesForPrediction(PreTrainedModel):
    config_class = SeriesConfig
    main_input_name = "past_values"

    def __init__(self, config):
        super().__init__(config)
        self.lags = nn.Linear(config.lags, config.horizon)
        self.kinds = nn.Embedding(5, config.horizon)
        self.post_init()

    def forward(self, past_values, kind, observed, labels=None):
        past = past_values * observed
        values = self.lags(past[:, -self.config.lags :]) + self.kinds(kind)
        loss = None if labels is None else ((values - labels) ** 2).mean()
        return ModelOutput(loss=loss, prediction=values)
