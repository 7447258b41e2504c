"""The search for the fastest way to compute a model that loses no more than is allowed."""
