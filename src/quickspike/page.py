"""One HTML page about one or several spiking networks: no script, no outside request, light and dark, fit for printing."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickspike.anatomy import PARTS, Anatomy, anatomy_of
from quickspike.claims import CLAIMS, filled_in
from quickspike.conversion import SpikingNetwork
from quickspike.data import DataSet
from quickspike.energy import ACCOUNTS, Energy, energy_of
from quickspike.errors import DataError
from quickspike.evaluation import Report
from quickspike.files import write_text
from quickspike.neuron import Neuron, unfold
from quickspike.operations import Operations, count_operations
from quickspike.searching import Trial, front
from quickspike.structure import first
from quickspike.wiring import INPUT, OUTPUT, edges_of

INK = "#010203"
"""Stands for the colour of the text while a picture is drawn: the page decides which that is."""
COLOURS = ("#3b76af", "#e0812c", "#519e3e", "#c23b36", "#8d69b8", "#84584e", "#d57dbe", "#7f7f7f", "#bcbd39", "#55b9cb")
COUNTED = 100
"""Test images on which operations are counted and errors split."""
NEURONS = 60
"""Neurons of a site that a raster shows, evenly spread."""


@dataclass(frozen=True)
class Sample:
    """One image and what it sets off."""

    image: Tensor
    """Pixels in [0, 1], `[C, H, W]`."""
    label: str
    spikes: Mapping[str, Tensor]
    """By site, `[T, neurons]`, bool."""
    logits: Tensor
    """Readout after each step, `[T, K]`."""
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Entry:
    """What the page says of one network; what is None is left out."""

    name: str
    report: Report
    snn: SpikingNetwork | None = None
    anatomy: Anatomy | None = None
    operations: Operations | None = None
    energies: tuple[Energy, ...] = ()
    sample: Sample | None = None


def sample_of(snn: SpikingNetwork, image: Tensor, pixels: Tensor, label: int, classes: Sequence[str] = ()) -> Sample:
    """Simulate one image and keep every spike.

    Args:
        snn: not modified.
        image: as the network takes it, `[C, H, W]`.
        pixels: to be shown, in [0, 1], `[C, H, W]`.
        label: its class.
        classes: their names; a class without one is called by its number.
    """
    spikes: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, out: Tensor) -> None:
            spikes[name] = unfold(out, snn.steps).ne(0).flatten(1).cpu()

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in snn.neurons().items()]
    try:
        with torch.inference_mode():
            outputs = first(snn.outputs(image[None].to(next(snn.parameters()))))[:, 0]
    finally:
        for hook in hooks:
            hook.remove()
    logits = outputs.cumsum(0) / torch.arange(1, len(outputs) + 1, device=outputs.device)[:, None]
    names = (*classes, *map(str, range(len(classes), max(logits.shape[1], label + 1))))
    return Sample(pixels.cpu(), names[label], spikes, logits.cpu(), names)


def first_sample(snn: SpikingNetwork, data: DataSet) -> Sample:
    """`sample_of` the first test image."""
    images, labels = next(iter(data.loader("test", batch_size=1)))
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (data.preprocessing.mean, data.preprocessing.std))
    return sample_of(snn, images[0], images[0] * std + mean, int(labels[0]), data.class_names)


def described(name: str, report: Report, snn: SpikingNetwork, data: DataSet, images: int = COUNTED) -> Entry:
    """All that the page can say of a network, on the first test images."""
    some = data.loader("test", limit=min(images, data.size("test")))
    operations = count_operations(snn, some)
    energies = tuple(energy_of(operations, device, account) for device in ("45nm_fp32", "45nm_int8") for account in ACCOUNTS)
    return Entry(name, report, snn, anatomy_of(snn, some), operations, energies, first_sample(snn, data))


def write_page(
    path: str | Path, title: str, entries: Sequence[Entry], command: str = "", trials: Sequence[Trial] = (), lead: str = ""
) -> None:
    """Write the page.

    Args:
        path: the file.
        title: its heading.
        entries: networks; all with a reference accuracy or none.
        command: what made it, to be made again; several in lines of their own.
        trials: conversions whose accuracy, latency and energy are drawn against each other, see `quickspike.searching.front`.
        lead: the sentence below the heading; by default what the best network answers.

    Raises:
        DataError: there are neither entries nor trials.
        OutputError: it cannot be written.
    """
    if not entries and not trials:
        raise DataError("a page needs at least one network")
    lead = lead or (_lead(entries) if entries else "")
    body = [f"<h1>{_text(title)}</h1>", f"<p class=lead>{_text(lead)}</p>", _accuracy(entries) if entries else "", _front(trials)]
    for number, entry in enumerate(entries):
        if len(entries) > 1:
            body.append(f"<h2 class=network>{_text(entry.name)}</h2>")
        body += [section(entry, f"n{number}") for section in (_network, _errors, _neurons, _cost, _raster)]
    body.append(_provenance(entries, command))
    write_text(Path(path), _PAGE.format(title=_text(title), style=_STYLE, body="\n".join(body)))


class _Markup(str):
    """Text that is HTML already."""


def _text(value: object) -> str:
    return value if isinstance(value, _Markup) else html.escape(str(value))


def _lead(entries: Sequence[Entry]) -> str:
    best = max(entries, key=lambda entry: entry.report.accuracy[entry.report.steps[-1]])
    report, steps = best.report, best.report.steps[-1]
    text = f"{best.name} answers {report.accuracy[steps]:.2f} % of {report.samples:,} images right after {steps} time steps"
    if report.latency[steps] > steps:
        text += f" (latency {report.latency[steps]}, since layers wait for whole windows)"
    if report.members > 1:
        text += f", with groups of {report.members} neurons in place of single ones"
    return text + ("." if report.reference_accuracy is None else f"; its source network {report.reference_accuracy:.2f} %.")


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]], wrapped: bool = False) -> str:
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = " class=wrapped" if wrapped else ""
    return f"<div class=scroll><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _section(heading: str, *parts: str) -> str:
    return f"<section><h2>{_text(heading)}</h2>{''.join(parts)}</section>"


def _drawing(width: float, height: float, draw: Callable[[Any], None], name: str, description: str) -> str:
    """A picture as SVG whose ink is the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    inks = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "patch.edgecolor"), INK)
    settings: Any = {**inks, "svg.fonttype": "none", "svg.hashsalt": "quickspike", "font.family": "sans-serif", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Several pictures share a page: each gets ids of its own.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    return f'<figure role=img aria-label="{_text(description)}">{svg}</figure>'


def _accuracy(entries: Sequence[Entry]) -> str:
    reference = entries[0].report.reference_accuracy

    def draw(axes: Any) -> None:
        for number, entry in enumerate(entries):
            values = [entry.report.accuracy[step] for step in entry.report.steps]
            axes.plot(entry.report.steps, values, marker="o", color=COLOURS[number % len(COLOURS)], label=entry.name)
        if reference is not None:
            axes.axhline(reference, linestyle="--", color=INK, linewidth=0.8, label=f"source network {reference:.2f} %")
        steps = sorted({step for entry in entries for step in entry.report.steps})
        axes.set_xscale("log", base=2)
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()
        axes.set_xlabel("time steps T")
        axes.set_ylabel("accuracy in %")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)

    steps = sorted({step for entry in entries for step in entry.report.steps})
    rows = [
        [entry.name, *(f"{entry.report.accuracy[step]:.2f}" if step in entry.report.accuracy else "" for step in steps)]
        for entry in entries
    ]
    if reference is not None:
        rows.append(["source network", *[f"{reference:.2f}"] * len(steps)])
    # One point is no curve.
    picture = _drawing(7, 3.4, draw, "accuracy", "accuracy against the number of time steps") if len(steps) > 1 else ""
    return _section("Accuracy", picture, _table(["accuracy in %", *(f"T = {step}" for step in steps)], rows))


def _front(trials: Sequence[Trial]) -> str:
    """Every trial as a dot, and what the best ones reach with as much time or energy."""
    if not trials:
        return ""
    names = list(dict.fromkeys(trial.candidate for trial in trials))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    reference = trials[0].accuracy + trials[0].drop

    def draw(axes: Any, value: Callable[[Trial], float], label: str) -> None:
        for trial in trials:
            axes.plot(value(trial), trial.accuracy, marker="o", markersize=5, color=colours[trial.candidate], linestyle="none")
        reached = list[tuple[float, float]]()
        for trial in sorted(trials, key=lambda one: (value(one), -one.accuracy)):
            if not reached or trial.accuracy > reached[-1][1]:
                reached.append((value(trial), trial.accuracy))
        reached.append((max(map(value, trials)), reached[-1][1]))
        axes.step(*zip(*reached, strict=True), where="post", color=INK, linewidth=0.8)
        axes.axhline(reference, linestyle="--", color=INK, linewidth=0.8)
        axes.set_xlabel(label)
        axes.set_ylabel("accuracy in %")
        axes.grid(alpha=0.25)

    def by_latency(axes: Any) -> None:
        draw(axes, lambda trial: trial.latency, "latency in time steps")
        axes.set_xscale("log", base=2)
        steps = sorted({2 ** round(math.log2(trial.latency)) for trial in trials})
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.minorticks_off()

    pictures = [_drawing(4.4, 3.2, by_latency, "front-latency", "accuracy against latency")]
    priced = all(trial.energy for trial in trials)
    if priced:

        def by_energy(axes: Any) -> None:
            draw(axes, lambda trial: (trial.energy or 0.0) / 1e3, "energy of an image in nJ")
            energies = [trial.energy or 0.0 for trial in trials]
            if max(energies) > 10 * min(energies):
                axes.set_xscale("log")
            else:
                axes.set_xlim(left=0)
            axes.xaxis.set_major_formatter("{x:,.6g}")

        pictures.append(_drawing(4.4, 3.2, by_energy, "front-energy", "accuracy against energy"))
    key = "".join(f'<span class=key><i style="background:{colours[name]}"></i>{_text(name)}</span>' for name in names)
    rows = [
        [
            *(trial.candidate, trial.steps, trial.latency, f"{trial.accuracy:.2f}", f"{trial.drop:+.2f}"),
            *((f"{(trial.energy or 0.0) / 1e3:,.1f}",) if priced else ()),
            f"{trial.seconds:.1f}",
        ]
        for trial in front(trials)
    ]
    headings = ["Pareto front", "T", "latency", "accuracy in %", "lost", *(("nJ",) if priced else ()), "seconds"]
    note = (
        f"<p class=note>{len(trials)} conversions on the same images, each a dot; the line is the best accuracy up to there, dashed is the "
        "source network. The table holds those that no other one beats in latency, accuracy"
        + (", energy and time" if priced else " and time")
        + ": seconds is what making and measuring it took, and counts where it is more than twice as long and a minute longer.</p>"
    )
    return _section("What accuracy takes", f"<div class=row>{''.join(pictures)}</div><p class=note>{key}</p>", _table(headings, rows), note)


def _errors(entry: Entry, key: str) -> str:
    found = entry.anatomy
    if found is None:
        return ""
    parts = [part for part in PARTS if any(one.sizes[part] > 1e-6 for one in found.sites)]

    def draw(axes: Any) -> None:
        places = range(len(found.sites))
        right, left = [0.0] * len(found.sites), [0.0] * len(found.sites)
        for number, part in enumerate(parts):
            values = [one.error * one.shares[part] for one in found.sites]
            starts = [right[i] if value >= 0 else left[i] for i, value in enumerate(values)]
            axes.barh(places, values, left=starts, color=COLOURS[number], label=part, height=0.7)
            for index, value in enumerate(values):
                if value >= 0:
                    right[index] += value
                else:
                    left[index] += value
        axes.set_yticks(list(places), [one.site for one in found.sites])
        axes.invert_yaxis()
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("error, relative to the activations")
        axes.legend(frameon=False, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1.0))

    items = "".join(f"<li>{_text(one.advice)}</li>" for one in found.bad)
    picture = _drawing(7, 0.9 + 0.28 * len(found.sites), draw, f"{key}-errors", "conversion error of every site by source")
    note = (
        f"<p class=note>After T = {found.steps}, mean of {found.images} images. Bars add up to the error of a site; a part to the left "
        "cancels others. <b>Inherited</b> comes from the layers before, <b>clipping</b> is what lies above the ceiling, "
        "<b>quantisation</b> is T + 1 levels (2^T of weighted spikes, T M + 1 of groups of M neurons), <b>unevenness</b> the order of "
        "spikes, <b>max-pooling</b> that the largest of values which err in both directions is too large.</p>"
    )
    advice = f"<ul>{items}</ul>" if items else "<p>No site needs attention.</p>"
    return _section("Where the error comes from", picture, note, advice, _joins(found))


def _joins(found: Anatomy) -> str:
    """What residual joins pass on."""
    rows = [
        (one.site, ", ".join(f"{name} {100 * share:.0f} %" for name, share in one.branches.items())) for one in found.sites if one.branches
    ]
    note = (
        "<p class=note>A residual join adds up, which has no error of its own: it passes on those of its branches, as part of what the "
        "site behind it inherits. A share below 0 cancels others.</p>"
    )
    return "" if not rows else _table(["site behind a residual join", "shares of its error, by branch"], rows, wrapped=True) + note


def _network(entry: Entry, key: str) -> str:
    """Sites from top to bottom; ways from one to the next are straight, others bow out to the left. Width is the rate."""
    if entry.snn is None:
        return ""
    edges, rates = edges_of(entry.snn), entry.report.rates
    shapes = {site.name: "x".join(map(str, site.shape)) for site in entry.snn.sites}
    rows = {name: -number for number, name in enumerate((INPUT, *shapes, OUTPUT))}
    most = max(rates.values(), default=0.0) or 1.0
    bows = {edge: -0.5 * skipped**0.6 if (skipped := rows[edge.start] - rows[edge.end] - 1) else 0.0 for edge in edges}

    def draw(axes: Any) -> None:
        for edge, bow in bows.items():
            top, bottom = rows[edge.start], rows[edge.end]
            # The image is no spike: it has no rate.
            rate = rates.get(edge.start)
            style = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
            if rate is not None:
                style = {"color": COLOURS[0], "linewidth": 0.5 + 5 * rate / most, "linestyle": "-"}
            style |= {"alpha": 0.75, "solid_capstyle": "butt"}
            height = [top + (bottom - top) * step / 40 for step in range(41)]
            axes.plot([bow * math.sin(math.pi * step / 40) for step in range(41)], height, zorder=1, **style)
            middle, small = (top + bottom) / 2, {"va": "center", "fontsize": 7, "color": INK, "alpha": 0.8}
            if bow:
                axes.text(bow - 0.12, middle, "real values" if rate is None else f"{rate:.3f}", ha="right", **small)
            else:
                said = "real values" if rate is None else f"{rate:.3f} spikes a step"
                axes.text(0.25, middle, said + (f" through {', '.join(edge.layers)}" if edge.layers else ""), **small)
        for name, row in rows.items():
            site = name in shapes
            axes.plot(0, row, marker="o" if site else "s", color=COLOURS[0] if site else INK, markersize=6, zorder=2)
            axes.text(0.25, row, f"{name}  {shapes[name]}" if site else name, va="center", fontweight="bold")
        axes.set_xlim(min(bows.values(), default=0.0) - 1.5, 8)
        axes.set_ylim(min(rows.values()) - 0.5, 0.5)
        axes.axis("off")

    picture = _drawing(7, 0.4 + 0.45 * len(rows), draw, f"{key}-network", "the network, its connections as wide as their rate of spikes")
    kind = "neuron" if entry.report.members == 1 else "group of neurons"
    note = (
        f"<p class=note>Every dot is a layer of neurons. Lines are as wide as the spikes of a {kind} in a step (at most {most:.3f}), which "
        "stand beside them; those of residual connections to the left.</p>"
    )
    return _section("Network", picture, note)


def _neurons(entry: Entry, key: str) -> str:
    report, shares = entry.report, {one.site: one for one in entry.anatomy.sites} if entry.anatomy else {}
    rows = list[list[str]]()
    for site, rate in report.rates.items():
        row = [site, f"{rate:.4f}"]
        if shares:
            one = shares[site]
            row += [_bars(one.rates), f"{one.silent:.3f}", f"{one.saturated:.3f}", "-" if one.outside is None else f"{one.outside:.3f}"]
        if entry.snn is not None:
            row += _parameters(entry.snn.neuron(site))
        rows.append(row)
    headings = ["site", "spikes a step", *(("rates 0 to 1", "silent", "saturated", "outside") if shares else ())]
    headings += ["threshold", "v(0)/theta", "leak"] if entry.snn is not None else []
    note = (
        "<p class=note>Rates: how the neurons divide among rates from 0 to 1, heights drawn as roots, so that rare ones show. Silent, "
        "saturated: shares that fired never, or at every step. Outside: share whose potential ended below 0 or above the threshold, so "
        "that they fired too often or too seldom for what arrived, though they could have done otherwise.</p>"
    )
    return _section("Neurons", _table(headings, rows), note if shares else "")


def _bars(shares: Sequence[float]) -> _Markup:
    """A small histogram."""
    bars = "".join(
        f'<rect x="{6 * place}" y="{16 - height:.1f}" width="5" height="{height:.1f}"/>'
        for place, height in enumerate(max(16 * math.sqrt(share), 0.5) for share in shares)
    )
    said = ", ".join(f"{share:.2f}" for share in shares)
    return _Markup(f'<svg class=bars viewBox="0 0 {6 * len(shares)} 16" role=img aria-label="shares by rate: {said}">{bars}</svg>')


def _parameters(neuron: Neuron) -> list[str]:
    theta = neuron.threshold.detach()
    low, high = float(theta.min()), float(theta.max())
    spread = f"{low:.3g}" if low == high else f"{float(theta.mean()):.3g} ({low:.3g} to {high:.3g})"
    return [spread, f"{float(neuron.initial.detach().mean()):.3g}", f"{float(neuron.leak.detach().mean()):.3g}"]


def _cost(entry: Entry, key: str) -> str:
    operations = entry.operations
    if operations is None:
        return ""
    rows = [
        (
            row.name if row.kind == "layer" else f"{row.name} (join)",
            *(f"{value:,.0f}" for value in (row.dense, row.multiplies, row.accumulates)),
        )
        for row in operations.rows
        if row.kind != "neurons"
    ]
    rows.append(("all", *(f"{operations.total(field):,.0f}" for field in ("dense", "multiplies", "accumulates"))))
    parts = [
        f"<p class=note>Operations per image at T = {operations.steps}, mean of {operations.images} images, counted connection by "
        f"connection; layers that read the image work {'once' if operations.first == 'once' else 'at every step'}.</p>",
        _table(["layer", "source MACs", "MACs", "accumulates"], rows),
    ]
    if entry.energies:
        priced = [
            (one.device, one.account, f"{one.source / 1e3:,.1f}", f"{one.spiking / 1e3:,.1f}", f"{one.ratio:.2f}") for one in entry.energies
        ]
        caveats = dict.fromkeys(caveat for one in entry.energies for caveat in one.caveats)
        items = "".join(f"<li>{_text(caveat)}</li>" for caveat in caveats)
        parts += [
            _energy_picture(entry.energies, key),
            _table(["device", "account", "source nJ", "spiking nJ", "source / spiking"], priced),
        ]
        here = filled_in(operations)
        papers = [
            (claim.source, claim.formula, f"{claim.published:g}", f"{here[method]:.2f}" if method in here else "-")
            for method, claim in CLAIMS.items()
        ]
        claims = "".join(f"<li>{_text(claim.source.partition(',')[0])}: {_text(claim.caveat)}</li>" for claim in CLAIMS.values())
        parts += [
            f"<ul class=note>{items}</ul>",
            _table(["as papers count it", "formula", "published", "here"], papers, wrapped=True),
            f"<ul class=note>{claims}</ul>",
        ]
    return _section("What it costs", *parts)


def _energy_picture(energies: Sequence[Energy], key: str) -> str:
    names = [name for name in dict.fromkeys(name for one in energies for name in one.parts) if any(one.parts.get(name) for one in energies)]

    def draw(axes: Any) -> None:
        ends = [0.0] * len(energies)
        for number, name in enumerate(names):
            values = [one.parts.get(name, 0.0) / one.source for one in energies]
            axes.barh(range(len(energies)), values, left=ends, color=COLOURS[number], label=name, height=0.7)
            ends = [end + value for end, value in zip(ends, values, strict=True)]
        axes.set_yticks(range(len(energies)), [f"{one.device}, {one.account}" for one in energies])
        axes.invert_yaxis()
        axes.axvline(1, color=INK, linestyle="--", linewidth=0.8)
        axes.set_xlabel("energy, source network = 1")
        axes.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))

    return _drawing(7, 1.2 + 0.3 * len(energies), draw, f"{key}-energy", "energy of an image by kind of operation")


def _raster(entry: Entry, key: str) -> str:
    sample = entry.sample
    if sample is None:
        return ""
    chosen = {}
    for site, spikes in sample.spikes.items():
        places = torch.linspace(0, spikes.shape[1] - 1, min(NEURONS, spikes.shape[1])).round().long()
        chosen[site] = spikes[:, places]
    steps = len(sample.logits)

    def draw(axes: Any) -> None:
        start = 0
        marks = []
        for number, (site, spikes) in enumerate(chosen.items()):
            times, neurons = spikes.nonzero().T.tolist() if bool(spikes.any()) else ([], [])
            axes.scatter(
                [time + 1 for time in times], [start + neuron for neuron in neurons], s=5, marker="|", color=COLOURS[number % len(COLOURS)]
            )
            marks.append((start + spikes.shape[1] / 2, site))
            start += spikes.shape[1] + 8
        axes.set_yticks([place for place, _ in marks], [site for _, site in marks])
        axes.set_xlim(0.5, steps + 0.5)
        axes.set_xticks(range(1, steps + 1))
        axes.invert_yaxis()
        axes.set_xlabel("time step")

    def answers(axes: Any) -> None:
        best = sample.logits[-1].topk(min(4, sample.logits.shape[1])).indices.tolist()
        for number, index in enumerate(best):
            axes.plot(range(1, steps + 1), sample.logits[:, index].tolist(), marker="o", color=COLOURS[number], label=sample.classes[index])
        axes.set_xticks(range(1, steps + 1))
        axes.set_xlabel("time step")
        axes.set_ylabel("answer so far")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))

    picture = f'<img alt="the image" src="data:image/png;base64,{_png(sample.image)}">'
    raster = _drawing(7, 1 + 0.45 * len(chosen), draw, f"{key}-raster", "spikes of every site over time")
    readout = _drawing(4.2, 2.4, answers, f"{key}-answers", "readout of the strongest classes over time")
    note = f"<p class=note>Up to {NEURONS} neurons of each site, evenly spread.</p>"
    heading = f"One image: {sample.label}"
    return _section(heading, f"<div class=row>{picture}{readout}</div>", raster, note)


def _png(image: Tensor) -> str:
    """Pixels, enlarged without smoothing, as text."""
    from PIL import Image

    values = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    grey = values.shape[0] == 1
    picture = Image.fromarray((values[0] if grey else values[:3].permute(1, 2, 0).contiguous()).numpy())
    factor = max(1, 160 // max(picture.size))
    stream = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _provenance(entries: Sequence[Entry], command: str) -> str:
    parts = [f"<p>Made by</p><pre>{_text(command)}</pre>"] if command else []
    for entry in entries:
        parts.append(f"<p class=note>{_text(entry.name)}: {_text(entry.report.engine)}</p>")
        data = {"method": entry.report.method, "provenance": entry.report.provenance, "settings": entry.report.settings}
        heading, listing = _text(f"{entry.name}: settings and versions"), _text(json.dumps(data, indent=2))
        parts.append(f"<details open><summary>{heading}</summary><pre>{listing}</pre></details>")
    return _section("To make it again", *parts)


_STYLE = """
:root { color-scheme: light dark; --ink: #1d2126; --soft: #5b646e; --paper: #ffffff; --line: #d9dee3; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #15181c; --line: #323940; --band: #1d2227; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h2.network { font-size: 1.4rem; border-top: 2px solid var(--line); padding-top: 1.5rem; }
.lead { font-size: 1.1rem; margin: 0; } .note { color: var(--soft); font-size: .9rem; }
figure { margin: .75rem 0; } svg { display: block; width: 100%; height: auto; }
svg.bars { display: inline-block; width: auto; height: 1rem; fill: currentColor; vertical-align: middle; }
.key { display: inline-block; margin-right: 1rem; } .key i { display: inline-block; width: .7rem; height: .7rem; border-radius: 50%;
  margin-right: .35rem; }
.row { display: flex; gap: 1.5rem; align-items: center; flex-wrap: wrap; } .row img { width: 10rem; image-rendering: pixelated; }
.row figure { flex: 1 1 18rem; max-width: 28rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .3rem .45rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 600; }
table.wrapped td { white-space: normal; } table.wrapped :is(th, td):nth-child(2) { text-align: left; }
tbody tr:nth-child(even) { background: var(--band); }
pre { background: var(--band); padding: .75rem; overflow-x: auto; font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #f4f6f8; }
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr { break-inside: avoid; } h2, p:has(+ pre) { break-after: avoid; }
  .scroll { overflow: visible; } th, td { white-space: normal; padding: .2rem .4rem; }
  details::details-content { content-visibility: visible; display: block; } * { print-color-adjust: exact; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
