"""Checkpoint containers: one file per container behind the interface of `base`; `open` picks the right one."""
