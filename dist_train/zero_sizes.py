"""DeepSpeed's sizes, in elements: what its generated config says, and what the memory formulas count with."""

REDUCE_BUCKET_SIZE = 50_000_000
ALLGATHER_BUCKET_SIZE = 50_000_000
STAGE3_PREFETCH_BUCKET_SIZE = 50_000_000
# Smaller parameters stay whole on every rank.
STAGE3_PARAM_PERSISTENCE_THRESHOLD = 10_000
STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000
STAGE3_MAX_REUSE_DISTANCE = 1_000_000_000
SUB_GROUP_SIZE = 1_000_000_000
