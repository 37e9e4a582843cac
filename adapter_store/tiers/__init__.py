"""Images in memory and on disk: one load for all who ask, what is kept, what is warm."""
