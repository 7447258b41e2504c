"""What a decision rests on: rules, the language of their conditions, reasons."""
