"""The Kafka door: a topic in, decisions out, exactly once."""
