"""How families of models write reasoning and calls of tools, read from their text as it comes."""
