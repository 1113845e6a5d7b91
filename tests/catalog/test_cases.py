"""What other people's adapters did to other people's servers, on the real program: each is served
as PEFT serves it, or refused by name.

A row of the collection is named where it is tested. In float32; tokens are compared exactly.
Nothing may leave the machine.
"""

from __future__ import annotations

import asyncio
import pickle
import shutil
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.bench.servers import started
from tests import kinds, making

pytestmark = pytest.mark.anyio

SETTINGS = {
    "base_id": "tiny",
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": "8",
}
HEAD = "base_model.model."
CALL = making.tokenizer().decode(kinds.CALL)
PROMPTS = [
    "Hi",
    "The capital of France is",
    f"one two {CALL} three four",
    f"{CALL} five {CALL} six and some more",
]
LENGTH = 8
Json = dict[str, Any]


@contextmanager
def sink() -> Iterator[socket.socket]:
    """Listens where the hub and every proxy are said to be; whoever asks them for anything waits in
    its queue.
    """
    with socket.create_server(("127.0.0.1", 0)) as heard:
        heard.setblocking(False)
        yield heard


@dataclass(frozen=True)
class RunningServer:
    """The service, its base and its adapters' root; what PEFT says is remembered."""

    url: str
    base: Path
    root: Path
    pid: int
    sink: socket.socket
    http: httpx.AsyncClient = field(default_factory=httpx.AsyncClient)
    told: dict[Path | None, list[list[int]]] = field(default_factory=dict)

    def right(self, folder: Path | None) -> list[list[int]]:
        if folder not in self.told:
            self.told[folder] = making.answers(self.base, folder, map(making.ids, PROMPTS), LENGTH)
        return self.told[folder]

    def make(self, name: str, maker: kinds.Maker) -> Path:
        with making.quiet():
            return maker(self.root / name.replace(" ", "-").replace("'", ""), self.base)

    async def register(self, id: str, folder: Path | str, **more: Any) -> httpx.Response:
        source = folder if isinstance(folder, str) else str(folder.relative_to(self.root))
        return await self.http.post("/adapters", json={"id": id, "source": source, **more})

    async def load(self, id: str, folder: Path, **more: Any) -> None:
        answer = await self.register(id, folder, **more)
        assert answer.status_code == 201, answer.text

    async def ids(self, prompt: str, id: str | None, n: int = LENGTH) -> list[int]:
        asked = {"adapter_id": id, "max_new_tokens": n, "details": True, "ignore_eos_token": True}
        answer = await self.http.post("/generate", json={"inputs": prompt, "parameters": asked})
        assert answer.status_code == 200, answer.text
        return [token["id"] for token in answer.json()["details"]["tokens"]]

    async def same(self, id: str | None, folder: Path | None) -> None:
        """What is served under this id is what PEFT says, and another thing than the base says."""
        said = [await self.ids(prompt, id) for prompt in PROMPTS]
        assert said == self.right(folder), id
        assert id is None or said != self.right(None), "a weak fixture"

    async def summary(self, id: str) -> Json:
        told: Json = (await self.http.get(f"/adapters/{id}/summary")).raise_for_status().json()
        return told

    async def drop(self, *ids: str) -> None:
        for id in ids:
            (await self.http.delete(f"/adapters/{id}")).raise_for_status()

    def asked_outside(self) -> bool:
        try:
            self.sink.accept()
        except BlockingIOError:
            return False
        return True

    def memory(self) -> int:
        above = psutil.Process(self.pid)
        return sum(one.memory_info().rss for one in [above, *above.children(recursive=True)])


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("cases")
    base, root = making.tiny(folder / "base", tie_word_embeddings=False), folder / "adapters"
    with sink() as heard, pytest.MonkeyPatch.context() as patch:
        for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            patch.setenv(name, f"http://127.0.0.1:{heard.getsockname()[1]}")
        with started({**SETTINGS, "base": str(base), "adapters_dir": str(root)}, folder / "log") as server:
            yield RunningServer(server.url, base, root, server.pid, heard)


@pytest.fixture
async def running(standing: RunningServer) -> AsyncIterator[RunningServer]:
    async with httpx.AsyncClient(base_url=standing.url, timeout=60, trust_env=False) as http:
        found = replace(standing, http=http)
        yield found
        await found.drop(*[card["id"] for card in (await http.get("/adapters")).json()["adapters"]])
        assert not found.asked_outside()


# ---- refused


@pytest.mark.parametrize("kind", kinds.REFUSED)
async def test_what_is_not_right_is_refused_by_name_and_leaves_no_trace(
    running: RunningServer, kind: str
) -> None:
    """A2, A4, A5, A6, A8, A11, A13, A14, A15, A16, each as named: 422, the id stays free, the base
    as it was, nothing runs.
    """
    maker, word = kinds.REFUSED[kind]
    folder = running.make(kind, maker)
    before = running.memory()
    answer = await running.register("x", folder)
    assert (answer.status_code, answer.json()["error_type"][:8]) == (422, "adapter_")
    assert word in "\n".join(answer.json()["details"]["problems"])
    assert str(running.root) not in answer.text
    assert (await running.http.get("/adapters/x")).status_code == 404
    assert running.memory() - before < 50e6
    assert not (folder.parent / kinds.CANARY).exists()
    assert await running.ids(PROMPTS[0], None) == running.right(None)[0]


async def test_a_resized_vocabulary_is_refused_with_both_sizes(running: RunningServer) -> None:
    """A11."""
    size = len(making.tokenizer())
    answer = await running.register("x", running.make("A11 both", kinds.grown))
    assert f"from {size} to {size + 4}" in answer.text
    assert (await running.http.get("/base")).json()["vocab_size"] == size
    await running.same(None, None)


async def test_counts_come_with_what_did_not_match(running: RunningServer) -> None:
    """A4: matched and total."""
    answer = await running.register("x", running.make("A4 counts", kinds.REFUSED["A4 half"][0]))
    assert {key: answer.json()["details"][key] for key in ("matched", "total")} == {"matched": 4, "total": 8}


# ---- served

OLD = (
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "task_type",
    "bias",
)


def renamed(rename: Callable[[str], str]) -> kinds.Maker:
    return kinds.edited(weights=lambda tensors: {rename(key): value for key, value in tensors.items()})


def stray(folder: Path) -> None:
    for name in ("optimizer.pt", "training_args.bin", "scheduler.pt"):
        (folder / name).write_bytes(pickle.dumps({"a": 1}))
    (folder / "config.json").write_text("{}")


def pickle_beside(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(kinds.Touch(folder.parent / kinds.CANARY)))


AS_PLAIN: dict[str, tuple[kinds.Maker, str]] = {
    "A1 an unknown null": (kinds.edited({"future_cfg": None}), ""),
    "A1 of 2023": (
        kinds.edited(lambda c: {key: c[key] for key in OLD} | {"enable_lora": None, "merge_weights": False}),
        "",
    ),
    "A1 an unknown value": (kinds.edited({"use_superlora": True}), "use_superlora"),
    "A3 one model short": (renamed(lambda key: key.replace(HEAD + "model.", HEAD)), "were read as"),
    "A3 bare": (renamed(lambda key: key.removeprefix(HEAD)), "were read as"),
    "A3 named": (renamed(lambda key: key.replace(".weight", ".default.weight")), "were read as"),
    "A3 ddp": (renamed(lambda key: "module." + key), "were read as"),
    "A8 null targets": (kinds.edited({"target_modules": None}), ""),
    "A13 stray files": (kinds.damaged(stray), ""),
    "A14 a laptop's path": (
        kinds.edited({"base_model_name_or_path": "/home/me/train/x", "revision": "abc"}),
        "/home/me/train/x",
    ),
    "A14 a dead repository": (
        kinds.edited({"base_model_name_or_path": "no-such-org/no-such-model"}),
        "no-such-org/no-such-model",
    ),
    "A14 another family": (
        kinds.edited({"base_model_name_or_path": "meta-llama/Llama-3.1-8B"}),
        "meta-llama/Llama-3.1-8B",
    ),
    "A15 a pickle beside": (kinds.damaged(pickle_beside), ""),
    "B6 dropout": (kinds.edited({"lora_dropout": 0.5}), ""),
}


@pytest.mark.parametrize("kind", AS_PLAIN)
async def test_oddities_that_change_nothing_are_served_as_the_plain_one_or_said_aloud(
    running: RunningServer, kind: str
) -> None:
    """A1, A3, A8, A13, A14, A15, B6: the same tokens again and again, and a warning where somebody
    should know.
    """
    maker, warning = AS_PLAIN[kind]
    plain, folder = running.make("plain", kinds.plain), running.make(kind, maker)
    await running.load("x", folder)
    for _ in range(2):
        await running.same("x", plain)
    told = await running.summary("x")
    assert [warning in one for one in told["warnings"] if warning] or told["warnings"] == []
    assert told["base_model"]["match"] is not kind.startswith("A14")
    assert not (folder.parent / kinds.CANARY).exists()


EVERY = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
SHOWN: dict[str, tuple[kinds.Maker, Json]] = {
    "A7 rslora": (
        kinds.lora(7, r=16, use_rslora=True),
        {"rank": {"min": 16, "max": 16}, "scalings": {2.0}, "use_rslora": True},
    ),
    "A7 alpha pattern": (
        kinds.lora(7, alpha_pattern={kinds.Q0: 64}),
        {"rank": {"min": 4, "max": 4}, "scalings": {2.0, 16.0}},
    ),
    "A7 rank pattern": (
        kinds.lora(7, rank_pattern={kinds.Q0: 16}),
        {"rank": {"min": 4, "max": 16}, "scalings": {2.0, 0.5}},
    ),
    "A8 regex": (kinds.POOL["regex"], {"target_modules": ["q_proj", "v_proj"], "layers": 1}),
    "A8 all-linear": (kinds.POOL["all-linear"], {"target_modules": EVERY}),
    "A9 dora": (kinds.POOL["dora"], {"use_dora": True, "lane": "pool"}),
    "A12 token rows": (kinds.SHADOW["trainable_token_indices"], {"lane": "shadow"}),
    "A12 activated": (kinds.POOL["activated"], {"lane": "pool", "features": ["alora_invocation_tokens"]}),
}


@pytest.mark.parametrize("kind", SHOWN)
async def test_what_a_config_means_is_served_and_shown_as_peft_means_it(
    running: RunningServer, kind: str
) -> None:
    """A7, A8, A9, A12: effective scalings, resolved modules, lanes.

    An activated one is asked with, without and with two invocations.
    """
    maker, facts = SHOWN[kind]
    folder = running.make(kind, maker)
    await running.load("x", folder)
    await running.same("x", folder)
    told = await running.summary("x")
    told["scalings"] = {row["scaling"] for row in told["by_module"]}
    assert {key: told[key] for key in facts} == facts


async def test_targets_of_every_spelling_live_side_by_side(running: RunningServer) -> None:
    """A8: as the first, the second and the third."""
    names = {
        "regex": kinds.POOL["regex"],
        "all": kinds.POOL["all-linear"],
        "null": AS_PLAIN["A8 null targets"][0],
    }
    folders = {id: running.make(f"A8 side {id}", maker) for id, maker in names.items()}
    for id, folder in folders.items():
        await running.load(id, folder)
    for _ in range(2):
        for id, folder in folders.items():
            await running.same(id, running.make("plain", kinds.plain) if id == "null" else folder)


async def test_saved_modules_and_parameters_stay_their_own_adapters(running: RunningServer) -> None:
    """A10, A12: two with whole modules, two on parameters, a plain one and the base in turn, and
    after one of them is gone.
    """
    makers = {
        "head": kinds.SHADOW["modules_to_save"],
        "embedding": kinds.SHADOW["embedding saved"],
        "p0": kinds.SHADOW["target_parameters"],
        "p1": kinds.lora(26, targets=(), target_parameters=["mlp.down_proj.weight"]),
        "plain": kinds.plain,
    }
    folders: Mapping[str, Path] = {id: running.make(f"A10 {id}", maker) for id, maker in makers.items()}
    for id, folder in folders.items():
        await running.load(id, folder)
    for _ in range(2):
        for id, folder in folders.items():
            await running.same(id, folder)
            await running.same(None, None)
    await running.drop("head", "p0")
    for id in ("embedding", "p1", "plain"):
        await running.same(id, folders[id])
    await running.same(None, None)


async def test_a_run_folder_wants_one_of_its_checkpoints_named(running: RunningServer) -> None:
    """A13."""
    run = running.make("A13 run", kinds.REFUSED["A13 a run"][0])
    answer = await running.register("x", run)
    assert "checkpoint-10, checkpoint-20" in answer.text
    await running.load("x", run, subfolder="checkpoint-20")
    await running.same("x", running.make("plain", kinds.plain))


# ---- in service


async def test_a_long_shared_prompt_is_each_adapters_own(running: RunningServer) -> None:
    """B3: under A, B, the base and A, each twice; so that nothing of one's prefill is another's."""
    folders: dict[str | None, Path | None] = {
        None: None,
        "a": running.make("B3 a", kinds.lora(31)),
        "b": running.make("B3 b", kinds.lora(32)),
    }
    prompt = " ".join(f"word{i}" for i in range(40))
    right = {
        id: making.answers(running.base, folder, [making.ids(prompt)], LENGTH)[0]
        for id, folder in folders.items()
    }
    assert len({tuple(said) for said in right.values()}) == 3
    for id, folder in folders.items():
        if id and folder:
            await running.load(id, folder)
    for name in ("a", "b", None, "a"):
        for _ in range(2):
            assert await running.ids(prompt, name) == right[name], name


async def test_a_name_stands_for_its_new_content_at_once(running: RunningServer) -> None:
    """B4: after DELETE and POST, and after PUT;

    POST on a taken name is a conflict, of the same content no change.
    """
    one, two = running.make("B4 one", kinds.lora(33)), running.make("B4 two", kinds.lora(34))
    await running.load("m", one)
    await running.same("m", one)
    await running.drop("m")
    await running.load("m", two)
    await running.same("m", two)
    assert (await running.register("m", one)).status_code == 409
    assert (await running.register("m", two)).status_code == 200
    await running.same("m", two)
    assert (await running.http.put("/adapters/m", json={"source": one.name})).status_code == 200
    await running.same("m", one)


async def test_no_adapter_is_the_base_before_between_and_after(running: RunningServer) -> None:
    """B6: also when the last one asked, and the last one there, is deleted."""
    folders = {"a": running.make("B6 a", kinds.POOL["head"]), "b": running.make("B6 b", kinds.SHADOW["IA3"])}
    await running.same(None, None)
    for id, folder in folders.items():
        await running.load(id, folder)
    for name in ("a", None, "b", None):
        await running.same(name, folders[name] if name else None)
    for id in ("b", "a"):
        await running.drop(id)
        await running.same(None, None)
        assert (await running.register("gone", "none")).status_code == 422


async def test_changes_at_the_same_time_are_one_after_another(running: RunningServer) -> None:
    """B7: of two deletions one finds it, of two contents for a name one gets it, and eight at once
    are all right.
    """
    folders = [running.make(f"B7 {i}", kinds.lora(40 + i)) for i in range(8)]
    for turn in range(5):
        answers = await asyncio.gather(
            *(running.register(f"e{i}", folder) for i, folder in enumerate(folders))
        )
        assert [answer.status_code for answer in answers] == [201] * 8
        said = await asyncio.gather(*(running.ids(PROMPTS[1], f"e{i}") for i in range(8)))
        assert said == [running.right(folder)[1] for folder in folders]
        both = await asyncio.gather(*(running.http.delete(f"/adapters/e{turn}") for _ in range(2)))
        assert sorted(answer.status_code for answer in both) == [200, 404]
        both = await asyncio.gather(*(running.register("m", folder) for folder in folders[:2]))
        assert sorted(answer.status_code for answer in both) == [201, 409]
        won = folders[[answer.status_code for answer in both].index(201)]
        assert await running.ids(PROMPTS[1], "m") == running.right(won)[1]
        left = {card["id"] for card in (await running.http.get("/adapters")).json()["adapters"]}
        assert left == {"m", *(f"e{i}" for i in range(8) if i != turn)}
        await running.drop(*left)


async def test_files_outside_are_neither_read_nor_deleted(running: RunningServer, tmp_path: Path) -> None:
    """C6: by an absolute path, by dots, by a link to a folder and by links to files; and where a
    link has become one after registration.
    """
    outside = kinds.plain(tmp_path / "outside", running.base)
    (running.root / "link").symlink_to(outside)
    (running.root / "files").mkdir()
    for name in (making.CONFIG, making.WEIGHTS):
        (running.root / "files" / name).symlink_to(outside / name)
    for source in (
        "/etc",
        str(outside),
        "..",
        "../outside",
        "a/../../x",
        "link",
        "files",
        "a\0b",
        "~root",
        "file:///etc",
    ):
        answer = await running.register("x", source)
        assert answer.status_code in (403, 422), source
        assert str(outside) not in answer.text or source == str(outside)
    inside = running.make("C6 inside", kinds.plain)
    await running.load("x", inside)
    shutil.rmtree(inside)
    inside.symlink_to(outside)
    assert (await running.http.delete("/adapters/x?purge=true")).status_code == 200
    assert {path.name for path in outside.iterdir()} >= {making.CONFIG, making.WEIGHTS}
    (running.root / "link").unlink()
