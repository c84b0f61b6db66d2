"""The operators that onnxruntime calls itself: the library that is made for it, its interface, what a session keeps and refuses."""

import ctypes
import gc
import hashlib
import struct
import subprocess
import sys
import threading
import weakref
from collections import Counter

import llvmlite.binding as llvm
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from runtime_ref.ort import OrtModel, register_kernels, shim
from runtime_ref.ort.fused import with_blocks
from runtime_ref.ort.interface import Api
from runtime_ref.ort.mapped import without_weights
from tests.onnx.exporting import TIED, export, feed, token_ids
from tmexport.errors import UsageError
from tmexport.onnx.names import DOMAIN, OnnxError

pytestmark = pytest.mark.skipif(not shim.supported(), reason="Linux on x86-64 and aarch64 load libraries from memory")


def session(path, threads=1, **settings):
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    for name, value in settings.items():
        setattr(options, name, value)
    assert register_kernels(options)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


ADDRESS = 0x1122334455667788


def test_the_jump_is_what_an_assembler_makes():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    target = llvm.Target.from_triple("x86_64-linux-gnu").create_target_machine()
    text = f"endbr64\\0Amovabsq $${ADDRESS:#x}, %rax\\0Ajmpq *%rax".replace("$$", "$")
    module = llvm.parse_assembly(f'target triple = "x86_64-linux-gnu"\nmodule asm "{text}"')
    found = llvm.ObjectFileRef.from_data(target.emit_object(module))
    assert shim.jump_x86_64(ADDRESS) == next(
        section.data() for section in found.sections() if section.name() == b".text"
    )


def test_the_jump_of_arm_is_what_its_manual_says():
    """Arm ARM, C6.2: LDR (literal) is 01 011 0 00, imm19 (in words, from itself), Rt; BR is 1101011 0000 11111 000000, Rn, 00000."""
    load, branch, address = struct.unpack("<IIQ", shim.jump_aarch64(ADDRESS))
    assert (load >> 24, load >> 5 & 0x7FFFF, load & 31) == (0b01_011_0_00, 8 // 4, 16)
    assert (branch >> 10, branch >> 5 & 31, branch & 31) == (0b1101011_0000_11111_000000, 16, 0)
    assert address == ADDRESS


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_no_page_of_the_library_is_writable_and_code(machine, number):
    """By the fields of the ABI; the loader of this machine opens such a file in every other test."""
    data = shim.elf(machine, ADDRESS)
    assert data[:6] == b"\x7fELF\x02\x01"
    assert struct.unpack_from("<HH", data, 16) == (3, number)  # a shared object
    count = struct.unpack_from("<H", data, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", data, 64 + 56 * i) for i in range(count)]
    assert all(flags & 3 != 3 for _, flags, *_ in segments)
    assert any(kind == 0x6474E551 for kind, *_ in segments)  # PT_GNU_STACK, which is not executable either
    assert all((place - offset) % align == 0 for _, _, offset, place, _, _, _, align in segments if align > 16)


def hashed(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def test_the_interface_is_where_the_header_says():
    """A status keeps its message, from the first of the interface's functions to the last ones: what the library gets is onnxruntime's."""
    found = []

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    def register(options, base):
        found.append(base)
        return Api.of(base).status("a message of our own")

    library = shim.library_of(ctypes.cast(register, ctypes.c_void_p).value)
    with pytest.raises(Exception, match="a message of our own"):
        ort.SessionOptions().register_custom_ops_library(library)
    version = ctypes.CFUNCTYPE(ctypes.c_char_p)(ctypes.c_void_p.from_address(found[0] + 8).value)()
    assert version.decode() == ort.__version__
    with pytest.raises(UsageError, match=r"older than 1\.9999"):
        Api.of(found[0], 9999)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_session_of_anyone_gives_the_bits_of_ort_model(files, threads):
    ids = token_ids(OrtModel.load(files["custom", "q8"], threads=1).config, 2, 40)
    model = OrtModel.load(files["custom", "q8"], threads=1, kernels=True)
    wanted = hashed(model.run(model.new_state(2), ids))
    assert hashed(feed(session(files["custom", "q8"], threads), model.config, ids)) == wanted


def test_runs_at_the_same_time_do_not_meet(files):
    path = files["custom", "q8"]
    config = OrtModel.load(path, threads=1).config
    texts = [token_ids(config, 1, 20 + i) for i in range(4)]
    shared = session(path, 2)
    wanted = [hashed(feed(session(path), config, ids)) for ids in texts]
    found: dict[int, set[str]] = {i: set() for i in range(4)}

    def work(i):
        for _ in range(10):
            found[i].add(hashed(feed(shared, config, texts[i])))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == {i: {digest} for i, digest in enumerate(wanted)}


def test_a_session_that_ends_gives_its_kernels_back(files, monkeypatch):
    from runtime_ref.ort import native

    made = []
    plain = native._Made.__init__

    def noted(self, *args):
        plain(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(native._Made, "__init__", noted)
    kept = session(files["custom", "q8"])
    gc.collect()
    assert len(made) == 10
    assert all(kernel() is not None for kernel in made)
    del kept
    gc.collect()
    assert all(kernel() is None for kernel in made)


def test_a_process_that_ends_with_a_session_ends_well(files):
    code = f"""
import sys, onnxruntime
from runtime_ref.ort import register_kernels
options = onnxruntime.SessionOptions()
register_kernels(options)
session = onnxruntime.InferenceSession({str(files["custom", "q8"])!r}, options)
session.cycle = session
sys.modules["kept"] = session
print("made")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


def graph(tmp_path, operator, x, weights, out, **attributes):
    """A file with one node of ours; weights: arrays, or a name for an input of the graph."""
    names = ["x", *(f"w{i}" for i in range(len(weights)))]
    node = helper.make_node(operator, names, ["y"], domain=DOMAIN, profile="exact", **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)]
    inputs += [helper.make_tensor_value_info(names[1 + i], *w) for i, w in enumerate(weights) if isinstance(w, tuple)]
    known = [numpy_helper.from_array(w, names[1 + i]) for i, w in enumerate(weights) if not isinstance(w, tuple)]
    body = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, out)], known)
    imports = [helper.make_opsetid("", 15), helper.make_opsetid(DOMAIN, 1)]
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(body, opset_imports=imports, ir_version=8), path)
    return path


ROWS = [None, None, 256]


@pytest.mark.parametrize(
    ("weights", "group", "message"),
    [
        ((np.zeros((8, 64), np.uint8), np.full((8, 4), 0.1, np.float32)), 64, "a scale that fp16 does not hold"),
        ((np.full((8, 64), 255, np.uint8), np.ones((8, 4), np.float32)), 64, "TernaryMatMul: a ternary weight"),
        ((np.zeros((8, 64), np.uint8), np.ones((8, 3), np.float32)), 64, "rows of 256 and 3 scales"),
        ((np.zeros((0, 64), np.uint8), np.ones((0, 4), np.float32)), 64, "no rows"),
        (
            (np.zeros(64, np.uint8), np.ones((8, 4), np.float32)),
            64,
            r"codes has the shape \[64\]; expected 2 dimensions",
        ),
        ((np.zeros((8, 64), np.uint8), (TensorProto.FLOAT, [8, 4])), 64, "scales is no constant of the graph"),
        (
            (np.zeros((8, 64), np.uint8), np.ones((8, 4), np.float32)),
            128,
            "rows of 256 and 4 scales; expected one for every 128",
        ),
    ],
)
def test_weights_that_cannot_be_are_one_clear_error_at_load(tmp_path, weights, group, message):
    path = graph(tmp_path, "TernaryMatMul", ROWS, weights, [None, None, 8], group_size=group)
    with pytest.raises(Exception, match=message):
        session(path)


@pytest.mark.parametrize(
    ("operator", "shape", "weights", "message"),
    [
        ("RMSNorm", [None, None, 20], [np.ones(20, np.float32), np.array(1e-5, np.float32)], "need a multiple of 16"),
        ("DenseMatMul", [None, None, 20], [np.ones((4, 20), np.float32)], "need a multiple of 16"),
    ],
)
def test_sizes_that_the_kernels_do_not_compute_are_refused_at_load(tmp_path, operator, shape, weights, message):
    with pytest.raises(Exception, match=message):
        session(graph(tmp_path, operator, shape, weights, [None, None, None]))


@pytest.mark.parametrize("shape", [(1, 1, 128), (256,), (1, 1, 1, 256)])
def test_an_input_of_another_shape_is_one_clear_error(tmp_path, shape):
    weights = (np.full((8, 64), 0x55, np.uint8), np.ones((8, 4), np.float32))
    path = graph(tmp_path, "TernaryMatMul", None, weights, None, group_size=64)
    found = session(path)
    with pytest.raises(Exception, match=r"input 0 has another shape than \[batch, time, 256\]"):
        found.run(None, {"x": np.zeros(shape, np.float32)})
    assert not found.run(None, {"x": np.ones((2, 3, 256), np.float32)})[0].any()
    assert found.run(None, {"x": np.ones((2, 0, 256), np.float32)})[0].shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("operator", "shapes", "good"),
    [
        ("SwiGLU", [(1, 1, 20), (1, 1, 20)], False),
        ("SwiGLU", [(1, 1, 32), (1, 2, 32)], False),
        ("SwiGLU", [(1, 2, 32), (1, 2, 32)], True),
        ("CausalAttention", [(1, 1, 64), (1, 1, 3, 24), (1, 1, 3, 24)], False),
        ("CausalAttention", [(1, 1, 64), (1, 3, 3, 16), (1, 3, 3, 16)], False),
        ("CausalAttention", [(1, 1, 1024), (1, 1, 3, 1024), (1, 1, 3, 1024)], False),
        ("CausalAttention", [(2, 3, 64), (2, 2, 3, 16), (2, 2, 3, 16)], True),
    ],
)
def test_sizes_that_only_a_run_knows(tmp_path, operator, shapes, good):
    weights = [(TensorProto.FLOAT, None)] * (len(shapes) - 1)
    weights += [np.array(0.25, np.float32)] if operator == "CausalAttention" else []
    found = session(graph(tmp_path, operator, None, weights, None))
    feeds = {name: np.ones(shape, np.float32) for name, shape in zip(("x", "w0", "w1"), shapes, strict=False)}
    if good:
        assert found.run(None, feeds)[0].shape == shapes[0]
        return
    with pytest.raises(Exception, match=r"input \d has another shape than .*"):
        found.run(None, feeds)


def test_no_optimisations_is_said_at_load(files):
    with pytest.raises(Exception, match="scales is no constant of the graph; expected a weight"):
        session(files["custom", "q8"], graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL)


def test_the_graph_without_its_weights_is_the_graph(tied, tmp_path):
    path = export(tied, tmp_path / "m.onnx", "custom")
    outside = onnx.load_from_string(without_weights(path))
    whole = onnx.load(path)
    found = {tensor.name for tensor in outside.graph.initializer if tensor.external_data}
    assert found
    onnx.load_external_data_for_model(outside, str(tmp_path))
    for tensor in outside.graph.initializer:
        tensor.ClearField("data_location")
        tensor.ClearField("external_data")
    for model in (whole, outside):
        model.graph.initializer.sort(key=lambda tensor: tensor.name)
    assert outside == whole


@given(st.binary(max_size=40))
def test_what_is_no_model_is_an_error_of_the_reader(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "bad.onnx"
    path.write_bytes(struct.pack("<BB", 0x3A, 60) + data)  # a graph of 60 bytes, of which some are there
    with pytest.raises(ValueError, match=r"field|number"):
        without_weights(path)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\xff" * 99])
def test_a_damaged_file_is_one_line(files, tmp_path, damage):
    path = tmp_path / "m.onnx"
    path.write_bytes(damage(files["custom", "q8"].read_bytes()))
    with pytest.raises(OnnxError, match=str(path)):
        OrtModel.load(path, threads=1, kernels=True)


def test_a_link_to_a_file_is_followed(files, tmp_path):
    (tmp_path / "link.onnx").symlink_to(files["custom", "q8"])
    model = OrtModel.load(tmp_path / "link.onnx", threads=1, kernels=True)
    assert np.isfinite(model.decode(model.new_state(), 1)).all()


def counted(model):
    return Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)


def test_a_block_is_one_node_where_nothing_else_reads_inside_it(tied, tmp_path):
    """OrtModel's sessions; that they have the bits of the separate nodes is tested above."""
    path = export(tied, tmp_path / "m.onnx", "custom")
    whole = onnx.load(path)
    fused = onnx.load_from_string(with_blocks(whole.SerializeToString()))
    assert counted(fused) == {"MixerBlock": TIED.n_layer, "RMSNorm": 1, "Q8MatMul": 1}
    assert (fused.graph.input, fused.graph.output) == (whole.graph.input, whole.graph.output)
    made = {value.name for value in [*fused.graph.input, *fused.graph.initializer]}
    for node in fused.graph.node:  # in an order that runs
        assert set(node.input) <= made
        made |= set(node.output)
    for node in whole.graph.node:  # as some programs save a graph
        node.ClearField("name")
    assert counted(onnx.load_from_string(with_blocks(whole.SerializeToString()))) == counted(fused)
    inside = next(node.output[0] for node in whole.graph.node if node.op_type == "SelectiveScan")
    whole.graph.output.append(helper.make_tensor_value_info(inside, TensorProto.FLOAT, None))
    fused = onnx.load_from_string(with_blocks(whole.SerializeToString()))
    assert counted(fused)["MixerBlock"] == TIED.n_layer - 1
    assert counted(fused)["SelectiveScan"] == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_long_texts_go_through_blocks_in_parts(tied, tmp_path, threads):
    """More rows than a block takes at once, of several texts, from states that are not zero; the state too is that of one text."""
    model = OrtModel.load(export(tied, tmp_path / "m.onnx", "custom"), threads, kernels=True)
    ids = token_ids(TIED, 3, 150)
    together = model.new_state(3)
    model.run(together, ids[:, :7])
    logits, states = model.run(together, ids[:, 7:]), together.arrays()
    bare = session(tmp_path / "m.onnx", threads)
    for i in range(3):
        wanted = feed(bare, TIED, ids[i : i + 1])
        assert hashed(logits[i]) == hashed(wanted[0, 7:])
        alone = model.new_state()
        model.run(alone, ids[i : i + 1])
        for name, array in alone.arrays().items():
            assert hashed(states[name][i]) == hashed(array[0])


def test_a_block_whose_sizes_do_not_fit_is_refused_at_load(tied, tmp_path):
    path = export(tied, tmp_path / "m.onnx", "custom")
    model = onnx.load(path)
    last = next(t for t in model.graph.initializer if t.name.endswith("0.mixer.out_proj.weight.codes"))
    scales = next(t for t in model.graph.initializer if t.name.endswith("0.mixer.out_proj.weight.scales"))
    for tensor in (last, scales):
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[:-16], tensor.name))
    onnx.save(model, path)
    with pytest.raises(Exception, match="projections of .* do not fit rows of 256"):
        OrtModel.load(path, threads=1, kernels=True)
