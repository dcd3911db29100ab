"""Turn guards off, one at a time, and see the test that fails.

    python -m benchmarks.guards            # all of them, some minutes
    python -m benchmarks.guards hash lock  # those whose name holds a word

Each guard is switched off in a copy of the project; its test must pass there before and fail after. Prints a table.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Guard:
    name: str
    file: str
    old: str
    new: str
    test: str
    """File and -k expression."""


LOOP, FILES = "tests/test_dist_train_loop.py", "tests/test_dist_train_checkpoint_files.py"
DOOR, BAD = "tests/test_front_door.py", "tests/test_front_door_bad_input.py"
DATA, UNITS = "tests/test_recipes_ticket_routing_data.py", "tests/test_launcher_units.py"
FETCH, STAGE = "tests/test_dist_train_fetch.py", "tests/test_dist_train_stage.py"
CONFIG, TASK = "tests/test_dist_train_config_io.py", "tests/test_recipes_ticket_routing_task.py"

GUARDS = (
    Guard("loss is divided by the count of the whole step", "dist_train/engine.py",
          "(self.world_size / total_weight)", "(1.0 / total_weight)", f"{LOOP} every_split"),
    Guard("DDP's buckets are laid out before the first step", "dist_train/loop.py",
          "            engine.warm_up(engine.to_device(data.batches[0]))\n", "            pass\n",
          f"{LOOP} bit_identical"),
    Guard("dropout is seeded by step, micro-batch and rank", "dist_train/loop.py",
          "    torch.manual_seed(derive_seed(DROPOUT", "    (derive_seed(DROPOUT", f"{LOOP} bit_identical"),
    Guard("moments of the optimizer are restored", "dist_train/checkpoint.py",
          "optimizer.state[parameter][kind] = tensor.to(device)", "pass", f"{LOOP} bit_identical"),
    Guard("a staged stop does not evaluate", "dist_train/loop.py",
          "state.step, plan.steps):", "state.step, last_step):", f"{LOOP} early_stopping"),
    Guard("a step that is not finite is skipped", "dist_train/loop.py",
          "finite = bool(np.isfinite(gradient_norm))", "finite = True", f"{LOOP} skipped_alike"),
    Guard("three such steps in a row stop the run", "dist_train/loop.py",
          "_MOST_NONFINITE = 3", "_MOST_NONFINITE = 9", f"{LOOP} three_steps_in_a_row"),
    Guard("a rank with no rows counts nothing", "dist_train/loop.py",
          "if len(part) else np.zeros(1)", "if len(part) else np.ones(1)", f"{LOOP} last_batch or does_not_divide"),
    Guard("masked rows are selected away, not multiplied", "dist_train/task.py",
          "torch.where(weight > 0, loss_per_row * weight, torch.zeros_like(loss_per_row))", "(loss_per_row * weight)",
          "tests/test_dist_train_task.py weight_zero"),
    Guard("the ranks of the plan are those that started", "dist_train/resume.py",
          "if engine.world_size != plan.world_size:", "if False:", f"{LOOP} not_the_planned"),
    Guard("evaluation puts rows back in their order", "dist_train/evaluate.py",
          "back[expected] = place", "back[:] = place", f"{LOOP} every_row_once"),
    Guard("a shard is compared with its hash", "dist_train/checkpoint_files.py",
          'if digest != shard["sha256"]:', "if False:", f"{FILES} flipped_bit"),
    Guard("the manifest is compared with its own hash", "dist_train/checkpoint_files.py",
          "    if not intact:", "    if False:", f"{FILES} flipped_bit"),
    Guard("a checkpoint exists by its rename alone", "dist_train/checkpoint_files.py",
          "    os.rename(temporary, final)\n", "    shutil.copytree(temporary, final, dirs_exist_ok=True)\n",
          f"{FILES} system_call"),
    Guard("the best that a fallback knows is kept", "dist_train/checkpoint_files.py",
          "protected = {_best_step(step_folder(root, step)) for step in committed_steps(root)[:keep_last]}",
          "protected: set[int] = set()", f"{FILES} pruning"),
    Guard("evaluating another checkpoint leaves best/ alone", "dist_train/finish.py",
          "    if engine.rank == 0 and is_best:\n", "    if engine.rank == 0:\n", f"{DOOR} made_again"),
    Guard("what nohup set to be ignored stays so", "launcher/process.py",
          "signal.getsignal(signal.SIGHUP) is signal.SIG_IGN", "False", f"{DOOR} nohup"),
    Guard("weights are fp32 whatever they were stored in", "recipes/ticket_routing/task.py",
          "dtype=torch.float32,", 'dtype="auto",', f"{TASK} half_precision"),
    Guard("W&B gets its last lines from a run that stops", "dist_train/track.py",
          "            ending.join(_CLOSE_TIMEOUT_S)\n", "", "tests/test_dist_train_track.py stops_before"),
    Guard("no valid checkpoint is never a fresh start", "dist_train/resume.py",
          'if damages or any(record["event"] == "checkpoint_committed" for record in read_lines(run.events)):',
          "if False:", f"{DOOR} all_checkpoints_damaged"),
    Guard("a run directory is locked", "dist_train/rundir.py",
          "fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", f"{UNITS} live_process"),
    Guard("files are replaced whole", "dist_train/rundir.py",
          'with open(temporary, "w", encoding="utf-8") as stream:', 'with open(path, "w", encoding="utf-8") as stream:',
          f"{UNITS} written_whole"),
    Guard("ranks die with the launcher", "dist_train/worker.py",
          "    _die_with_launcher()\n", "", f"{DOOR} killed_run and launcher and 2"),
    Guard("a killed rank is noticed and named", "launcher/process.py",
          "self._vanished[rank] = pid", "pass", f"{DOOR} killed_run and rank and 2"),
    Guard("a rank hears a signal before its imports", "dist_train/worker.py",
          "    stop = StopFlag()\n    stop.install()\n", "    stop = StopFlag()\n", f"{DOOR} still_import"),
    Guard("output that nobody reads stops nothing", "launcher/cli.py",
          "    make_output_steady()\n", "", f"{DOOR} nohup"),
    Guard("an edited config needs a word to go on", "dist_train/worker.py",
          '"config": result_fingerprint(config),', "", f"{DOOR} edited_between"),
    Guard("a line that is cut short is taken back", "dist_train/events.py",
          "if written < len(line):", "if False:", f"{UNITS} cuts_short"),
    Guard("--debug on several ranks is refused before the run exists", "launcher/start.py",
          "    if debug:\n        check_one_rank(plan)\n", "",
          f"{DOOR} debug_runs"),
    Guard("the missing rank of a hang is named", "dist_train/heartbeat.py",
          "if now - when > _SILENT_S and", "if False and", f"{UNITS} wait_for"),
    Guard("a rank that died of waiting is not the one that is missing", "launcher/process.py",
          "        if timed_out:\n", "        if False:\n", f"{UNITS} nccl"),
    Guard("several nodes are refused where one machine starts", "launcher/preflight.py",
          "    if plan.nodes > 1:\n", "    if False:\n", f"{BAD} nodes"),
    Guard("the planned device is the one that torch has", "dist_train/resume.py",
          "if engine.device.type != plan.device:", "if False:", f"{LOOP} device"),
    Guard("variables of another launcher are dropped", "launcher/accelerate_config.py",
          'if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))', "if name", f"{UNITS} another_launcher"),
    Guard("free space is checked before the start", "launcher/preflight.py",
          "if free_mib < _LEAST_FREE_MIB:", "if False:", f"{BAD} full_disk_is_refused"),
    Guard("the output folder is tried by writing", "launcher/preflight.py",
          "probe.write_bytes(", "bytes(", f"{BAD} read_only"),
    Guard("an unknown key is refused", "dist_train/config_io.py",
          'problems.append(f"{where}: {_unknown(name, model)}")', "pass", f"{CONFIG} wrong_in_a_file"),
    Guard("tags and anchors are refused", "dist_train/yaml_data.py",
          'if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:', "if False:",
          f"{CONFIG} unsafe"),
    Guard("what defines the result cannot change on resume", "dist_train/config_io.py",
          'if not _is_resumable(name):', "if False:",
          f"{CONFIG} resume_lets"),
    Guard("line ends of Unicode survive config.yaml", "dist_train/config_io.py",
          "allow_unicode=words.isprintable()", "allow_unicode=True", f"{CONFIG} written_and_read"),
    Guard("near-duplicates stay on one side", "recipes/ticket_routing/split.py",
          "result[members[starts[group] : starts[group + 1]]] = split", "result[members[starts[group]]] = split",
          f"{DATA} both_sides"),
    Guard("a pair is compared before it is united", "recipes/ticket_routing/duplicates.py",
          "return common >= THRESHOLD * (len(first) + len(second) - common)", "return True", f"{DATA} threshold"),
    Guard("a time never lies on both sides of a cut", "recipes/ticket_routing/split.py",
          'cuts.append(int(np.searchsorted(ordered, ordered[min(place, len(times) - 1)], side="left")))',
          "cuts.append(place + 3)", f"{DATA} by_time"),
    Guard("labels that training lacks are refused", "recipes/ticket_routing/data.py",
          "        if unknown:\n", "        if False:\n", f"{DATA} cannot_be_split"),
    Guard("prepared data is keyed by content", "recipes/ticket_routing/data.py",
          '"content": content, ', "", f"{DATA} found_again"),
    Guard("padding is masked", "recipes/ticket_routing/model.py",
          "attention_mask = token_mask[:, None, None, :]", "attention_mask = None", f"{TASK} padding"),
    Guard("pickled weights are refused", "recipes/ticket_routing/hub.py",
          'if not any(folder.glob("*.safetensors")):', "if False:", f"{TASK} pickled"),
    Guard("hub: pickled weights are refused", "dist_train/fetch.py",
          "        raise _no_weights(what, key, names)\n", "        chosen = names\n", f"{FETCH} no_safe_model"),
    Guard("hub: a fetched file is what its hash says", "dist_train/fetch.py",
          "return None if damaged else found", "return found", f"{FETCH} flipped_bit"),
    Guard("hub: an arriving file is what the hub says", "dist_train/fetch.py",
          "return sha256 if file.blob_id in (None, blob_id) else None", "return sha256", f"{FETCH} arrives_damaged"),
    Guard("hub: one process downloads, the other waits", "dist_train/fetch.py",
          'with FileLock(store / ".lock"):', "if FileLock:", f"{FETCH} two_at_once"),
    Guard("hub: whether it can be reached is tried first", "dist_train/hub.py",
          "    if cause is not None:\n        raise unreachable", "    if False:\n        raise unreachable",
          "tests/test_recipes_ticket_routing_hub.py out_of_reach"),
    Guard("hub: the resolver cannot block", "dist_train/hub.py",
          "thread.join(CONNECT_S + 0.5)", "thread.join()", f"{FETCH} resolver"),
    Guard("hub: offline asks nothing", "dist_train/fetch.py",
          "        raise _missing_offline(what, store, commit)\n", "        pass\n", f"{FETCH} offline"),
    Guard("hub: ranks read the fetched folder", "recipes/ticket_routing/hub.py",
          'if "pretrained" not in facts:', "if True:",
          "tests/test_recipes_ticket_routing_hub.py no_rank_asks"),
    Guard("hub: a run is pinned", "dist_train/start_run.py",
          "        if asked != commit:\n", "        if False:\n",
          "tests/test_recipes_ticket_routing_hub.py trains_offline"),
    Guard("stage: a copy is read back", "dist_train/stage.py",
          'if copied[name]["sha256"] != _sha256(temporary / name):', "if False:", f"{STAGE} does_not_keep"),
    Guard("stage: a copy that was cut short is made again", "dist_train/stage.py",
          '(target / name).stat().st_size == described["bytes"]', "True", f"{STAGE} cut_short"),
    Guard("stage: a copy of other content is made again", "dist_train/stage.py",
          "(source / name).read_bytes() == (target / name).read_bytes()", "True", f"{STAGE} cut_short"),
    Guard("stage: the other ranks wait", "dist_train/stage.py",
          "        _wait_for_copy(run, attempt)\n", "        pass\n", f"{STAGE} other_ranks"),
    Guard("stage: space is looked at first", "dist_train/stage.py",
          "    if needed <= free:\n", "    if True:\n", f"{STAGE} too_little"),
    Guard("stage: ranks read the copy", "dist_train/worker.py",
          "staged_folder(run, attempt, facts, stage_to)", 'Path(facts["folder"])', f"{STAGE} two_ranks"),
    Guard("stage: where data lies changes no fingerprint", "dist_train/config_io.py",
          '    "data.stage_to",\n', "", f"{STAGE} changes_no_fingerprint"),
    Guard("labels are text in the report", "dist_train/report.py",
          'autoescape=name.endswith(".html.j2")', "autoescape=False", f"{DOOR} any_label"),
    Guard("differences are paired", "dist_train/report.py",
          "for metric, value in model.values(weights).items():",
          "for metric, value in model.values(np.roll(weights, name != 'model')).items():",
          "tests/test_dist_train_report.py equal_predictions"),
    Guard("W&B's failure ends nothing", "dist_train/track.py",
          "except Exception as error:  # no host answers", "except ZeroDivisionError as error:  # no host answers",
          "tests/test_dist_train_track.py host"),
)  # fmt: skip


def main(words: list[str]) -> int:
    chosen = [guard for guard in GUARDS if not words or any(word in guard.name for word in words)]
    unseen = []
    print("| guard that was turned off | test that then failed |\n|---|---|", flush=True)
    for guard in chosen:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / "copy"
            ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis")
            shutil.copytree(ROOT, copy, ignore=ignored)
            seen = _fails_without(guard, copy)
        print(f"| {guard.name} | {seen or '**none**'} |", flush=True)
        if seen is None:
            unseen.append(guard.name)
    return len(unseen)


def _fails_without(guard: Guard, copy: Path) -> str | None:
    """The first test that fails without the guard; None if all pass."""
    path = copy / guard.file
    text = path.read_text()
    assert text.count(guard.old) == 1, f"{guard.name}: {text.count(guard.old)} places in {guard.file}"
    path.write_text(text.replace(guard.old, guard.new))
    file, _, expression = guard.test.partition(" ")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file, "-k", expression],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return failed[0].partition("::")[2] if failed else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
