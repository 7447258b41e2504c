"""Memory of a device: what work takes, whose weights lie there, and running in less."""
