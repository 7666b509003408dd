"""What people look at: tables for the terminal and a picture of accuracy against time steps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quickspike.anatomy import PARTS, Anatomy
from quickspike.claims import CLAIMS, filled_in
from quickspike.coverage import Coverage
from quickspike.early_exit import Saving
from quickspike.energy import Energy
from quickspike.evaluation import Report
from quickspike.files import write_bytes
from quickspike.method import Method, label
from quickspike.operations import Operations
from quickspike.options import options_of
from quickspike.recipe import STAGES
from quickspike.refinement import Refinement
from quickspike.searching import Found


def accuracy_table(reports: Mapping[str, Report]) -> Table:
    """One row per number of steps, one column per network, the source network's accuracy last: fits a narrow terminal."""
    first = next(iter(reports.values()))
    table = Table(title=f"accuracy in % on {first.samples} images, after T steps", min_width=46)
    table.add_column("")
    for name in reports:
        table.add_column(name, justify="right", overflow="fold")
    for step in first.steps:
        table.add_row(f"T = {step}", *(f"{report.accuracy[step]:.2f}" for report in reports.values()))
    table.add_row("source network", *(_percent(report.reference_accuracy) for report in reports.values()))
    return table


def report_tables(report: Report) -> RenderableType:
    """Accuracy, which engine ran, distance from the source network, and firing rate of every site."""
    parts: list[RenderableType] = [accuracy_table({label(report.method): report})] if report.accuracy else []
    if report.members > 1:
        parts.append(Text(f"groups of {report.members} neurons in place of single ones"))
    parts.append(Text(report.engine))
    if report.agreement:
        shares = ", ".join(f"T = {step}: {share:.2f} %" for step, share in report.agreement.items())
        parts.append(Text(f"same class as the source network: {shares}"))
    if report.deviation:
        distances = ", ".join(f"T = {step}: {distance:.1f} %" for step, distance in report.deviation.items())
        parts.append(Text(f"off what the source network gives (root mean square): {distances}"))
    table = Table(title=f"spikes per {'neuron' if report.members == 1 else 'group'} and step", min_width=32)
    table.add_column("site", overflow="fold")
    table.add_column("rate", justify="right")
    for site, rate in report.rates.items():
        table.add_row(site, f"{rate:.4f}")
    return Group(*parts, table)


def exit_table(savings: Sequence[Saving], report: Report) -> Table:
    """One row per loss that was allowed, after that of all steps."""
    table = Table(title="early exit: images stop when their answer is decided", min_width=46)
    for heading in ("allowed loss", "mean steps", "accuracy in %"):
        table.add_column(heading, justify="right")
    last = report.steps[-1]
    table.add_row("(all steps)", str(last), f"{report.accuracy[last]:.2f}")
    for row in savings:
        table.add_row(f"{row.loss:g}", f"{row.steps:.2f}", f"{row.accuracy:.2f}")
    return table


ADVISED = 10
"""Layers that the terminal advises on, the worst first."""
_SHORT = {"max-pooling": "pool", "clipping": "clip", "quantisation": "quant.", "unevenness": "uneven"}
_BARS = " ▁▂▃▄▅▆▇█"


def anatomy_tables(anatomy: Anatomy) -> RenderableType:
    """The error of every site and where it comes from, how its neurons fire, and what helps, the largest own error first."""
    errors = Table(title=f"conversion error after T = {anatomy.steps} ({anatomy.images} images)")
    errors.add_column("site", overflow="fold")
    parts = [part for part in PARTS if part not in ("max-pooling", "neuron") or any(one.sizes[part] > 1e-6 for one in anatomy.sites)]
    for heading in ("error", "own", *(f"{_SHORT.get(part, part)} %" for part in parts)):
        errors.add_column(heading, justify="right")
    for one in anatomy.sites:
        errors.add_row(one.site, f"{one.error:.3f}", f"{one.own:.3f}", *(f"{100 * one.shares[part]:.0f}" for part in parts))
    errors.caption = "error, own part: relative to the activations; %: shares of the error"
    neurons = Table(title="shares of the neurons")
    neurons.add_column("site", overflow="fold")
    for heading in ("silent", "saturated", "uneven", "rate 0 to 1"):
        neurons.add_column(heading, justify="right")
    for one in anatomy.sites:
        outside = "-" if one.outside is None else f"{one.outside:.3f}"
        # A root, so that rare rates are seen beside silence.
        bars = "".join(_BARS[math.ceil(8 * math.sqrt(share))] for share in one.rates)
        neurons.add_row(one.site, f"{one.silent:.3f}", f"{one.saturated:.3f}", outside, bars)
    neurons.caption = "uneven: fired too often or too seldom for what arrived, though they could have done otherwise"
    joins = [_joins_table(anatomy)] if any(one.branches for one in anatomy.sites) else []
    advice = [Text(f"- {one.advice}") for one in anatomy.bad[:ADVISED]]
    if (more := len(anatomy.bad) - ADVISED) > 0:
        advice.append(Text(f"- and {more} more that add less: all of them with --page FILE or --json"))
    return Group(errors, *joins, neurons, *advice)


def _joins_table(anatomy: Anatomy) -> Table:
    table = Table(title="residual joins: through which branch the error of the sum comes")
    table.add_column("site behind it", overflow="fold")
    table.add_column("shares of the error", overflow="fold")
    for one in anatomy.sites:
        if one.branches:
            table.add_row(one.site, ", ".join(f"{name} {100 * share:.0f} %" for name, share in one.branches.items()))
    table.caption = "a join adds up, which has no error of its own: this is part of what its site inherits"
    return table


def energy_tables(operations: Operations, energies: Sequence[Energy]) -> RenderableType:
    """Operations of every layer, then what they cost on every device, and what these figures leave out."""
    often = "once" if operations.first == "once" else "at every step"
    counts = Table(title=f"operations per image, T = {operations.steps}, image read {often} (mean of {operations.images} images)")
    counts.add_column("", overflow="fold")
    for heading in ("source MACs", "MACs", "accumulates", "share"):
        counts.add_column(heading, justify="right")
    total = operations.total("accumulates") or 1.0
    for row in operations.rows:
        if row.kind != "neurons":
            name = row.name if row.kind == "layer" else f"{row.name} (join)"
            share = f"{100 * row.accumulates / total:.1f} %"
            counts.add_row(name, *(f"{value:,.0f}" for value in (row.dense, row.multiplies, row.accumulates)), share)
    counts.add_row("all", *(f"{operations.total(field):,.0f}" for field in ("dense", "multiplies", "accumulates")), "")
    costs = Table(title="energy per image in nJ")
    for heading in ("device", "account", "source network", "spiking", "source / spiking"):
        costs.add_column(heading, justify="left" if heading in ("device", "account") else "right")
    for one in energies:
        costs.add_row(one.device, one.account, f"{one.source / 1e3:,.1f}", f"{one.spiking / 1e3:,.1f}", f"{one.ratio:.2f}")
    caveats = dict.fromkeys(caveat for one in energies for caveat in one.caveats)
    claims = (f"{claim.source.partition(',')[0]}: {claim.caveat}" for claim in CLAIMS.values())
    return Group(
        counts, costs, *(Text(f"- {caveat}") for caveat in caveats), _claims_table(operations), *(Text(f"- {one}") for one in claims)
    )


def _claims_table(operations: Operations) -> Table:
    """This network by the papers' formulas, beside what the papers state of theirs."""
    table = Table(title="source / spiking as papers count it")
    for heading in ("paper", "formula", "published", "here"):
        table.add_column(heading, justify="right" if heading in ("published", "here") else "left", overflow="fold")
    here = filled_in(operations)
    for method, claim in CLAIMS.items():
        ratio = f"{here[method]:.2f}" if method in here else "-"
        table.add_row(claim.source, claim.formula, f"{claim.published:g} ({claim.network})", ratio)
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def coverage_tables(coverage: Coverage) -> RenderableType:
    """Every operator of the network and what becomes of it, then the counts and what to do about refusals."""
    table = Table(title=coverage.network)
    for heading in ("call", "operator", "becomes", "line"):
        table.add_column(heading, overflow="fold")
    styles = {"neuron": "green", "unsupported": "red", "analog": "yellow"}
    for finding in coverage.findings:
        becomes = Text(finding.status, style=styles.get(finding.status, ""))
        table.add_row(Text(finding.name), finding.operator, becomes, Text(finding.source))
    return Group(table, Text(str(coverage)))


def method_table(methods: Mapping[str, type[Method] | type[Refinement]], title: str) -> Table:
    """All methods, or all refinements, with their papers."""
    table = Table(title=title)
    for heading in ("name", "what it does", "paper"):
        table.add_column(heading, overflow="fold")
    for name, cls in methods.items():
        table.add_row(name, Text(summary(cls)), Text(str(cls.paper)))
    return table


def option_table(cls: type[Method] | type[Refinement]) -> RenderableType:
    """All options of one method: default, unit, range, meaning."""
    table = Table(title=f"options of {cls.name}")
    for heading in ("option", "default", "unit", "range or choices", "meaning"):
        table.add_column(heading, overflow="fold")
    for name, (declared, kind, default) in options_of(cls).items():
        choices = ", ".join(map(str, getattr(kind, "__args__", ())))
        table.add_row(name, Text(str(default)), Text(declared.unit), Text(declared.range_text() or choices), Text(declared.help))
    doc = "\n".join(line.strip() for line in (cls.__doc__ or "").splitlines())
    return Group(Text(str(cls.paper)), Text(""), Text(doc.strip()), Text(""), table)


def summary(cls: type[Method] | type[Refinement]) -> str:
    """First sentence of its docstring."""
    return (cls.__doc__ or "").strip().splitlines()[0]


def plot_accuracy(reports: Mapping[str, Report], path: str | Path, savings: Sequence[Saving] = ()) -> None:
    """Draw accuracy against T, one line per network, the source network dashed, early exits at their mean number of steps.

    Raises:
        OutputError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, report in reports.items():
        axes.plot(report.steps, [report.accuracy[step] for step in report.steps], marker="o", label=name)
    if savings:
        axes.plot([row.steps for row in savings], [row.accuracy for row in savings], "x--", label="early exit, mean T")
    first = next(iter(reports.values()))
    if first.reference_accuracy is not None:
        axes.axhline(first.reference_accuracy, linestyle="--", color="0.4", label=f"source network, {first.reference_accuracy:.2f} %")
    axes.set_xscale("log", base=2)
    axes.set_xticks(first.steps, [str(step) for step in first.steps])
    axes.set_xlabel("time steps T")
    axes.set_ylabel(f"accuracy in % ({first.samples} images)")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150, metadata={"Software": "quickspike"})
    write_bytes(path, drawn.getvalue())


def compare_table(reports: Mapping[str, Mapping[int, Report]]) -> Table:
    """One row per method, one column per number of steps; with an asterisk where the answer takes longer than T."""
    first = next(iter(next(iter(reports.values())).values()))
    table = Table(title=f"accuracy in % on {first.samples} images; source network {_percent(first.reference_accuracy)}")
    table.add_column("method", overflow="fold")
    for step in next(iter(reports.values())):
        table.add_column(f"T = {step}", justify="right")
    waits = False
    notes = list[str]()
    for name, found in reports.items():
        waits |= any(report.latency[step] > step for step, report in found.items())
        cells = (f"{report.accuracy[step]:.2f}{'*' if report.latency[step] > step else ''}" for step, report in found.items())
        table.add_row(name, *cells)
        notes += [f"{name}: groups of {members} neurons" for members in {report.members for report in found.values()} if members > 1]
    if waits:
        notes.insert(0, "* layers wait for whole windows: the answer takes depth x T steps")
    table.caption = "\n".join(notes) or None
    return table


def search_tables(found: Found, report: Report | None) -> RenderableType:
    """The trials that nothing beats, and the one that was looked for."""
    table = Table(title=f"Pareto front; source network {found.reference:.2f} % on the same images")
    table.add_column("method", overflow="fold")
    priced = any(trial.energy is not None for trial in found.front)
    for heading in ("T", "latency", "accuracy %", "lost", "s", *(("nJ",) if priced else ())):
        table.add_column(heading, justify="right")
    for trial in found.front:
        energy = (f"{trial.energy / 1e3:,.1f}",) if trial.energy is not None else ()
        cells = (str(trial.steps), str(trial.latency), f"{trial.accuracy:.2f}", f"{trial.drop:+.2f}", f"{trial.seconds:.0f}", *energy)
        table.add_row(trial.candidate, *cells, style="bold" if trial == found.best else "")
    table.caption = "s: what making and measuring it took"
    return Group(table, Text(search_outcome(found, report)))


def search_outcome(found: Found, report: Report | None) -> str:
    """What a search came to, in a sentence: the best trial on the test images, or what to do where there is none."""
    if found.best is None or report is None:
        bound = "" if found.max_energy is None else f" within {found.max_energy / 1e3:,.1f} nJ"
        way_out = (
            "fine-tune (--tune-epochs), or train (train)"
            if found.complete
            else "or more time (--max-minutes): it was up before all was tried"
        )
        return f"Nothing loses at most {found.max_drop:g} points{bound}; allow more steps (--most-steps), {way_out}."
    (steps,) = report.steps
    least = f"{found.best.candidate} with T = {steps}: {report.accuracy[steps]:.2f} % on {report.samples} test images"
    untried = "" if found.complete else " The time was up before all was tried."
    return f"{least}, the source network {_percent(report.reference_accuracy)} %.{untried}"


def choice_tables(choice: Mapping[str, Any]) -> RenderableType:
    """What `choosing.choose` tried, best first, and its reasons."""
    table = Table(title=f"in %: {choice['measure']}")
    table.add_column("combination", overflow="fold")
    for heading in ("%", "s"):
        table.add_column(heading, justify="right")
    for attempt in sorted(choice["attempts"], key=lambda one: -one["measured"]):
        chosen = "bold" if attempt["what"] == choice["what"] else ""
        table.add_row(attempt["what"], f"{attempt['measured']:.2f}", f"{attempt['seconds']:.0f}", style=chosen)
    return Group(table, *(Text(f"- {reason}") for reason in choice["reasons"]))


def recipe_tables(result: Mapping[str, Any]) -> Table:
    """What a recipe gave, mean and standard deviation over its seeds, beside the published figures."""
    summary, runs = result["summary"], result["runs"]
    table = Table(title=f"{result['title']}: accuracy in % on {runs[0]['test_images']} images, {len(runs)} seed(s)")
    stages = [stage for stage in STAGES if stage in summary]
    for heading in ("", "latency", *stages, "published"):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for stage, name in (("source", "source network"), ("ann", "network that was converted")):
        if stage in summary:
            published = next((figure for figure in result["published"] if figure["ann"] is not None), None)
            cells = [_spread(summary[stage]), *[""] * (len(stages) - 1)]
            table.add_row(name, "", *cells, f"{published['ann']:.2f}, {published['network']}" if published and stage == "ann" else "")
    for step in summary[stages[-1]]:
        figures = [figure for figure in result["published"] if str(figure["steps"]) == step]
        cells = [_spread(summary[stage][step]) for stage in stages]
        table.add_row(f"T = {step}", str(runs[0]["latency"][step]), *cells, "\n".join(map(_figure, figures)))
    return table


def _spread(values: Mapping[str, Any]) -> str:
    return f"{values['mean']:.2f} ± {values['std']:.2f}" if values["n"] > 1 else f"{values['mean']:.2f}"


def _figure(figure: Mapping[str, Any]) -> str:
    return f"{figure['accuracy']:.2f}, {figure['network']}, {figure['stage']} [{figure['evidence']}]"
