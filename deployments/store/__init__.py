"""The adapter store from afar: its actor, and what routers and replicas ask of it."""
