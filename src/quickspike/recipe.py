"""Experiments as files: a TOML recipe names data, network, method, trainings and the published figure; running it gives JSON."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import statistics
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from quickspike.api import finish, fit, train, tune
from quickspike.augmentation import Augmentation
from quickspike.batches import TrainingBatches
from quickspike.conversion import SpikingNetwork
from quickspike.data import DataSet, ImageStream, load_data
from quickspike.errors import OptionError, QuickspikeError, UnknownNameError
from quickspike.evaluation import accuracy_of, evaluate
from quickspike.files import check_writable, write_text
from quickspike.graph import Traced, trace
from quickspike.method import Method, create
from quickspike.models import is_pretrained, load_model, preprocessing_of, save_weights
from quickspike.neuron import MAX_STEPS, MOST_MEMBERS, MOST_WEIGHTED
from quickspike.options import options_of
from quickspike.preprocessing import PREPROCESSING, Preprocessing
from quickspike.provenance import commit, digest, machine, versions
from quickspike.refinement import refinements_of
from quickspike.training import Silent, Trainer, Training, Watcher, start_anew
from quickspike.tuning import Tuning

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class RecipeError(QuickspikeError):
    """A recipe cannot be read, or says something that cannot be done."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure from a paper that a recipe is held against. Accuracies in percent."""

    steps: int
    accuracy: float
    source: str
    """arXiv id and where in the paper."""
    evidence: str
    """How certain the figure is: abstract, paper, code, secondary, recalled."""
    network: str
    stage: str = "converted"
    ann: float | None = None

    def __post_init__(self) -> None:
        # 0: a figure of the source network alone.
        if type(self.steps) is not int or not 0 <= self.steps <= MAX_STEPS:
            raise OptionError(f"recipe: steps in [[published]] must be a whole number in [0, {MAX_STEPS}], got {self.steps!r}"[:300])
        for name in ("accuracy", "ann"):
            value = getattr(self, name)
            if value is not None and (type(value) not in (int, float) or not 0 <= value <= 100):
                raise OptionError(f"recipe: {name} in [[published]] must be a percentage, got {value!r}")
        for name in ("source", "evidence", "network", "stage"):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"recipe: {name} in [[published]] must be a text, got {getattr(self, name)!r}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One experiment."""

    later: ClassVar[tuple[str, ...]] = ("weights", "weighted", "groups")
    """See `Training.later`."""

    title: str
    data: str
    model: str
    method: Method
    preprocessing: Preprocessing | None = None
    weights: str | None = None
    """What the network starts from: "pretrained" (those of torchvision or timm), or a file; None: random weights."""
    seeds: tuple[int, ...] = (0,)
    calibration: int = 1000
    """Training images without labels that the method is calibrated on."""
    precision: str = "32-true"
    steps: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of steps that are measured."""
    synchronous: bool = False
    """Measure the converted network with layers that wait for whole windows, too."""
    signed: bool = False
    """Measure the converted network with neurons that take spikes back, too."""
    weighted: bool = False
    """Measure the converted network with spikes that are weighted by their step, too, at the numbers of steps that these can have."""
    groups: int = 1
    """Measure the converted network with groups of so many neurons in place of each one, too; 1 for none."""
    source: Training | None = None
    """Training of the source network with plain ReLU; None: the weights that it starts from go to the method's training."""
    train: Training | None = None
    """Training with the method's activations."""
    tune: Training | None = None
    """Fine-tuning of the spiking network."""
    tuning: Tuning = field(default_factory=Tuning)
    augmentation: Augmentation = field(default_factory=Augmentation)
    published: tuple[Published, ...] = ()
    text: str = ""
    """The file itself."""

    def __post_init__(self) -> None:
        ranges = (("seeds", self.seeds, 0, 2**31 - 1), ("steps", self.steps, 1, MAX_STEPS), ("calibration", (self.calibration,), 1, 2**31))
        for name, values, low, high in ranges:
            if not values or any(type(value) is not int or not low <= value <= high for value in values) or len(set(values)) < len(values):
                raise OptionError(f"recipe: {name} must be whole numbers in [{low}, {high}], each once, got {list(values)!r}"[:300])
        if type(self.groups) is not int or not 1 <= self.groups <= MOST_MEMBERS:
            raise OptionError(f"recipe: groups in [evaluate] must be a whole number in [1, {MOST_MEMBERS}], got {self.groups!r}"[:300])
        if self.weighted and min(self.steps) > MOST_WEIGHTED:
            raise OptionError(f"recipe: weighted in [evaluate] has at most {MOST_WEIGHTED} steps, and all of steps are more")
        for name, settings in (("train", self.train), ("tune", self.tune)):
            if settings is not None and settings.whiten:
                raise OptionError(f"recipe: whiten belongs to [source], not to [{name}]: it would undo the first convolution")
            if settings is not None and settings.taught and self.source is None and self.weights is None:
                raise OptionError(
                    f"recipe: {settings.taught.split('=')[0]} in [{name}] needs a [source] or weights whose answers are learned"
                )
        for name, settings in (("source", self.source), ("train", self.train)):
            if settings is not None and settings.every_step:
                raise OptionError(f"recipe: every_step belongs to [tune], not to [{name}]: a source network knows no steps")
        if self.source is not None and self.source.taught:
            raise OptionError(
                "recipe: [source] is trained first and has no teacher; distill and distill_features belong to [train] or [tune]"
            )
        for name in ("title", "data", "model", "precision", *(() if self.weights is None else ("weights",))):
            if not isinstance(getattr(self, name), str):
                raise OptionError(f"recipe: {name} must be a text, got {getattr(self, name)!r}")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        RecipeError: the file is missing, no TOML, or lacks or adds a table or key.
        OptionError, UnknownNameError: a value is out of range, a name unknown.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        tables = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply") from None
    except ValueError as error:
        # No TOML, no UTF-8, or a number of more digits than Python reads.
        raise RecipeError(f"{path}: not a TOML file ({error})") from error
    try:
        return _recipe(tables, text)
    except KeyError as error:
        raise RecipeError(f"{path}: lacks {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error


CPU = torch.device("cpu")
STAGES = ("converted", "synchronous", "signed", "weighted", "groups", "tuned")
"""Spiking networks of a run, in the order in which they are measured."""
PREPARED = tuple(field.name for field in dataclasses.fields(Preprocessing))
"""Keys of [data] that say how a picture becomes an input."""
TABLES = (
    *("title", "seeds", "data", "model", "weights", "method", "source", "train", "tune", "augmentation", "evaluate", "precision"),
    "published",
)


def _recipe(tables: Mapping[str, Any], text: str) -> Recipe:
    _only(tables, TABLES, "table")
    data, method, measure = (_table(name, found) for name, found in _needed(tables))
    refined = method.pop("refinements", ())
    _only(data, ("name", "calibration", *PREPARED), "key of [data]")
    _only(measure, ("steps", "synchronous", "signed", "weighted", "groups"), "key of [evaluate]")
    tuning = _table("tune", tables["tune"]) if "tune" in tables else None
    learned = {name: tuning.pop(name) for name in options_of(Tuning) if tuning and name in tuning}
    given = {name: data[name] for name in PREPARED if name in data}
    if "mean" in given or "std" in given:
        given |= {"mean": tuple(data["mean"]), "std": tuple(data["std"])}
    for name, owner in (("name", data), ("name", method), ("model", tables), ("weights", tables)):
        if not isinstance(owner.get(name, ""), str):
            raise OptionError(f"recipe: {name} must be a text, got {owner[name]!r}")
    weights = tables.get("weights")
    # What the file leaves open is as pretrained weights ask for it.
    asked = preprocessing_of(str(tables["model"])) if weights is not None and is_pretrained(weights) else None
    usual = asked or PREPROCESSING.get(data["name"].partition(":")[0], PREPROCESSING["npz"])
    preprocessing = dataclasses.replace(usual, **given) if given else asked
    return Recipe(
        title=tables["title"],
        seeds=tuple(tables.get("seeds", (0,))),
        data=data["name"],
        preprocessing=preprocessing,
        weights=weights,
        calibration=data.get("calibration", 1000),
        model=tables["model"],
        method=create(method.pop("name"), **method, refinements=refinements_of(refined)),
        precision=tables.get("precision", "32-true"),
        steps=tuple(measure.get("steps", (1, 2, 4, 8))),
        synchronous=measure.get("synchronous", False),
        signed=measure.get("signed", False),
        weighted=measure.get("weighted", False),
        groups=measure.get("groups", 1),
        source=_settings(Training, _table("source", tables.get("source"))),
        train=_settings(Training, _table("train", tables.get("train"))),
        tune=_settings(Training, tuning),
        tuning=_settings(Tuning, learned) or Tuning(),
        augmentation=_settings(Augmentation, _table("augmentation", tables.get("augmentation"))) or Augmentation(),
        published=tuple(Published(**_table("published", figure)) for figure in tables.get("published", ())),
        text=text,
    )


def _needed(tables: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "data", tables["data"]
    yield "method", tables["method"]
    yield "evaluate", tables.get("evaluate", {})


def _table(name: str, found: Any) -> Any:
    """A copy of a table; None for none.

    Raises:
        OptionError: it is something else.
    """
    if found is not None and not isinstance(found, dict):
        raise OptionError(f"recipe: [{name}] must be a table, got {found!r}"[:300])
    return found and dict(found)


def _settings(kind: type, table: Mapping[str, Any] | None) -> Any:
    if table is None:
        return None
    _only(table, tuple(options_of(kind)), f"option of {kind.name}")  # type: ignore[attr-defined]
    return kind(**table)


def _only(table: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for name in table:
        if name not in known:
            raise UnknownNameError(what, name, known)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a recipe is run."""

    out: Path
    """Folder of this recipe's files; source networks go to its neighbour `sources`, shared by recipes."""
    fabric: Fabric
    data: str | None = None
    """Another place of the recipe's data, for example npz:FILE."""
    data_dir: Path | None = None
    download: bool = False
    resume: bool = False
    tensorboard: bool = False
    watcher: Watcher = field(default_factory=Silent)
    command: str = ""


def plan(recipe: Recipe, data: DataSet) -> list[str]:
    """What running the recipe will do, line by line, after having built and traced its network.

    Raises:
        QuickspikeError: something of it cannot be done.
    """
    model = load_model(recipe.model, recipe.weights)
    example = next(iter(data.loader("train", 1, 1)))[0]
    traced = trace(recipe.method.source(model), example)
    size = data.size("train")
    start = "" if recipe.weights is None else f" from {'pretrained weights' if is_pretrained(recipe.weights) else recipe.weights}"
    lines = [
        f"{recipe.title}: {len(recipe.seeds)} seed(s) {', '.join(map(str, recipe.seeds))}",
        f"network {recipe.model}{start}, {sum(p.numel() for p in model.parameters()):,} parameters, {len(traced.sites)} sites",
        f"data {recipe.data}, {size} training and {data.size('test')} test images",
    ]
    for name, stage in _stages(recipe):
        steps = len(TrainingBatches(data, stage.validation, stage.batch_size, recipe.augmentation, 0, CPU)) * stage.epochs
        lines.append(f"{name}: {stage.epochs} epochs of {stage.optimiser}, {steps} steps, learning rate {stage.learning_rate:g}")
    lines.append(f"method {recipe.method.name}, T = {recipe.method.steps}, measured at T = {', '.join(map(str, recipe.steps))}")
    return lines


def _stages(recipe: Recipe) -> Iterator[tuple[str, Training]]:
    """Every stage of training, those that the method adds too."""
    if recipe.source is not None:
        yield "source", recipe.source
    of_method = (("train", recipe.train, recipe.method.stages()), ("tune", recipe.tune, recipe.method.tuning_stages()))
    for table, settings, stages in of_method:
        if settings is not None:
            for stage, changes in stages.items():
                yield (table if len(stages) == 1 else f"{table}, {stage}"), dataclasses.replace(settings, **changes)


def load_recipe_data(recipe: Recipe, data: str | None = None, data_dir: Path | None = None, download: bool = False) -> DataSet:
    """The recipe's data set, or the one at `data`, normalised as the recipe says."""
    preprocessing = recipe.preprocessing or PREPROCESSING.get(recipe.data.partition(":")[0])
    return load_data(data or recipe.data, data_dir, preprocessing, download)


def run_recipe(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Run a recipe with all its seeds; what it measured, as plain data. `result.json` in the folder holds the same.

    Raises:
        QuickspikeError: see `read_recipe`, `quickspike.api`, `quickspike.training`.
    """
    check_writable(place.out / "result.json")
    data = load_recipe_data(recipe, place.data, place.data_dir, place.download)
    runs = [_Seed(recipe, place, data, seed).run() for seed in recipe.seeds]
    result = {
        "title": recipe.title,
        "command": place.command,
        "runs": runs,
        "summary": summarise(runs),
        "published": [dataclasses.asdict(figure) for figure in recipe.published],
        "recipe": recipe.text,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(),
    }
    if place.fabric.is_global_zero:
        write_text(place.out / "result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
    return result


def _json_of(path: Path, kind: type) -> Any:
    """What an earlier run left: JSON of that kind.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path} is damaged ({error}); remove it, or run without --resume") from error
    if not isinstance(found, kind):
        raise RecipeError(f"{path} is damaged; remove it, or run without --resume")
    return found


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every accuracy."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0, "n": len(values)}

    summary: dict[str, Any] = {}
    for stage in ("source", "ann"):
        values = [run["accuracy"][stage] for run in runs if run["accuracy"].get(stage) is not None]
        if values:
            summary[stage] = spread(values)
    for stage in STAGES:
        found = [run["accuracy"][stage] for run in runs if stage in run["accuracy"]]
        if found:
            summary[stage] = {step: spread([values[step] for values in found]) for step in found[0]}
    return summary


def _in_force(settings: Any) -> dict[str, Any]:
    """What options are set to, without those that came later and are off: what was made before they came keeps its digest."""
    later = getattr(settings, "later", ())
    return {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(settings)
        if field.name not in later or getattr(settings, field.name) != field.default
    }


def _spelled(value: Any) -> str:
    """`repr(value)`, of options those in force."""
    if not dataclasses.is_dataclass(value):
        return repr(value)
    return f"{type(value).__name__}({', '.join(f'{name}={_spelled(one)}' for name, one in _in_force(value).items())})"


def _digest_of(described: Any) -> str:
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]


class _Seed:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, place: Place, data: DataSet, seed: int) -> None:
        self.recipe, self.place, self.data, self.seed, self.fabric = recipe, place, data, seed, place.fabric
        self.folder = place.out / f"seed{seed}"
        self.seconds: dict[str, float] = {}
        """What each part took; of epochs from a checkpoint what they took then."""
        self.resumed: list[float] = []

    def run(self) -> dict[str, Any]:
        done = self.folder / "run.json"
        if self.place.resume and done.is_file():
            found: dict[str, Any] = _json_of(done, dict)
            if found.get("recipe") != self._digest():
                raise RecipeError(f"{done} was made by another recipe or with other images; remove it, or choose another folder")
            return found
        if not self.place.resume and self.fabric.is_global_zero:
            start_anew(self.folder)
        self.fabric.barrier()
        accuracy: dict[str, Any] = {}
        source = self._source()
        if self.recipe.source is not None or self.recipe.weights is not None:
            accuracy["source"] = accuracy_of(source, self.data.loader("test"), self.fabric)
        ann, snn = self._converted(source)
        accuracy["ann"] = accuracy_of(ann.module, self.data.loader("test"), self.fabric)
        if self.fabric.is_global_zero:
            snn.save(self.folder / "converted.safetensors")
        report = self._measured(snn)
        accuracy["converted"] = report["accuracy"]
        if self.recipe.synchronous:
            waiting = self._measured(snn.as_synchronous())
            accuracy["synchronous"] = waiting["accuracy"]
        if self.recipe.signed:
            accuracy["signed"] = self._measured(snn.as_signed())["accuracy"]
        if self.recipe.weighted:
            accuracy["weighted"] = self._measured(snn.as_weighted(), MOST_WEIGHTED)["accuracy"]
        if self.recipe.groups > 1:
            accuracy["groups"] = self._measured(snn.as_groups(self.recipe.groups))["accuracy"]
        if self.recipe.tune is not None:
            snn = self._tuned(snn, source)
            report = self._measured(snn)
            accuracy["tuned"] = report["accuracy"]
        run = {
            "seed": self.seed,
            "recipe": self._digest(),
            "accuracy": accuracy,
            "latency": report["latency"],
            "rates": report["rates"],
            "test_images": report["samples"],
            "seconds": self.seconds,
        }
        if self.fabric.is_global_zero:
            write_text(done, json.dumps(run, indent=2, allow_nan=False) + "\n")
        return run

    def _digest(self) -> str:
        """What the results of a seed depend on."""
        described = dataclasses.replace(self.recipe, seeds=(0,), title="", published=(), text="")
        return _digest_of([_spelled(described), self._images(), *self._given()])

    def _start(self) -> nn.Module:
        """The network before any training."""
        return load_model(self.recipe.model, self.recipe.weights, self.seed)

    def _given(self) -> tuple[str, ...]:
        """What tells given weights from others, however they are named."""
        return () if self.recipe.weights is None else (digest(self._start().state_dict().values()),)

    def _images(self) -> str:
        """Where the images come from, without the place on this machine."""
        kind, _, path = (self.place.data or self.recipe.data).partition(":")
        return f"{kind}:{Path(path).name} {self.data.size('train')}"

    def _trainer(self, settings: Training, folder: Path) -> Trainer:
        return Trainer(
            fabric=self.fabric,
            data=self.data,
            settings=dataclasses.replace(settings, seed=settings.seed + self.seed),
            augmentation=self.recipe.augmentation,
            folder=folder,
            resume=self.place.resume,
            tensorboard=self.place.tensorboard,
            watcher=self.place.watcher,
            resumed=self.resumed,
        )

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        self.resumed.clear()
        yield
        self.seconds[part] = sum(self.resumed) + time.perf_counter() - started

    def _source(self) -> nn.Module:
        """The source network: random, or trained here, or by another recipe that trains the same one."""
        settings = self.recipe.source
        if settings is None:
            return self._start()
        key = _digest_of(
            [
                self._images(),
                str(self.recipe.preprocessing),
                self.recipe.model,
                self.recipe.precision,
                _in_force(settings),
                dataclasses.asdict(self.recipe.augmentation),
                *self._given(),
            ]
        )
        folder = self.place.out.parent / "sources" / key / f"seed{self.seed}"
        weights, took = folder / "weights.safetensors", folder / "seconds.json"
        if not weights.is_file():
            with self._timed("source"):
                trainer = dataclasses.replace(self._trainer(settings, folder), resume=True)
                network, _ = train(self._start(), trainer)
            if self.fabric.is_global_zero:
                write_text(folder / "recipe.toml", self.recipe.text)
                write_text(took, json.dumps(self.seconds["source"]) + "\n")
                save_weights(network, weights)
            self.fabric.barrier()
        elif self.place.resume and took.is_file() and (folder / "recipe.toml").read_text(encoding="utf-8") == self.recipe.text:
            # Trained before this run was interrupted.
            self.seconds["source"] = _json_of(took, float)
        return load_model(self.recipe.model, weights)

    def _converted(self, source: nn.Module) -> tuple[Traced, SpikingNetwork]:
        images = ImageStream(self.data.loader("train", limit=min(self.recipe.calibration, self.data.size("train"))))
        trainer = None if self.recipe.train is None else self._trainer(self.recipe.train, self.folder)
        with self._timed("train and convert"):
            ann = fit(source, images, self.recipe.method, trainer)
            snn = finish(ann, images, self.recipe.method)
        preprocessing = dataclasses.asdict(self.data.preprocessing)
        snn.provenance.update(model=self.recipe.model, data=self.recipe.data, preprocessing=preprocessing, seed=self.seed)
        return ann, snn

    def _tuned(self, snn: SpikingNetwork, source: nn.Module) -> SpikingNetwork:
        with self._timed("tune"):
            tuned = tune(snn, self._trainer(self.recipe.tune or Training(), self.folder), self.recipe.tuning, teacher=source)
        if self.fabric.is_global_zero:
            tuned.save(self.folder / "tuned.safetensors")
        return tuned

    def _measured(self, snn: SpikingNetwork, most: int = MAX_STEPS) -> dict[str, Any]:
        steps = [step for step in self.recipe.steps if step <= most]
        return evaluate(snn, self.data.loader("test"), None, steps, fabric=self.fabric).to_json()
