"""One model on several worker processes: how it is cut, and how its parts talk."""
