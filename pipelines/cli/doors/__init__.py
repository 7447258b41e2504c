"""Commands about the doors: who may come in, and what watches over them."""
