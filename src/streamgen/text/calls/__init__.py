"""Calls of tools in a model's output: how each kind of template has them written, and how they are read."""
