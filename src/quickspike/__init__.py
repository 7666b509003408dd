"""quickspike: a trained PyTorch network goes in, a spiking network that answers in 1 to 8 time steps comes out."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quickspike.version import __version__

if TYPE_CHECKING:
    from quickspike import methods, refinements
    from quickspike.anatomy import Anatomy, SiteAnatomy, anatomy_of
    from quickspike.api import convert
    from quickspike.checkpoint import load
    from quickspike.choosing import Auto, Choice, choose
    from quickspike.conversion import SpikingNetwork
    from quickspike.coverage import Coverage
    from quickspike.early_exit import calibrate_exit
    from quickspike.energy import Device, Energy, energy_of, register_device
    from quickspike.engines import accelerate
    from quickspike.errors import QuickspikeError
    from quickspike.evaluation import Report, evaluate
    from quickspike.graph import inspect, trace
    from quickspike.hub import from_pretrained, push_to_hub, save_pretrained
    from quickspike.inputs import OneInput
    from quickspike.method import Method, register
    from quickspike.neuron import Surrogate
    from quickspike.nir_export import export_nir
    from quickspike.nir_import import load_nir
    from quickspike.onnx_export import to_onnx
    from quickspike.operations import Operations, count_operations
    from quickspike.pooling import replace_max_pool
    from quickspike.program_export import load_program, to_program
    from quickspike.quantisation import quantise
    from quickspike.refinement import Refinement
    from quickspike.searching import Candidate, Found, Trial, search
    from quickspike.simulation import Run, simulate

# Where each public name lives. They are fetched on first use, so that the command line can answer `--help` without
# loading torch. No module may share its name with one of these, or importing it would hide the function.
_HOMES = {
    "Anatomy": "anatomy",
    "SiteAnatomy": "anatomy",
    "anatomy_of": "anatomy",
    "convert": "api",
    "load": "checkpoint",
    "Auto": "choosing",
    "Choice": "choosing",
    "choose": "choosing",
    "SpikingNetwork": "conversion",
    "Coverage": "coverage",
    "accelerate": "engines",
    "calibrate_exit": "early_exit",
    "Device": "energy",
    "Energy": "energy",
    "energy_of": "energy",
    "register_device": "energy",
    "QuickspikeError": "errors",
    "Report": "evaluation",
    "evaluate": "evaluation",
    "inspect": "graph",
    "trace": "graph",
    "from_pretrained": "hub",
    "push_to_hub": "hub",
    "save_pretrained": "hub",
    "OneInput": "inputs",
    "Method": "method",
    "register": "method",
    "Refinement": "refinement",
    "Surrogate": "neuron",
    "export_nir": "nir_export",
    "load_nir": "nir_import",
    "to_onnx": "onnx_export",
    "Operations": "operations",
    "count_operations": "operations",
    "replace_max_pool": "pooling",
    "load_program": "program_export",
    "to_program": "program_export",
    "quantise": "quantisation",
    "Candidate": "searching",
    "Found": "searching",
    "Trial": "searching",
    "search": "searching",
    "Run": "simulation",
    "simulate": "simulation",
}

__all__ = [
    "Anatomy",
    "Auto",
    "Candidate",
    "Choice",
    "Coverage",
    "Device",
    "Energy",
    "Found",
    "Method",
    "OneInput",
    "Operations",
    "QuickspikeError",
    "Refinement",
    "Report",
    "Run",
    "SiteAnatomy",
    "SpikingNetwork",
    "Surrogate",
    "Trial",
    "__version__",
    "accelerate",
    "anatomy_of",
    "calibrate_exit",
    "choose",
    "convert",
    "count_operations",
    "energy_of",
    "evaluate",
    "export_nir",
    "from_pretrained",
    "inspect",
    "load",
    "load_nir",
    "load_program",
    "methods",
    "push_to_hub",
    "quantise",
    "refinements",
    "register",
    "register_device",
    "replace_max_pool",
    "save_pretrained",
    "search",
    "simulate",
    "to_onnx",
    "to_program",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in ("methods", "refinements"):
        return importlib.import_module(f"quickspike.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'quickspike' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"quickspike.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
