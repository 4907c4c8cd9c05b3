"""Where text comes from, and the parquet shards every later stage reads it from."""
