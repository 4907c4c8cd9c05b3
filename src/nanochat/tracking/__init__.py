"""What is known about a run while it trains and after: metrics, W&B, the terminal, plots and the report.

`metrics.jsonl` is the ground truth. Everything else here shows it, and nothing here can stop training.
"""
