"""What a model is, how it lies on disk, and its weights."""
