"""Commands about the messages of a Kafka: their mapping, their audit records."""
