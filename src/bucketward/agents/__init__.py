"""The long-running services: each is a loop over open backends."""
