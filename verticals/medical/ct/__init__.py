"""What is measured in a CT: lungs, airway, body."""
