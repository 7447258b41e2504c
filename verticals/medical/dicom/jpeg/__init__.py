"""JPEG code streams: what of their damage can be told."""
