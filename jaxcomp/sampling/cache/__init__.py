"""Cache policies, one file each: which steps of a sampler skip the trunk, and what stands in for it."""
