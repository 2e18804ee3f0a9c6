"""Rocket.Chat Omnichannel webhooks onto Kafka: durable before 200, exactly once, in order per chat."""

__version__ = "0.1.0"
