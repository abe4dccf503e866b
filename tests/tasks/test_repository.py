"""Task bundles on the Hub, with the real client and a Hub of our own: what travels, and what happens when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from support.hub_server import OTHER_TOKEN, HubServer, running_hub

from lowbit_format.container.reader import ModelReader
from lowbit_format.errors import BundleError, DigestError, HeaderError, HubError, TaskError
from lowbit_format.hub import check_subfolder, is_hub_id
from lowbit_format.tasks.bundle import (
    CARD_FILE,
    SCALES_FILE,
    StoredBundle,
    TaskBundle,
    read_stored_bundle,
    write_bundle,
)
from lowbit_format.tasks.bundle_config import TASK_CONFIG_FILE, TaskConfig
from lowbit_format.tasks.card import task_card
from lowbit_format.tasks.matching import check_matches
from lowbit_format.tasks.repository import base_tag, fetch_task, find_tasks, push_task, search_tasks
from lowbit_format.tasks.sharing import push_task_to_hub

REPO, BASE, FILES = "owner/task", "ab" * 32, (TASK_CONFIG_FILE, SCALES_FILE, CARD_FILE)
SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
patient_client = pytest.mark.skipif(int(huggingface_hub.__version__.split(".")[0]) < 2, reason="1.x retries less")
Contents = dict[str, bytes]
MakeBundle = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with running_hub(tmp_path, monkeypatch) as server:
        yield server


def bundle_of(seed: int, **config: Any) -> TaskBundle:
    facts = {"base_fingerprint": BASE, "base_model_name_or_path": "owner/base", "method": f"method {seed}", **config}
    values = np.random.default_rng(seed).normal(size=(1, 256)).astype(np.float32)
    return TaskBundle(TaskConfig(**facts), {"fc.scales.mul": values})


@pytest.fixture
def make(tmp_path: Path) -> MakeBundle:
    """``make(1)`` is the directory of a bundle with a card, another for each number."""

    def make_bundle(seed: int = 0, **config: Any) -> Path:
        directory = tmp_path / f"bundle-{seed}"
        bundle = bundle_of(seed, **config)
        write_bundle(directory, bundle)
        (directory / CARD_FILE).write_text(task_card(bundle), "utf-8", newline="\n")
        return directory

    return make_bundle


def push(directory: Path, repo_id: str, **options: Any) -> str:
    stored = read_stored_bundle(directory)
    return push_task(stored.files(), stored.bundle.config, repo_id, **options)


def contents(bundle: Path | StoredBundle) -> Contents:
    directory = bundle if isinstance(bundle, Path) else bundle.directory
    return {name: (directory / name).read_bytes() for name in FILES}


def requests(hub: HubServer, method: str, part: str) -> int:
    return sum(r.method == method and part in r.path for r in hub.log)


# --- there and back --------------------------------------------------------------------------------


def test_round_trip(hub: HubServer, make: MakeBundle) -> None:
    url = push(make(), REPO)
    assert url.endswith(f"/{REPO}/commit/{hub.head(REPO)}")
    assert contents(fetch_task(REPO)) == contents(make())
    assert requests(hub, "POST", "/commit/") == 1
    assert set(hub.files(REPO)) == {*FILES, ".gitattributes"}


def test_a_name_alone_is_in_the_namespace_of_the_token(hub: HubServer, make: MakeBundle) -> None:
    push(make(), "task")
    assert contents(fetch_task(REPO)) == contents(make())


def test_branch_tag_and_commit(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO, tag="v1")
    push(make(2), REPO, revision="next/step")
    push(make(3), REPO)
    first = hub.refs(REPO)["tags"]["v1"]
    for revision, seed in (("v1", 1), (first, 1), ("next/step", 2), (None, 3), ("main", 3)):
        assert contents(fetch_task(REPO, revision=revision)) == contents(make(seed))
    push(make(4), REPO, revision="next/step")  # which exists now
    assert contents(fetch_task(REPO, revision="next/step")) == contents(make(4))


def test_private_repository(hub: HubServer, make: MakeBundle) -> None:
    push(make(), REPO, private=True)
    assert hub.refs(REPO)["private"]
    for token in (OTHER_TOKEN, False):
        with pytest.raises(HubError, match=r"owner/task: there is no such repository, or this token may not see it"):
            fetch_task(REPO, token=token)
    assert contents(fetch_task(REPO)) == contents(make())
    push(make(1), REPO, private=True)
    assert contents(fetch_task(REPO)) == contents(make(1))


def test_private_is_not_published_in_a_public_repository(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    head = hub.head(REPO)
    with pytest.raises(HubError, match="is public already"):
        push(make(2), REPO, private=True)
    assert hub.head(REPO) == head


def test_pull_request(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    head = hub.head(REPO)
    url = push(make(2), REPO, create_pr=True, token=OTHER_TOKEN)
    assert url.endswith("/discussions/1")
    assert hub.head(REPO) == head
    assert contents(fetch_task(REPO, revision="refs/pr/1")) == contents(make(2))
    push(make(3), REPO, revision="refs/pr/1")
    assert contents(fetch_task(REPO, revision="refs/pr/1")) == contents(make(3))
    assert hub.head(REPO) == head
    with pytest.raises(HubError, match="cannot be tagged"):
        push(make(2), REPO, create_pr=True, tag="v1")


def test_pushing_again(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    first = hub.head(REPO)
    assert push(make(1), REPO).endswith(first)  # nothing new, no commit
    push(make(2), REPO)
    assert requests(hub, "POST", "/commit/") == 2
    assert contents(fetch_task(REPO)) == contents(make(2))
    assert contents(fetch_task(REPO, revision=first)) == contents(make(1))


def test_a_directory_that_is_no_bundle_is_not_sent(hub: HubServer, make: MakeBundle) -> None:
    directory = make()
    (directory / SCALES_FILE).write_bytes(b"short")
    with pytest.raises(HeaderError):
        push(directory, REPO)
    assert hub.log == []


# --- many tasks in one repository ------------------------------------------------------------------


def test_tasks_in_subfolders(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO, subfolder="glue/sst2")
    push(make(2, base_fingerprint="cd" * 32), REPO, subfolder="e2e/")
    for subfolder, seed in (("glue/sst2", 1), ("e2e", 2)):
        directory = fetch_task(REPO, subfolder=subfolder).directory
        assert {name: (directory / name).read_bytes() for name in FILES} == contents_of(hub, subfolder)
        assert json.loads((directory / TASK_CONFIG_FILE).read_bytes())["method"] == f"method {seed}"
    assert {base_tag(BASE), base_tag("cd" * 32), "lowbit-task", "base_model:owner/base"} <= set(hub.tags(REPO))
    with pytest.raises(HubError, match=r"has no task there .*it has tasks in: 'e2e', 'glue/sst2'; choose one"):
        fetch_task(REPO)
    with pytest.raises(HubError, match="in 'nowhere': has no task there"):
        fetch_task(REPO, subfolder="nowhere")


def contents_of(hub: HubServer, subfolder: str) -> Contents:
    return {name: hub.files(REPO)[f"{subfolder}/{name}"] for name in FILES}


def test_the_owners_card_stays(hub: HubServer, make: MakeBundle) -> None:
    hub.create(REPO)
    hub.commit(REPO, {CARD_FILE: b"# Mine\n"})
    push(make(), REPO, subfolder="a")
    assert hub.files(REPO)[CARD_FILE] == b"# Mine\n"


def test_find_tasks(hub: HubServer, make: MakeBundle, tmp_path: Path) -> None:
    push(make(1), REPO)
    push(make(2, bits=3), REPO, subfolder="b")
    hub.commit(REPO, {"config-alone/task_config.json": b"{}", ".hidden/task_config.json": b"{}"})
    found = find_tasks(REPO)
    assert [(t.source, t.revision, t.subfolder, t.config.method, t.config.bits) for t in found] == [
        (REPO, hub.head(REPO), None, "method 1", None),
        (REPO, hub.head(REPO), "b", "method 2", 3),
    ]
    assert found[0].nbytes == (make(1) / SCALES_FILE).stat().st_size
    assert requests(hub, "GET", SCALES_FILE) == 0
    local = find_tasks(tmp_path)
    assert [(t.subfolder, t.revision, t.config) for t in local if t.subfolder in ("bundle-1", "bundle-2")] == [
        ("bundle-1", None, found[0].config),
        ("bundle-2", None, found[1].config),
    ]


def test_search(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    push(make(2, base_fingerprint="cd" * 32), "owner/hidden", private=True)
    push(make(3, base_model_name_or_path="/home/me/base"), "other/local", token=OTHER_TOKEN)
    hub.create("other/model")

    def ids(**options: Any) -> list[str]:
        return [found.repo_id for found in search_tasks(**options)]

    assert ids() == ["other/local", "owner/hidden", REPO]
    assert ids(token=False) == ["other/local", REPO]
    assert ids(base=BASE) == ["other/local", REPO]
    assert ids(base="owner/base") == ["owner/hidden", REPO]
    assert ids(author="other", limit=5) == ["other/local"]
    assert ids(limit=1) == ["other/local"]
    assert search_tasks(base="cd" * 32)[0].private
    with pytest.raises(HubError, match="neither a fingerprint"):
        search_tasks(base="base")


# --- the cache -------------------------------------------------------------------------------------


def test_fetched_once(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    first = fetch_task(REPO).directory
    asked = requests(hub, "GET", "/resolve/")
    assert asked == len(FILES)
    assert fetch_task(REPO).directory == first
    assert requests(hub, "GET", "/resolve/") == asked
    push(make(2), REPO)
    assert contents(fetch_task(REPO)) == contents(make(2))


def test_without_a_connection(hub: HubServer, make: MakeBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    push(make(), REPO, subfolder="a")
    with pytest.raises(HubError, match=r"owner/task in 'a': the cache .*Nothing was loaded"):
        fetch_task(REPO, subfolder="a", local_files_only=True)
    directory = fetch_task(REPO, subfolder="a").directory
    asked = len(hub.log)
    assert fetch_task(REPO, subfolder="a", local_files_only=True).directory == directory
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_task(REPO, subfolder="a").directory == directory
    with pytest.raises(HubError):
        fetch_task(REPO, subfolder="b")
    with pytest.raises(HubError, match="unset HF_HUB_OFFLINE"):
        push(make(), REPO)
    with pytest.raises(HubError, match=r"switched off|not asked"):
        fetch_task("owner/never-seen")
    assert len(hub.log) == asked


def test_a_cache_of_another_folder_is_no_bundle(hub: HubServer, make: MakeBundle) -> None:
    for subfolder in ("a", "b"):
        push(make(), REPO, subfolder=subfolder)
    fetch_task(REPO, subfolder="a")
    with pytest.raises(HubError, match=r"in 'b': the cache"):
        fetch_task(REPO, subfolder="b", local_files_only=True)


def test_force_download(hub: HubServer, make: MakeBundle) -> None:
    push(make(), REPO)
    scales = (fetch_task(REPO).directory / SCALES_FILE).resolve()
    scales.write_bytes(scales.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DigestError, match=SCALES_FILE):
        fetch_task(REPO)
    assert contents(fetch_task(REPO, force_download=True)) == contents(make())
    hub.fail("GET", "/api/models/", status=500, times=99)
    assert contents(fetch_task(REPO)) == contents(make())  # what it gave last
    with pytest.raises(HubError, match="trouble of its own"):
        fetch_task(REPO, force_download=True)
    with pytest.raises(HubError, match="exclude each other"):
        fetch_task(REPO, force_download=True, local_files_only=True)


# --- failures: nothing is published by halves ------------------------------------------------------

PUSH_FAILURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no right to create": ("POST", "/repos/create", {"status": 401, "times": 9}, "token is missing or not valid"),
    "forbidden": ("POST", "/preupload/", {"status": 403}, "open a pull request"),
    "rate limit": ("POST", "/preupload/", {"status": 429, "times": 99}, "fewer requests"),
    "conflict": ("POST", "/commit/", {"status": 409}, "somebody else pushed"),
    "race": ("POST", "/commit/", {"status": 412}, "somebody else pushed"),
    "500 at the listing": ("POST", "/preupload/", {"status": 500, "times": 99}, "try again later"),
    "503 at the batch": ("POST", "/objects/batch", {"status": 503, "times": 99}, "try again later"),
    "500 at the upload": ("PUT", "/lfs/", {"status": 500, "times": 99}, "try again later"),
    "404 at the check": ("POST", "/lfs-verify", {"status": 404}, "no such place"),
    "500 at the commit": ("POST", "/commit/", {"status": 500, "times": 99}, "try again later"),
    "cut in the upload": ("PUT", "/lfs/", {"cut": True, "times": 99}, "the connection was cut"),
    "cut in the commit": ("POST", "/commit/", {"cut": True, "times": 99}, "the connection was cut"),
}


@pytest.mark.parametrize("case", PUSH_FAILURES)
@pytest.mark.parametrize("subfolder", [None, "a"])
def test_a_failed_push_publishes_nothing(case: str, subfolder: str | None, hub: HubServer, make: MakeBundle) -> None:
    method, path, fault, message = PUSH_FAILURES[case]
    push(make(1), REPO, subfolder=subfolder)
    head, files = hub.head(REPO), hub.files(REPO)
    hub.fail(method, path, **fault)
    if case == "no right to create":
        hub.fail("GET", "/api/models/", status=401, times=1)
    with pytest.raises(HubError, match=message) as caught:
        push(make(2), REPO, subfolder=subfolder)
    assert str(caught.value).startswith(f"{REPO}{f' in {subfolder!r}' if subfolder else ''}: ")
    assert "Nothing was published" in str(caught.value)
    assert caught.value.__cause__ is not None
    assert (hub.head(REPO), hub.files(REPO)) == (head, files)
    hub.faults.clear()
    push(make(2), REPO, subfolder=subfolder)
    assert contents(fetch_task(REPO, subfolder=subfolder)) == contents(make(2))


@patient_client
@pytest.mark.parametrize(
    ("method", "path", "fault"),
    [
        ("POST", "/preupload/", {"status": 500}),
        ("POST", "/objects/batch", {"status": 503, "times": 2}),
        ("PUT", "/lfs/", {"status": 500}),
        ("PUT", "/lfs/", {"cut": True}),
    ],
)
def test_passing_trouble_is_sat_out(
    method: str, path: str, fault: dict[str, Any], hub: HubServer, make: MakeBundle
) -> None:
    hub.fail(method, path, **fault)
    push(make(), REPO)
    assert hub.faults[0].times == 0
    assert contents(fetch_task(REPO)) == contents(make())


def test_a_race_is_lost_as_a_whole(hub: HubServer, make: MakeBundle) -> None:
    """Our configuration is the published one, theirs is not: without a parent commit, theirs would meet our scales."""
    push(make(1), REPO)
    ours, theirs = make(1), contents(make(2))
    write_bundle(ours, replace(bundle_of(3), config=bundle_of(1).config))
    hub.fail("POST", "/commit/", call=lambda: hub.commit(REPO, dict(theirs)))
    with pytest.raises(HubError, match="somebody else pushed in the meantime"):
        push(ours, REPO)
    assert contents(fetch_task(REPO)) == theirs


def test_a_lost_answer(hub: HubServer, make: MakeBundle) -> None:
    """The commit was made, but its answer was lost: pushing again makes no second one."""
    hub.fail("POST", "/commit/", status=500, after=True)
    with pytest.raises(HubError):
        push(make(), REPO)
    head = hub.head(REPO)
    push(make(), REPO)
    assert hub.head(REPO) == head
    assert contents(fetch_task(REPO)) == contents(make())


def test_tokens(hub: HubServer, make: MakeBundle) -> None:
    with pytest.raises(HubError, match="token is missing or not valid"):
        push(make(), REPO, token="hf_wrong")
    with pytest.raises(HubError, match=r"this token may not do that"):
        push(make(), REPO, token=OTHER_TOKEN)
    assert not hub.exists(REPO)


def test_tags(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO, tag="v1")
    head = hub.head(REPO)
    with pytest.raises(HubError, match="has the tag 'v1' already"):
        push(make(2), REPO, tag="v1")
    assert hub.head(REPO) == head
    hub.fail("POST", "/tag/", status=403)
    with pytest.raises(HubError, match="The files were published as http"):
        push(make(2), REPO, tag="v2")
    assert contents(fetch_task(REPO)) == contents(make(2))


# --- failures: nothing is loaded by halves ---------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "owner/none"}, r"owner/none: there is no such repository"),
        ({"repo_id": REPO, "revision": "v9"}, r"owner/task at revision 'v9': .*no such branch, tag or commit"),
        ({"repo_id": REPO, "token": "hf_wrong"}, r"token is missing or not valid"),
        ({"repo_id": "not an id"}, r"expected user/name"),
        ({"repo_id": "owner/empty"}, r"has no task there .*nor anywhere else"),
    ],
)
def test_what_is_not_there(options: dict[str, Any], message: str, hub: HubServer, make: MakeBundle) -> None:
    push(make(), REPO)
    hub.create("owner/empty")
    with pytest.raises(HubError, match=message):
        fetch_task(**options)


@pytest.mark.parametrize(
    ("method", "path", "fault", "message"),
    [
        ("GET", "/api/models/", {"status": 500}, "trouble of its own"),
        ("GET", "/api/models/", {"cut": True}, "the connection was cut"),
        ("GET", f"/resolve/.*{SCALES_FILE}", {"status": 503}, "trouble of its own"),
        ("GET", f"/resolve/.*{SCALES_FILE}", {"cut": True}, "the connection was cut"),
    ],
)
def test_a_failed_fetch_loads_nothing(
    method: str, path: str, fault: dict[str, Any], message: str, hub: HubServer, make: MakeBundle
) -> None:
    push(make(), REPO)
    hub.fail(method, path, **fault, times=999)
    with pytest.raises(HubError, match=message):
        fetch_task(REPO)
    with pytest.raises(HubError, match="cache"):
        fetch_task(REPO, local_files_only=True)
    hub.faults.clear()
    assert contents(fetch_task(REPO)) == contents(make())


@patient_client
def test_a_cut_download_is_resumed(hub: HubServer, make: MakeBundle) -> None:
    push(make(), REPO)
    hub.fail("GET", f"/resolve/.*{SCALES_FILE}", cut=True)
    assert contents(fetch_task(REPO)) == contents(make())
    assert hub.faults[0].times == 0


def test_all_files_are_of_one_commit(hub: HubServer, make: MakeBundle) -> None:
    push(make(1), REPO)
    hub.fail("GET", "/resolve/", call=lambda: hub.commit(REPO, dict(contents(make(2)))))
    assert contents(fetch_task(REPO)) == contents(make(1))
    assert contents(fetch_task(REPO)) == contents(make(2))


def test_a_bundle_that_is_damaged_on_the_hub(hub: HubServer, make: MakeBundle) -> None:
    push(make(), REPO)
    scales = contents(make())[SCALES_FILE]
    hub.commit(REPO, {SCALES_FILE: scales[:-1] + bytes([scales[-1] ^ 1])})
    with pytest.raises(DigestError):
        fetch_task(REPO)
    hub.commit(REPO, {TASK_CONFIG_FILE: b"{}", SCALES_FILE: scales})
    with pytest.raises(BundleError, match="TSK-1"):
        fetch_task(REPO)
    hub.commit(REPO, {SCALES_FILE: None})
    with pytest.raises(HubError, match="has no task there"):
        fetch_task(REPO)


# --- bases -----------------------------------------------------------------------------------------


def test_a_base_that_travelled_is_still_the_bundles(hub: HubServer, tmp_path: Path) -> None:
    """Pushed and pulled by transformers, under another name and in other shards: the fingerprint is the same."""
    import torch
    from support.building import write_model
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from lowbit_format.schema import Scheme

    scheme = Scheme("bcq", 3, 8, "F16", offset=True)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)).eval()
    base = write_model(model, tmp_path / "base", lambda path, _: scheme if path.endswith("_proj") else None)
    mine = ModelReader(base)
    path = next(name for name in mine.config.modules if name.endswith("q_proj"))
    name, rows = mine.config.canonical_path(path)[0], mine.module(path).rows
    deltas = {f"{name}.scales.mul": np.full((1, rows), 0.5, np.float32)}
    config = TaskConfig(mine.fingerprint().body, base_model_name_or_path="owner/base")
    write_bundle(tmp_path / "task", TaskBundle(config, deltas))
    push_task_to_hub(tmp_path / "task", REPO)

    original = AutoModelForCausalLM.from_pretrained(base)
    original.push_to_hub("owner/renamed", max_shard_size="20KB")
    pulled = AutoModelForCausalLM.from_pretrained("owner/renamed")
    ids = torch.arange(8)[None]
    assert torch.equal(original(ids).logits, pulled(ids).logits)

    from huggingface_hub import snapshot_download

    travelled = ModelReader(snapshot_download("owner/renamed"))
    assert len(travelled.headers) > len(mine.headers)
    check_matches(fetch_task(REPO).bundle, travelled.config, travelled.fingerprint())


# --- push_task_to_hub ------------------------------------------------------------------------------


def test_a_directory_stays_as_it_is(hub: HubServer, make: MakeBundle) -> None:
    before = contents(make(revision="v1"))
    push_task_to_hub(make(revision="v1"), "task", subfolder="a", metrics={"accuracy": 0.5}, base_model="owner/new")
    assert contents(make(revision="v1")) == before
    found = contents(fetch_task(REPO, subfolder="a"))
    assert found[SCALES_FILE] == before[SCALES_FILE]
    old, new = json.loads(before[TASK_CONFIG_FILE]), json.loads(found[TASK_CONFIG_FILE])
    told = {"format_version": "1.1", "task": {"metrics": {"accuracy": 0.5}}}
    assert new == {**old, "base_model_name_or_path": "owner/new", "revision": None, **told}
    for part in ("| accuracy | 0.5 |", 'load_task(model, "owner/task", subfolder="a"', "base_model: owner/new"):
        assert part in found[CARD_FILE].decode()


def test_a_directorys_card_is_kept_or_made(hub: HubServer, make: MakeBundle) -> None:
    directory = make()
    (directory / CARD_FILE).write_text("---\ntags: [mine]\n---\n")
    push_task_to_hub(str(directory), REPO)
    assert contents(fetch_task(REPO)) == contents(directory)
    (directory / CARD_FILE).unlink()
    push_task_to_hub(directory, REPO)
    assert base_tag(BASE) in hub.tags(REPO)
    assert not (directory / CARD_FILE).exists()
    with pytest.raises(TaskError, match="a directory holds one task"):
        push_task_to_hub(directory, REPO, name="a")


def test_keys_of_a_later_version_travel(hub: HubServer, make: MakeBundle) -> None:
    """TSK-5: a reader ignores them, but keeps them, also where the base gets another name."""
    directory = make()
    config = {
        **json.loads((directory / TASK_CONFIG_FILE).read_bytes()),
        "format_version": "1.7",
        "new": [1, {"a": None}],
    }
    (directory / TASK_CONFIG_FILE).write_text(json.dumps(config))
    push_task_to_hub(directory, REPO, base_model="owner/new")
    found = json.loads(contents(fetch_task(REPO))[TASK_CONFIG_FILE])
    assert found == {**config, "base_model_name_or_path": "owner/new"}


def test_a_models_task_is_saved_and_sent(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a model to the Hub and back, bit for bit, with a card that says where it is. It is read once, at loading."""
    import torch
    from support.building import write_model
    from transformers import LlamaConfig, LlamaForCausalLM

    import lowbit_format as lb
    from lowbit_format.schema import Scheme

    scheme = Scheme("bcq", 3, 8, "F16", offset=True)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2)).eval()
    base = write_model(llama, tmp_path / "base", lambda path, _: scheme if path.endswith("_proj") else None)
    ids = torch.arange(8)[None]
    tuned = lb.from_pretrained(base)
    lb.prepare_scale_tuning(tuned, method="alphatuning")
    with torch.no_grad():
        for parameter in (p for p in tuned.parameters() if p.requires_grad):
            parameter.normal_(0, 0.1)
    reads = list[Path]()

    def counted(directory: Path) -> StoredBundle:
        reads.append(directory)
        return read_stored_bundle(directory)

    for module in ("sharing", "repository", "finding"):
        monkeypatch.setattr(f"lowbit_format.tasks.{module}.read_stored_bundle", counted)
    lb.push_task_to_hub(tuned, REPO, base_model="owner/base", metrics={"f1": 0.25}, license="mit")
    assert reads == []
    card = (fetch_task(REPO).directory / CARD_FILE).read_text("utf-8")
    for part in ("| f1 | 0.25 |", f'lb.load_task(model, "{REPO}"', "base_model: owner/base", "license: mit"):
        assert part in card

    fresh = lb.from_pretrained(base)
    plain = fresh(ids).logits
    reads.clear()
    lb.load_task(fresh, REPO, name="back")
    assert len(reads) == 1
    lb.set_task(fresh, "back")
    assert torch.equal(fresh(ids).logits, tuned(ids).logits)
    assert not torch.equal(fresh(ids).logits, plain)


# --- names, imports --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "subfolder",
    ["", "/", "..", "a/../b", "/a", "a//b", ".git", "a\\b", "a*", "[a]", "a?", "a\n", "a\x00", "C:/x", "x" * 201],
)
def test_subfolders_that_are_refused(subfolder: str, hub: HubServer, make: MakeBundle) -> None:
    for act in (push, lambda _, repo, subfolder: fetch_task(repo, subfolder=subfolder)):
        with pytest.raises(HubError, match="is not a plain path"):
            act(make(), REPO, subfolder=subfolder)
    assert hub.log == []


def test_subfolders_that_are_taken() -> None:
    assert [check_subfolder(s) for s in (None, "a", "a/b/", "en-US/sst 2.1")] == [None, "a", "a/b", "en-US/sst 2.1"]


def test_hub_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "base").mkdir(parents=True)
    taken = ("user/base", "user/base-4bit.v2")
    refused = (None, "", "base", "out/base", "./base", "/a/b", "../b", "a/b/c", "~/b", "C:\\a", "a/b\nc")
    assert [is_hub_id(name) for name in (*taken, *refused)] == [True] * len(taken) + [False] * len(refused)


def test_imports_are_light() -> None:
    code = (
        "import sys, lowbit_format.hub, lowbit_format.tasks.sharing, lowbit_format.tasks.repository\n"
        "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
