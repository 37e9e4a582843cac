"""Where adapters come from: folders, buckets, web servers and hubs. See docs/sources.md."""
