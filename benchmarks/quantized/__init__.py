"""What weights in few bits cost in quality, and what they save in bytes."""
