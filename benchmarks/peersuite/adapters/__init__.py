"""The engines, one file each: how each is asked to do a work."""
