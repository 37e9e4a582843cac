"""Who answers a request: prompts to tokens, the choice of a replica, streams and their resumption."""
