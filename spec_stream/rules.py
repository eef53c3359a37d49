"""The rules of acceptance by name, for those that must not wait for jax: what
they do is in `accept`."""

RULES = ("exact", "rejection", "typical")
LOSSY = ("typical",)
