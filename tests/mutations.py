"""Ways to spoil what quickspike reads: files byte by byte, headers entry by entry (sealed again, as an attacker would), recipes, arrays.

Every mutation draws from the generator that it is given and from nothing else.
"""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import h5py
import nir
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from quickspike import checkpoint, nir_export
from trials import TOUCH

# Bytes


def unspoiled(data: bytes, draw: Random) -> bytes:
    """The control: this one must be read."""
    return data


def flipped_bit(data: bytes, draw: Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flipped_in_front(data: bytes, draw: Random) -> bytes:
    """Where formats keep their structure."""
    changed = bytearray(data)
    changed[draw.randrange(min(len(data), 512))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def flipped_at_the_end(data: bytes, draw: Random) -> bytes:
    """Where zip files keep theirs."""
    changed = bytearray(data)
    changed[-1 - draw.randrange(min(len(data), 512))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncated(data: bytes, draw: Random) -> bytes:
    return data[: draw.randrange(len(data))]


def overwritten(data: bytes, draw: Random) -> bytes:
    start, size = draw.randrange(len(data)), draw.randrange(1, 65)
    return data[:start] + draw.choice([draw.randbytes(size), b"\xff" * size, b"\0" * size]) + data[start + size :]


def moved_block(data: bytes, draw: Random) -> bytes:
    start, end, to = sorted(draw.randrange(len(data)) for _ in range(3))
    return data[:start] + data[end:to] + data[start:end] + data[to:]


def doubled_block(data: bytes, draw: Random) -> bytes:
    start, end = sorted(draw.randrange(len(data)) for _ in range(2))
    return data[:end] + data[start:end] + data[end:]


def huge_number(data: bytes, draw: Random) -> bytes:
    """Eight bytes somewhere become a size that no machine has."""
    start = draw.randrange(max(1, len(data) - 8))
    return data[:start] + draw.choice([2**63 - 1, 2**62, 2**40, 2**33]).to_bytes(8, "little") + data[start + 8 :]


BYTES: dict[str, Callable[[bytes, Random], bytes]] = {
    "unspoiled": unspoiled,
    "flipped bit": flipped_bit,
    "flipped bit in front": flipped_in_front,
    "flipped bit at the end": flipped_at_the_end,
    "truncated": truncated,
    "overwritten": overwritten,
    "moved block": moved_block,
    "doubled block": doubled_block,
    "huge number": huge_number,
}

# Plain data, as JSON holds it

HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 255, 65536, 65537, 10**6, 10**9, 2**31, 2**40, 2**63 - 1, 2**63, 10**30, 10**400, -(2**63)),
    *(0.5, -1.5, 1e308, math.nan, math.inf, -math.inf),
    *("", "x", "a b", "\0", "\n", "../../etc/passwd", "__class__", "self", "é", TOUCH, f'"); {TOUCH}; ("', "x" * 5000),
    *([], [[]], {}, [0], [-1, -1], [10**9, 10**9], {"x": 1}, {"node": "x"}, {"tuple": []}, {"tuple": [10**9] * 4}, {"slice": [0, 1, 0]}),
    *("mul", "expand", "call_function", "torch.load", "Neuron", "Conv2d"),
)


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    """(owner, key) of every entry, however deep."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield data, key
        yield from _places(value)


def _place(data: Any, draw: Random) -> tuple[Any, Any]:
    """An entry, those of all depths with the same odds, so that the many deep ones do not hide the others."""
    owner, key = data, draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
    while isinstance(owner[key], (dict, list)) and owner[key] and draw.random() < 0.75:
        owner = owner[key]
        key = draw.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
    return owner, key


def replaced(data: Any, draw: Random) -> None:
    owner, key = _place(data, draw)
    owner[key] = copy.deepcopy(draw.choice(HOSTILE))


def replaced_number(data: Any, draw: Random) -> None:
    """A size, most of the time."""
    places = [(owner, key) for owner, key in _places(data) if type(owner[key]) is int]
    if places:
        owner, key = draw.choice(places)
        owner[key] = draw.choice([0, -1, 1, 2, 3, 1000, 65536, 10**6, 10**9, 2**31, 2**40, 2**62, 2**63, 10**30])


def dropped(data: Any, draw: Random) -> None:
    owner, key = _place(data, draw)
    del owner[key]


def exchanged(data: Any, draw: Random) -> None:
    """Two entries change places."""
    (one, a), (other, b) = _place(data, draw), _place(data, draw)
    one[a], other[b] = copy.deepcopy(other[b]), copy.deepcopy(one[a])


def doubled(data: Any, draw: Random) -> None:
    places = [(owner, key) for owner, key in _places(data) if isinstance(owner, list)]
    if places:
        owner, key = draw.choice(places)
        owner.insert(key, copy.deepcopy(owner[key]))


def renamed(data: Any, draw: Random) -> None:
    places = [(owner, key) for owner, key in _places(data) if isinstance(owner, dict)]
    owner, key = draw.choice(places)
    owner[draw.choice([text for text in HOSTILE if isinstance(text, str)])] = owner.pop(key)


def nested(data: Any, draw: Random) -> None:
    owner, key = _place(data, draw)
    owner[key] = f"NESTED{draw.choice([50, 300, 900, 5000, 100_000])}{draw.choice('LTD')}"


def several(data: Any, draw: Random) -> None:
    for _ in range(draw.randrange(2, 6)):
        if data:
            draw.choice([replaced, replaced_number, dropped, exchanged, doubled])(data, draw)


PLAIN: dict[str, Callable[[Any, Random], None]] = {
    "entry replaced": replaced,
    "number replaced": replaced_number,
    "entry dropped": dropped,
    "entries exchanged": exchanged,
    "entry doubled": doubled,
    "key renamed": renamed,
    "nested deeply": nested,
    "several at once": several,
}


def as_json(data: Any) -> str:
    """JSON, with what `nested` asked for written out: no program that recurses could write it."""

    def deep(match: re.Match[str]) -> str:
        left, right = {"L": ("[", "]"), "T": ('{"tuple": [', "]}"), "D": ('{"x": ', "}")}[match[2]]
        return left * int(match[1]) + "1" + right * int(match[1])

    return re.sub(r'"NESTED(\d+)([LTD])"', deep, json.dumps(data, sort_keys=True))


# Networks


def _network_parts(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["quickspike"]), safetensors.torch.load(data)


def _sealed(header: str, tensors: dict[str, Tensor]) -> bytes:
    return safetensors.torch.save(tensors, {"quickspike": header, "sha256": checkpoint._digest(header, tensors)})


def header_of_network(change: Callable[[Any, Random], None], data: bytes, draw: Random) -> bytes:
    """The header is changed and the file sealed again: the checksum is right."""
    header, tensors = _network_parts(data)
    change(header, draw)
    return _sealed(as_json(header), tensors)


def container_of_network(data: bytes, draw: Random) -> bytes:
    """The table of safetensors itself: types, shapes, offsets, names."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    draw.choice(list(PLAIN.values()))(header, draw)
    text = as_json(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def length_of_header(data: bytes, draw: Random) -> bytes:
    return draw.choice([2**63, 2**40, 10**8, 99_999_999, len(data), len(data) - 8, 0, 1]).to_bytes(8, "little") + data[8:]


def tensor_of_network(data: bytes, draw: Random) -> bytes:
    """One tensor has another shape, type or values, and the checksum is right."""
    header, tensors = _network_parts(data)
    name = draw.choice(sorted(tensors))
    changed = _other_tensor(tensors[name], draw)
    tensors.pop(name) if changed is None else tensors.update({name: changed})
    if draw.random() < 0.2:
        tensors[draw.choice(["extra", "relu.extra", "conv.weight.x", TOUCH, "__class__", "é", "a" * 3000])] = torch.zeros(2)
    return _sealed(json.dumps(header, sort_keys=True), tensors)


def _other_tensor(old: Tensor, draw: Random) -> Tensor | None:
    kinds: list[Callable[[], Tensor | None]] = [
        lambda: None,
        lambda: old.reshape(-1).clone(),
        lambda: old.reshape(1, *old.shape).clone(),
        lambda: torch.cat([old.reshape(-1), old.reshape(-1)]),
        lambda: old.transpose(0, -1).contiguous() if old.ndim > 1 else old.reshape(1, 1, -1).clone(),
        lambda: torch.zeros(0),
        lambda: torch.zeros(()),
        lambda: old * math.nan,
        lambda: old + math.inf,
        lambda: old * -1e30,
        lambda: old.double(),
        lambda: old.half(),
        lambda: old.bfloat16(),
        lambda: old.long(),
        lambda: old.bool(),
        lambda: old.to(torch.complex64),
        lambda: old.to(torch.uint8),
        lambda: old.to(torch.float8_e4m3fn),
    ]
    return draw.choice(kinds)()


NETWORK: dict[str, Callable[[bytes, Random], bytes]] = {
    **BYTES,
    **{f"header: {name}": lambda data, draw, change=change: header_of_network(change, data, draw) for name, change in PLAIN.items()},
    "container": container_of_network,
    "length of the header": length_of_header,
    "tensor": tensor_of_network,
}

# Weights and training checkpoints, which torch wrote


class Bomb:
    """Unpickling an instance leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (TOUCH,)


def _saved(data: Any, **how: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(data, stream, **how)
    return stream.getvalue()


def bomb(data: bytes, draw: Random) -> bytes:
    """Code in the place of one entry, in every way in which torch and pickle write."""
    state = dict(_loaded(data))
    state[draw.choice(sorted(map(str, state)))] = draw.choice([Bomb(), [Bomb()], {"x": Bomb()}])
    how = draw.randrange(3)
    return pickle.dumps(state) if how == 2 else _saved(state, _use_new_zipfile_serialization=how == 0)


def _loaded(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def entry_of_state(data: bytes, draw: Random) -> bytes:
    """Another value, name or shape of one entry."""
    state = copy.deepcopy(_loaded(data))
    places = [(owner, key) for owner, key in _places(state) if isinstance(owner, dict)]
    owner, key = draw.choice(places)
    old = owner.pop(key)
    how = draw.randrange(4)
    if how == 0:
        owner[draw.choice(["", "module.", "x", 3, None, (1, 2)])] = old
    elif how == 1 and isinstance(old, Tensor):
        owner[key] = draw.choice(
            [old.to_sparse(), old.to("meta"), torch.zeros(1).expand(10**6, 10**6), old.to(torch.complex64), torch.zeros(0)]
        )
    elif how == 2:
        owner[key] = copy.deepcopy(draw.choice([value for value in HOSTILE if not isinstance(value, int) or abs(value) < 2**63]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _saved(state)


def pickle_of_torch(data: bytes, draw: Random) -> bytes:
    """One byte of the pickle inside the archive, whose checksum is made right again."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    parts[name] = draw.choice([flipped_bit, overwritten, doubled_block])(parts[name], draw)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for entry, content in parts.items():
            archive.writestr(entry, content)
    return stream.getvalue()


STATE: dict[str, Callable[[bytes, Random], bytes]] = {
    **BYTES,
    "code in a pickle": bomb,
    "entry of the state": entry_of_state,
    "byte of the pickle": pickle_of_torch,
}

# NIR


def _datasets(file: Any) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, thing: names.append(name) if isinstance(thing, h5py.Dataset) else None)
    return names


def _edited(data: bytes, edit: Callable[[Any], None]) -> bytes:
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as file:
        edit(file)
    return stream.getvalue()


def entry_of_nir(data: bytes, draw: Random) -> bytes:
    def edit(file: Any) -> None:
        name = draw.choice(_datasets(file))
        old = file[name][()]
        del file[name]
        how = draw.randrange(7)
        if how == 0:
            return
        if how > 4 and np.asarray(old).dtype.kind == "f":
            file[name] = np.asarray(old) * draw.choice([-1, 0, 1e30, math.nan, math.inf])
            return
        values: list[Any] = [0, -1, 10**9, 2.5, math.nan, "x", "IF", "Conv2d", "NIRGraph", [1, 2], np.zeros((0, 3)), TOUCH, b"\xff\xfe"]
        if how < 4:
            file[name] = draw.choice(values)
        else:
            file[name] = np.asarray(old).reshape(-1)[:1] if np.size(old) else 1

    return _edited(data, edit)


def huge_array_of_nir(data: bytes, draw: Random) -> bytes:
    """An array is said to be enormous; none of it is in the file."""

    def edit(file: Any) -> None:
        name = draw.choice([name for name in _datasets(file) if file[name].ndim])
        shape = draw.choice([(2**34,), (10**5, 10**5), (40_000, 40_000), (2**60,)])
        del file[name]
        if draw.random() < 0.5:
            file.create_dataset(name, shape, "f4", chunks=(1024,) * len(shape), compression="gzip")
        else:
            file.create_dataset(name, shape, "f4")

    return _edited(data, edit)


def structure_of_nir(data: bytes, draw: Random) -> bytes:
    """Groups that hold themselves, that point elsewhere, that are missing, or nested deeply."""

    def edit(file: Any) -> None:
        groups = ["node", "node/nodes", *(f"node/nodes/{name}" for name in file["node/nodes"])]
        group = draw.choice(groups)
        how = draw.randrange(6)
        if how == 0:
            del file[group]
        elif how == 1:
            file[f"{group}/again"] = file["node"]
        elif how == 2:
            name = draw.choice(_datasets(file))
            del file[name]
            file[name] = h5py.ExternalLink("/proc/self/mem", "/x")
        elif how == 3:
            del file[group]
            file[group] = h5py.SoftLink("/node/nowhere")
        elif how == 4:
            file.create_group(group + "/x" * draw.choice([10, 400]))
        else:
            name = draw.choice(list(file["node/nodes"]))
            file.move(f"node/nodes/{name}", f"node/nodes/{draw.choice(['x', 'a b', 'forward', 'class', '1', 'é'])}")

    return _edited(data, edit)


def metadata_of_nir(change: Callable[[Any, Random], None], data: bytes, draw: Random) -> bytes:
    """What quickspike wrote beside the graph, changed and sealed again."""
    graph = nir.read(io.BytesIO(data))
    text = graph.metadata["quickspike"]
    metadata = json.loads(text.decode() if isinstance(text, bytes) else text)
    del metadata["sha256"]
    change(metadata, draw)
    try:
        metadata = json.loads(as_json(metadata))
        metadata["sha256"] = nir_export.digest(graph, metadata)
        text = json.dumps(metadata)
    except RecursionError:
        text = as_json(metadata)
    graph.metadata = {"quickspike": text}
    stream = io.BytesIO()
    nir.write(stream, graph)
    return stream.getvalue()


def without_metadata(data: bytes, draw: Random) -> bytes:
    """A file from elsewhere, with an entry that is not right: nothing seals it."""

    def edit(file: Any) -> None:
        del file["node/metadata"]

    return draw.choice([entry_of_nir, huge_array_of_nir, structure_of_nir])(_edited(data, edit), draw)


NIR: dict[str, Callable[[bytes, Random], bytes]] = {
    **BYTES,
    "entry": entry_of_nir,
    "huge array": huge_array_of_nir,
    "structure": structure_of_nir,
    "entry of a file from elsewhere": without_metadata,
    **{f"metadata: {name}": lambda data, draw, change=change: metadata_of_nir(change, data, draw) for name, change in PLAIN.items()},
}

# ONNX, of which the checksum is verified


ONNX = BYTES

# Recipes

VALUES = (
    *('""', '"x"', '"digits"', "true", "false", "0", "1", "-1", "2.5", "1e400", "-1e400", "nan", "inf", "65537", "1000000000"),
    *("9223372036854775808", "1" + "0" * 400, "1" + "0" * 5000, "[]", "[[]]", "[1, 2]", '["x"]', "[nan]", "{}", "{x = 1}", '{name = "x"}'),
    *("1979-05-27", "07:32:00", "0x7fffffff", '"""a\nb"""', "'" + TOUCH + "'", '"npz:/dev/zero"', '"torchvision:nothing"', '"\\u0000"'),
    *("[" * 500 + "]" * 500, "[" * 100_000, "{a = " * 900 + "1" + "}" * 900, '"../../../../etc/passwd"', '"a:b:c"'),
)


def _lines(text: str, draw: Random, fitting: Callable[[str], bool] = lambda line: "=" in line) -> tuple[list[str], int]:
    lines = text.splitlines()
    return lines, draw.choice([number for number, line in enumerate(lines) if fitting(line)])


def other_value(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw)
    lines[at] = f"{lines[at].partition('=')[0]}= {draw.choice(VALUES)}"
    return "\n".join(lines)


def exchanged_values(text: str, draw: Random) -> str:
    lines, one = _lines(text, draw)
    _, other = _lines(text, draw)
    (key, _, value), (other_key, _, other_value) = lines[one].partition("="), lines[other].partition("=")
    lines[one], lines[other] = f"{key}={other_value}", f"{other_key}={value}"
    return "\n".join(lines)


def line_dropped(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw, bool)
    return "\n".join(lines[:at] + lines[at + 1 :])


def line_doubled(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw, bool)
    return "\n".join([*lines[: at + 1], *lines[at:]])


def line_moved(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw, bool)
    lines.insert(draw.randrange(len(lines)), lines.pop(at))
    return "\n".join(lines)


def other_key(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw)
    new = draw.choice(["x", "name", "steps", '""', "a.b", "data.name", '"__class__"', "sites", "seed", "é"])
    lines[at] = f"{new} ={lines[at].partition('=')[2]}"
    return "\n".join(lines)


def other_table(text: str, draw: Random) -> str:
    lines, at = _lines(text, draw, lambda line: line.startswith("["))
    old = lines[at].strip("[]")
    lines[at] = draw.choice(
        [f"[[{old}]]", f"[{old}", "[x]", f"[{old}.x]", "[" + "a." * 3000 + "b]", f"{old} = 3\n[x]", f"[{old}]\n[{old}]"]
    )
    return "\n".join(lines)


RECIPE: dict[str, Callable[[str, Random], str]] = {
    "value replaced": other_value,
    "values exchanged": exchanged_values,
    "line dropped": line_dropped,
    "line doubled": line_doubled,
    "line moved": line_moved,
    "key renamed": other_key,
    "table changed": other_table,
}
RECIPE_BYTES = {name: BYTES[name] for name in ("unspoiled", "flipped bit", "truncated", "overwritten", "moved block")}

# Data in files


def npz(arrays: dict[str, Any], compressed: bool = True) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def declared(data: bytes, draw: Random) -> bytes:
    """An array of an archive is said to be enormous, of another type, or in objects."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = draw.choice(sorted(parts))
    shape = draw.choice([(2**34,), (40_000, 40_000), (10**5, 10**5, 10**5), (2**62,), (-1, 5), (3_000_000_000, 4), (0,), ()])
    kind = draw.choice(["|u1", "<i8", "<f8", "|O", "<U1000000", "|V8", "<M8[s]", "x", "<c16"])
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    if draw.random() < 0.2:
        text = draw.choice([TOUCH, "(" * 200, "{" * 5000, "{'descr': " + "[" * 90 + "]" * 90 + "}", "9" * 9000])
    content = parts[name]
    size = struct.unpack("<H", content[8:10])[0]
    parts[name] = content[:8] + struct.pack("<H", len(text) + 1) + text.encode() + b"\n" + content[10 + size :]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, part in parts.items():
            archive.writestr(entry, part)
    return stream.getvalue()


def pickled_array(data: bytes, draw: Random) -> bytes:
    with np.load(io.BytesIO(data)) as archive:
        arrays = {key: archive[key] for key in archive.files}
    hostile = np.empty(3, dtype=object)
    hostile[:] = [Bomb()] * 3
    arrays[draw.choice([*arrays, "class_names"])] = hostile
    return npz(arrays)


NPZ: dict[str, Callable[[bytes, Random], bytes]] = {**BYTES, "declared otherwise": declared, "code in a pickle": pickled_array}


def sources(folder: Path) -> list[Path]:
    """Recipes that come with the package, for mutations of the real thing."""
    return sorted((folder / "recipes").glob("*/*.toml"))
