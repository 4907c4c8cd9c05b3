"""From raw text to a chat model you trained yourself."""
