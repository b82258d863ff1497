"""Which placement is fastest: profiles, cost model, search, dry run."""
