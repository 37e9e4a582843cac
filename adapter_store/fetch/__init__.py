"""A version's bytes arrive, in parts, and are proved to be one version's."""
