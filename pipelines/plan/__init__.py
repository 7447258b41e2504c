"""How many lanes does it take? The batcher that serves, in virtual time, on measured costs."""
