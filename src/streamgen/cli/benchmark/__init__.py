"""What `streamgen bench` measures, and how."""
