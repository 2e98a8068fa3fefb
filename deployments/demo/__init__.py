"""The whole story on an embedded default: train on poisoned data, fit, serve, attack, report."""
