"""The API for adapters: what there is, and (with an admin key) what is to be there."""
