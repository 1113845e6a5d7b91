"""Clients that do everything at once: they ask in both dialects, stream, leave, err, register,
replace and delete, and judge each answer.

Speaks HTTP only; must not know what is done to the service meanwhile, but by the errors that it has
for it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx

from tests.truth import (
    ALIAS,
    BAD,
    BUSY,
    CAUGHT,
    DIED,
    GONE,
    LATE,
    LENGTHS,
    NO_VERSION,
    OTHER_DIGEST,
    PROMPTS,
    TWO_FACED,
    Body,
    Tally,
    Truth,
    WrongError,
    code,
    events,
    native,
    openai,
)


class Person:
    """One client. Whatever comes back is judged and goes into the tally; nothing is raised."""

    def __init__(self, number: int, http: httpx.AsyncClient, truth: Truth, tally: Tally) -> None:
        self.name, self.http, self.truth, self.tally = f"c{number}", http, truth, tally
        self.dice = random.Random(number)
        self.sent = 0
        self.deeds: dict[Callable[[], Awaitable[None]], int] = {
            self.ask: 30,
            self.ask_openai: 20,
            self.stream: 20,
            self.leave: 8,
            self.leave_unanswered: 3,
            self.err: 8,
            self.ask_for_nobody: 3,
            self.look: 3,
            self.come_and_go: 3,
            self.shake: 2,
            self.replace: 2,
            self.roll_back: 1,
            self.ask_version: 4,
            self.move_alias: 1,
            self.ask_alias: 4,
        }

    async def act(self) -> None:
        deed = self.dice.choices(list(self.deeds), list(self.deeds.values()))[0]
        try:
            await deed()
        except WrongError as error:
            self.tally.wrong.append(f"{self.name} {deed.__name__}: {error}")

    # ---- sending

    def _id(self) -> str:
        self.sent += 1
        id = f"{self.name}-{self.sent}"
        self.tally.outcomes[id] = "open"
        return id

    async def send(
        self, method: str, path: str, body: Body | str | None, *also: tuple[int, str]
    ) -> httpx.Response | None:
        """The answer if it is a good one;

        None for one of the errors that anybody may get, or that this one may.
        """
        id = self._id()
        sent = {"content": body} if isinstance(body, str) else {"json": body} if body is not None else {}
        headers = {"x-request-id": id, "content-type": "application/json"}
        try:
            answer = await self.http.request(method, path, headers=headers, **sent)
        except httpx.TransportError as error:
            self._cut(id, error)
            return None
        return answer if await self._good(id, answer, BUSY | set(also)) else None

    async def _good(self, id: str, answer: httpx.Response, may: set[tuple[int, str]]) -> bool:
        if answer.is_success:
            self.tally.outcomes[id] = (
                "answered" if "generat" in answer.url.path or "completions" in answer.url.path else "done"
            )
            return True
        told = (answer.status_code, code(answer.json()))
        self.tally.outcomes[id] = self._outcome(told, answer.text)
        if told not in may:
            raise WrongError(f"{id}: {answer.status_code} {answer.text[:200]}")
        if told in BUSY:
            await asyncio.sleep(0.1)
        return False

    def _outcome(self, told: tuple[int, str], text: str) -> str:
        if told == LATE:
            return "late"
        return "error" if told not in BUSY else "caught" if DIED in text else "refused"

    def _cut(self, id: str, error: Exception) -> None:
        self.tally.outcomes[id] = "cut"
        if not self.truth.ending:
            raise WrongError(f"{id}: {type(error).__name__} {error}")

    @asynccontextmanager
    async def _open(
        self, path: str, body: Body, *also: tuple[int, str]
    ) -> AsyncIterator[httpx.Response | None]:
        """A stream; counted as left unless whoever reads it says otherwise."""
        id = self._id()
        request = self.http.build_request("POST", path, json=body, headers={"x-request-id": id})
        try:
            answer = await self.http.send(request, stream=True)
        except httpx.TransportError as error:
            self._cut(id, error)
            yield None
            return
        try:
            if answer.is_success:
                self.tally.outcomes[id] = "left"
                yield answer
            else:
                await answer.aread()
                await self._good(id, answer, BUSY | set(also))
                yield None
        except httpx.TransportError as error:
            self._cut(id, error)
        finally:
            await answer.aclose()

    # ---- deeds

    def _question(self) -> tuple[str, str | None, int]:
        adapter = self.dice.choice([None, *self.truth.letters]) if self.dice.random() < 0.9 else TWO_FACED
        return self.dice.choice(PROMPTS), adapter, self.dice.choice(LENGTHS)

    def _may(self, adapter: str | None) -> list[tuple[int, str]]:
        return [GONE] if adapter in self.truth.shaky else []

    def _judge(self, asked: tuple[str, str | None, int], told: Body | None, text: str) -> None:
        prompt, adapter, length = asked
        if (told["id"] if told else None) != adapter:
            raise WrongError(f"asked {adapter}, answered by {told}")
        right = self.truth.answer(told["digest"] if told else None, prompt, length)
        if text != right:
            raise WrongError(f"{adapter} said {text!r} to {prompt!r}, not {right!r}")
        if adapter in self.truth.letters and text != self.truth.letters[adapter] * length:
            raise WrongError(f"{adapter} said {text!r}: another one's letter")
        self.tally.letters[text[0] if adapter else ""] += 1

    async def ask(self) -> None:
        asked = self._question()
        warm: Body = {"temperature": 1.0, "seed": self.sent} if asked[1] and self.dice.random() < 0.3 else {}
        if answer := await self.send("POST", "/generate", native(*asked, **warm), *self._may(asked[1])):
            self._judge(asked, answer.json()["adapter"], answer.json()["generated_text"])

    async def ask_openai(self) -> None:
        asked = self._question()
        if answer := await self.send("POST", "/v1/completions", openai(*asked), *self._may(asked[1])):
            self._judge(asked, answer.json()["adapter"], answer.json()["choices"][0]["text"])

    async def stream(self) -> None:
        asked = self._question()
        plain = self.dice.random() < 0.5
        path = "/generate_stream" if plain else "/v1/completions"
        body = native(*asked) if plain else openai(*asked, stream=True)
        async with self._open(path, body, *self._may(asked[1])) as answer:
            if answer is None:
                return
            read = (await answer.aread()).decode()
            id = answer.request.headers["x-request-id"]
            self.tally.outcomes[id] = "answered"
            found = events(read)
            if "error" in found[-1]:
                self.tally.outcomes[id] = "late" if code(found[-1]) == LATE[1] else "broken"
                if code(found[-1]) not in CAUGHT:
                    raise WrongError(f"{id}: {found[-1]}")
                return
        text = "".join(event["token"]["text"] if plain else event["choices"][0]["text"] for event in found)
        self._judge(asked, found[-1]["adapter"], text)
        if not plain and not read.endswith("data: [DONE]\n\n"):
            raise WrongError(f"{id}: no [DONE]")

    async def leave(self) -> None:
        """Goes in the middle of a long stream."""
        _, adapter, _ = self._question()
        async with self._open(
            "/generate_stream", native(PROMPTS[0], adapter, 150), *self._may(adapter)
        ) as answer:
            if answer is not None:
                left = self.dice.randint(1, 12)
                async for _ in answer.aiter_lines():
                    left -= 1
                    if not left:
                        break

    async def leave_unanswered(self) -> None:
        """Goes before an answer that is sent whole."""
        id = self._id()
        _, adapter, _ = self._question()
        asked = self.http.post(
            "/generate", json=native(PROMPTS[0], adapter, 150), headers={"x-request-id": id}
        )
        try:
            answer = await asyncio.wait_for(asked, self.dice.uniform(0.005, 0.1))
            await self._good(id, answer, BUSY | {GONE})
        except TimeoutError:
            self.tally.outcomes[id] = "unheard"
        except httpx.TransportError as error:
            self._cut(id, error)

    async def err(self) -> None:
        path, body, status = self.dice.choice(BAD)
        await self._refused(path, body, status)

    async def ask_for_nobody(self) -> None:
        name = self.dice.choice(("typo", "", "M0", "m0 ", f"{self.name}-gone"))
        path, body = self.dice.choice(
            (("/generate", native("Hi", name, 3)), ("/v1/completions", openai("Hi", name or "none", 3)))
        )
        await self._refused(path, body, 404)

    async def _refused(self, path: str, body: Body | str, status: int) -> None:
        id = self._id()
        sent = {"content": body} if isinstance(body, str) else {"json": body}
        try:
            answer = await self.http.post(
                path, headers={"x-request-id": id, "content-type": "application/json"}, **sent
            )
        except httpx.TransportError as error:
            return self._cut(id, error)
        told = (answer.status_code, code(answer.json()) if not answer.is_success else "")
        self.tally.outcomes[id] = self._outcome(told, answer.text)
        if answer.status_code != status and told not in BUSY:
            raise WrongError(f"{id}: {body!r} got {told}, not {status}")
        return None

    async def look(self) -> None:
        await self.send(
            "GET",
            self.dice.choice(
                ("/adapters", "/adapters/m0/summary", "/base", "/v1/models", "/adapters/m1/architecture")
            ),
            None,
        )

    # ---- adapters that come and go

    async def come_and_go(self) -> None:
        """Registers a name of its own, asks it, deletes it, and is told then that it is not there."""
        folder, id = self.dice.choice(self.truth.steady), f"{self.name}-own"
        if not await self.send("PUT", f"/adapters/{id}", {"source": folder}):
            return
        if answer := await self.send("POST", "/generate", native(PROMPTS[0], id, 5)):
            self._judge((PROMPTS[0], id, 5), answer.json()["adapter"], answer.json()["generated_text"])
            if answer.json()["generated_text"] != self.truth.letters[folder] * 5:
                raise WrongError(f"{id} is {folder}, and said {answer.json()['generated_text']!r}")
        while not self.truth.ending and not await self.send("DELETE", f"/adapters/{id}", None):
            pass
        await self._refused("/generate", native("Hi", id, 3), 404)

    async def shake(self) -> None:
        """Deletes one that others ask, and brings it back."""
        id = self.dice.choice(self.truth.shaky)
        await self.send("DELETE", f"/adapters/{id}", None, GONE)
        await self.send("POST", "/adapters", {"id": id, "source": id}, (409, "conflict"))

    async def replace(self) -> None:
        """Puts another content under the one name that says now this, now that."""
        await self.send("PUT", f"/adapters/{TWO_FACED}", {"source": self.dice.choice(self.truth.steady[:6])})
        await self.send("PATCH", f"/adapters/{TWO_FACED}", {"pinned": self.dice.random() < 0.5})

    async def roll_back(self) -> None:
        await self.send("POST", f"/adapters/{TWO_FACED}/rollback", {}, NO_VERSION)

    async def ask_version(self) -> None:
        """Asks for a content that the two-faced one had a moment ago; it is that, or not kept any more."""
        answer = await self.send("GET", f"/adapters/{TWO_FACED}/versions", None)
        if answer is None:
            return
        digest = self.dice.choice(answer.json()["versions"])["digest"]
        asked = (self.dice.choice(PROMPTS), TWO_FACED, self.dice.choice(LENGTHS))
        body = native(asked[0], f"{TWO_FACED}@{digest}", asked[2])
        if answer := await self.send("POST", "/generate", body, OTHER_DIGEST):
            told = answer.json()
            self._judge(asked, told["adapter"], told["generated_text"])
            if told["adapter"]["digest"] != digest:
                raise WrongError(f"asked for {digest}, answered by {told['adapter']}")

    # ---- a name for two

    async def move_alias(self) -> None:
        weights = self.dice.choice(((90, 10), (50, 50), (0, 100)))
        named = zip(self.truth.steady, weights, strict=False)
        targets = [{"id": id, "weight": weight} for id, weight in named]
        await self.send("PUT", f"/aliases/{ALIAS}", {"targets": targets, "sticky": "user"})

    async def ask_alias(self) -> None:
        """The answer is that of the target which it names; before the alias is there nobody answers."""
        prompt, length = self.dice.choice(PROMPTS), self.dice.choice(LENGTHS)
        body = openai(prompt, ALIAS, length, user=self.name)
        if answer := await self.send("POST", "/v1/completions", body, GONE):
            told = answer.json()
            if told["adapter"]["id"] not in self.truth.steady[:2]:
                raise WrongError(f"the alias is answered by {told['adapter']}")
            self._judge((prompt, told["adapter"]["id"], length), told["adapter"], told["choices"][0]["text"])


async def run(url: str, truth: Truth, tally: Tally, stop: asyncio.Event, numbers: range) -> None:
    """The clients of these numbers act until told to stop, and finish what was begun."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=len(numbers))
    async with httpx.AsyncClient(base_url=url, timeout=150, limits=limits, trust_env=False) as http:

        async def live(person: Person) -> None:
            while not stop.is_set():
                await person.act()
                if truth.ending:
                    await asyncio.sleep(0.02)  # soon there is nobody to ask

        await asyncio.gather(*(live(Person(number, http, truth, tally)) for number in numbers))
