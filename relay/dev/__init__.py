"""Trying the relay out: a local Kafka, a player of Rocket.Chat, a tail of the topics."""
