"""Branches of an ONNX graph that pictures can steer: architectural backdoors, found and fired."""

from wm_victim.branches.look import look_at_graph
from wm_victim.branches.report import Branch, GraphReport

__all__ = ["Branch", "GraphReport", "look_at_graph"]
