"""Bytes to images and answers to bytes: the Open Inference Protocol v2, and plain bodies."""
