"""The original network's logits from elsewhere: another server, or a deployment of the user's own."""
