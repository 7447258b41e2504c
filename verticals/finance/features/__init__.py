"""Real-time features of card payments: one implementation for training and serving."""
