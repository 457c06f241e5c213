"""Bridges to other libraries, each with an extra of its own. Nothing here is imported by the rest of the package."""
