"""The command line. Each command is a plain typed function; method options come from the registry.

Nothing heavy is imported here at the top: `quickspike --help` answers before torch would have loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import tyro

from quickspike.cli_options import (
    ChoiceArguments,
    DataArguments,
    DataOptions,
    Device,
    Json,
    ModelName,
    Refine,
    SiteArguments,
    SiteChoices,
    Weights,
    auto_of,
    commands_of,
    method_options,
    remember_command,
    tell_attempt,
    typed,
)
from quickspike.console import Tracked, dump, print_json, show, track
from quickspike.version import __version__
from quickspike.wrapped import Wrapped

if TYPE_CHECKING:
    from quickspike.method import Method
    from quickspike.refinement import Refinement

DEFAULT_METHOD = "threshold_balancing"

Help = tyro.conf.arg


def demo(out: Annotated[Path, Help(metavar="DIR", help="folder for what the demo makes")] = Path("runs/demo"), json: Json = False) -> None:
    """Train a small network on the embedded digits, convert it, compare both, save it and load it again."""
    from quickspike.files import check_writable

    check_writable(out / "network.safetensors")
    if not json:
        show("training a small network on the embedded digits, then converting it ...")
    from quickspike.demo import run_demo
    from quickspike.report import accuracy_table

    result = run_demo(out, track)
    if json:
        print_json({name: report.to_json() for name, report in result.reports.items()})
        return
    show(accuracy_table(result.reports))
    show(f"saved and loaded again, same answers: {result.network}\npicture: {result.picture}\npage: {result.page}")


def methods(
    name: Annotated[str | None, tyro.conf.Positional, Help(metavar="[NAME]", help="show all options of this method")] = None,
    json: Json = False,
) -> None:
    """List the conversion methods and the refinements that can follow them, or the options of one."""
    from quickspike.errors import UnknownNameError
    from quickspike.method import all_methods
    from quickspike.refinement import REFINEMENTS
    from quickspike.report import method_table, option_table, summary

    converting, refining = all_methods(), REFINEMENTS.all()
    both: dict[str, type[Method] | type[Refinement]] = {**converting, **refining}
    if name is not None and name not in both:
        raise UnknownNameError("method", name, both)
    chosen = both if name is None else {name: both[name]}
    if json:
        print_json([_method_json(cls, summary(cls)) for cls in chosen.values()])
    elif name is None:
        show(method_table(converting, "conversion methods"))
        show(method_table(refining, "refinements of a converted network, without training: --refine NAME"))
    else:
        show(option_table(chosen[name]))


def _method_json(cls: type[Method] | type[Refinement], summary: str) -> dict[str, Any]:
    from quickspike.options import options_of

    options = {
        key: {
            "default": default,
            "unit": declared.unit,
            "range": declared.range_text(),
            "choices": list(getattr(kind, "__args__", ())),
            "help": declared.help,
        }
        for key, (declared, kind, default) in options_of(cls).items()
    }
    return {"name": cls.name, "summary": summary, "paper": str(cls.paper), "options": options}


def inspect(
    model: ModelName,
    choices: ChoiceArguments,
    input: Annotated[tuple[int, ...], Help(metavar="N", help="shape of one sample, for example 3 224 224 [default: 3 224 224]")] = (
        3,
        224,
        224,
    ),
    weights: Weights = None,
    json: Json = False,
) -> None:
    """Report what of a network converts, what stays analog and what is refused, before anything is changed."""
    import torch

    from quickspike.errors import DataError
    from quickspike.graph import inspect as inspect_model
    from quickspike.models import load_model
    from quickspike.report import coverage_tables

    if not input or min(input) < 1:
        raise DataError(f"--input must be sizes >= 1, got {input}")
    example = torch.rand(1, *input, generator=torch.Generator().manual_seed(0))
    coverage = inspect_model(load_model(model, weights), example, choices.analog, choices.pieces)
    if json:
        print_json(coverage.to_json())
    else:
        show(coverage_tables(coverage))


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What goes in, what comes out, and where it runs."""

    out: Annotated[Path, Help(metavar="FILE", help="the spiking network, safetensors")] = Path("network.safetensors")
    method: Annotated[
        str,
        Help(
            metavar="NAME",
            help="conversion method, see `quickspike methods`, or auto: what measures best; the options shown are this method's",
        ),
    ] = DEFAULT_METHOD
    refine: Refine = ()
    weights: Weights = None
    calibration_images: Annotated[
        int | None,
        Help(
            metavar="N",
            help="first N training images, without labels; by default 1000, or all if there are fewer [unit: images; range: >= 1]",
        ),
    ] = None
    device: Device = "auto"
    json: Json = False


def _convert_command(name: str) -> Callable[..., None]:
    """The `convert` command with the options of one method."""

    def convert(model: Any, data: Any, settings: Any, choices: Any, options: Any) -> None:
        """Convert a trained network with calibration images and save the spiking one."""
        _convert(model, data, settings, choices, dataclasses.asdict(options))

    convert.__annotations__ = {
        "model": ModelName,
        "data": DataArguments,
        "settings": Annotated[ConvertOptions, tyro.conf.OmitArgPrefixes, Help(name="conversion")],
        "choices": SiteArguments,
        "options": Annotated[method_options(name), tyro.conf.OmitArgPrefixes, Help(name="method")],
    }
    return convert


def _convert(model: str, data: DataOptions, settings: ConvertOptions, choices: SiteChoices, options: dict[str, Any]) -> None:
    from quickspike.api import finish, fit
    from quickspike.choosing import choose
    from quickspike.data import ImageStream
    from quickspike.errors import DataError
    from quickspike.evaluation import make_fabric
    from quickspike.files import check_writable
    from quickspike.method import create, get, label
    from quickspike.models import load_model
    from quickspike.refinement import refinements_of
    from quickspike.report import choice_tables

    auto = auto_of(settings.method, options, settings.refine, choices)
    chosen = None
    if auto is None:
        refined = refinements_of(settings.refine)
        chosen = create(settings.method, **options, sites=choices.sites(get(settings.method)), refinements=refined)
    check_writable(settings.out)
    source = make_fabric(settings.device).to_device(load_model(model, settings.weights))
    data_set = data.load(model=model, weights=settings.weights)
    images = settings.calibration_images
    if images is None:
        images = min(1000, data_set.size("train"))
    if images < 1:
        raise DataError(f"--calibration-images must be >= 1, got {images}")
    calibration = Tracked(data_set.loader("train", limit=images), "calibrating")
    if chosen is None:
        choice = choose(source, calibration, auto, analog=choices.analog, pieces=choices.pieces, progress=tell_attempt)
        snn, coverage, told = choice.network, choice.coverage, choice.to_json()
    else:
        stream = ImageStream(calibration)
        ann = fit(source, stream, chosen, analog=choices.analog, pieces=choices.pieces)
        snn, coverage, told = finish(ann, stream, chosen), ann.coverage, None
    preprocessing = dataclasses.asdict(data_set.preprocessing)
    snn.provenance.update(model=Path(model).name, data=Path(data.data).name, preprocessing=preprocessing)
    remember_command(snn)
    snn.save(settings.out)
    if settings.json:
        print_json({"out": str(settings.out), "coverage": coverage.to_json(), "method": snn.method, "provenance": snn.provenance})
        return
    if told is not None:
        show(choice_tables(told))
    seen = snn.provenance["calibration_images"]
    show(f"{coverage}\n{label(snn.method)}, T = {snn.steps}, calibrated on {seen} images: {settings.out}")
    if snn.readout_leak is not None:
        show(f"readout: {snn.readout_leak:g} of the weight of an output is left at the next step")


class _Unlabelled(Wrapped):
    """Batches without their labels."""

    def __iter__(self) -> Iterator[Any]:
        return (images for images, _ in self.source)


def evaluate(
    network: Annotated[Path, tyro.conf.Positional, Help(metavar="NETWORK", help="a spiking network that `convert` saved")],
    data: DataArguments,
    steps: Annotated[
        tuple[int, ...] | None,
        Help(metavar="T", help="numbers of steps to read out after [unit: steps; range: >= 1; default: 1 2 4 ... T]"),
    ] = None,
    reference: Annotated[str | None, Help(metavar="MODEL", help="the source network, to compare with")] = None,
    weights: Weights = None,
    values: Annotated[
        bool,
        Help(
            help="the network chooses no class (regression, segmentation, features): leave labels out, and show how far what it gives is "
            "from what --reference gives"
        ),
    ] = False,
    images: Annotated[int | None, Help(metavar="N", help="first N test images [unit: images; range: >= 1; default: all]")] = None,
    out: Annotated[Path | None, Help(metavar="FILE", help="also write the report as JSON")] = None,
    plot: Annotated[Path | None, Help(metavar="FILE", help="also draw accuracy against T, PNG")] = None,
    device: Device = "auto",
    devices: Annotated[
        int, Help(metavar="N", help="processes on this machine, one device each, that share the images [unit: devices; range: >= 1]")
    ] = 1,
    nodes: Annotated[int, Help(metavar="N", help="machines; start the same command on each with torchrun [range: >= 1]")] = 1,
    precision: Annotated[str, Help(metavar="NAME", help="Lightning Fabric's name: 32-true, bf16-mixed, ...")] = "32-true",
    engine: Annotated[
        Literal["auto", "reference", "fused", "integer", "count"] | None,
        Help(
            metavar="NAME",
            help="measure a copy made for this engine: integer has 8-bit weights, count needs layers that wait for whole windows, "
            "auto takes the fastest exact one [default: the network as it is]",
        ),
    ] = None,
    bits: Annotated[int, Help(metavar="N", help="weights of --engine integer or count [unit: bits; range: 2 to 8]")] = 8,
    engine_precision: Annotated[
        Literal["fp32", "bf16"], Help(metavar="NAME", help="of the layers that read spikes, with --engine fused: fp32 or bf16")
    ] = "fp32",
    memory: Annotated[
        str | None,
        Help(metavar="AMOUNT", help="what a simulation may take, for example 2GiB: it takes the images in parts [default: no bound]"),
    ] = None,
    exit: Annotated[
        tuple[float, ...],
        Help(
            metavar="LOSS",
            help="also let images stop early, at a margin that may cost that much accuracy on the last 2,000 training images, and show "
            "accuracy and mean steps [unit: percentage points; range: >= 0; example: 0.1 0.5 1]",
        ),
    ] = (),
    energy: Annotated[
        tuple[str, ...],
        Help(
            metavar="DEVICE",
            help="also count operations on the first 200 test images, and show what they cost there: 45nm_fp32, 45nm_fp16, 45nm_int32, "
            "45nm_int8, loihi, truenorth",
        ),
    ] = (),
    first_layer: Annotated[
        Literal["once", "every-step"],
        Help(
            metavar="HOW-OFTEN",
            help="how often --energy counts layers that read the image: once, since their input stays the same, or every-step, as hardware "
            "that keeps no currents does it",
        ),
    ] = "once",
    anatomy: Annotated[
        bool, Help(help="also split the error of every layer into its sources, on the first 200 test images, and say what helps")
    ] = False,
    page: Annotated[
        Path | None, Help(metavar="FILE", help="also write a page that shows all of this, with --anatomy and --energy 45nm_fp32, HTML")
    ] = None,
    share: Annotated[
        Path | None, Help(metavar="FOLDER", help="also write a folder with the network and a model card that shows these figures")
    ] = None,
    push: Annotated[
        str | None, Help(metavar="USER/NAME", help="also upload that to a repository of the Hugging Face Hub, see `hf auth login`")
    ] = None,
    json: Json = False,
) -> None:
    """Measure a spiking network on test images: accuracy after each number of steps, and firing rates."""
    from quickspike.anatomy import anatomy_of, check_anatomy
    from quickspike.checkpoint import load
    from quickspike.claims import filled_in
    from quickspike.early_exit import Saving, check_exit, check_loss, savings
    from quickspike.energy import ACCOUNTS, Energy, device_named, energy_of
    from quickspike.engines import accelerate
    from quickspike.errors import OptionError
    from quickspike.evaluation import evaluate as measure
    from quickspike.evaluation import make_fabric
    from quickspike.files import check_writable, write_text
    from quickspike.memory import in_bytes
    from quickspike.method import label
    from quickspike.models import load_model
    from quickspike.operations import count_operations
    from quickspike.page import Entry, first_sample, write_page
    from quickspike.processes import start
    from quickspike.report import anatomy_tables, energy_tables, exit_table, plot_accuracy, report_tables

    for path in filter(None, (out, plot, page)):
        check_writable(path)
    if page is not None:
        anatomy, energy = True, energy or ("45nm_fp32",)
    for loss in exit:
        check_loss(loss)
    for device_name in energy:
        device_named(device_name)
    if exit and engine == "count":
        raise OptionError("--exit needs an answer after every step, and --engine count has one after the last only; take fused or integer")
    if memory is not None:
        in_bytes(memory)
    snn = load(network)
    if anatomy:
        check_anatomy(snn)
    if exit:
        check_exit(snn)
    if weights is not None and reference is None:
        raise OptionError("--weights are those of the source network; name it with --reference")
    if values and reference is None:
        raise OptionError("--values compares with the source network; name it with --reference")
    if values and (plot is not None or page is not None):
        raise OptionError("--plot and --page show accuracy, which there is none of with --values; --out has the figures")
    if values and exit:
        raise OptionError("--exit stops a sample once its class is decided, and with --values there is none")
    source = None if reference is None else load_model(reference, weights)
    data_set = data.load(snn.provenance.get("preprocessing", snn.provenance.get("statistics")))
    fabric = start(device, precision, devices, nodes)
    loader: Any = data_set.loader("test", limit=images)
    if values:
        loader = _Unlabelled(loader)
    if fabric.is_global_zero:
        loader = Tracked(loader, "evaluating")
    chosen: Any = {"bits": bits, "engine_precision": engine_precision}
    report = measure(snn, loader, source, steps, precision=precision, fabric=fabric, engine=engine, memory=memory, **chosen)
    if not fabric.is_global_zero:
        return
    saved: tuple[Saving, ...] = ()
    longest = snn.with_steps(report.steps[-1])
    make_fabric(device).to_device(longest)
    if exit:
        held_out = data_set.loader("train", limit=min(2000, data_set.size("train")), last=True)
        test = data_set.loader("test", limit=images)
        # What stops early is what was measured: the same engine, memory and precision.
        stopping = longest if engine is None else accelerate(longest, engine, engine_precision, bits)
        stopping.memory = memory
        with make_fabric(device, precision).autocast():
            saved = savings(stopping, Tracked(held_out, "setting margins"), Tracked(test, "stopping early"), exit)
    some = data_set.loader("test", limit=min(COUNTED, images or COUNTED, data_set.size("test")))
    if anatomy:
        report = dataclasses.replace(report, anatomy=anatomy_of(longest, Tracked(some, "splitting the error")))
    found = report.to_json() | ({"early_exit": [dataclasses.asdict(row) for row in saved]} if exit else {})
    priced: tuple[Energy, ...] = ()
    if energy:
        operations = count_operations(longest, Tracked(some, "counting operations"), "once" if first_layer == "once" else "every step")
        priced = tuple(energy_of(operations, name, account) for name in energy for account in ACCOUNTS)
        found |= {
            "operations": operations.to_json(),
            "energy": [one.to_json() for one in priced],
            "as_papers_count": {name: ratio if math.isfinite(ratio) else None for name, ratio in filled_in(operations).items()},
        }
    if out is not None:
        write_text(out, dump(found))
    if plot is not None:
        plot_accuracy({label(snn.method): report}, plot, saved)
    _share(snn, report, priced, data_set.name, share, push)
    if page is not None:
        sample = first_sample(longest, data_set)
        entry = Entry(label(snn.method), report, longest, report.anatomy, operations, priced, sample)
        commands = [commands_of(snn, network.name), typed()]
        write_page(page, f"{Path(network).name} on {data_set.name}", [entry], "\n".join(commands))
    if json:
        print_json(found)
    else:
        show(report_tables(report))
        if saved:
            show(exit_table(saved, report))
        if report.anatomy is not None:
            show(anatomy_tables(report.anatomy))
        if energy:
            show(energy_tables(operations, priced))


def _share(snn: Any, report: Any, energy: Any, dataset: str, folder: Path | None, repository: str | None) -> None:
    """The network and its card, in a folder and on the Hub."""
    if folder is None and repository is None:
        return
    from quickspike.hub import push_to_hub, save_pretrained

    if folder is not None:
        save_pretrained(snn, folder, report, energy, dataset=dataset)
    if repository is not None:
        where = push_to_hub(snn, repository, report, energy, dataset=dataset)
        sys.stderr.write(f"uploaded: {where}\n")


COUNTED = 200
"""Test images on which operations are counted and errors split."""


# Entry


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exit statuses are those of `STATUSES`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments == ["--version"]:
        sys.stdout.write(f"quickspike {__version__}\n")
        return
    logging.basicConfig(format="quickspike: %(message)s", level=logging.WARNING)
    with _interrupts() as received:
        try:
            _dispatch(arguments)
            sys.stdout.flush()
        except KeyboardInterrupt as stop:
            sys.stderr.write(f"\nquickspike: {str(stop) or 'interrupted; no file was left half-written'}\n")
            sys.exit(128 + (received or [signal.SIGINT])[0])
        except OSError as error:
            # The interpreter would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            # A reader that has left (`| head`) wants to hear no more.
            _leave(1, "" if isinstance(error, BrokenPipeError) else str(error))
        except (ValueError, RuntimeError, MemoryError) as error:
            if (told := _told(error)) is None:
                raise
            _leave(*told)


STATUSES = """Exit status: 0 done; 1 the machine could not (out of memory, nobody reads the output), or a mistake in quickspike, which shows
a traceback; 2 something to put right: options, input, an output that cannot be written; 130 Ctrl-C; 143 SIGTERM. Files are
written whole or not at all."""


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """SIGTERM stops a command as Ctrl-C does, with time to tidy up and to say how to go on; the list gets its number."""
    received: list[int] = []
    # One of several processes has to end at once, even while it waits for the others, where Python hears no signal.
    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield received
        return

    def stop(number: int, _: object) -> None:
        received.append(number)
        # A second one ends the process while it tidies up.
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _told(error: Exception) -> tuple[int, str] | None:
    """Exit status and message of an error that is no mistake of this program."""
    from quickspike.errors import QuickspikeError

    if isinstance(error, QuickspikeError):
        return 2, str(error)
    from quickspike.memory import out_of_memory

    if out_of_memory(error):
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        return 1, f"out of memory ({reason}); take less at a time: a smaller --batch-size, --accumulate, or evaluate --memory"
    return None


def _leave(status: int, message: str) -> NoReturn:
    if message:
        sys.stderr.write(f"quickspike: error: {message}\n")
    sys.exit(status)


def _dispatch(arguments: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "methods": methods,
        "inspect": inspect,
        "train": _train_stub,
        "convert": _convert_stub,
        "tune": _tune_stub,
        "evaluate": evaluate,
        "compare": _compare_stub,
        "search": _search_stub,
        "export": _export_stub,
        "run": _run_stub,
    }
    if arguments[:1] == ["convert"]:
        chosen = _chosen_method(arguments)
        commands["convert"] = _convert_command(DEFAULT_METHOD if chosen is None else chosen)
    if arguments[:1] in (["train"], ["tune"], ["run"]):
        commands[arguments[0]] = _training_command(arguments)
    if arguments[:1] in (["compare"], ["search"]):
        from quickspike import cli_searching

        commands[arguments[0]] = getattr(cli_searching, arguments[0])
    if arguments[:1] == ["export"]:
        from quickspike.cli_exporting import export

        commands["export"] = export
    tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="quickspike",
        description=f"Turn a trained PyTorch network into a spiking one that answers in a few time steps.\n\n{STATUSES}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
        sort_subcommands=False,
    )


def _train_stub() -> None:
    """Train a source network, plainly or with a method's activations; with a method, convert it too."""


def _tune_stub() -> None:
    """Fine-tune a spiking network end to end with surrogate gradients: weights, thresholds and leaks."""


def _export_stub() -> None:
    """Write a spiking network for other programs: NIR, ONNX, torch.export, or a folder with a model card."""


def _run_stub() -> None:
    """Run an experiment from a recipe and show what it gave beside the published figure."""


def _compare_stub() -> None:
    """Convert one network with several methods, calibrated only, and show their accuracies in one table."""


def _search_stub() -> None:
    """Find the least T, and the method, that keep the accuracy within a bound."""


def _convert_stub() -> None:
    """Convert a trained network with calibration images and save the spiking one."""


def _training_command(arguments: list[str]) -> Callable[..., None]:
    from quickspike import cli_training

    if arguments[0] == "train":
        return cli_training.train_command(_chosen_method(arguments))
    if arguments[0] == "tune":
        return cli_training.tune_command()
    command: Callable[..., None] = getattr(cli_training, arguments[0])
    return command


def _chosen_method(arguments: list[str]) -> str | None:
    """The value of --method, read ahead of parsing because the options depend on it."""
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag.startswith("--method="):
            return flag.removeprefix("--method=")
        if flag == "--method":
            return value
    return None
