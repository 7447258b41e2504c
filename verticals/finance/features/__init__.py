"""Real-time features of card payments: one implementation for training and serving."""

from plinth.compiled import extended

__path__ = extended(__path__, __name__)
