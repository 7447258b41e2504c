"""State on disk: whole snapshots, or parts larger than memory."""
