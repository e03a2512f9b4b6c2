"""One engine on several ranks whose weights are shards: rank 0 plans, all of them launch the same steps."""
