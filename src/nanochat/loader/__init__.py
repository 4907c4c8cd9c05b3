"""From text shards to training batches: tokenise once, order by seed, pack without waste, deliver in step."""
