"""Sharing: what is saved comes back, the card says what was measured and nothing else, and errors name the way out."""

from __future__ import annotations

import dataclasses
import getpass
import importlib
import json
import re
import runpy
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

import quickspike as qs
from quickspike import hub
from quickspike.energy import Energy
from quickspike.errors import CheckpointError, DataError, OptionError, QuickspikeError
from quickspike.files import OutputError
from quickspike.hub import CARD, CONFIG, NETWORK, PICTURE, from_pretrained, model_card, push_to_hub, save_pretrained

huggingface_hub = pytest.importorskip("huggingface_hub", reason="sharing needs huggingface_hub: pip install 'quickspike[hub]'")
errors, constants, hub_mixin = (importlib.import_module(f"huggingface_hub.{name}") for name in ("errors", "constants", "hub_mixin"))
ROOT = Path(__file__).parent.parent
FILES = {CARD, CONFIG, NETWORK, PICTURE}
COMMAND = "quickspike convert chain --weights /home/somebody/secret.pt --data npz:/home/somebody/data.npz"


@dataclasses.dataclass(frozen=True)
class Made:
    """A network and what was measured of it."""

    snn: qs.SpikingNetwork
    source: nn.Module
    images: Tensor
    report: qs.Report
    energy: tuple[Energy, ...]


@pytest.fixture(scope="module")
def made(random_network: Callable[..., nn.Module], random_images: Callable[..., Tensor]) -> Made:
    source, images = random_network("chain"), random_images("chain", 60)
    labels = torch.arange(60) % 5
    snn = qs.convert(source, images, "qcfs", steps=4, analog=())
    snn.provenance.update(data="cifar10", preprocessing={"mean": [0.4914], "std": [0.2023]}, where="/home/somebody/a folder/b.pt")
    snn.provenance["made"] = {"by": COMMAND}
    report = qs.evaluate(snn, [(images, labels)], source, device="cpu")
    operations = qs.count_operations(snn, images[:10])
    rows = (("45nm_fp32", "papers"), ("45nm_fp32", "conservative"), ("loihi", "conservative"))
    return Made(snn, source, images, report, tuple(qs.energy_of(operations, device, account) for device, account in rows))


@pytest.fixture(autouse=True)
def cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """No way out of this machine, and a cache of its own; yields what was tried."""
    tried: list[str] = []

    def refuse(*args: Any, **_: Any) -> NoReturn:
        tried.append(str(args[:2]))
        raise OSError("the network is cut off")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield tried


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows_of(text: str) -> list[list[str]]:
    """Cells of all tables, without those of dashes."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if not set("".join(row)) <= set("-: ")]


# Folders


def test_a_folder_gives_the_same_answers_without_a_network(made: Made, tmp_path: Path, cut_off: list[str]) -> None:
    folder = save_pretrained(made.snn, tmp_path / "a" / "net", made.report, made.energy)
    assert set(contents(folder)) == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["net"]
    again = from_pretrained(folder)
    assert torch.equal(again(made.images), made.snn(made.images))
    assert torch.equal(again.run(made.images).logits, made.snn.run(made.images).logits)
    assert (again.method, again.provenance) == (json.loads(json.dumps(made.snn.method)), made.snn.provenance)
    assert cut_off == []


def test_the_same_input_gives_the_same_bytes(made: Made, tmp_path: Path) -> None:
    one = contents(save_pretrained(made.snn, tmp_path / "one", made.report, made.energy))
    assert one == contents(save_pretrained(made.snn, tmp_path / "two", made.report, made.energy))
    # A loaded network tells the same of itself.
    assert one == contents(save_pretrained(from_pretrained(tmp_path / "one"), tmp_path / "three", made.report, made.energy))


def test_a_folder_is_loaded_without_huggingface_hub(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pretrained(made.snn, tmp_path / "net")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    hub._adapter.cache_clear()
    assert from_pretrained(str(tmp_path / "net")).steps == 4
    for call in (lambda: save_pretrained(made.snn, tmp_path / "b"), lambda: from_pretrained("a/b"), lambda: push_to_hub(made.snn, "a/b")):
        with pytest.raises(QuickspikeError, match=r"pip install 'quickspike\[hub\]'"):
            call()
    assert not (tmp_path / "b").exists()


def test_the_module_does_not_import_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    runpy.run_path(str(hub.__file__), run_name="again")


def test_a_second_save_replaces_the_first_and_leaves_other_files(made: Made, tmp_path: Path) -> None:
    folder = save_pretrained(made.snn, tmp_path / "net", made.report)
    (folder / "LICENSE").write_text("mine")
    save_pretrained(made.snn.with_steps(2), folder)
    assert set(contents(folder)) == {CARD, CONFIG, NETWORK, "LICENSE"}
    assert from_pretrained(folder).steps == 2


def test_a_picture_of_somebody_else_stays(made: Made, tmp_path: Path) -> None:
    (tmp_path / PICTURE).write_bytes(b"mine")
    assert contents(save_pretrained(made.snn, tmp_path))[PICTURE] == b"mine"


@pytest.mark.parametrize("name", [CARD, CONFIG])
def test_files_of_others_are_not_overwritten(made: Made, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("# My project")
    with pytest.raises(OutputError, match=f"{name} that quickspike did not write"):
        save_pretrained(made.snn, tmp_path)
    assert contents(tmp_path) == {name: b"# My project"}


def test_nothing_is_half_written_when_saving_fails(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(save_pretrained(made.snn, tmp_path / "net", made.report))

    def fail(*_: Any) -> NoReturn:
        raise OutputError("the disk is full")

    # The picture comes after the network: by then a file is written.
    monkeypatch.setattr("quickspike.report.plot_accuracy", fail)
    for name in ("net", "new"):
        with pytest.raises(OutputError, match="the disk is full"):
            save_pretrained(made.snn.with_steps(2), tmp_path / name, made.report)
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    assert contents(tmp_path / "net") == before


def test_a_network_that_cannot_be_saved_leaves_nothing(made: Made, tmp_path: Path, uploads: list[dict[str, Any]]) -> None:
    fast = qs.accelerate(made.snn, "integer")
    with pytest.raises(CheckpointError, match="save the one that it was made from"):
        save_pretrained(fast, tmp_path / "net")
    with pytest.raises(CheckpointError, match="save the one that it was made from"):
        push_to_hub(fast, "user/net")
    assert list(tmp_path.iterdir()) == []
    assert uploads == []


def test_a_file_in_the_place_of_the_folder_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "net").write_text("")
    with pytest.raises(OutputError, match="it is a file; name a folder"):
        save_pretrained(made.snn, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"is a file; load it with quickspike\.load"):
        from_pretrained(tmp_path / "net")


@pytest.mark.parametrize("damage", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:-100], lambda _: b"\x80\x04N."])
def test_a_damaged_network_is_refused(made: Made, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    folder = save_pretrained(made.snn, tmp_path / "net")
    (folder / NETWORK).write_bytes(damage((folder / NETWORK).read_bytes()))
    with pytest.raises(CheckpointError, match=r"damaged or altered|truncated, or not a safetensors file"):
        from_pretrained(folder)


def test_folders_that_hold_no_network_are_refused(made: Made, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"holds no {NETWORK}; name a folder that save_pretrained wrote"):
        from_pretrained(tmp_path)
    with pytest.raises(OptionError, match="a folder, which has no revisions"):
        from_pretrained(save_pretrained(made.snn, tmp_path / "net"), revision="main")


# The Hub


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would have been sent to the Hub."""
    calls: list[dict[str, Any]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        calls.append({"repo_id": repo_id, **options})
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self: Any, *, folder_path: Path, **options: Any) -> str:
        calls.append({"files": contents(folder_path), "token": self.token, **options})
        return "https://huggingface.co/user/net/commit/0123"

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return calls


def test_pushing_uploads_the_files_of_the_folder(made: Made, tmp_path: Path, uploads: list[dict[str, Any]]) -> None:
    options: Any = {"private": True, "token": "hf_x", "branch": "dev", "message": "the second"}
    url = push_to_hub(made.snn, "user/net", made.report, made.energy, license="mit", **options)
    assert url == "https://huggingface.co/user/net/commit/0123"
    created, sent = uploads
    assert (created["repo_id"], created["private"], created["exist_ok"]) == ("user/net", True, True)
    assert (sent["repo_id"], sent["revision"], sent["commit_message"], sent["token"]) == ("user/net", "dev", "the second", "hf_x")
    saved = contents(save_pretrained(made.snn, tmp_path / "net", made.report, made.energy, license="mit"))
    assert {name for name in saved if saved[name] != sent["files"][name]} == {CARD}
    assert set(sent["files"]) == FILES
    assert b'qs.from_pretrained("user/net")' in sent["files"][CARD]
    assert b'qs.from_pretrained(".")' in saved[CARD]
    assert sent["delete_patterns"] is None


def test_pushing_without_a_report_takes_an_older_picture_away(made: Made, uploads: list[dict[str, Any]]) -> None:
    push_to_hub(made.snn, "user/net")
    assert set(uploads[1]["files"]) == FILES - {PICTURE}
    assert uploads[1]["delete_patterns"] == [PICTURE]


@pytest.mark.parametrize("name", ["net", "a/b/c", "", "user/"])
def test_pushing_needs_an_owner(made: Made, uploads: list[dict[str, Any]], name: str) -> None:
    with pytest.raises(OptionError, match="must name owner and repository"):
        push_to_hub(made.snn, name)
    assert uploads == []


def hub_error(kind: str, status: int) -> Exception:
    """An error as the client makes it of an answer."""
    response = type("Response", (), {"headers": {}, "status_code": status, "request": None})()
    error: Exception = getattr(errors, kind)(f"{status} Client Error.\nmore", response=response)
    return error


def raising(error: Exception) -> Callable[..., NoReturn]:
    def call(*_: Any, **__: Any) -> NoReturn:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (hub_error("HfHubHTTPError", 401), r"does not know who you are; log in \(hf auth login\)"),
        (errors.LocalTokenNotFoundError("no token"), r"does not know who you are; log in \(hf auth login\)"),
        (hub_error("HfHubHTTPError", 403), "the token may not write there"),
        (hub_error("RevisionNotFoundError", 404), "the repository has no branch 'dev'; make it first"),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached: offline; save_pretrained writes the same to a folder"),
        (OSError("broken"), "broken; save_pretrained"),
    ],
)
def test_why_a_push_failed(made: Made, monkeypatch: pytest.MonkeyPatch, error: Exception, way_out: str) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", raising(error))
    with pytest.raises(OutputError, match=f"cannot push to user/net: .*{way_out}") as found:
        push_to_hub(made.snn, "user/net", branch="dev")
    assert "\n" not in str(found.value)


def test_a_push_offline_says_so(made: Made) -> None:
    with pytest.raises(OutputError, match="cannot push to user/net: the Hub cannot be reached"):
        push_to_hub(made.snn, "user/net")


@pytest.mark.parametrize(
    ("error", "way_out"),
    [
        (hub_error("RepositoryNotFoundError", 401), "the Hub has no such repository, or it is private: log in"),
        (hub_error("GatedRepoError", 403), "access to this repository has to be asked for"),
        (hub_error("RevisionNotFoundError", 404), "the repository has no revision 'v2'; name a branch, a tag or a commit"),
        (hub_error("RemoteEntryNotFoundError", 404), f"the repository holds no {NETWORK}"),
        (hub_error("HfHubHTTPError", 500), "500 Client Error"),
    ],
)
def test_why_a_repository_was_not_loaded(monkeypatch: pytest.MonkeyPatch, error: Exception, way_out: str) -> None:
    monkeypatch.setattr(hub_mixin, "hf_hub_download", raising(error))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", raising(error))
    with pytest.raises(CheckpointError, match=f"^user/net: .*{way_out}") as found:
        from_pretrained("user/net", "v2")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("offline", [True, False])
def test_an_unknown_repository_without_a_connection(monkeypatch: pytest.MonkeyPatch, offline: bool, cut_off: list[str]) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between attempts
    with pytest.raises(CheckpointError, match=r"^user/net: no folder of that name is here, .*the Hub cannot be reached"):
        from_pretrained("user/net")
    assert offline is (cut_off == [])


def test_what_is_neither_a_folder_nor_a_repository(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder of that name is here, and repositories of the Hub are called user/name"):
        from_pretrained(tmp_path / "nowhere")


def cached(folder: Path, revision: str, cache: Path, repository: str = "user/net") -> None:
    """Put a folder where the client keeps what it downloaded of a repository at that commit."""
    snapshot = cache / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for name, data in contents(folder).items():
        (snapshot / name).write_bytes(data)


def test_a_revision_is_what_was_asked_for(made: Made, tmp_path: Path) -> None:
    commits = {"1" * 40: 2, "2" * 40: 8}
    for commit, steps in commits.items():
        cached(save_pretrained(made.snn.with_steps(steps), tmp_path / commit), commit, tmp_path / "cache")
    for commit, steps in commits.items():
        assert from_pretrained("user/net", commit, cache_dir=tmp_path / "cache").steps == steps
    # A tag, as the client remembers it.
    refs = tmp_path / "cache" / "models--user--net" / "refs"
    refs.mkdir()
    (refs / "v2").write_text("2" * 40)
    assert from_pretrained("user/net", "v2", cache_dir=tmp_path / "cache", local_files_only=True).steps == 8
    with pytest.raises(CheckpointError, match="was not downloaded before"):
        from_pretrained("user/net", "3" * 40, cache_dir=tmp_path / "cache")


def test_a_damaged_download_is_refused(made: Made, tmp_path: Path) -> None:
    folder = save_pretrained(made.snn, tmp_path / "net")
    (folder / NETWORK).write_bytes((folder / NETWORK).read_bytes()[:-8] + bytes(8))
    cached(folder, "1" * 40, tmp_path / "cache")
    with pytest.raises(CheckpointError, match=r"^user/net: .*the checksum does not match.*repeat it with force_download=True"):
        from_pretrained("user/net", "1" * 40, cache_dir=tmp_path / "cache")


def test_what_a_config_of_the_repository_says_changes_nothing(made: Made, tmp_path: Path) -> None:
    folder = save_pretrained(made.snn, tmp_path / "net")
    (folder / CONFIG).write_text(json.dumps({"network": 1, "folder": "/", "model_id": "a/b", "steps": 99}))
    cached(folder, "1" * 40, tmp_path / "cache")
    assert from_pretrained("user/net", "1" * 40, cache_dir=tmp_path / "cache").steps == 4


# The card


@pytest.fixture(scope="module")
def card(made: Made) -> str:
    return model_card(made.snn, made.report, made.energy, license="apache-2.0", repo_id="user/net", picture=True)


def test_the_header_is_what_the_hub_reads(made: Made, card: str) -> None:
    data = huggingface_hub.ModelCard(card).data
    assert (data.library_name, data.license, data.pipeline_tag) == ("quickspike", "apache-2.0", "image-classification")
    assert {"spiking-neural-network", "qcfs"} <= set(data.tags)
    assert (data.datasets, data.metrics, data.model_name) == (["uoft-cs/cifar10"], ["accuracy"], "Chain, qcfs, T = 4")
    assert {one.metric_args["steps"]: one.metric_value for one in data.eval_results} == made.report.accuracy
    for one in data.eval_results:
        assert (one.dataset_name, one.dataset_type, one.task_type) == ("cifar10", "uoft-cs/cifar10", "image-classification")


def test_the_header_claims_only_what_is_known(made: Made) -> None:
    data = huggingface_hub.ModelCard(model_card(made.snn)).data.to_dict()
    assert set(data) == {"library_name", "tags", "datasets"}
    snn = made.snn.with_steps(4)
    del snn.provenance["data"]
    data = huggingface_hub.ModelCard(model_card(snn, made.report)).data.to_dict()
    assert set(data) == {"library_name", "tags", "metrics", "pipeline_tag"}
    data = huggingface_hub.ModelCard(model_card(snn, made.report, dataset="my/images", task="image-segmentation", name="N")).data
    assert (data.datasets, data.pipeline_tag, data.model_name) == (["my/images"], "image-segmentation", "N")
    assert "datasets" not in huggingface_hub.ModelCard(model_card(snn, made.report, dataset="some images")).data.to_dict()


def test_the_tables_hold_the_figures_of_the_report(made: Made, card: str) -> None:
    report = made.report
    heading, *rows, source = rows_of(section(card, "Accuracy"))
    assert heading == ["", "accuracy %", "same class as source %", "off the source's output %", "latency in steps"]
    assert rows == [
        [f"T = {t}", f"{report.accuracy[t]:.2f}", f"{report.agreement[t]:.2f}", f"{report.deviation[t]:.1f}", str(report.latency[t])]
        for t in report.steps
    ]
    assert source[:2] == ["source network", f"{report.reference_accuracy:.2f}"]
    assert f"Measured on {report.samples} images of `cifar10`" in card
    assert f"![accuracy against T]({PICTURE})" in card
    assert report.engine in card
    assert f"torch {torch.__version__}" in section(card, "Accuracy")
    assert rows_of(section(card, "Spike rates"))[1:] == [[f"`{site}`", f"{rate:.4f}"] for site, rate in report.rates.items()]


def test_the_energy_comes_with_its_devices_and_caveats(made: Made, card: str) -> None:
    text = section(card, "Energy")
    assert rows_of(text)[1:] == [
        [f"`{one.device}`", one.account, f"{one.source / 1e3:,.1f}", f"{one.spiking / 1e3:,.1f}", f"{one.ratio:.2f}"] for one in made.energy
    ]
    for one in made.energy:
        for caveat in one.caveats:
            assert caveat in text
    assert "cost nothing in this account (45nm_fp32 papers)" in text
    assert "Horowitz" in text
    assert "Davies" in text


def test_the_card_tells_how_the_network_was_made(made: Made, card: str) -> None:
    text = section(card, "How it was made")
    rows = dict(row for row in rows_of(text) if len(row) == 2)
    for key, value in made.snn.method["options"].items():
        assert rows[f"`{key}`"] == f"`{value if isinstance(value, str) else json.dumps(value)}`"
    assert rows["`calibration_images`"] == "`60`"
    assert f"torch {torch.__version__}" in rows["`versions`"]
    assert "quickspike convert chain --weights secret.pt --data npz:data.npz" in text
    assert "changed afterwards" in text
    assert "`[0.4914]`" in section(card, "Use")


def test_the_card_cites_the_paper(card: str) -> None:
    text = section(card, "Citation")
    assert "https://arxiv.org/abs/2303.04347" in text
    assert "@misc{bu2022optimal," in text
    assert "T. Bu and W. Fang and J. Ding and P. Dai and Z. Yu and T. Huang" in text
    assert text.count("{") == text.count("}")


def test_every_method_has_a_citation(made: Made) -> None:
    for name, cls in qs.method.all_methods().items():
        snn = made.snn.with_steps(4)
        snn.method = {"name": name, "options": {}}
        text = section(model_card(snn), "Citation")
        assert re.search(r"@misc\{[a-z]+\d{4}[a-z]+,", text)
        assert f"{{{cls.paper.arxiv or cls.paper.venue}}}" in text
    snn.method = {"name": "of somebody", "options": {}}
    assert "its paper is not known here" in model_card(snn)


def test_no_folder_and_no_user_is_named(made: Made, tmp_path: Path) -> None:
    folder = save_pretrained(made.snn, tmp_path / "net", made.report, made.energy)
    for name in (CARD, CONFIG):
        text = (folder / name).read_text(encoding="utf-8")
        for hidden in ("somebody", "/home", "a folder", str(tmp_path), str(Path.home()), f"/{getpass.getuser()}/"):
            assert hidden not in text, (name, hidden)
    assert "`b.pt`" in (folder / CARD).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/My data/x.npz", "x.npz"),
        ("npz:/home/me/x.npz", "npz:x.npz"),
        ("run --out=/home/me/x '--data=npz:/home/My Name/y' ~/a/b ~me/c", "run --out=x '--data=npz:y' b c"),
        ("see file:///home/me/x and C:\\Users\\me\\w.pt, D:/data/y.pt", "see x and w.pt, y.pt"),
        ('{"weights": "/home/My Name/w.pt", "n": 1}', '{"weights": "w.pt", "n": 1}'),
        ("https://hf.co/a/b 1/2 recipes/ours/a.toml ./x/y ../z", "https://hf.co/a/b 1/2 recipes/ours/a.toml ./x/y ../z"),
    ],
)
def test_of_absolute_paths_the_last_part_is_left(text: str, left: str) -> None:
    assert hub._without_folders(text) == left


def test_names_cannot_break_out_of_the_card(made: Made) -> None:
    snn = made.snn.with_steps(4)
    snn.provenance.update(model="a`|b\n## Not a heading\n---\n", note="```\n<script>")
    snn.provenance["made"] = {"by": "first\n```\n# not a heading"}
    text = model_card(snn, made.report, made.energy, name="---\nx: <b>|[y](z)")
    assert huggingface_hub.ModelCard(text).data.library_name == "quickspike"
    assert "\n## Not a heading" not in text
    assert "converted from `a'\\|b ## Not a heading ---` with" in text
    assert "\n````sh\nfirst\n```\n# not a heading" in text
    assert "# --- x: \\<b\\>\\|\\[y\\](z)\n" in text
    assert all(len(row) == 2 for row in rows_of(section(text, "How it was made").replace("\\|", "")))


def test_without_a_report_the_card_says_how_to_make_one(made: Made) -> None:
    text = model_card(made.snn)
    assert "Not measured" in section(text, "Accuracy")
    assert "qs.evaluate(" in section(text, "Accuracy")
    assert "qs.energy_of(" in section(text, "Energy")
    assert "## Spike rates" not in text
    assert PICTURE not in text
    assert "%" not in text


def test_a_report_without_labels_or_reference(made: Made, tmp_path: Path) -> None:
    distances = qs.evaluate(made.snn, [made.images], made.source, device="cpu")
    folder = save_pretrained(made.snn, tmp_path / "net", distances)
    assert set(contents(folder)) == FILES - {PICTURE}
    text = (folder / CARD).read_text(encoding="utf-8")
    assert rows_of(section(text, "Accuracy"))[0] == ["", "off the source's output %", "latency in steps"]
    alone = qs.evaluate(made.snn, [(made.images, torch.arange(60) % 5)], device="cpu", steps=[3])
    assert [row[0] for row in rows_of(section(model_card(made.snn, alone), "Accuracy"))] == ["", "T = 3"]


def test_a_report_of_another_network_is_refused(made: Made) -> None:
    for other in ({"method": {"name": "qcfs", "options": {}}}, {"rates": {"elsewhere": 0.5}}):
        with pytest.raises(DataError, match="the report is of another network"):
            model_card(made.snn, dataclasses.replace(made.report, **other))


def test_the_limits_follow_the_network(made: Made) -> None:
    plain = section(model_card(made.snn.with_steps(8)), "Limits")
    assert "fitted for T = 4" in plain
    assert "does not spike" in plain
    assert "depth x T" not in plain
    assert "depth x T" in section(model_card(made.snn.as_synchronous()), "Limits")
    assert "spikes of -1" in section(model_card(made.snn.as_signed()), "Limits")


# Documents


@pytest.fixture
def public(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "model_card"):
        monkeypatch.setattr(qs, name, getattr(hub, name), raising=False)


def test_the_example_of_the_card_runs(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: None) -> None:
    monkeypatch.chdir(save_pretrained(made.snn, tmp_path / "net"))
    (code,) = re.findall(r"```python\n(.*?)```", section(Path(CARD).read_text(encoding="utf-8"), "Use"), re.DOTALL)
    names: dict[str, Any] = {"images": made.images}
    exec(code, names)
    assert torch.equal(names["answer"], made.snn(made.images))


def test_the_python_of_the_page_runs(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uploads: list[dict[str, Any]], public: None
) -> None:
    cached(save_pretrained(made.snn, tmp_path / "net"), "1" * 40, tmp_path / "cache", "user/resnet20-qcfs")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"snn": made.snn, "model": made.source, "images": made.images, "commit": "1" * 40}
    names["test_loader"] = [(made.images, torch.arange(60) % 5)]
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)
    assert set(contents(tmp_path / "resnet20-qcfs")) == FILES
    assert set(uploads[1]["files"]) == FILES


@pytest.mark.parametrize("step", range(1, 5))
def test_a_card_never_speaks_of_another_network(step: int, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it is stopped, the folder loads, and what lies beside the network is of that network."""
    folder, few = save_pretrained(made.snn, tmp_path / "net", made.report), made.snn.with_steps(2)
    replace, moved = Path.replace, 0

    def stopped(path: Path, target: Any) -> Path:
        nonlocal moved
        moved += path.parent != folder.parent and path.suffix != ".part"
        if moved == step:
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped)
        if step < 4:
            with pytest.raises(KeyboardInterrupt):
                save_pretrained(few, folder)
        else:
            save_pretrained(few, folder)
    steps = from_pretrained(folder).steps
    assert steps == (made.snn.steps if step == 1 else 2)
    if (folder / CONFIG).exists():
        assert json.loads((folder / CONFIG).read_text())["steps"] == steps
    assert (folder / CARD).exists() == (step == 4)
    save_pretrained(few, folder)
    assert set(contents(folder)) == {CARD, CONFIG, NETWORK}


def test_a_full_disk_is_told_of_the_folder_that_was_asked_for(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError) as caught:
        save_pretrained(made.snn, tmp_path / "net")
    assert str(caught.value) == f"cannot write {tmp_path / 'net' / NETWORK}: No space left on device"
    assert list(tmp_path.iterdir()) == []
