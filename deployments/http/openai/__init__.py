"""The OpenAI API: wire models, translation to engine requests, replies and streams."""
