"""The engine for event loops: its threads, what they are asked, and who waits for their answers."""
