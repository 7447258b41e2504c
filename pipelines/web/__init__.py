"""Pages for people: the engine, a form for each vertical, studies. No build step, no other site."""
