"""The serving layer: Ray Serve deployments around the engine and the adapter store. Start: `deployments.app:build`."""
