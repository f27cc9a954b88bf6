"""Packaged YAML: models, scenarios and published targets."""
