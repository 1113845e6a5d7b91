"""The console in a real browser, against a live server: each view does what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests import making

from .conftest import BROKEN, Keyed, Open


def some_ids(url: str) -> list[str]:
    """Those that can be used."""
    return [card["id"] for card in httpx.get(f"{url}adapters").json()["adapters"] if card["state"] == "ready"]


def row(page: Page, id: str) -> Locator:
    return page.get_by_role("row").filter(has=page.get_by_role("link", name=id, exact=True))


def upload(page: Page, id: str, files: list[Path]) -> None:
    form = page.get_by_role("form", name="Upload an adapter")
    form.locator("input[type=file]").set_input_files(files)
    form.get_by_label("Id").fill(id)
    form.get_by_role("button", name="Upload").click()


def send(url: str, id: str, files: list[Path]) -> httpx.Response:
    return httpx.post(
        f"{url}adapters/{id}/upload", files=[(path.name, (path.name, path.read_bytes())) for path in files]
    )


@pytest.fixture
def uploaded(live: str, adapter_files: list[Path]) -> str:
    """An adapter that is there only for this test's sake."""
    assert send(live, "spare", adapter_files).is_success
    return "spare"


# ---- adapters


def test_the_table_says_what_each_adapter_is(live: str, open_page: Open) -> None:
    page = open_page(live)
    for id in some_ids(live):
        summary = httpx.get(f"{live}adapters/{id}/summary").json()
        line = row(page, id)
        expect(line).to_contain_text(" ".join(summary["target_modules"]))
        expect(line.get_by_role("cell").nth(1)).to_have_text(re.compile(rf"^{summary['rank']['min']}\b"))
        expect(line).to_contain_text(summary["residency"])
        expect(line.get_by_role("img")).to_have_attribute("aria-label", re.compile(r"% of the base"))


def test_the_table_sorts_and_filters(live: str, open_page: Open) -> None:
    page = open_page(live)
    ids = sorted([*some_ids(live), BROKEN], key=str.lower)
    links = page.get_by_role("table", name="Adapters").get_by_role("link")
    expect(links).to_have_text(ids)
    page.get_by_role("button", name="Adapter", exact=False).first.click()
    expect(links).to_have_text(ids[::-1])
    expect(page.get_by_role("columnheader", name="Adapter")).to_have_attribute("aria-sort", "descending")
    page.get_by_label("Filter").fill(ids[0].upper())
    expect(links).to_have_text([id for id in ids[::-1] if ids[0] in id])
    page.get_by_label("Filter").fill("no such adapter")
    expect(page.get_by_text("No adapter matches.")).to_be_visible()


def test_an_upload_is_registered(live: str, open_page: Open, adapter_files: list[Path]) -> None:
    page = open_page(live)
    upload(page, "from-the-page", adapter_files)
    expect(page.get_by_text("from-the-page is registered")).to_be_visible()
    expect(row(page, "from-the-page")).to_be_visible()
    assert "from-the-page" in some_ids(live)
    httpx.delete(f"{live}adapters/from-the-page")


def test_an_uploads_tokenizer_and_templates_go_along(
    live: str, open_page: Open, adapter_files: list[Path]
) -> None:
    beside = [
        adapter_files[0].with_name(name)
        for name in ("chat_template.jinja", "generation_config.json", "README.md")
    ]
    for file, content in zip(
        beside, ("{{ messages[-1].content }}", "{}", "not part of an answer"), strict=True
    ):
        file.write_text(content)
    page = open_page(live)
    upload(page, "with-template", [*adapter_files, *beside])
    expect(page.get_by_text("with-template is registered")).to_be_visible()
    sent = httpx.get(f"{live}adapters/with-template/summary").json()["files"]
    assert [file["name"] for file in sent] == [
        making.CONFIG,
        making.WEIGHTS,
        "chat_template.jinja",
        "generation_config.json",
    ]
    httpx.delete(f"{live}adapters/with-template")


def drop(page: Page, *paths: Path) -> None:
    """What the browser does when a person drags these from the desktop into the drop zone."""
    box = page.locator(".drop").bounding_box()
    assert box is not None
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    browser = page.context.new_cdp_session(page)
    for type in ("dragEnter", "dragOver", "drop"):
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        browser.send("Input.dispatchDragEvent", {"type": type, **at, "data": data})


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "files"])
def test_an_adapter_is_taken_by_drag_and_drop_and_a_folder_names_it(
    live: str, open_page: Open, adapter_source: Path, whole: bool
) -> None:
    page = open_page(live)
    form = page.get_by_role("form", name="Upload an adapter")
    page.get_by_text("Drop an adapter's folder").scroll_into_view_if_needed()
    drop(page, *([adapter_source] if whole else sorted(adapter_source.iterdir())))
    expect(form.locator(".file")).to_have_text(
        [re.compile("adapter_config.json"), re.compile("adapter_model.safetensors")]
    )
    expect(form.get_by_label("Id")).to_have_value(adapter_source.name if whole else "")


def test_an_upload_says_how_far_it_is(live: str, open_page: Open, adapter_files: list[Path]) -> None:
    config, weights = adapter_files
    weights.write_bytes(bytes(3_000_000))
    page = open_page(live, expect="422")
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 1_500_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    upload(page, "slow", [config, weights])
    sent = page.get_by_role("progressbar", name=re.compile(r"^[1-9]\d? % sent"))
    sent.wait_for()
    expect(page.get_by_role("button", name="Upload")).to_be_disabled()
    expect(page.get_by_role("alert")).to_contain_text("adapter_invalid")
    expect(page.get_by_role("progressbar")).to_have_count(0)


def test_what_is_wrong_with_an_upload_is_shown_as_the_api_gives_it(
    live: str, open_page: Open, adapter_files: list[Path]
) -> None:
    config, weights = adapter_files
    weights.write_bytes(b"broken weights")
    page = open_page(live, expect="422")
    upload(page, "wrong", [config, weights])
    shown = page.get_by_role("alert")
    expect(shown).to_contain_text("adapter_invalid")
    refused = send(live, "wrong", adapter_files).json()
    expect(shown.get_by_role("listitem")).to_have_text(refused["details"]["problems"])
    assert "wrong" not in some_ids(live)


def test_a_source_can_be_checked_without_registering(live: str, open_page: Open) -> None:
    page = open_page(live)
    form = page.get_by_role("form", name="Register an adapter")
    form.get_by_label("Id").fill("checked-only")
    form.get_by_label("Source").fill(some_ids(live)[0])
    form.get_by_role("button", name="Check only").click()
    expect(form.get_by_text("It would be served.")).to_be_visible()
    form.get_by_label("Source").fill("nowhere")
    form.get_by_role("button", name="Check only").click()
    expect(form.get_by_role("alert").get_by_role("listitem")).to_have_count(1)
    assert "checked-only" not in some_ids(live)


def test_an_id_that_is_taken_can_be_replaced(live: str, open_page: Open, uploaded: str) -> None:
    page = open_page(live, expect="409")
    form = page.get_by_role("form", name="Register an adapter")
    form.get_by_label("Id").fill(uploaded)
    form.get_by_label("Source").fill(next(id for id in some_ids(live) if id != uploaded))
    form.get_by_role("button", name="Register").click()
    expect(form.get_by_role("alert")).to_contain_text("conflict (409)")
    before = httpx.get(f"{live}adapters/{uploaded}").json()["digest"]
    form.get_by_role("button", name="Replace it").click()
    expect(page.get_by_text(f"{uploaded} is replaced")).to_be_visible()
    assert httpx.get(f"{live}adapters/{uploaded}").json()["digest"] != before
    httpx.delete(f"{live}adapters/{uploaded}")


def test_an_adapter_is_pinned_and_let_go(live: str, open_page: Open, uploaded: str) -> None:
    page = open_page(live)
    pin = row(page, uploaded).get_by_role("button", name=f"Pin {uploaded}")
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Pinned").click()
    expect(page.get_by_role("table", name="Adapters").get_by_role("link").first).to_have_text(uploaded)
    assert httpx.get(f"{live}adapters/{uploaded}").json()["pinned"]
    pin.click()
    expect(pin).to_have_attribute("aria-pressed", "false")
    httpx.delete(f"{live}adapters/{uploaded}")


def test_nothing_is_deleted_without_a_yes(live: str, open_page: Open, uploaded: str) -> None:
    page = open_page(live)
    row(page, uploaded).get_by_role("button", name=f"Delete {uploaded}", exact=True).click()
    dialog = page.get_by_role("dialog", name=f"Delete {uploaded}?")
    dialog.get_by_role("button", name="Keep it").click()
    expect(dialog).to_be_hidden()
    assert uploaded in some_ids(live)
    row(page, uploaded).get_by_role("button", name=f"Delete {uploaded}", exact=True).press("Enter")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert uploaded in some_ids(live)
    row(page, uploaded).get_by_role("button", name=f"Delete {uploaded}", exact=True).click()
    dialog.get_by_label("Delete its uploaded files too").check()
    dialog.get_by_role("button", name="Delete", exact=True).click()
    expect(page.get_by_text(f"Deleted {uploaded}")).to_be_visible()
    expect(row(page, uploaded)).to_have_count(0)
    assert uploaded not in some_ids(live)


# ---- one adapter


def test_an_adapters_page_shows_the_summary_the_modules_and_the_tree(live: str, open_page: Open) -> None:
    id = some_ids(live)[0]
    summary = httpx.get(f"{live}adapters/{id}/summary").json()
    page = open_page(live)
    row(page, id).get_by_role("link", name=id).click()
    expect(page.get_by_role("heading", name=id, level=1)).to_be_visible()
    expect(page.get_by_text(f"{summary['parameters']:,} (")).to_be_visible()
    modules = page.get_by_role("region", name=f"Modules of {id}").get_by_role("row")
    expect(modules).to_have_count(1 + len(summary["by_module"]))
    expect(page.get_by_role("img", name=re.compile("adds .* MB to the"))).to_be_visible()
    for name in summary["target_modules"]:
        expect(page.get_by_role("img", name=re.compile(rf"^{name}: norm [0-9.]+ to"))).to_be_visible()
    page.get_by_role("button", name="Rank", exact=True).click()
    for name in summary["target_modules"]:
        expect(
            page.get_by_role("img", name=re.compile(rf"^{name}: rank {summary['rank']['max']} to"))
        ).to_be_visible()
    tree = httpx.get(f"{live}adapters/{id}/architecture").text
    assert page.get_by_label("Module tree with the adapter in place").inner_text().strip() == tree.strip()


def test_an_adapter_is_rolled_back_to_a_kept_version(live: str, open_page: Open, uploaded: str) -> None:
    page = open_page(f"{live}#/adapters/{uploaded}")
    expect(page.get_by_label("Module tree with the adapter in place")).to_be_visible()
    expect(page.get_by_role("region", name=f"Versions of {uploaded}")).to_have_count(0)
    first = httpx.get(f"{live}adapters/{uploaded}").json()["digest"]
    source = next(id for id in some_ids(live) if id != uploaded)
    second = httpx.put(f"{live}adapters/{uploaded}", json={"source": source}).json()["digest"]
    versions = page.get_by_role("region", name=f"Versions of {uploaded}")
    expect(versions.get_by_role("row")).to_have_count(3)
    versions.get_by_role("button", name="Roll back to").click()
    expect(page.get_by_text(f"{uploaded} is {first[7:19]} again")).to_be_visible()
    assert httpx.get(f"{live}adapters/{uploaded}").json()["digest"] == first
    expect(versions.get_by_role("button", name=f"Roll back to {second[7:19]}")).to_be_visible()
    httpx.delete(f"{live}adapters/{uploaded}?purge=true")


def test_why_an_adapter_failed_is_said_in_the_table_and_on_its_page(live: str, open_page: Open) -> None:
    page = open_page(live)
    reason = httpx.get(f"{live}adapters/{BROKEN}").json()["reason"]
    expect(row(page, BROKEN)).to_contain_text(f"failed {reason}")
    expect(row(page, BROKEN).get_by_role("button", name="Pin")).to_have_count(0)
    row(page, BROKEN).get_by_role("link").click()
    expect(page.get_by_role("alert")).to_contain_text(reason)
    expect(page.get_by_role("button", name="Delete")).to_be_visible()
    expect(page.get_by_role("link", name="Compare").and_(page.locator("main a"))).to_have_count(0)


@pytest.mark.parametrize("id", ["no-such", "100%"])
def test_an_unknown_adapter_is_said_to_be_unknown(live: str, open_page: Open, id: str) -> None:
    page = open_page(f"{live}#/adapters/{id}", expect="404")
    expect(page.get_by_role("alert")).to_contain_text("adapter_not_found (404)")


# ---- compare


def ask(page: Page, prompt: str, length: int, way: str = "plain text") -> None:
    page.get_by_label("Prompt").last.fill(prompt)
    page.get_by_label("New tokens").fill(str(length))
    page.get_by_label("Send as").select_option(way)
    page.get_by_role("button", name="Run").click()


@pytest.mark.parametrize("way", ["chat", "plain text"])
def test_the_base_and_adapters_answer_side_by_side(live: str, open_page: Open, way: str) -> None:
    page = open_page(f"{live}#/compare")
    ids = some_ids(live)[:2]
    for id in ids:
        page.get_by_role("button", name=id, exact=True).click()
    ask(page, "Say something short.", 24, way)
    expect(page.get_by_role("article")).to_have_count(1 + len(ids))
    for id in ids:
        run = page.get_by_role("article", name=id)
        expect(run.locator("dd").nth(3)).to_have_text(re.compile("length|eos_token|stop"))
        expect(run.locator(".speed")).to_have_text(re.compile(r"^\d+\.\d$"))
        digest = httpx.get(f"{live}adapters/{id}").json()["digest"]
        expect(run.get_by_title(f"Copy {digest}")).to_be_visible()
        assert run.locator(".run-text").inner_text() == answer(live, id, 24, way)


def answer(url: str, id: str, length: int, way: str) -> str:
    """What the server says to the same request, asked without the page."""
    if way == "plain text":
        plain: dict[str, Any] = {
            "inputs": "Say something short.",
            "parameters": {"adapter_id": id, "max_new_tokens": length, "temperature": 0},
        }
        return "".join(
            event["token"]["text"]
            for event in events(f"{url}generate_stream", plain)
            if not event["token"]["special"]
        )
    message = {"role": "user", "content": "Say something short."}
    asked: dict[str, Any] = {
        "model": id,
        "messages": [message],
        "max_tokens": length,
        "temperature": 0,
        "stream": True,
    }
    chunks = [choice for event in events(f"{url}v1/chat/completions", asked) for choice in event["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in chunks)


def events(url: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    lines = httpx.post(url, json=asked, timeout=30).text.splitlines()
    return [
        json.loads(line[5:]) for line in lines if line.startswith("data:") and not line.endswith("[DONE]")
    ]


def test_with_the_demo_there_is_an_example_for_each_of_its_adapters(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/compare")
    page.get_by_role("button", name="an example for orders").click()
    expect(page.get_by_label("Prompt").last).to_have_value(
        re.compile("seven green umbrellas.*\nJSON:$", re.S)
    )
    expect(page.get_by_role("button", name="orders", exact=True)).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="an example for redact")).to_have_count(0)


def test_answers_arrive_while_they_are_made_and_can_be_stopped(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/compare")
    ask(page, "Go on and on.", 8000)
    run = page.get_by_role("article")
    expect(run).to_have_attribute("aria-busy", "true")
    expect(run.locator(".run-text")).not_to_have_text("")
    page.get_by_role("button", name="Stop").click()
    expect(run).to_have_attribute("aria-busy", "false")
    expect(run.locator("dd").nth(3)).to_have_text("stopped")


def test_what_goes_wrong_is_shown_where_the_answer_would_be(
    live: str, open_page: Open, uploaded: str
) -> None:
    page = open_page(f"{live}#/compare/{uploaded}", expect="404")
    expect(page.get_by_role("button", name=uploaded, exact=True)).to_have_attribute("aria-pressed", "true")
    httpx.delete(f"{live}adapters/{uploaded}")
    ask(page, "Hi", 2, "chat")
    expect(page.get_by_role("article", name=uploaded).get_by_role("alert")).to_contain_text(
        "model_not_found (404)"
    )
    expect(page.get_by_role("article").first.locator("dd").nth(3)).to_have_text("length")


def test_at_most_four_adapters_are_compared(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/compare")
    assert len(some_ids(live)) > 4
    chips = page.get_by_role("group", name=re.compile("The base and up to 4")).get_by_role("button")
    expect(chips).to_have_count(1 + len(some_ids(live)))
    for index in range(1, 5):
        chips.nth(index).click()
    expect(chips.nth(5)).to_be_disabled()


def test_a_request_is_copied_as_curl(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/compare")
    ask(page, "It's fine.", 2)
    page.get_by_role("button", name=re.compile("as curl")).click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith(f"curl -N {live}generate_stream -H 'content-type: application/json' -d '{{")
    assert r"It'\''s fine." in copied


# ---- aliases


def set_alias(url: str, weights: tuple[int, int]) -> list[str]:
    """The two adapters that the alias `team/prod` sends requests to, by these weights."""
    ids = some_ids(url)[:2]
    targets = [{"id": id, "weight": weight} for id, weight in zip(ids, weights, strict=True)]
    assert httpx.put(f"{url}aliases/team/prod", json={"targets": targets}).is_success
    return ids


def weights_of(url: str) -> list[float]:
    (alias,) = httpx.get(f"{url}aliases").json()["aliases"]
    return [target["weight"] for target in alias["targets"]]


def test_an_alias_shows_its_targets_and_what_they_have_served(live: str, open_page: Open) -> None:
    stable, canary = set_alias(live, (3, 1))
    body = {"inputs": "Hi", "parameters": {"adapter_id": "team/prod", "max_new_tokens": 3}}
    went = [httpx.post(f"{live}generate", json=body).json()["adapter"]["id"] for _ in range(8)]
    page = open_page(f"{live}#/aliases")
    for id, share in ((stable, "75.0 %"), (canary, "25.0 %")):
        cells = row(page, id).get_by_role("cell")
        expect(cells.nth(3)).to_contain_text(share)
        expect(cells.nth(4)).to_have_text(str(went.count(id)))
        expect(cells.nth(6)).to_have_text(re.compile(r"m?s$" if id in went else "–"))
    httpx.delete(f"{live}aliases/team/prod")
    expect(page.get_by_text("There is none.")).to_be_visible()


def test_a_canary_is_promoted_and_rolled_back(live: str, open_page: Open) -> None:
    stable, canary = set_alias(live, (90, 10))
    page = open_page(f"{live}#/aliases")
    page.get_by_label(f"Weight of {canary} in team/prod").fill("50")
    page.get_by_role("button", name="Save the weights of team/prod").click()
    expect(row(page, canary).get_by_role("cell").nth(3)).to_contain_text("35.7 %")
    assert weights_of(live) == [90, 50]
    page.get_by_role("button", name=f"Promote {canary} in team/prod").click()
    expect(row(page, canary).get_by_role("cell").nth(3)).to_contain_text("100 %")
    assert weights_of(live) == [0, 100]
    expect(page.get_by_role("button", name=f"Roll back {canary} in team/prod")).to_be_disabled()
    page.get_by_role("button", name=f"Promote {stable} in team/prod").click()
    expect(row(page, stable).get_by_role("cell").nth(3)).to_contain_text("100 %")
    set_alias(live, (90, 10))
    page.get_by_role("button", name=f"Roll back {canary} in team/prod").click()
    expect(row(page, canary).get_by_role("cell").nth(3)).to_contain_text("0 %")
    expect(page.get_by_label(f"Weight of {canary} in team/prod")).to_have_value("0")
    assert weights_of(live) == [90, 0]
    httpx.delete(f"{live}aliases/team/prod")


# ---- live


def test_the_charts_move_while_requests_run(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/live")
    tokens = page.get_by_role("img", name="Tokens/s: generated")
    expect(tokens).to_be_visible()
    still = tokens.locator("canvas").evaluate("canvas => canvas.toDataURL()")
    httpx.post(
        f"{live}generate_stream", json={"inputs": "Go on.", "parameters": {"max_new_tokens": 60}}, timeout=60
    )
    expect(page.get_by_role("img", name=re.compile("^First token: median [0-9.]+ m?s"))).to_be_visible()
    assert tokens.locator("canvas").evaluate("canvas => canvas.toDataURL()") != still


def test_the_pool_map_says_who_holds_which_rows(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/live")
    pool = httpx.get(f"{live}base").json()["pool"]
    held = f"{pool['rank_used']} of {pool['rank_total']} rank rows held by {len(pool['placements'])} adapters"
    expect(page.get_by_role("img", name=held)).to_be_visible()
    ids = {card["digest"]: card["id"] for card in httpx.get(f"{live}adapters").json()["adapters"]}
    for one in pool["placements"]:
        rows = f"rows {one['start']}–{one['start'] + one['rank'] - 1}"
        expect(page.get_by_role("listitem").filter(has_text=ids[one["digest"]])).to_contain_text(rows)


# ---- forecast


def test_a_forecast_follows_the_sliders(live: str, open_page: Open) -> None:
    page = open_page(f"{live}#/forecast")
    names = [
        module["name"] for module in httpx.get(f"{live}base").json()["modules"] if module["name"] != "lm_head"
    ]
    page.get_by_role("button", name="Every linear layer").click()
    page.get_by_role("slider", name="Rank").fill("4")
    told = httpx.get(f"{live}forecast", params={"r": 4, "target_modules": ",".join(names)}).json()
    expect(page.get_by_text(f"{told['parameters']:,}", exact=True)).to_be_visible()
    expect(page.get_by_role("region", name="Modules of the adapter").get_by_role("row")).to_have_count(
        1 + len(told["by_module"])
    )
    page.get_by_role("slider", name="Rank").press("ArrowRight")
    expect(page.get_by_text(f"{told['parameters'] * 5 // 4:,}", exact=True)).to_be_visible()


# ---- usage


def generate(url: str, id: str, tokens: int = 3) -> None:
    body = {"inputs": "Go on.", "parameters": {"adapter_id": id, "max_new_tokens": tokens}}
    assert httpx.post(f"{url}generate", json=body, timeout=60).is_success


def test_the_usage_page_says_what_each_adapter_has_used(live: str, open_page: Open) -> None:
    id = some_ids(live)[0]
    generate(live, id)
    page = open_page(f"{live}#/usage")
    line = row(page, id)
    rows = httpx.get(f"{live}usage", params={"by": "adapter"}).json()["usage"]
    (told,) = [one for one in rows if one["adapter"] == id]
    expect(line.get_by_role("cell").nth(1)).to_have_text("no key")
    expect(line.get_by_role("cell").nth(2)).to_have_text(f"{told['requests']:,}")
    expect(line.get_by_role("cell").nth(5)).to_have_text(f"{told['generated_tokens']:,}")
    page.get_by_label("By").select_option("key")
    expect(page.get_by_role("table", name="Usage").get_by_role("row")).to_have_count(2)
    page.get_by_label("Over the last").select_option("ever")
    expect(page.get_by_role("table", name="Usage").get_by_role("row")).to_have_count(2)


# ---- keys, theme, keyboard


def test_a_key_is_asked_for_and_kept_in_the_tab_only(keyed: Keyed, open_page: Open) -> None:
    page = open_page(keyed.url, expect="401", files=True)
    dialog = page.get_by_role("dialog", name="Key")
    dialog.get_by_label("Key").fill("not the key")
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_contain_text("did not take this key")
    dialog.get_by_label("Key").fill(keyed.key)
    dialog.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    expect(page.get_by_text("No adapter is registered yet")).to_be_visible()
    page.reload()
    expect(page.get_by_text("No adapter is registered yet")).to_be_visible()
    assert page.evaluate("JSON.stringify([document.cookie, localStorage])") == '["",{}]'
    page.get_by_role("button", name="Forget key").click()
    expect(dialog).to_be_visible()


def test_who_gives_no_key_is_not_asked_over_and_over(keyed: Keyed, open_page: Open) -> None:
    page = open_page(keyed.url, expect="401", files=True)
    dialog = page.get_by_role("dialog", name="Key")
    dialog.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("a key is needed")).to_be_visible()
    with page.expect_response(re.compile("/adapters$")):
        expect(dialog).to_be_hidden()
    page.get_by_role("button", name="Give a key").click()
    expect(dialog).to_be_visible()


def test_curl_never_shows_the_key(keyed: Keyed, open_page: Open) -> None:
    page = open_page(f"{keyed.url}#/compare", expect="Failed to load resource", files=True)
    page.get_by_role("textbox", name="Key").fill(keyed.key)
    page.get_by_role("button", name="Use this key").click()
    ask(page, "Hi", 2)
    page.get_by_role("button", name=re.compile("as curl")).click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert '-H "authorization: Bearer $ADAPTERD_KEY"' in copied
    assert keyed.key not in copied


def test_the_theme_follows_the_system_until_one_is_chosen(live: str, open_page: Open) -> None:
    page = open_page(live, scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    toggle = page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    dark = page.evaluate(ground)
    toggle.click()
    expect(toggle).to_have_attribute("aria-pressed", "false")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    expect(toggle).to_have_attribute("aria-pressed", "false")
    assert page.evaluate(ground) == light


def test_the_views_are_reached_by_keyboard(live: str, open_page: Open) -> None:
    page = open_page(live)
    page.get_by_role("link", name="Compare").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Compare", level=1)).to_be_visible()
    expect(page.get_by_role("main")).to_be_focused()
    expect(page).to_have_title("Compare · adapterd")
