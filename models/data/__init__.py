"""Manifests, and the windows that networks are trained and judged on."""
