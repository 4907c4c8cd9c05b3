"""The network: tokens in, next-token distribution out."""
