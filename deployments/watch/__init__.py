"""The watch over all replicas of a node: what their counters, added up, say of the traffic. Without torch, beside the
classifier, so that no request waits for it."""
