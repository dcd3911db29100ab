"""What a training really needed: the peak of one step, held against the prediction in RUN/memory.json."""

from __future__ import annotations

import traceback

from dist_train.activation_profile import measure_for
from dist_train.errors import UnmeasuredError
from dist_train.fit import setting_of
from dist_train.loop import Training
from dist_train.memory import estimate
from dist_train.memory_facts import model_facts
from dist_train.plan import need_of
from dist_train.recipe import Recipe
from dist_train.rundir import read_json, write_json


def write_memory_record(training: Training, recipe: Recipe) -> None:
    """On all ranks; rank 0 writes. Nothing when the attempt was too short to measure a step."""
    run, config, plan, engine = training.run, training.config, training.plan, training.engine
    seen = training.memory
    peaks = engine.gather_objects(seen.peak)
    shapes = [shapes for shapes in engine.gather_objects(seen.shapes) if shapes]
    first = tuple(sorted({one[0] for one in shapes}))
    later = tuple(sorted({shape for one in shapes for shape in one[1:]}))
    if engine.rank != 0 or None in peaks:
        return
    record = {"step": seen.step, "shapes": sorted({*first, *later}), "measured": max(peaks), "measured_by_rank": peaks}
    try:
        facts = model_facts(config, recipe, read_json(run.data_facts), plan.device, measure_for)
        assert facts is not None
        need = need_of(config, plan.device, plan.world_size)
        setting = setting_of(need, plan.strategy, plan.micro_batches, (first, later), (1, first[0][1]))
        predicted = estimate(facts.profile(plan.activation_checkpointing), setting)
    except UnmeasuredError:
        # No reason to fail a training that is done.
        traceback.print_exc()
        return
    error = predicted.peak / max(peaks) - 1
    write_json(run.path / "memory.json", {**record, "predicted": predicted.to_json(), "error": error})
