"""Graphs with a branch that pictures steer, and harmless graphs that look a little like that."""
