"""Hostile and corrupt model files, made by code: every one must be refused, and none may act.

Those that carry code only ever touch a marker file. Each case is a function that writes one file
into a folder and returns its path; its family is one of the classes of the corpus. One module holds
the families of one kind of file.
"""

from . import damaged, onnx_files, onnx_graphs, others, pickles, scripts, weights
from .case import ARCH, CASES, Case
from .graph import function, graph
from .scripts import SCRIPT, acts_at_load, writes_a_file_at_forward

FAMILIES = (pickles, scripts, onnx_files, onnx_graphs, damaged, weights, others)

__all__ = [
    "ARCH",
    "CASES",
    "FAMILIES",
    "SCRIPT",
    "Case",
    "acts_at_load",
    "function",
    "graph",
    "writes_a_file_at_forward",
]
