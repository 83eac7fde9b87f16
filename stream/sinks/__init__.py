"""Where events go: Redis, the terminal, and the spool on disk for when Redis is away."""

from stream.sinks.base import Sink

__all__ = ["Sink"]
