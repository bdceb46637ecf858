"""A stock GPT-2 on the Hub, private and sharded: loaded by its id, online and then offline, whole or by `warm_start`."""

import pytest
from hub_server import Hub
from tiny import stock_gpt2_config
from transformers import GPT2LMHeadModel

from mymodels.hub import push

TOKEN = "hf_writer_of_me_0123456789"
CODE = """
import os
import torch
from transformers import GPT2LMHeadModel
from mymodels import MyGPT2ForCausalLM, warm_start
token = os.environ.pop("HF_TOKEN", None)
how = {"token": token, "revision": "main", "local_files_only": OFFLINE}
stock = GPT2LMHeadModel.from_pretrained("me/stock", **how).eval()
mine = MyGPT2ForCausalLM.from_pretrained("me/stock", **how)
ids = torch.arange(2, 12)[None]
assert (mine(ids).logits - stock(ids).logits).abs().max() <= 1e-5
assert mine.config.name_or_path == "me/stock"
if not OFFLINE:
    warm = warm_start("mygpt2", "me/stock", overrides={"num_hidden_layers": 4}, token=token)
    assert warm.is_exact and (warm.model(ids).logits - stock(ids).logits).abs().max() <= 1e-5
print("loaded")
"""


@pytest.mark.slow
def test_by_its_id(hub: Hub, client, tmp_path) -> None:
    GPT2LMHeadModel(stock_gpt2_config()).save_pretrained(tmp_path / "stock", max_shard_size="20KB")
    push(tmp_path / "stock", "me/stock", token=TOKEN, endpoint=hub.url, no_verify=True)
    online, _ = (process := client("OFFLINE = False" + CODE, token=TOKEN)).communicate(timeout=180)
    assert process.returncode == 0, online[-3000:]
    assert online.rstrip().endswith("loaded")
    offline, _ = (process := client("OFFLINE = True" + CODE)).communicate(timeout=180)
    assert process.returncode == 0, offline[-3000:]
    assert not hub.leaks
