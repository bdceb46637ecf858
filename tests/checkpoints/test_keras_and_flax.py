"""HDF5 files of Keras and msgpack files of Flax, written by h5py, Keras and msgpack as these frameworks write them.

The names are those that transformers 4.57 gave its TensorFlow and Flax models.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from states import assert_reads, one_sentence
from transformers import BertConfig, BertModel

from mymodels.checkpoints import CheckpointError, check_checkpoint, open_checkpoint
from mymodels.checkpoints.converting import convert_checkpoint
from mymodels.checkpoints.inspecting import inspect_checkpoint
from mymodels.extras import install_command

pytestmark = pytest.mark.filterwarnings("ignore")
KERNELS = ("query", "key", "value", "dense")


def bert() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, vocab_size=20)
    return BertModel(config).state_dict()


def tf_name(name: str) -> str:
    """What `TFBertModel` calls a tensor of `BertModel`."""
    parts = name.split(".")
    if parts[-2] == "LayerNorm":
        parts[-1] = {"weight": "gamma", "bias": "beta"}[parts[-1]]
    elif parts[-1] == "weight":
        parts[-1] = "embeddings" if "embeddings" in parts[-2] else "kernel"
        parts[-1] = "weight" if parts[-2] == "word_embeddings" else parts[-1]
    return "/".join(parts).replace("encoder/layer/", "encoder/layer_._")


def array(name: str, tensor: torch.Tensor) -> np.ndarray:
    turned = name.endswith(".weight") and name.split(".")[-2] in KERNELS
    return (tensor.T if turned else tensor).numpy()


def write_tf(path: Path, tensors: dict[str, torch.Tensor], *, split: bool = False) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        names = [f"tf_bert_model/bert/{tf_name(name)}:0" for name in tensors]
        group = file.create_group("bert")
        for name, (own, tensor) in zip(names, tensors.items()):
            group[name] = array(own, tensor)
        file.attrs["layer_names"] = [b"bert"]
        if split:  # as Keras does where one attribute would be too long
            for number, some in enumerate((names[:5], names[5:])):
                group.attrs[f"weight_names{number}"] = [name.encode() for name in some]
        else:
            group.attrs["weight_names"] = [name.encode() for name in names]


@pytest.mark.formats
@pytest.mark.parametrize("split", [False, True])
def test_tf_model(split: bool, tmp_path: Path) -> None:
    tensors = bert()
    write_tf(tmp_path / "tf_model.h5", tensors, split=split)
    expected = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    for path in (tmp_path, tmp_path / "tf_model.h5"):
        assert_reads(opened := open_checkpoint(path), expected)
        assert "13 kernels were transposed" in opened.extras["layout"]
    assert check_checkpoint(tmp_path, full=True) == []
    convert_checkpoint(tmp_path, tmp_path / "out")
    assert_reads(open_checkpoint(tmp_path / "out"), expected)


def write_shards(folder: Path, kind: str, tensors: dict[str, torch.Tensor]) -> None:
    """TensorFlow's shards leave the class's scope out of names."""
    h5py = pytest.importorskip("h5py")
    items = list(tensors.items())
    weight_map = {}
    for number, some in enumerate((items[:20], items[20:]), 1):
        file = f"tf_model-{number:05d}-of-00002.h5"
        names = [f"mlm___bert/{tf_name(name)}:0" for name, _ in some]
        weight_map |= {f"tf_bert_model/{name}": file for name in names}
        with h5py.File(folder / file, "w") as shard:
            for name, (own, tensor) in zip(names, some):
                shard[name] = array(own, tensor)
            shard.attrs["layer_names"] = [name.encode() for name in names]
    (folder / f"{kind}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.formats
def test_sharded_tf_model(tmp_path: Path) -> None:
    tensors = bert()
    write_shards(tmp_path, "tf_model.h5", tensors)
    assert_reads(open_checkpoint(tmp_path), {f"bert.{name}": tensor for name, tensor in tensors.items()})
    (tmp_path / "tf_model-00002-of-00002.h5").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert "tf_model-00002-of-00002.h5" in one_sentence(caught.value, str(tmp_path))


@pytest.mark.formats
def test_a_row_of_gpt2s_bias_and_other_names(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    values = {
        "tf_gpt2_model/transformer/h_._0/attn/c_attn/weight:0": np.arange(12.0, dtype="f4").reshape(3, 4),
        "tf_gpt2_model/transformer/h_._0/attn/c_attn/bias:0": np.arange(4.0, dtype="f4").reshape(1, 4),
        "tf_gpt2_model/mlm___cls/predictions/bias:0": np.arange(3.0, dtype="f4"),
        "tf_gpt2_model/conv/kernel:0": np.arange(120.0, dtype="f4").reshape(2, 3, 4, 5),
        "tf_gpt2_model/norm/moving_mean:0": np.ones(3, "f4"),
    }
    with h5py.File(tmp_path / "x.h5", "w") as file:
        group = file.create_group("transformer")
        for name, value in values.items():
            group[name] = value
        group.attrs["weight_names"] = [name.encode() for name in values]
        file.attrs["layer_names"] = [b"transformer"]
    attention, bias, head, kernel, mean = map(torch.from_numpy, values.values())
    expected = {
        "transformer.h.0.attn.c_attn.weight": attention,  # Conv1D's, which torch keeps as [in, out] too
        "transformer.h.0.attn.c_attn.bias": bias[0],
        "cls.predictions.bias": head,
        "conv.weight": kernel.permute(3, 2, 0, 1),
        "norm.running_mean": mean,
    }
    assert_reads(open_checkpoint(tmp_path / "x.h5"), expected)


@pytest.mark.formats
@pytest.mark.parametrize("name", ["m.weights.h5", "m.keras", "m.h5"])
def test_what_keras_writes(name: str, tmp_path: Path) -> None:
    """Under the names in the file, untransposed: there is no torch model that they are for."""
    keras = pytest.importorskip("keras")
    layers = [
        keras.layers.Dense(3, name="first"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(2, name="second"),
    ]
    model = keras.Sequential([keras.layers.Input((4,)), *layers])
    model.compile("adam", "mse")
    model.fit(np.ones((2, 4)), np.ones((2, 2)), verbose=0)
    model.save_weights(tmp_path / name) if "weights" in name else model.save(tmp_path / name)
    opened = open_checkpoint(tmp_path / name)
    truth = sorted((value.shape, value.flatten().tolist()) for value in model.get_weights())
    assert sorted((tuple(opened[key].shape), opened[key].flatten().tolist()) for key in opened) == truth
    assert "as they are stored" in opened.extras["layout"]


@pytest.mark.formats
def test_damaged_hdf5(tmp_path: Path) -> None:
    write_tf(tmp_path / "tf_model.h5", bert())
    data = (tmp_path / "tf_model.h5").read_bytes()
    for content in (data[:900], data[: len(data) // 2]):
        (tmp_path / "tf_model.h5").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        one_sentence(caught.value, str(tmp_path / "tf_model.h5"))


def packed(tensor: torch.Tensor):
    msgpack = pytest.importorskip("msgpack")
    kind = str(tensor.dtype).removeprefix("torch.")
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((list(tensor.shape), kind, data), use_bin_type=True))


def flax_tree(tensors: dict[str, torch.Tensor]) -> dict:
    """As `FlaxBertModel` names its parameters."""
    tree: dict = {}
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        if last == "weight":
            turned = path[-1] in KERNELS
            last = "scale" if path[-1] == "LayerNorm" else "kernel" if turned else "embedding"
            tensor = tensor.T if turned else tensor
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = packed(tensor)
    return tree


@pytest.mark.formats
def test_flax_model(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    tensors = bert() | {"half.weight": torch.randn(3, 300).bfloat16(), "count": torch.tensor(4)}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(flax_tree(tensors)))
    for path in (tmp_path, tmp_path / "flax_model.msgpack"):
        assert_reads(opened := open_checkpoint(path), tensors)
    assert "13 kernels were transposed" in opened.extras["layout"]
    assert "transposed" in inspect_checkpoint(tmp_path)["extras"]["layout"]
    (tmp_path / "other.msgpack").write_bytes(
        msgpack.packb({"params": flax_tree({"dense.weight": torch.ones(2, 3)}), "step": 3})
    )
    opened = open_checkpoint(tmp_path / "other.msgpack")
    assert opened.info["params.dense.kernel"].shape == (3, 2) and opened.extras["step"] == 3


@pytest.mark.formats
def test_a_large_array_of_flax_is_in_pieces(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    whole = torch.randn(5, 4)
    chunks = {str(i): packed(piece) for i, piece in enumerate(whole.reshape(-1).split(9))}
    tree = {"wte": {"embedding": {"__msgpack_chunked_array__": True, "shape": {"0": 5, "1": 4}, "chunks": chunks}}}
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    assert_reads(open_checkpoint(tmp_path), {"wte.weight": whole})


@pytest.mark.formats
def test_damaged_flax(tmp_path: Path) -> None:
    msgpack = pytest.importorskip("msgpack")
    data = msgpack.packb(flax_tree(bert()))
    for number, content in enumerate((data[:-9], data[: len(data) // 2], data + b"\x01", data[:300] + data[310:])):
        (tmp_path / "flax_model.msgpack").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path)
        one_sentence(caught.value, str(tmp_path / "flax_model.msgpack")), number


@pytest.mark.parametrize(("module", "name", "extra"), [("h5py", "m.h5", "h5"), ("msgpack", "m.msgpack", "flax")])
def test_without_the_library_the_extra_is_named(
    module: str, name: str, extra: str, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / name).write_bytes(
        b"\x89HDF\r\n\x1a\n" + bytes(600) if extra == "h5" else b"\x81\xa1a\xc7\x01\x01" + bytes(9)
    )
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / name)
    assert install_command(extra) in one_sentence(caught.value, name)
