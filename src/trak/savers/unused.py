"""Experiments that were begun with another number of targets, and never got one."""

from contextlib import ExitStack

from trak.savers.filesystem import sync_directory
from trak.savers.journal import Journal
from trak.savers.layout import StoreLayout, read_experiment


def discard_unused(layout: StoreLayout, exp_name: str, num_targets: int) -> bool:
    """Frees the name of an experiment that holds nothing; the store's lock is held.

    A process that is about to write its first target finds its files replaced, and raises.

    Args:
        layout: where things lie.
        exp_name: the experiment.
        num_targets: how many targets it is to have.

    Returns:
        Whether there was one, of another number of targets and without any row or score.
    """
    path = layout.experiment(exp_name)
    record = read_experiment(path) if path.exists() else {"num_targets": num_targets}
    count = record["num_targets"]
    if count == num_targets or record["scores_finalized"] or record.get("ridges"):
        return False
    ids = [int(p.name) for p in layout.save_dir.iterdir() if p.name.isdecimal()]
    with ExitStack() as held:
        for model_id in ids:
            journal = layout.target_journal(exp_name, model_id)
            if journal.exists():
                known = Journal(journal, count)
                held.enter_context(known.held())
                if known.done.any():
                    return False
        for model_id in ids:
            layout.target_journal(exp_name, model_id).unlink(missing_ok=True)
            for file in layout.target_files(exp_name, model_id):
                file.unlink(missing_ok=True)
            sync_directory(layout.checkpoint(model_id))
        path.unlink()
    sync_directory(path.parent)
    return True
