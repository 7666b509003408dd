"""The command `export`: networks for other programs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from quickspike.cli_options import DataOptions, Help, Json
from quickspike.console import Tracked, print_json, show

if TYPE_CHECKING:
    from quickspike.conversion import SpikingNetwork

Kind = Literal["nir", "onnx", "torch", "folder"]
SUFFIXES = {"nir": ".nir", "onnx": ".onnx", "torch": ".pt2", "folder": ""}


@dataclasses.dataclass(frozen=True)
class MeasuringOptions(DataOptions):
    """Images to measure on what a NIR file loses; how pixels become the network's input."""

    data: Annotated[
        str,
        Help(
            metavar="NAME",
            help="digits, mnist, fashion-mnist, cifar10, cifar100, imagenet, imagefolder:PATH, or npz:PATH [default: nothing is measured]",
        ),
    ] = ""


def export(
    network: Annotated[Path, tyro.conf.Positional, Help(metavar="NETWORK", help="a spiking network that quickspike saved")],
    options: Annotated[MeasuringOptions, tyro.conf.OmitArgPrefixes],
    to: Annotated[
        Kind,
        Help(
            metavar="FORMAT",
            help="nir: for neuromorphic hardware and other simulators; onnx: for onnxruntime and others; torch: a torch.export program; "
            "folder: network and model card, as the Hugging Face Hub keeps them",
        ),
    ] = "nir",
    out: Annotated[
        Path | None, Help(metavar="FILE", help="what is written [default: beside the network, with the ending of the format]")
    ] = None,
    reader: Annotated[
        str,
        Help(
            metavar="NAME",
            help="--to nir: who will read the file: nir (the specification), sinabs, spikingjelly, snntorch, norse; they differ in resets, "
            "time steps and what they can read",
        ),
    ] = "nir",
    initial: Annotated[
        Literal["left-out", "bias"],
        Help(metavar="HOW", help="--to nir: potentials to begin with are left-out, or come in over the steps as a bias"),
    ] = "left-out",
    bits: Annotated[
        int | None, Help(metavar="N", help="weights of N bits with a scale per output channel [unit: bits; range: 2 to 8]")
    ] = None,
    strict: Annotated[bool, Help(help="--to nir: refuse to write a file whose reader would answer otherwise")] = False,
    allow_lossy: Annotated[bool, Help(help="--to nir: write it anyway, and measure on --data what is lost")] = False,
    images: Annotated[int, Help(metavar="N", help="first N test images to measure on [unit: images; range: >= 1]")] = 1000,
    program: Annotated[bool, Help(help="measure in the reader itself, which must be installed, and not only by its rules")] = False,
    form: Annotated[
        Literal["unrolled", "step"],
        Help(metavar="FORM", help="--to onnx: all steps at once, or one step with potentials as inputs and outputs"),
    ] = "unrolled",
    integers: Annotated[bool, Help(help="--to onnx: 8-bit weights between QuantizeLinear and DequantizeLinear")] = False,
    image_bits: Annotated[
        int | None,
        Help(
            metavar="N",
            help="with --bits or --integers: the image in whole numbers of N bits, too; every program then gives the same answers, "
            "however it orders its sums [unit: bits; range: 2 to 12; 10 keeps 8-bit pixels apart]",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Write a spiking network for other programs: NIR, ONNX, torch.export, or a folder with a model card."""
    from quickspike.checkpoint import load
    from quickspike.errors import OptionError
    from quickspike.files import check_writable

    if allow_lossy and strict:
        raise OptionError("--strict refuses what --allow-lossy writes; give one of them")
    if (allow_lossy or program) and not options.data:
        raise OptionError("what is lost is measured on images; name --data")
    if image_bits is not None and (to == "nir" or not (integers or bits is not None)):
        raise OptionError("--image-bits goes with --bits or --integers, and not with --to nir")
    snn = load(network)
    path = out or network.with_name(network.stem + SUFFIXES[to])
    if to != "folder":
        check_writable(path)
    if to == "nir":
        found = _nir(snn if bits is None else snn.fold(bits), path, reader, initial, strict, options, images, program, json)
    else:
        found = _other(to, snn, path, form, integers, bits, image_bits)
    if json:
        print_json({"file": str(path), **found})
    else:
        show(f"written: {path}")


def _nir(
    snn: SpikingNetwork,
    path: Path,
    reader: str,
    initial: str,
    strict: bool,
    options: MeasuringOptions,
    images: int,
    program: bool,
    json: bool,
) -> dict[str, Any]:
    from quickspike.nir_export import export_nir
    from quickspike.nir_programs import compare

    how: Any = "bias" if initial == "bias" else "left out"
    exported = export_nir(snn, path, reader, how, strict)
    measured = []
    if options.data:
        data = options.load(snn.provenance.get("preprocessing"))
        some = data.loader("test", limit=min(images, data.size("test")))
        measured = [compare(snn, exported, Tracked(some, f"running it as {reader} does"))]
        if program:
            measured.append(compare(snn, exported, Tracked(some, f"running it in {reader}"), program=True))
    if not json:
        show(f"{len(exported.graph.nodes)} nodes for {exported.reader.name} {exported.reader.version}: {exported.reader.call}")
        if snn.readout_leak is not None:
            show(f"to read out: the mean of the outputs, that of step t of {snn.steps} weighted by {snn.readout_leak:g}^({snn.steps}-t)")
        for loss in exported.losses:
            show(f"not in the file: {loss}")
        for one in measured:
            kind = f"in {reader} itself" if one.program else f"as {reader} computes"
            show(
                f"{kind}, T = {snn.steps}, {one.images} images: accuracy {one.accuracy:.2f} % (here {one.own_accuracy:.2f} %), "
                f"same answer for {one.agreement:.2f} %"
                + ("" if one.same_counts is None else f", same number of spikes for {one.same_counts:.2f} % of the neurons")
            )
    return {
        "reader": reader,
        "nodes": len(exported.graph.nodes),
        "losses": [dataclasses.asdict(loss) for loss in exported.losses],
        "measured": [one.to_json() for one in measured],
    }


def _other(
    to: Kind, snn: SpikingNetwork, path: Path, form: Any, integers: bool, bits: int | None, image_bits: int | None
) -> dict[str, Any]:
    from quickspike.quantisation import quantise

    if bits is not None or integers:
        snn = quantise(snn, 8 if bits is None else bits, image_bits).network
    if to == "onnx":
        from quickspike.onnx_export import to_onnx

        to_onnx(snn, path, form, integers=integers)
        return {"form": form, "integers": integers}
    if to == "torch":
        from quickspike.program_export import to_program

        to_program(snn, path)
        return {}
    from quickspike.hub import save_pretrained

    save_pretrained(snn, path)
    return {}


__all__ = ["export"]
