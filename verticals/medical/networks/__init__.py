"""Anybody's network on a volume: read its own metadata, prepare as it says, and the way back."""
