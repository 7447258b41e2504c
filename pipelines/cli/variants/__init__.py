"""Commands that end in variants of a stored model."""
