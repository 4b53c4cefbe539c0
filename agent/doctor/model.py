"""``ratchet doctor --model``: what each model's endpoint can do, found by asking, and how it will be asked therefore.

Two small questions, one of some 8,000 tokens, and the endpoint's list of models: does it answer; does it keep to a JSON
schema where the question pulls the other way; does it call a tool; does it still know the first line of a long prompt
(some servers cut what is too long and say nothing); and what did that cost. No source is sent. Does not cover how good
its patches are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent import config
from agent.doctor.checks import Check
from agent.llm.answers import Auth, BadRequest, ContextOverflow, EndpointError, Quota
from agent.llm.endpoint import Endpoint
from agent.llm.quote import shown_url
from agent.proposers import choose, open_endpoint
from agent.records import Cost
from agent.resources import default_target

LIMIT = 60.0
"""Seconds of one question."""
LONG_CHARACTERS = 28_000
"""Of the long prompt: about 8,000 tokens, which any prompt with source in it exceeds."""
_WORDS = ("heron", "plover", "curlew")
_SCHEMA = {"type": "object", "properties": {"bird": {"type": "string", "enum": list(_WORDS)}}, "required": ["bird"],
           "additionalProperties": False}
_CONTEXT_KEYS = ("context_length", "max_model_len", "context_window", "max_context_length", "n_ctx", "n_ctx_train")


def examine(repo: Path | None, preset: str) -> Iterator[Check]:
    """Every check in turn, as it is made. Raises UserError where no model is set up."""
    found = config.load(default_target() if repo is None else repo, preset)
    choose("llm", found.model)
    for model in (found.model, *config.other_models(found)):
        yield from probe(open_endpoint(model), model)


def probe(endpoint: Endpoint, model: config.Model) -> Iterator[Check]:
    """The checks of one endpoint; only the first where it does not answer."""
    name, where = endpoint.name, shown_url(endpoint.base_url)
    clock = endpoint.clock
    try:
        reply = endpoint.complete([{"role": "user", "content": "Which bird has the longest legs? Answer in a sentence "
                                    f"of prose, with one of these: {', '.join(_WORDS)}."}], _SCHEMA, clock() + LIMIT)
    except EndpointError as error:
        yield Check("model", "error", f"{name} at {where} gave no answer: {error.kind} ({error})", _mend(error, model))
        return
    told = f", which calls itself {reply.model}" if reply.model and reply.model != name else ""
    yield Check("model", "ok", f"{name} at {where} answers in {reply.cost.seconds:.1f} s{told}")
    kept = endpoint.format == "json_schema" and _is_bird(reply.text)
    yield _schema_check(endpoint, kept)
    yield _tools(endpoint)
    yield from _context(endpoint)
    yield _price(reply.cost)
    yield Check("edits", "ok", edit_mode(endpoint.format, kept))


def edit_mode(form: str, kept: bool) -> str:
    """How edits will be asked for, in words."""
    if form == "json_schema" and kept:
        return ("JSON edits held to a schema; after two replies in a row that do not apply, the text to find is pinned "
                "to lines that exist")
    if form == "json_schema":
        return "JSON edits, asked for by schema and by the prompt; only the prompt holds the model to them"
    how = "the endpoint's JSON mode" if form == "json_object" else "the prompt alone"
    return f"JSON edits, asked for by {how}; search/replace blocks, diffs and whole files are understood too"


def _is_bird(text: str) -> bool:
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and set(answer) == {"bird"} and answer["bird"] in _WORDS


def _schema_check(endpoint: Endpoint, kept: bool) -> Check:
    if kept:
        return Check("schema", "ok", "JSON schemas are kept to, against the wording of the question")
    if endpoint.format == "json_schema":
        return Check("schema", "warning", "a JSON schema is taken, and not kept to",
                     "Nothing to do: replies are read in any form. A server that enforces schemas helps small models.")
    mode = "JSON mode" if endpoint.format == "json_object" else "neither schemas nor JSON mode"
    return Check("schema", "warning", f"it knows {mode}", "Nothing to do: replies are read in any form.")


_TOOL = [{"type": "function", "function": {
    "name": "read_file", "description": "The text of a file.", "parameters": {
        "type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}}}]


def _tools(endpoint: Endpoint) -> Check:
    try:
        wish = endpoint.look_up([{"role": "user", "content": "Read notes.txt with the tool read_file."}], _TOOL,
                                endpoint.clock() + LIMIT)
    except EndpointError as error:
        return Check("tools", "warning", f"no tool calls: {error.kind} ({error})", "Nothing to do: none are needed.")
    return (Check("tools", "ok", "it calls tools") if any(call.name == "read_file" for call in wish.calls) else
            Check("tools", "warning", "it was offered a tool and did not call it", "Nothing to do: none are needed."))


def _context(endpoint: Endpoint) -> Iterator[Check]:
    """What the endpoint says of its context, and whether it sees the first line of a long prompt."""
    try:
        entries = endpoint.listed(LIMIT)
    except EndpointError:
        entries = []
    said = next((size for entry in entries if entry.get("id") in (endpoint.name, None) or len(entries) == 1
                 if (size := stated_context(entry))), 0)
    stated = f"its endpoint says {said:,} tokens" if said else "its endpoint does not say how long"
    filler = "\n".join(f"line {number}: nothing to see here" for number in range(LONG_CHARACTERS // 32))
    ask = f"The code word is {_WORDS[1]}.\n{filler}\nWhich of {', '.join(_WORDS)} is the code word of the first line?"
    try:
        reply = endpoint.complete([{"role": "user", "content": ask}], _SCHEMA, endpoint.clock() + 2 * LIMIT)
    except ContextOverflow:
        yield Check("context", "warning", f"{stated}; a prompt of some 8,000 tokens is refused as too long",
                    "Start the server with a longer context: a prompt holds your source. Until then it is cut down.")
        return
    except EndpointError as error:
        yield Check("context", "warning", f"{stated}; a prompt of some 8,000 tokens got no answer: {error.kind} "
                    f"({error})", "Raise model.timeout_seconds if it is slow.")
        return
    if _WORDS[1] in reply.text and not any(word in reply.text for word in (_WORDS[0], _WORDS[2])):
        yield Check("context", "ok", f"{stated}; the first line of a prompt of some 8,000 tokens is seen "
                    f"({reply.cost.seconds:.1f} s)")
    else:
        yield Check("context", "warning", f"{stated}; of a prompt of some 8,000 tokens the first line was not seen: "
                    "the server may cut prompts and say nothing", "Start it with a longer context (for Ollama: "
                    "OLLAMA_CONTEXT_LENGTH).")


def stated_context(entry: Mapping[str, Any]) -> int:
    """Tokens of context that an entry of /models gives; 0 where it gives none."""
    for place in (entry, entry.get("meta"), entry.get("top_provider")):
        for key in _CONTEXT_KEYS:
            value = place.get(key) if isinstance(place, Mapping) else None
            if isinstance(value, int) and value > 0:
                return value
    return 0


def _price(cost: Cost) -> Check:
    if cost.usd:
        tokens = cost.prompt_tokens + cost.completion_tokens
        return Check("price", "ok", f"the first question cost ${cost.usd:.6f} ({tokens} tokens)")
    return Check("price", "warning", "its price is not known: its tokens count as $0",
                 "Set model.usd_per_million_prompt and model.usd_per_million_completion, unless the server is yours.")


def _mend(error: EndpointError, model: config.Model) -> str:
    if isinstance(error, Auth):
        return (f"Set a valid key in {model.key_variable}." if model.key_variable else
                "Name its key's variable in key_variable.")
    if isinstance(error, Quota):
        return "Top the account up."
    if isinstance(error, BadRequest) and error.status == 404:
        return "Correct model.name (or RATCHET_MODEL) and model.base_url (or OPENAI_BASE_URL)."
    if error.kind == "tls":
        return "Give an http address if the server speaks no TLS; else install ca-certificates."
    if error.kind == "cut off":
        return "Raise model.max_tokens."
    return "Start it, or correct model.base_url (or OPENAI_BASE_URL)."
