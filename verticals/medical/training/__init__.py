"""Training of the nodule network."""
