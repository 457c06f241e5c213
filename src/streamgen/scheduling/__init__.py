"""The decisions: which sequences run in each step, with which pages. Pure, driven by plain calls."""
