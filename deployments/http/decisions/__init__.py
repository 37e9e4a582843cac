"""/v1/decisions: questions about a text, answered by the probabilities of their answers."""
