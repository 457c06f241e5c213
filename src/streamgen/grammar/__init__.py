"""Structured output: what an output type means as a grammar, and which tokens a grammar allows."""
