"""What readers of NIR make of a network: how often they answer as we do, and as the labels say.

    python bench/nir_agreement.py MODEL WEIGHTS DATA --mean M... --std S... [--method potential_init] [--steps 4] [--images N] [--out FILE]

The network is converted once, on the first 1,000 training images, and written for every reader. Each file is read back and
its answers for the first test images are compared with those of the network: by the reader's rules (`as it computes`), and in
the program itself where it is installed (pip install 'quickspike[readers]', see docs/exporting.md). --tuned FILE takes a
network that was saved instead, such as one fine-tuned under the reset of the readers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from timing import network_and_data, save

import quickspike as qs
from quickspike.errors import ConversionError, OptionError
from quickspike.nir_export import Exported, export_nir, need_nir
from quickspike.nir_programs import compare
from quickspike.nir_readers import READERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="threshold_balancing")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--calibration-images", type=int, default=1000)
    parser.add_argument("--images", type=int, default=1000, help="first N test images")
    parser.add_argument("--initial", choices=["left out", "bias"], default="left out")
    parser.add_argument("--tuned", type=Path, help="a spiking network that was saved, instead of converting MODEL")
    options, model, data = network_and_data(parser)
    calibration = data.loader("train", limit=options.calibration_images)
    snn = qs.load(options.tuned) if options.tuned else qs.convert(model, calibration, options.method, steps=options.steps)
    options.tuned = options.tuned and options.tuned.name
    rows, left_out = [], dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        for reader in READERS:
            path = Path(folder) / f"{reader}.nir"
            try:
                exported = export_nir(snn, path, reader, options.initial)
            except ConversionError as error:
                left_out[reader] = str(error)
                continue
            read = Exported(need_nir().read(path), exported.reader, exported.losses, exported.nodes)
            for program in (False, True) if reader != "nir" else (False,):
                try:
                    found = compare(snn, read, data.loader("test", limit=options.images), program)
                except OptionError as error:
                    left_out[f"{reader} itself"] = str(error)
                    continue
                rows.append(found.to_json() | {"losses": [str(loss) for loss in exported.losses], "bytes": path.stat().st_size})
                kind = "itself" if program else "as it computes"
                spikes = "" if found.spikes is None else f", {found.spikes:.3f} x the spikes, {found.same_counts:.2f} % of neurons alike"
                print(
                    f"{reader:>12} {kind:>14}: {found.accuracy:.2f} % (here {found.own_accuracy:.2f} %), "
                    f"same answer {found.agreement:.2f} %{spikes}",
                    flush=True,
                )
    for name, why in left_out.items():
        print(f"left out: {name}, {why}")
    save(options.out, rows, options, left_out=left_out, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
