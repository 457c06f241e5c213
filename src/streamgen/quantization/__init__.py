"""Storage formats of weights: what a block holds (`base`), and each format's reference dequantization."""
