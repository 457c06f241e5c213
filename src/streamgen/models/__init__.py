"""Model families: what ops one step runs, and the shape of a checkpoint's model."""
