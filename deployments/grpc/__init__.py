"""The gRPC surface: ``inference.GRPCInferenceService``."""
