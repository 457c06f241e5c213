"""Ways to run programs: what a backend must do, the torch reference, own CPU kernels, and which one is taken."""
