"""From documents to batches: fetching, tokenizing, shards, bytes of a token, the validation stream, data orders."""
