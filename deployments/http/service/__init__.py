"""What other servers tell of themselves under paths that their clients and gateways call, and tokens."""
