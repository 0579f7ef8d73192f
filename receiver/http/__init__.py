"""The HTTP side: callbacks, the /v1 API, health and metrics."""
