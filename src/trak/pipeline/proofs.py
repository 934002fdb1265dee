"""Rows whose gradients were computed in a way that later batches disproved."""

from trak.batches import Batch
from trak.errors import StoreMismatchError
from trak.gradient_computers import AbstractGradientComputer
from trak.pipeline.chance import random_outputs
from trak.savers import AbstractSaver


def refuse_disproved(
    saver: AbstractSaver,
    model_id: int,
    computer: AbstractGradientComputer,
    batch: Batch,
) -> None:
    """Refuses to go on beside rows that may be wrong, in this process and later ones.

    Args:
        saver: the store.
        model_id: the checkpoint.
        computer: has just computed a batch.
        batch: that batch, normalized.

    Raises:
        StoreMismatchError: if parameters were computed by rules for the checkpoint's rows,
            and the rules turned out not to give their gradients.
    """
    known = saver.coverage(model_id)
    if known is None:
        return
    names = known.get("disproved")
    coverage = computer.coverage()
    if not names and computer.disproved and coverage is not None:
        if known["exactly"] >= coverage.exactly:
            return
        names = sorted(computer.disproved)
        saver.record_coverage(model_id, {**known, "disproved": names})
    if not names:
        return
    random = random_outputs(computer, batch)
    if random is not None:
        raise StoreMismatchError(
            f"Rows of model_id={model_id} in this store cannot be checked, since the model "
            f"is random: outputs of the same samples were {random[0]} once and {random[1]} "
            "the next time, in evaluation mode. Look for dropout or noise that does not "
            "depend on self.training, mend it, and begin another save_dir."
        )
    raise StoreMismatchError(
        f"Rows of model_id={model_id} in this store may be wrong: gradients of "
        f"{names[:3]} were taken sample by sample from the rows that their layers saw, "
        "and a later batch shows that the model picks or reorders samples inside, or "
        "reads weights around their layers for some. Begin another save_dir with "
        "gradient_computer=FunctionalGradientComputer."
    )
