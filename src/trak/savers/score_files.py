"""Score files, written by a thread while the next scores are being computed."""

import queue
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trak.errors import PhaseError, StoreCorruptedError
from trak.savers.arrays import RowFile, new_array
from trak.savers.filesystem import replace_json
from trak.savers.layout import StoreLayout, read_experiment
from trak.savers.locks import changing, reading

_SYNC_BYTES = 256 << 20

Item = tuple[int, NDArray[Any]]
Record = dict[str, Any]


class ScoreFiles:
    """The files below `scores/`, and the records that vouch for them.

    Args:
        layout: where things lie.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self._layout = layout

    def write(
        self,
        sets: Sequence[tuple[str, str | None, Record]],
        blocks: Iterable[Item],
        info: Mapping[str, Any],
    ) -> list[NDArray[Any]]:
        """Replaces several files with one pass over their scores.

        A reader or a crash sees the old files or new ones, and no record that vouches for
        another file than the one that is there.

        Args:
            sets: experiment, name of a further ridge or None, and the record.
            blocks: first row and scores `[rows, m]` of consecutive stretches, the sets'
                columns side by side. A block may be overwritten when two more have been
                given out.
            info: what the scores were made from.

        Returns:
            The scores of each set, whatever other processes write afterwards.
        """
        start = 0
        with ExitStack() as held, ExitStack() as stack:
            files: list[tuple[RowFile, slice]] = []
            for name, ridge, record in sets:
                path = self._path(name, ridge, record)
                path.parent.mkdir(exist_ok=True)
                shape = (self._layout.num_rows, record["num_targets"])
                file = new_array(path, shape, self._layout.score_dtype)
                part = slice(start, start + shape[1])
                files.append((stack.enter_context(file), part))
                start = part.stop
            _write_all(files, blocks)
            held.enter_context(changing(self._layout.save_dir))
            self._vouch(sets, None)
            stack.close()  # gives the files their names
            self._vouch(sets, info)
            return [self._mapped(*each) for each in sets]

    def read(self, exp_name: str, ridge: str | None) -> NDArray[Any]:
        """Maps a file that its record vouches for.

        Args:
            exp_name: the experiment, which exists.
            ridge: the name of a further ridge, or None.

        Returns:
            `[n, m]`; what a caller changes stays in memory.
        """
        with reading(self._layout.save_dir):
            record = read_experiment(self._layout.experiment(exp_name))
            return self._read(exp_name, ridge, record)

    def _read(self, exp_name: str, ridge: str | None, record: Record) -> NDArray[Any]:
        known = record["scores_finalized"] if ridge is None else _ridges(record).get(ridge)
        if not known:
            at = "" if ridge is None else f" at the ridge {ridge}"
            raise PhaseError(
                f"Experiment {exp_name!r} has no scores yet{at}. Call "
                f"finalize_scores(exp_name={exp_name!r}) first."
            )
        path = self._path(exp_name, ridge, record)
        if not path.exists():
            raise StoreCorruptedError(f"{path} is gone; call finalize_scores again.")
        return self._mapped(exp_name, ridge, record)

    def _mapped(self, exp_name: str, ridge: str | None, record: Record) -> NDArray[Any]:
        path = self._path(exp_name, ridge, record)
        shape = (self._layout.num_rows, record["num_targets"])
        if ridge is None:
            again = f"finalize_scores(exp_name={exp_name!r})"
        else:
            again = f"sweep([{exp_name!r}], lambda_regs=...)"
        remedy = f"Call {again} again; no gradient is recomputed."
        return RowFile(path, shape, self._layout.score_dtype, remedy).read()

    def _path(self, exp_name: str, ridge: str | None, record: Record) -> Path:
        if ridge is None:
            return self._layout.save_dir / record["scores_path"]
        return self._layout.save_dir / "scores" / f"ridge={ridge}" / f"{exp_name}.mmap"

    def _vouch(
        self,
        sets: Sequence[tuple[str, str | None, Record]],
        info: Mapping[str, Any] | None,
    ) -> None:
        for name in dict.fromkeys(name for name, _, _ in sets):
            path = self._layout.experiment(name)
            record = read_experiment(path)
            for ridge in [ridge for other, ridge, _ in sets if other == name]:
                if ridge is None:
                    record |= {**(info or {}), "scores_finalized": int(info is not None)}
                else:
                    # such scores hold whatever ridge the checkpoints are factored with
                    kept = info and {k: v for k, v in info.items() if k != "factors"}
                    record["ridges"] = {**_ridges(record), ridge: kept}
            replace_json(path, record)


def _ridges(record: Record) -> dict[str, Any]:
    return record.get("ridges", {})


def _write_all(files: list[tuple[RowFile, slice]], blocks: Iterable[Item]) -> None:
    writer = _Writer(files)
    writer.start()
    try:
        for block in blocks:
            writer.give(block)
    finally:
        writer.finish()
    for file, _ in files:
        file.sync()


class _Writer(threading.Thread):
    """Writes blocks in the order in which they are given."""

    def __init__(self, files: list[tuple[RowFile, slice]]) -> None:
        super().__init__(name="trak-writer", daemon=True)
        self._files = files
        self._waiting: queue.Queue[Item | None] = queue.Queue(maxsize=1)
        self._error: BaseException | None = None

    def give(self, block: Item) -> None:
        """Waits until the block before the last is written; raises what went wrong.

        Args:
            block: first row and scores.
        """
        self._waiting.put(block)
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        self._waiting.put(None)
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        unsynced = 0
        while (item := self._waiting.get()) is not None:
            if self._error is not None:
                continue  # the next give() raises it
            try:
                unsynced += self._write(*item)
                if unsynced > _SYNC_BYTES:
                    unsynced = 0
                    for file, _ in self._files:
                        # the disk works along, and scores do not push the rows, which
                        # will be read again, out of the system's cache
                        file.sync(forget=True)
            except BaseException as error:
                self._error = error

    def _write(self, start: int, block: NDArray[Any]) -> int:
        rows = np.arange(start, start + len(block))
        for file, part in self._files:
            file.write(rows, block[:, part], sync=False)
        return block.nbytes
