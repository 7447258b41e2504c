"""``plinth.toml``, the environment and the command line, checked."""
