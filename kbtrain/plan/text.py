"""A plan as text of 80 columns, and as HTML for notebooks."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kbtrain.plan.program import ProgramFacts
from kbtrain.plan.roofline import ASSUMPTION, Roofline
from kbtrain.utils.html import Html, element, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kbtrain.plan.plan import Case, Plan

WIDTH = 80
_AMOUNT = 12
"""Columns of a figure."""
_NAME = 30
"""Columns of the name of an alternative."""


def memory(count: float) -> str:
    """Bytes in a binary unit, with three significant digits or more.

    Example:
        >>> memory(13.294 * 2**30), memory(5_000_000), memory(640), memory(0)
        ('13.29 GiB', '4.77 MiB', '640 B', '0 B')
    """
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.2f} {unit}"


def transfer(count: float) -> str:
    """Bytes that are moved, in a decimal unit, as bandwidths are.

    Example:
        >>> transfer(900), transfer(2_500_000), transfer(3.2e12)
        ('900 B', '2.5 MB', '3,200.0 GB')
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:,.1f} {unit}"


def milliseconds(seconds: float) -> str:
    """Seconds in milliseconds with three significant digits.

    Example:
        >>> milliseconds(0.0123456), milliseconds(1.5), milliseconds(2e-7)
        ('12.3', '1,500', '0.0002')
    """
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def rounded(value: float) -> str:
    """A number with three significant digits, in full.

    Example:
        >>> rounded(36_519_670.2), rounded(5203), rounded(0.01234)
        ('36,500,000', '5,200', '0.0123')
    """
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def devices(plan: Plan) -> str:
    """The devices: "8 x NVIDIA H100 SXM"."""
    return f"{plan.count} x {plan.device.title}"


def verdict(case: Case) -> str:
    """Whether a run fits, in a sentence."""
    spare = case.spare_bytes
    if spare is None:
        return case.problem
    if spare >= 0:
        return f"It fits, with {memory(spare)} to spare."
    return f"It does NOT fit: {memory(-spare)} are missing."


def memory_rows(plan: Plan) -> list[tuple[str, str]]:
    """What takes the memory of a device, and how much there is."""
    facts = plan.run.facts
    if facts is None:
        return []
    gradients = "gradients"
    if facts.gradient_bytes <= facts.temporary_bytes:  # else a TPU holds them on the chip
        gradients += f" ({memory(facts.gradient_bytes)})"
    temporary = f"activations, {gradients}, scratch"
    reserve = (
        f"{plan.device.reserve:.0%} of {memory(plan.device.memory_bytes)} kept for the framework"
    )
    return [
        ("weights", memory(facts.parameter_bytes)),
        ("optimizer state", memory(facts.optimizer_bytes)),
        ("other state", memory(facts.other_state_bytes)),
        ("samples", memory(facts.batch_bytes)),
        (temporary, memory(facts.temporary_bytes)),
        ("program", memory(facts.program_bytes)),
        ("peak", memory(facts.peak_bytes)),
        (f"available ({reserve})", memory(plan.run.usable_bytes)),
    ]


def update_rows(facts: ProgramFacts, bound: Roofline) -> list[tuple[str, str]]:
    """What an update does, and the least time for it."""
    traffic = facts.bytes_accessed
    rows = [
        ("operations of the program", f"{facts.program_flops:.3g}"),
        ("  of forward and backward pass", f"{facts.flops:.3g}"),
        ("memory traffic", "unknown" if traffic is None else transfer(traffic)),
    ]
    for kind, (count, sent) in sorted(facts.collectives.items()):
        rows.append((f"{count} x {kind}, each device sends", transfer(sent)))
    for name, seconds in (
        (f"computing in {bound.dtype}", bound.compute_seconds),
        ("memory", bound.memory_seconds),
        ("network", bound.network_seconds),
    ):
        shown = "unknown" if seconds is None else f">= {milliseconds(seconds)} ms"
        rows.append((name, shown))
    return rows


def speed(bound: Roofline) -> str:
    """The bound in a sentence."""
    rates = [f"{rounded(bound.samples_per_second)} samples/s"]
    if bound.tokens_per_second is not None:
        rates.append(f"{rounded(bound.tokens_per_second)} tokens/s")
    if bound.mfu is not None:
        rates.append(f"an MFU of {100 * bound.mfu:.2g} %")
    unless = " unless caches answer a part" if bound.bound_by == "memory" else ""
    return (
        f"Bound by {bound.bound_by}: no update takes less than {milliseconds(bound.seconds)} ms"
        f"{unless}; at most {', '.join(rates)}."
    )


def size_of_update(facts: ProgramFacts) -> str:
    """The samples of an update: "64 samples on 8 devices, 65,536 tokens"."""
    found = f"{facts.samples:,} samples on {facts.device_count:,} devices"
    if facts.device_count == 1:
        found = f"{facts.samples:,} samples"
    if facts.accumulation > 1:
        found += f", {facts.accumulation} micro-batches"
    return found if facts.tokens is None else f"{found}, {facts.tokens:,} tokens"


def largest(plan: Plan) -> str:
    """The largest batch in a sentence; empty if it was not searched."""
    found = plan.largest
    if found is None:
        return ""
    if found.batch_size == 0:
        return "Not even a batch of one sample a device fits."
    size, limit = found.batch_size, found.too_large
    if limit == size + 1:
        return f"The largest batch of a device that fits has {size:,} samples."
    if limit is None:
        return f"A batch of {size:,} samples a device fits; larger ones were not tried."
    return f"A batch of {size:,} samples a device fits, one of {limit:,} does not."


def comparison(plan: Plan) -> list[tuple[str, str, str, str, str, str]]:
    """Rows of the alternatives: name, fits, peak and its change, least time and its change."""
    rows = []
    for case in (plan.run, *plan.batches, *plan.alternatives):
        if case.facts is None or case.roofline is None:
            rows.append((case.name, "", case.problem, "", "", ""))
            continue
        base = plan.run
        rows.append(
            (
                case.name,
                "yes" if case.fits else "no",
                memory(case.facts.peak_bytes),
                _change(case.facts.peak_bytes, base.facts.peak_bytes) if base.facts else "",
                milliseconds(_per_sample(case, plan)),
                _change(_per_sample(case, plan), base.roofline.seconds) if base.roofline else "",
            )
        )
    return rows


def _per_sample(case: Case, plan: Plan) -> float:
    """The least time for as many samples as an update of the run has."""
    assert case.roofline is not None
    assert case.facts is not None
    samples = case.facts.samples if plan.run.facts is None else plan.run.facts.samples
    return case.roofline.seconds * samples / case.facts.samples


def _change(value: float, base: float) -> str:
    if not base or abs(value / base - 1) < 0.005:
        return ""
    return f"{100 * (value / base - 1):+.0f} %"


def pasted(plan: Plan) -> list[str]:
    """The advice as arguments; empty if nothing has to be changed."""
    if not plan.advice.changes:
        return []
    return [f"TrainingArguments(..., {plan.advice.arguments})", plan.advice.options]


def lines(plan: Plan) -> Iterator[str]:
    """The plan, a line at a time."""
    run = plan.run
    parameters = f", {run.facts.parameters:,} parameters" if run.facts else ""
    yield from _wrapped(f"Plan of {plan.model}{parameters}, on {devices(plan)}", "")
    yield from _wrapped(_how(plan), "")
    yield ""
    yield _heading("Memory of a device", "")
    yield from (_row(name, amount) for name, amount in memory_rows(plan))
    yield from _wrapped(" ".join(filter(None, (verdict(run), largest(plan)))))
    if run.facts is not None and run.roofline is not None:
        yield ""
        yield _heading(f"An update ({size_of_update(run.facts)})", "a device")
        yield from (_row(name, amount) for name, amount in update_rows(run.facts, run.roofline))
        yield from _wrapped(speed(run.roofline))
    if plan.batches or plan.alternatives:
        yield ""
        yield from _comparison_lines(plan)
    if plan.advice.why:
        yield ""
        yield _heading("Advice", "")
        yield from _wrapped(plan.advice.why)
        for line in pasted(plan):
            yield from _wrapped(line, "    ")
    yield ""
    yield _heading("How far to trust this", "")
    for note in (*plan.notes, ASSUMPTION):
        yield from _wrapped(note, "  - ", "    ")


def _how(plan: Plan) -> str:
    facts = plan.run.facts
    compiled = "" if facts is None else f"Compiled for {facts.compiled_for}, not run: "
    return f"{compiled}memory is the program's, times are bounds and nothing is measured."


def _comparison_lines(plan: Plan) -> Iterator[str]:
    yield _heading("Alternatives", "")
    head = f"  {'':<{_NAME}}{'fits':<5}{'peak':>12}{'':>8}{'least ms':>11}{'':>8}"
    yield head.rstrip()
    for name, fits, peak, more, least, longer in comparison(plan):
        if not fits:
            yield from _wrapped(f"{name}: {peak}", "  ", "    ")
            continue
        if len(name) >= _NAME:
            yield from _wrapped(name, "  ", "    ")
            name = ""
        yield f"  {name:<{_NAME}}{fits:<5}{peak:>12}{more:>8}{least:>11}{longer:>8}".rstrip()
    samples = 0 if plan.run.facts is None else plan.run.facts.samples
    if samples:
        yield from _wrapped(f"least ms: for {samples:,} samples, as an update of the run has.")


def _heading(title: str, unit: str) -> str:
    return f"{title:<{WIDTH - _AMOUNT - 2}}{unit:>{_AMOUNT}}".rstrip()


def _row(name: str, amount: str) -> str:
    return f"  {name:<{WIDTH - _AMOUNT - 4}}{amount:>{_AMOUNT}}"


def _wrapped(text: str, first: str = "  ", other: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=first if other is None else other,
        break_on_hyphens=False,
        break_long_words=False,
    )


def styled(plan: Plan) -> RenderableType:
    """The lines for a terminal: headings bold, the verdict in green or red."""
    from rich.text import Text

    found = Text()
    color = "green" if plan.fits else "red"
    for line in lines(plan):
        style = "bold" if line and not line.startswith(" ") else ""
        if line.lstrip().startswith(("It fits, with", "It does NOT fit")):
            style = f"bold {color}"
        found.append(line + "\n", style or None)
    found.rstrip()
    return found


def page(plan: Plan) -> str:
    """The plan as tables, for ``_repr_html_`` in a notebook."""
    run, parts = plan.run, list[Any]()
    parts.append(element("b", f"Plan of {plan.model} on {devices(plan)}"))
    parts.append(element("p", _how(plan)))
    parts.append(element("p", element("b", " ".join((verdict(run), largest(plan))))))
    parts.append(table(("Memory of a device", ""), memory_rows(plan), numeric=True))
    if run.facts is not None and run.roofline is not None:
        rows = [(name.strip(), amount) for name, amount in update_rows(run.facts, run.roofline)]
        head = (f"An update ({size_of_update(run.facts)})", "a device")
        parts.append(table(head, rows, numeric=True))
        parts.append(element("p", speed(run.roofline)))
    if plan.batches or plan.alternatives:
        titles = ("Alternatives", "fits", "peak", "", "least ms", "")
        parts.append(table(titles, comparison(plan), numeric=True))
    if plan.advice.why:
        parts.append(element("p", plan.advice.why))
        parts += [element("pre", line) for line in pasted(plan)[:1]]
    notes = (element("li", note) for note in (*plan.notes, ASSUMPTION))
    parts.append(element("ul", Html("".join(notes))))
    return element("div", *parts)
