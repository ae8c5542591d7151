"""How images and their labels are mixed."""
