"""TensorFlow, ONNX and GGUF files, written by their own libraries in the test and read bit for bit."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from states import FLOAT8, NUMPY_DTYPES, assert_reads, assert_same, one_sentence
from torch import nn

from mymodels.checkpoints import (
    CheckpointError,
    check_checkpoint,
    load_checkpoint_and_dispatch,
    load_state_dict,
    open_checkpoint,
)

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
pytestmark = [pytest.mark.formats, pytest.mark.filterwarnings("ignore")]


def as_torch(array: np.ndarray) -> torch.Tensor:
    """The same bytes, for the dtypes of ml_dtypes too."""
    dtype = getattr(torch, array.dtype.name)
    if not array.size:
        return torch.empty(array.shape, dtype=dtype)
    return torch.from_numpy(np.frombuffer(array.tobytes(), np.uint8).copy()).view(dtype).reshape(array.shape)


def random_array(dtype, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """Random bytes, so NaN and denormal numbers too."""
    dtype = np.dtype(dtype)
    high = 2 if dtype.kind == "b" else 256
    bytes_ = np.random.default_rng(0).integers(0, high, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    return bytes_.view(dtype)


def numpy_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx")


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf")


# ----- TensorFlow -----


def tf_arrays() -> dict[str, np.ndarray]:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {f"layers/{numpy_name(dtype)}/kernel": random_array(numpy_name(dtype)) for dtype in NUMPY_DTYPES}
    arrays |= {f"layers/{name}/kernel": random_array(getattr(ml_dtypes, name)) for name in ("bfloat16", "float8_e5m2")}
    return arrays | {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 4), np.float64)}


def save_v2(tf, prefix: Path, arrays: dict) -> None:
    tensors = [tf.constant(array) for array in arrays.values()]
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=list(arrays), shape_and_slices=[""] * len(arrays), tensors=tensors
    )


def test_tensorflow_prefix(tf, tmp_path: Path) -> None:
    """The prefix, its index file, and the folder open the same; texts go to the extras."""
    arrays = tf_arrays()
    save_v2(tf, tmp_path / "model.ckpt-10", arrays | {"vocabulary": np.array([b"a", b"b"])})
    expected = {name: as_torch(array) for name, array in arrays.items()}
    for path in (tmp_path / "model.ckpt-10", tmp_path / "model.ckpt-10.index", tmp_path):
        checkpoint = open_checkpoint(path)
        assert_reads(checkpoint, expected)
        assert set(checkpoint.extras) == {"vocabulary"}
        assert checkpoint.format == "TensorFlow"
    for name, tensor in load_state_dict(tmp_path / "model.ckpt-10").items():
        assert_same(tensor, expected[name], name)


def test_tensorflow_prefix_in_the_current_folder(tf, tmp_path: Path, monkeypatch) -> None:
    save_v2(tf, tmp_path / "model.ckpt", {"w": (w := random_array("float32"))})
    monkeypatch.chdir(tmp_path)
    for path in ("model.ckpt", "model.ckpt.index", "."):
        assert_reads(open_checkpoint(path), {"w": as_torch(w)})


def test_tensorflow_shards(tf, tmp_path: Path) -> None:
    arrays = {f"layer_{i}/kernel": random_array("float32") + np.float32(i) for i in range(4)}
    parts = [tmp_path / "part0", tmp_path / "part1"]
    for i, part in enumerate(parts):
        save_v2(tf, part, {name: array for j, (name, array) in enumerate(arrays.items()) if j % 2 == i})
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(part) for part in parts], destination_prefix=str(tmp_path / "model.ckpt")
    )
    assert len(list(tmp_path.glob("model.ckpt.data-*-of-00002"))) == 2
    assert_reads(open_checkpoint(tmp_path / "model.ckpt"), {name: as_torch(array) for name, array in arrays.items()})


def test_tensorflow_object_checkpoint(tf, tmp_path: Path) -> None:
    kernel, half = random_array("float32"), tf.Variable(tf.constant([1.5, -0.0], tf.bfloat16))
    checkpoint = tf.train.Checkpoint(kernel=tf.Variable(kernel), half=half, step=tf.Variable(4), text=tf.Variable("a"))
    prefix = checkpoint.save(str(tmp_path / "ckpt"))
    ending = "/.ATTRIBUTES/VARIABLE_VALUE"
    expected = {
        f"kernel{ending}": as_torch(kernel),
        f"half{ending}": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        f"step{ending}": torch.tensor(4, dtype=torch.int32),
        f"save_counter{ending}": torch.tensor(1),
    }
    for path in (prefix, tmp_path):
        opened = open_checkpoint(path)
        assert_reads(opened, expected)
        assert set(opened.extras) == {"_CHECKPOINTABLE_OBJECT_GRAPH", f"text{ending}"}


def test_tensorflow_1_saver(tf, tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        values = {"bert/embeddings": random_array("float32"), "global_step": np.int64(7).reshape(())}
        for name, value in values.items():
            tf.compat.v1.get_variable(name, initializer=tf.constant(value), use_resource=False)
        session.run(tf.compat.v1.global_variables_initializer())
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "bert_model.ckpt"))
    assert (tmp_path / "bert_model.ckpt.meta").is_file()
    for path in (tmp_path / "bert_model.ckpt", tmp_path):
        assert_reads(open_checkpoint(path), {name: as_torch(value) for name, value in values.items()})


def test_tensorflow_checkpoint_in_one_file(tf, tmp_path: Path) -> None:
    """As TensorFlow before 0.12 wrote it."""
    kernel = random_array("float32")
    tf.raw_ops.Save(filename=str(tmp_path / "model.ckpt"), tensor_names=["w"], data=[tf.constant(kernel)])
    assert np.array_equal(
        tf.train.load_variable(str(tmp_path / "model.ckpt"), "w").view(np.int32), kernel.view(np.int32)
    )
    assert_reads(open_checkpoint(tmp_path / "model.ckpt"), {"w": as_torch(kernel)})


def test_tensorflow_saved_model(tf, tmp_path: Path) -> None:
    module, kernel = tf.Module(), random_array("float32")
    module.dense = tf.Module()
    module.dense.kernel = tf.Variable(kernel)
    tf.saved_model.save(module, str(tmp_path / "saved"))
    for path in (tmp_path / "saved", tmp_path / "saved" / "variables", tmp_path / "saved" / "variables" / "variables"):
        assert_reads(open_checkpoint(path), {"dense/kernel/.ATTRIBUTES/VARIABLE_VALUE": as_torch(kernel)})


def test_tensorflow_saved_model_without_its_variables(tf, tmp_path: Path) -> None:
    module = tf.Module()
    module.kernel = tf.Variable([1.0])
    tf.saved_model.save(module, str(tmp_path))
    (tmp_path / "variables" / "variables.index").unlink()
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    one_sentence(caught.value, str(tmp_path))


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "index"])
def test_damaged_tensorflow_checkpoint(tf, damage: str, tmp_path: Path) -> None:
    save_v2(tf, tmp_path / "model.ckpt", {"w": random_array("float32", (30, 40))})
    data, index = tmp_path / "model.ckpt.data-00000-of-00001", tmp_path / "model.ckpt.index"
    whole = data.read_bytes()
    if damage == "missing":
        data.unlink()
    elif damage == "index":
        index.write_bytes(index.read_bytes()[:8] + bytes(20) + index.read_bytes()[28:])
    else:
        data.write_bytes(whole[:-100] if damage == "truncated" else whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "model.ckpt")["w"]
    one_sentence(caught.value, str(tmp_path / "model.ckpt"))


# ----- ONNX -----


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.embed(ids)))


@pytest.mark.parametrize("external", [False, True])
def test_onnx_export(onnx, external: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    module = Small().eval()
    ids = torch.tensor([1, 2])
    torch.onnx.export(module, (ids,), tmp_path / "model.onnx", dynamo=True, external_data=external, verbose=False)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in module.state_dict().items():
        assert_same(checkpoint[name], tensor, name)
    whole = onnx.load(tmp_path / "model.onnx")  # with what the exporter added, such as shapes
    added = {t.name: as_torch(onnx.numpy_helper.to_array(t)) for t in whole.graph.initializer}
    assert_reads(checkpoint, added)
    other = load_checkpoint_and_dispatch(Small(), tmp_path / "model.onnx", strict=False).eval()
    assert torch.equal(other(ids), module(ids))


def onnx_arrays() -> dict[str, np.ndarray]:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = {f"{numpy_name(dtype)}.weight": random_array(numpy_name(dtype)) for dtype in NUMPY_DTYPES}
    names = ["bfloat16", *(name for name in map(numpy_name, FLOAT8) if name != "float8_e8m0fnu")]
    arrays |= {f"{name}.weight": random_array(getattr(ml_dtypes, name)) for name in names}
    return arrays | {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 4), np.float64)}


def onnx_model(onnx, initializers: list):
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    return onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y], initializers))


def save_external(onnx, folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    model = onnx_model(onnx, [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()])
    onnx.save_model(model, folder / "model.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    assert (folder / "weights.data").stat().st_size >= sum(array.nbytes for array in arrays.values())
    return folder / "model.onnx"


@pytest.mark.parametrize("name", ["model.onnx", "model.bin", "model.pt", "model"])
def test_onnx_dtypes_under_any_name(onnx, name: str, tmp_path: Path) -> None:
    arrays = onnx_arrays()
    initializers = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    words = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [2], [b"a", b"b"])
    onnx.save_model(onnx_model(onnx, [*initializers, words]), tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert_reads(checkpoint, {name: as_torch(array) for name, array in arrays.items()})
    assert checkpoint.extras == {"words": [b"a", b"b"]}


def test_onnx_typed_fields(onnx, tmp_path: Path) -> None:
    """Values as numbers in the message instead of bytes."""
    kinds = onnx.TensorProto
    initializers = [
        onnx.helper.make_tensor("float", kinds.FLOAT, [2], [1.5, -0.0]),
        onnx.helper.make_tensor("double", kinds.DOUBLE, [1], [0.1]),
        onnx.helper.make_tensor("half", kinds.FLOAT16, [2], [1.5, -2.0]),
        onnx.helper.make_tensor("brain", kinds.BFLOAT16, [2], [1.5, -2.0]),
        onnx.helper.make_tensor("long", kinds.INT64, [1, 2], [-1, 2**40]),
        onnx.helper.make_tensor("flag", kinds.BOOL, [2], [True, False]),
    ]
    onnx.save_model(onnx_model(onnx, initializers), tmp_path / "model.onnx")
    expected = {
        "float": torch.tensor([1.5, -0.0]),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
        "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "long": torch.tensor([[-1, 2**40]]),
        "flag": torch.tensor([True, False]),
    }
    assert_reads(open_checkpoint(tmp_path), expected)


def test_onnx_external_data(onnx, tmp_path: Path, monkeypatch) -> None:
    arrays = onnx_arrays()
    save_external(onnx, tmp_path, arrays)
    expected = {name: as_torch(array) for name, array in arrays.items()}
    assert_reads(checkpoint := open_checkpoint(tmp_path), expected)
    assert checkpoint.info["float32.weight"].file == "weights.data"
    monkeypatch.chdir(tmp_path)
    assert_reads(open_checkpoint("model.onnx"), expected)


@pytest.mark.parametrize("damage", ["missing", "truncated", "cut later", "gone later"])
def test_incomplete_onnx_external_data(onnx, damage: str, tmp_path: Path) -> None:
    path = save_external(onnx, tmp_path, {"a": random_array("float32"), "b": random_array("int64", (30, 40))})
    data = tmp_path / "weights.data"
    checkpoint = open_checkpoint(path) if "later" in damage else None
    if damage in ("missing", "gone later"):
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        checkpoint["b"] if checkpoint else open_checkpoint(path)
    message = one_sentence(caught.value, str(tmp_path))
    assert "weights.data" in message


@pytest.mark.parametrize("location", ["../weights.data", "/etc/hostname", "link.data", "a/../../weights.data", ""])
def test_onnx_external_data_outside_is_refused(onnx, location: str, tmp_path: Path) -> None:
    (folder := tmp_path / "model").mkdir()
    path = save_external(onnx, folder, {"w": random_array("float32")})
    (folder / "weights.data").rename(tmp_path / "weights.data")
    (folder / "link.data").symlink_to(tmp_path / "weights.data")
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"leads out of the folder|is not a file name") as caught:
        open_checkpoint(path)
    one_sentence(caught.value, str(path))


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("value", ["-8", "many", "99999999999999999999"])
def test_onnx_external_data_with_wrong_numbers(onnx, key: str, value: str, tmp_path: Path) -> None:
    path = save_external(onnx, tmp_path, {"w": random_array("float32")})
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)["w"]
    one_sentence(caught.value, str(tmp_path))


def test_onnx_types_that_torch_has_not(onnx, tmp_path: Path) -> None:
    packed = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, [3], [1, -2, 3])
    onnx.save_model(onnx_model(onnx, [packed]), tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="'w' has the type INT4") as caught:
        open_checkpoint(tmp_path)
    one_sentence(caught.value, str(tmp_path / "model.onnx"))


def test_onnx_without_weights_and_cut(onnx, tmp_path: Path) -> None:
    onnx.save_model(onnx_model(onnx, []), tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="without initialisers"):
        open_checkpoint(tmp_path)
    onnx.save_model(onnx_model(onnx, [onnx.numpy_helper.from_array(random_array("float32"), "w")]), tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:-30])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "m.onnx")
    one_sentence(caught.value, str(tmp_path / "m.onnx"))


# ----- GGUF -----


def write_gguf(gguf, path: Path) -> dict[str, torch.Tensor]:
    """A file with every plain type and some quantised ones; what gguf itself makes of each."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_name("tiny")
    writer.add_array("tokens", ["a", "b"])
    expected = {}
    for name in ("float32", "float16", "float64", "int8", "int16", "int32", "int64"):
        array = random_array(name, (3, 2, 5))
        writer.add_tensor(f"blk.{name}.weight", array)
        expected[f"blk.{name}.weight"] = as_torch(array)
    kinds, values = gguf.GGMLQuantizationType, np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    for kind in (kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q5_1):
        packed = gguf.quantize(values, kind)
        writer.add_tensor(f"blk.{kind.name}.weight", packed, raw_dtype=kind)
        expected[f"blk.{kind.name}.weight"] = torch.from_numpy(gguf.dequantize(packed, kind).copy())
    expected["blk.BF16.weight"] = expected["blk.BF16.weight"].bfloat16()
    assert torch.allclose(expected["blk.Q8_0.weight"], torch.from_numpy(values), atol=0.02)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors", "model"])
def test_gguf(gguf, name: str, tmp_path: Path) -> None:
    expected = write_gguf(gguf, tmp_path / name)
    checkpoint = open_checkpoint(tmp_path / name)
    assert_reads(checkpoint, expected)
    assert checkpoint.extras["general.architecture"] == "llama" and checkpoint.extras["llama.block_count"] == 2
    assert checkpoint.extras["tokens"] == ["a", "b"]
    assert checkpoint.extras["quantisation"] == {f"blk.{kind}.weight": kind for kind in ("Q8_0", "Q4_0", "Q5_1")}


def test_gguf_in_a_folder(gguf, tmp_path: Path) -> None:
    expected = write_gguf(gguf, tmp_path / "tiny-Q8_0.gguf")
    assert_reads(open_checkpoint(tmp_path), expected)


@pytest.mark.parametrize("kept", [4, 8, 20, 100, 400, 0.5, -1])
def test_truncated_gguf(gguf, kept: float, tmp_path: Path) -> None:
    write_gguf(gguf, path := tmp_path / "model.gguf")
    data = path.read_bytes()
    end = max(tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors)
    path.write_bytes(data[: end - 1 if kept == -1 else int(len(data) * kept) if kept < 1 else int(kept)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    one_sentence(caught.value, str(path))


@pytest.mark.parametrize("at", [8, 16])
def test_gguf_with_absurd_counts(gguf, at: int, tmp_path: Path) -> None:
    write_gguf(gguf, path := tmp_path / "model.gguf")
    with path.open("r+b") as file:
        file.seek(at)  # the number of tensors, the number of fields
        file.write((2**40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    one_sentence(caught.value, str(path))


def test_onnx_constants_sparse_and_inner_weights(onnx, tmp_path: Path) -> None:
    helper, numpy_helper, FLOAT = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    dense = np.random.randn(3, 4).astype("f4")
    folded = np.random.randn(4, 2).astype("f4")
    inner = np.random.randn(2).astype("f4")
    thin = np.zeros((3, 4), "f4")
    thin[0, 1], thin[2, 3] = 5, 7
    values = numpy_helper.from_array(np.array([5, 7], "f4"), "thin")
    flat = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 11])), [3, 4])
    values = numpy_helper.from_array(np.array([5, 7], "f4"), "thin2")
    pairs = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([[0, 1], [2, 3]])), [3, 4])
    output = helper.make_tensor_value_info("y", FLOAT, None)
    branch = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", FLOAT, None)],
        [numpy_helper.from_array(inner, "inner")],
    )
    nodes = [
        helper.make_node("Constant", [], ["folded"], value=numpy_helper.from_array(folded)),
        helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1, 2]))),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]
    condition = helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])
    graph = helper.make_graph(nodes, "g", [condition], [output], [numpy_helper.from_array(dense, "dense")])
    graph.sparse_initializer.extend([flat, pairs])
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    opened = open_checkpoint(tmp_path / "m.onnx")
    expected = {"dense": dense, "folded": folded, "inner": inner, "thin": thin, "thin2": thin}
    assert set(opened) == set(expected)
    assert all(np.array_equal(opened[name].numpy(), value) for name, value in expected.items())
    assert opened.extras["constants of the graph"] == 1


def test_gguf_of_a_type_that_the_library_cannot_dequantise(
    gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    data = np.zeros((1, 34), np.uint8)
    writer.add_tensor("a", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert open_checkpoint(tmp_path / "m.gguf")["a"].shape == (1, 32)
    monkeypatch.setattr(gguf.quants, "_type_traits", {})  # as for a type newer than the library
    with pytest.raises(CheckpointError, match=r"Q8_0.*cannot dequantise"):
        open_checkpoint(tmp_path / "m.gguf")["a"]


def test_split_gguf(gguf, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    arrays = {f"blk.{i}.w": np.random.randn(4, 32).astype("f4") for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    opened = open_checkpoint(files[0])
    assert set(opened) == set(arrays) and all(np.array_equal(opened[name].numpy(), arrays[name]) for name in arrays)
    assert check_checkpoint(files[1], full=True) == []
    files[1].unlink()
    (problem,) = check_checkpoint(files[0])
    assert files[1].name in problem.message


def test_any_file_of_a_tensorflow_checkpoint_leads_to_it(tf, tmp_path: Path) -> None:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variable = tf.compat.v1.get_variable("a/kernel", initializer=np.ones((2, 3), "f4"))
        session.run(variable.initializer)
        tf.compat.v1.train.Saver().save(session, str(tmp_path / "model.ckpt"))
    for name in ("checkpoint", "model.ckpt.meta", "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt"):
        opened = open_checkpoint(tmp_path / name)
        assert list(opened) == ["a/kernel"] and torch.equal(opened["a/kernel"], torch.ones(2, 3)), name
    assert check_checkpoint(tmp_path / "checkpoint", full=True) == [] == check_checkpoint(tmp_path / "model.ckpt.meta")
    (tmp_path / "model.ckpt.index").unlink()
    for name in ("checkpoint", "model.ckpt.meta", "model.ckpt.data-00000-of-00001"):
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(tmp_path / name)
        assert ".index" in one_sentence(caught.value, name) and "damaged" not in str(caught.value)
