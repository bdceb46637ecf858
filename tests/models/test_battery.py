"""MyGPT2 and MyBert pass the tests that mymodels gives to the authors of models."""

from pathlib import Path

import pytest
from own_models.conv_bert import ConvBert
from own_models.make import make
from tiny import MODERN, mybert_config, mygpt2_config

from mymodels import MyBertForMaskedLM, MyBertForSequenceClassification, MyGPT2ForCausalLM, MyGPT2Model
from mymodels.testing import ModelBattery


class Shared(ModelBattery):
    """Without the clean process, which the tests of the Hub folders are about; the export takes seconds."""

    @pytest.mark.slow
    def test_clean_process(self, tmp_path: Path) -> None:
        super().test_clean_process(tmp_path)

    @pytest.mark.slow
    def test_export(self, model, given) -> None:
        super().test_export(model, given)


class TestMyGPT2(Shared):
    model_class, packs = MyGPT2ForCausalLM, True

    def make_config(self):
        return mygpt2_config(**MODERN)


class TestMyGPT2Body(Shared):
    model_class, packs = MyGPT2Model, True
    test_clean_process = None

    def make_config(self):
        return mygpt2_config()


class TestMyBert(Shared):
    model_class, packs = MyBertForMaskedLM, True
    test_clean_process = None

    def make_config(self):
        return mybert_config()


class TestMyBertClassifier(Shared):
    model_class = MyBertForSequenceClassification
    test_clean_process = None

    def make_config(self):
        return mybert_config()


class TestConvBert(Shared):
    """Its `forward` cannot do without an attention_mask, and returns a tuple."""

    model_class = ConvBert
    test_clean_process = None

    def make_model(self):
        return make("conv_bert")
