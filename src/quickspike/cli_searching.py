"""The commands that convert one network several times: compare and search. Plain typed functions, like the others."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from quickspike.cli_options import DataArguments, Json, ModelName, Weights, candidate_of, typed
from quickspike.console import Tracked, TrainingWatcher, print_json, show
from quickspike.tuning import TUNING

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork
    from quickspike.data import DataSet
    from quickspike.evaluation import Report
    from quickspike.page import Entry

Help = tyro.conf.arg
PRICED = "45nm_fp32"
"""Device of the energies on a page, unless one is named."""


def compare(
    model: ModelName,
    data: DataArguments,
    methods: Annotated[tuple[str, ...] | None, Help(metavar="NAME", help="methods to compare [default: all]")] = None,
    steps: Annotated[tuple[int, ...], Help(metavar="T", help="numbers of steps; every method is fitted for each [unit: steps]")] = (
        1,
        2,
        4,
        8,
    ),
    weights: Weights = None,
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels [unit: images; range: >= 1]")
    ] = 1000,
    images: Annotated[int | None, Help(metavar="N", help="first N test images [unit: images; range: >= 1; default: all]")] = None,
    out: Annotated[Path | None, Help(metavar="FILE", help="also write the figures as JSON")] = None,
    page: Annotated[Path | None, Help(metavar="FILE", help="also write a page: accuracy, errors and cost of all, HTML")] = None,
    device: Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: Json = False,
) -> None:
    """Convert one network with several methods, calibrated only, and show their accuracies in one table."""
    from quickspike.api import convert
    from quickspike.console import dump
    from quickspike.energy import energy_of
    from quickspike.errors import OptionError
    from quickspike.evaluation import evaluate, make_fabric
    from quickspike.files import check_writable, write_text
    from quickspike.method import all_methods, get
    from quickspike.models import load_model
    from quickspike.operations import count_operations
    from quickspike.page import COUNTED, write_page
    from quickspike.report import compare_table
    from quickspike.searching import Trial

    if not steps:
        raise OptionError("--steps needs at least one number")
    names = methods or tuple(all_methods())
    for name in names:
        get(name)
    for path in filter(None, (out, page)):
        check_writable(path)
    source = make_fabric(device).to_device(load_model(model, weights))
    data_set = data.load(model=model, weights=weights)
    some = data_set.loader("test", limit=min(COUNTED, data_set.size("test")))
    reports, entries, trials = {}, [], list[Trial]()
    for name in Tracked(names, "comparing methods"):
        found = {}
        for count in steps:
            loader = data_set.loader("train", limit=min(calibration_images, data_set.size("train")))
            started = time.perf_counter()
            snn = convert(source, loader, name, steps=count)
            found[count] = report = evaluate(snn, data_set.loader("test", limit=images), source, (count,), device=device)
            seconds = time.perf_counter() - started
            if page is not None:
                accuracy = report.accuracy[count]
                spent = energy_of(count_operations(snn, some), PRICED).spiking
                drop = (report.reference_accuracy or 0.0) - accuracy
                trials.append(Trial(name, count, report.latency[count], accuracy, drop, spent, seconds))
        reports[name] = found
        if page is not None:
            entries.append(_entry(name, snn, found, data_set))
    plain = {name: {str(count): report.to_json() for count, report in found.items()} for name, found in reports.items()}
    if out is not None:
        write_text(out, dump(plain))
    if page is not None:
        write_page(page, f"{Path(model).name} on {data_set.name}: methods compared", entries, typed(), trials)
    print_json(plain) if json else show(compare_table(reports))


def _entry(name: str, snn: SpikingNetwork, found: Mapping[int, Report], data: DataSet) -> Entry:
    """One method on the page: its accuracy for every T, all else for the last."""
    from quickspike.page import described

    last = found[max(found)]
    accuracy = {steps: report.accuracy[steps] for steps, report in sorted(found.items())}
    latency = {steps: report.latency[steps] for steps, report in sorted(found.items())}
    return described(name, dataclasses.replace(last, steps=tuple(accuracy), accuracy=accuracy, latency=latency), snn, data)


def search(
    model: ModelName,
    data: DataArguments,
    methods: Annotated[
        tuple[str, ...] | None, Help(metavar="NAME", help="methods to try, calibrated only [default: all, or none with --candidate]")
    ] = None,
    candidate: Annotated[
        tuple[str, ...],
        Help(
            metavar="METHOD:OPTION=VALUE,...",
            help="methods to try with other options than their defaults, for example potential_init:ceiling=percentile,percentile=99",
        ),
    ] = (),
    max_drop: Annotated[float, Help(metavar="LOSS", help="accuracy that may be lost [unit: percentage points; range: >= 0]")] = 1.0,
    most_steps: Annotated[int, Help(metavar="T", help="largest number of steps to try [unit: steps; range: >= 1]")] = 64,
    synchronous: Annotated[bool, Help(help="try each method with layers that wait for whole windows, too")] = False,
    weighted: Annotated[bool, Help(help="try each method with spikes that are weighted by their step, too")] = False,
    energy: Annotated[str | None, Help(metavar="DEVICE", help="weigh energy too, on this device: see `evaluate --energy`")] = None,
    max_energy: Annotated[float | None, Help(metavar="NJ", help="energy that an image may take there [unit: nJ; range: >= 0]")] = None,
    max_minutes: Annotated[float | None, Help(metavar="N", help="begin no new trial after so long [unit: minutes; range: > 0]")] = None,
    weights: Weights = None,
    calibration_images: Annotated[
        int, Help(metavar="N", help="first N training images, without labels [unit: images; range: >= 1]")
    ] = 1000,
    images: Annotated[
        int, Help(metavar="N", help="last N training images, on which accuracy is measured [unit: images; range: >= 1]")
    ] = 2000,
    out: Annotated[Path | None, Help(metavar="FILE", help="keep every trial there, as JSON; the same command goes on from it")] = None,
    network: Annotated[Path | None, Help(metavar="FILE", help="save the best network")] = None,
    page: Annotated[
        Path | None, Help(metavar="FILE", help="also write a page: the Pareto front, and all about the best network, HTML")
    ] = None,
    tune_epochs: Annotated[
        int, Help(metavar="N", help="try each method fine-tuned for so long, too, distilled from the source [unit: epochs; range: >= 0]")
    ] = 0,
    precision: Annotated[str, Help(metavar="NAME", help="of fine-tuning, Lightning Fabric's name: 32-true, bf16-mixed, ...")] = "32-true",
    device: Annotated[str, Help(metavar="NAME", help="auto, cpu, cuda, mps, ...")] = "auto",
    json: Json = False,
) -> None:
    """Find the least T, and the method, that keep the accuracy within a bound; then measure that network on the test images."""
    from quickspike.augmentation import Augmentation
    from quickspike.evaluation import evaluate, make_fabric
    from quickspike.files import check_writable
    from quickspike.method import all_methods, get
    from quickspike.models import load_model
    from quickspike.options import options_of
    from quickspike.page import described, write_page
    from quickspike.report import search_outcome, search_tables
    from quickspike.searching import Candidate, Trial
    from quickspike.searching import search as find
    from quickspike.training import Trainer, Training

    own = [candidate_of(text) for text in candidate]
    candidates = [*(Candidate(name) for name in methods or (() if own else tuple(all_methods()))), *own]
    kinds = [kind for kind, asked in (("synchronous", synchronous), ("weighted", weighted)) if asked]
    candidates += [
        Candidate(one.method, {**one.options, kind: True}) for kind in kinds for one in candidates if kind in options_of(get(one.method))
    ]
    candidates += [dataclasses.replace(one, epochs=tune_epochs) for one in candidates if tune_epochs]
    for path in filter(None, (out, network, page)):
        check_writable(path)
    source = make_fabric(device).to_device(load_model(model, weights))
    data_set = data.load(model=model, weights=weights)
    size = data_set.size("train")
    trainer = Trainer(
        fabric=make_fabric(device, precision),
        data=data_set.without_last(min(images, size)) if tune_epochs else data_set,
        settings=Training(distill=0.9, temperature=4.0, **TUNING),
        augmentation=Augmentation(),
        folder=None if out is None else out.with_suffix(""),
        watcher=TrainingWatcher(),
    )
    calibration = data_set.loader("train", limit=min(calibration_images, size))
    held_out = data_set.loader("train", limit=min(images, size), last=True)

    def progress(trial: Trial) -> None:
        sys.stderr.write(f"{trial.candidate}, T = {trial.steps}: {trial.accuracy:.2f} %, {trial.drop:+.2f} lost, {trial.seconds:.0f} s\n")

    found = find(
        source,
        calibration,
        held_out,
        candidates,
        max_drop=max_drop,
        most_steps=most_steps,
        energy=PRICED if energy is None and page is not None else energy,
        max_energy=None if max_energy is None else 1e3 * max_energy,
        max_seconds=None if max_minutes is None else 60 * max_minutes,
        device=device,
        trainer=trainer if tune_epochs else None,
        file=out,
        progress=progress,
    )
    report, entries = None, []
    if found.best is not None and (best := found.network) is not None:
        best.provenance.update(model=Path(model).name, data=Path(data.data).name, preprocessing=dataclasses.asdict(data_set.preprocessing))
        report = evaluate(best, data_set.loader("test"), source, (found.best.steps,), device=device)
        if network is not None:
            best.save(network)
        if page is not None:
            entries.append(described(found.best.candidate, report, best, data_set))
    if page is not None and found.trials:
        title = f"{Path(model).name} on {data_set.name}: the least T"
        write_page(page, title, entries, typed(), found.trials, search_outcome(found, report))
    if json:
        print_json(found.to_json() | {"test": None if report is None else report.to_json()})
    else:
        show(search_tables(found, report))
