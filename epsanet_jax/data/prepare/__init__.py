"""`epsanet prepare`, pictures into ArrayRecord. command: the whole; layouts: what SRC is; shards: DST."""
