"""The public conformance suites, one per Protocol: subclass one with one fixture."""
