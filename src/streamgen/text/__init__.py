"""Text: tokenizers of each container, chat templates, incremental decoding, stop strings."""
