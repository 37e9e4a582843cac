"""Answers that later requests may refer to, for a while: bounded in bytes and in age, each its key's alone."""
