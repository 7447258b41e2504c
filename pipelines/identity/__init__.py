"""Who asks, what they may, and the log of who asked what."""
