"""The Mamba-1 mixer as ONNX nodes, the same in every form: the recurrence is a Scan over time, a standard operator.

Shapes: B batch, T time, D d_inner channels, N d_state, K d_conv, R dt_rank. There is no way around the loop: every channel has
decays of its own for each of its states, so a chunk of time is no product of matrices as it is in Mamba-2.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from tmexport.model.branches.mamba1 import Mamba1
from tmexport.onnx.builder import Builder
from tmexport.onnx.forms import Portable
from tmexport.onnx.mathematics import causal_conv, silu
from tmexport.onnx.names import GraphState


def write(form: Portable, c: Mamba1, x: str, weights: Mapping[str, str], state: Mapping[str, GraphState]) -> str:
    """The branch of normalised x [B, T, d_model]; writes the present states. weights: initialisers by role."""
    b = form.b
    projected = form.product(x, weights["in_proj"])
    x, z = b.ops("Split", projected, b.ints(c.d_inner, c.d_inner), outputs=2, axis=-1)
    conv = state["conv"]
    x = causal_conv(b, c.d_conv, x, conv.past, weights["conv_weight"], weights["conv_bias"], conv.present)
    inputs = form.product(x, weights["x_proj"])
    dt, bb, cc = b.ops("Split", inputs, b.ints(c.dt_rank, c.d_state, c.d_state), outputs=3, axis=-1)
    dt = b.op("Softplus", b.op("Add", form.product(dt, weights["dt_proj"]), weights["dt_bias"]))
    y = _scan(b, c, dt, b.op("Mul", dt, x), bb, cc, weights["a"], state["ssm"])
    y = b.op("Add", y, b.op("Mul", x, weights["d"]))
    return form.product(b.op("Mul", y, silu(b, z)), weights["out_proj"])


def _scan(b: Builder, c: Mamba1, dt: str, dx: str, bb: str, cc: str, a: str, state: GraphState) -> str:
    """h_t = exp(dt_t A) h_{t-1} + dx_t B_t, y_t = sum over N of h_t C_t: dt, dx [B, T, D], bb, cc [B, T, N] -> y [B, T, D].

    The state is [B, N, D]; A [D, N] is turned once, at load.
    """
    turned = b.op("Transpose", a, perm=[1, 0])
    body = Builder(in_function=True, inside=f"{b.scope}step.")
    names = {name: f"{b.scope}step.{name}" for name in ("h", "dt", "dx", "b", "c", "h_next", "y")}

    def row(name: str) -> str:
        """[B, D] -> [B, 1, D]."""
        return body.op("Unsqueeze", names[name], body.ints(1))

    def column(name: str) -> str:
        """[B, N] -> [B, N, 1]."""
        return body.op("Unsqueeze", names[name], body.ints(2))

    decayed = body.op("Mul", names["h"], body.op("Exp", body.op("Mul", row("dt"), turned)))
    body.op("Add", decayed, body.op("Mul", row("dx"), column("b")), out=names["h_next"])
    body.op("ReduceSum", body.op("Mul", names["h_next"], column("c")), body.ints(1), keepdims=0, out=names["y"])
    shapes = {"h": [c.d_state, c.d_inner], "dt": [c.d_inner], "dx": [c.d_inner], "b": [c.d_state], "c": [c.d_state]}
    shapes |= {"h_next": shapes["h"], "y": shapes["dt"]}
    values = {
        name: helper.make_tensor_value_info(names[name], TensorProto.FLOAT, ["batch", *shape])
        for name, shape in shapes.items()
    }
    graph = helper.make_graph(
        body.nodes, "step", [values[n] for n in ("h", "dt", "dx", "b", "c")], [values[n] for n in ("h_next", "y")]
    )
    axes = [1, 1, 1, 1]  # time
    outputs = [state.present, b.name("scanned")]
    inputs = (state.past, dt, dx, bb, cc)
    b.ops("Scan", *inputs, outputs=outputs, body=graph, num_scan_inputs=4, scan_input_axes=axes, scan_output_axes=[1])
    b.annotate(outputs[1], ("batch", "time", c.d_inner))
    return outputs[1]


WRITERS = {"portable": write, "custom": write, "ort": write}


def functions(c: Mamba1, opset: int) -> list[onnx.FunctionProto]:
    """None: all its nodes are standard operators."""
    return []
