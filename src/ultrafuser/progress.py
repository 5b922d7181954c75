"""The one progress bar: of trainings, measurements and answers."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class ProgressBar:
    """A bar on standard error, from the first `update` to the end of its `with` block.

    Where standard error is no terminal, a line says that the work has begun, and one follows with every note.

    Args:
        title: what is going on.
        keep: leave the finished bar on the screen.
        quiet: show nothing; one of several processes speaks for all.
    """

    def __init__(self, title: str, *, keep: bool = False, quiet: bool = False) -> None:
        self.title = title
        self._console = Console(stderr=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=not keep,
            disable=quiet or not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, note: str | None = None) -> None:
        """Move the bar.

        Args:
            done: steps that are done.
            total: all steps.
            note: shown behind the bar until there is another, such as the latest loss.
        """
        if self._task is None:
            self._task = self._bar.add_task(self.title, total=total, note="")
            self._bar.start()
            if self._bar.disable:
                self._console.print(f"{self.title} ...", highlight=False)
        self._bar.update(self._task, completed=done, total=total)
        if note is not None:
            self._bar.update(self._task, note=note)
            if self._bar.disable:
                self._console.print(f"{self.title}: step {done}/{total}, {note}", highlight=False)
