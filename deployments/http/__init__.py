"""Bodies become requests, answers become bodies: OpenAI's, LoRAX's and the adapters' interfaces."""
