"""What serve_config.yaml may say."""
