"""What is done with the topics of a stream afterwards: decisions again, dead letters back."""
