"""`epsanet prepare`: images into ArrayRecord. dataset: the whole; layouts: the source; shards: the output."""
