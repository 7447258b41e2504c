"""The policy: what runs next and what cannot make it; no clock, no thread."""
