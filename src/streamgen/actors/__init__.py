"""The engine thread's actors: each one receives, calls a plain object that decides, and sends."""
