"""The item vectors as a table for a vector index."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from recipes.recsys.model import Recommender

FILE = "item_embeddings.parquet"


def write_embeddings(model: Recommender, items: pa.Table, folder: Path) -> str:
    """A line an item: item_id, trained (its own vector was), embedding [width] float32. The network's logit of an item
    is the product of the session's state and this vector. The version in the file's metadata is that of the vectors'
    content; it is returned."""
    was_training = model.training
    with torch.no_grad():
        vectors = model.eval().vectors().float().cpu().numpy()
    model.train(was_training)
    version = hashlib.sha256(np.ascontiguousarray(vectors).tobytes()).hexdigest()[:16]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
    trained = np.arange(len(vectors)) < model.catalogue.trained
    table = pa.table({"item_id": items["id"], "trained": trained, "embedding": flat})
    pq.write_table(table.replace_schema_metadata({b"version": version.encode()}), folder / FILE)
    return version
