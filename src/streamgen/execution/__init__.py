"""What runs on a device: opening a model, its memory, and one step at a time."""
