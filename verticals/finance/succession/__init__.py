"""How one version of the model follows another: champion, challenger, drift."""
