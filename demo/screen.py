"""The demo's screen: what the fleet and the suite do, drawn from one scene; or a line of log per event."""

from __future__ import annotations

import io
import re
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.layout import Layout
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

WIDTH, HEIGHT = 132, 42
_EVENTS_SHOWN = 11


@dataclass(frozen=True, slots=True)
class SlotRow:
    """One slot's day: how much of its quota is done, under way and lost."""

    keyword: str
    quota: int
    succeeded: int
    failed: int
    leased: int
    expired: int


@dataclass(frozen=True, slots=True)
class ExitRow:
    """One exit and its counted uses."""

    name: str
    endpoint: str
    use_count: int
    cap: int
    toggles: int


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One live session."""

    client: str
    keyword: str
    stage: str
    page: int
    total: int
    products: int
    eta_seconds: float | None


@dataclass(slots=True)
class Scene:
    """All that is shown. The demo fills it; the screen only reads it."""

    started: float = field(default_factory=time.monotonic)
    stage: str = "starting"
    slots: list[SlotRow] = field(default_factory=list)
    exits: list[ExitRow] = field(default_factory=list)
    sessions: list[SessionRow] = field(default_factory=list)
    leases: int = 0
    clients_online: int = 0
    results: int = 0
    pages: int = 0
    products: int = 0
    pages_per_second: float = 0.0
    check_ins_pending: int = 0
    events: deque[tuple[float, str, str]] = field(default_factory=lambda: deque(maxlen=200))

    def elapsed_seconds(self) -> float:
        """Returns how long the demo has run."""
        return time.monotonic() - self.started


class Screen(Protocol):
    """Shows a scene while the demo runs."""

    def __enter__(self) -> Screen:
        """Begins to show."""

    def __exit__(self, *_: object) -> None:
        """Ends."""

    def event(self, text: str, style: str = "") -> None:
        """Tells that something happened."""

    def refresh(self) -> None:
        """Draws the scene anew."""


class PlainScreen:
    """A line per event and a line of figures every few seconds: for logs."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._next_figures = 0.0

    def __enter__(self) -> PlainScreen:
        """Nothing to begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def event(self, text: str, style: str = "") -> None:
        """Prints the event."""
        self._scene.events.append((self._scene.elapsed_seconds(), text, style))
        print(f"{self._scene.elapsed_seconds():6.1f} s  {text}", flush=True)

    def refresh(self) -> None:
        """Prints the figures, at most every 5 seconds."""
        scene = self._scene
        if scene.elapsed_seconds() < self._next_figures:
            return
        self._next_figures = scene.elapsed_seconds() + 5
        print(
            f"{scene.elapsed_seconds():6.1f} s  {scene.stage}: {scene.results} results, {scene.leases} leases, "
            f"{len(scene.sessions)} live sessions, {scene.pages_per_second:.1f} pages/s",
            flush=True,
        )


class RichScreen:
    """The live screen; its busiest picture can be exported as SVG."""

    def __init__(self, scene: Scene, picture: Path | None) -> None:
        self._scene = scene
        self._picture = picture
        self._most_sessions = 0
        self._live = Live(self._draw(), refresh_per_second=6, screen=Console().is_terminal, transient=True)

    def __enter__(self) -> RichScreen:
        """Takes the terminal."""
        self._live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives the terminal back."""
        self._live.__exit__(None, None, None)

    def event(self, text: str, style: str = "") -> None:
        """Adds the event to the list."""
        self._scene.events.append((self._scene.elapsed_seconds(), text, style))

    def refresh(self) -> None:
        """Draws the scene, and takes the picture when there is more to see than ever before."""
        self._live.update(self._draw())
        if self._picture is not None and (busy := self._busyness()) > self._most_sessions:
            self._most_sessions = busy
            console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO())
            console.print(self._draw(), height=HEIGHT)
            # rich would have the reader's browser fetch a font from elsewhere; any fixed-width one will do.
            picture = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="make demo"), flags=re.DOTALL)
            self._picture.write_text(picture, encoding="utf-8")

    def _busyness(self) -> int:
        return len(self._scene.sessions) * 2 + len(self._scene.events)

    def _draw(self) -> Layout:
        scene = self._scene
        layout = Layout()
        layout.split_column(
            Layout(_headline(scene), size=3), Layout(name="middle"), Layout(_events(scene), size=_EVENTS_SHOWN + 2)
        )
        layout["middle"].split_row(Layout(_slots(scene.slots), ratio=5), Layout(name="right", ratio=6))
        layout["right"].split_column(Layout(_exits(scene.exits), size=7), Layout(_sessions(scene.sessions)))
        return layout


def _headline(scene: Scene) -> RenderableType:
    quota = sum(slot.quota for slot in scene.slots)
    done = sum(slot.succeeded + slot.failed for slot in scene.slots)
    figures = [
        ("", f"{scene.elapsed_seconds():.0f} s"),
        ("results", f"{done}/{quota}"),
        ("leases", str(scene.leases)),
        ("clients", str(scene.clients_online)),
        ("pages/s", f"{scene.pages_per_second:.1f}"),
        ("check-ins waiting", str(scene.check_ins_pending)),
    ]
    text = Text.assemble((f"{scene.stage}   ", "bold cyan"))
    for name, value in figures:
        text.append(f"  {value} ", "bold")
        text.append(name, "dim")
    return Panel(text, title="Muster", title_align="left", box=box.ROUNDED)


def _table(title: str, columns: Iterable[tuple[str, str]]) -> Table:
    table = Table(box=None, expand=True, pad_edge=False, header_style="dim", title=title, title_justify="left")
    table.title_style = "bold"
    for name, justify in columns:
        table.add_column(name, justify="right" if justify == ">" else "left", no_wrap=True, overflow="ellipsis")
    return table


def _slots(rows: list[SlotRow]) -> RenderableType:
    table = _table(
        "Slots and quotas", [("keyword", "<"), ("today", "<"), ("done", ">"), ("leased", ">"), ("lost", ">")]
    )
    shown = sorted(rows, key=lambda row: (-row.leased, row.quota == row.succeeded + row.failed, row.keyword))
    for row in shown[:24]:
        done = row.succeeded + row.failed
        table.add_row(
            row.keyword,
            ProgressBar(total=max(row.quota, 1), completed=done, width=14),
            f"{done}/{row.quota}",
            str(row.leased or ""),
            Text(str(row.expired or ""), "yellow"),
        )
    return Panel(table, box=box.ROUNDED)


def _exits(rows: list[ExitRow]) -> RenderableType:
    table = _table("Exits", [("exit", "<"), ("endpoint", "<"), ("uses", "<"), ("", ">"), ("toggles", ">")])
    for row in rows:
        bar = ProgressBar(total=row.cap, completed=row.use_count, width=12)
        table.add_row(row.name, row.endpoint, bar, f"{row.use_count}/{row.cap}", str(row.toggles))
    return Panel(table, box=box.ROUNDED)


def _sessions(rows: list[SessionRow]) -> RenderableType:
    columns = [
        ("client", "<"),
        ("keyword", "<"),
        ("stage", "<"),
        ("pages", "<"),
        ("", ">"),
        ("found", ">"),
        ("ETA", ">"),
    ]
    table = _table("Live sessions", columns)
    for row in rows[:16]:
        table.add_row(
            row.client,
            row.keyword,
            row.stage,
            ProgressBar(total=max(row.total, 1), completed=row.page, width=12),
            f"{row.page}/{row.total or '?'}",
            str(row.products),
            "" if row.eta_seconds is None else f"{max(row.eta_seconds, 0):.0f} s",
        )
    return Panel(table, box=box.ROUNDED)


def _events(scene: Scene) -> RenderableType:
    lines = [
        Text.assemble((f"{at:6.1f} s  ", "dim"), (text, style))
        for at, text, style in list(scene.events)[-_EVENTS_SHOWN:]
    ]
    return Panel(Group(*lines), title="Events", title_align="left", box=box.ROUNDED)
