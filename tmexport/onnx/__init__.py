"""ONNX: one graph for prefill and decode, in three forms (docs/onnx.md), written and verified here; `runtime_ref.ort` runs it."""
