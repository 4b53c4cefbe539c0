"""`ratchet doctor --model` against servers of known abilities."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent import cli, config, tiny
from agent.doctor.checks import Check
from agent.doctor.model import probe, stated_context
from agent.llm.endpoint import Endpoint
from agent.llm.scripted import Fixed, Say, ScriptedModel, Status

KEY = "sk-test-0123456789abcdef"


class Server:
    """Answers as its abilities say."""

    def __init__(self, schema: bool = True, known: bool = True, tools: bool = True, sees: bool = True,
                 longest: int = 10 ** 9) -> None:
        self.schema, self.known, self.tools, self.sees, self.longest = schema, known, tools, sees, longest

    def __call__(self, body: dict[str, Any]) -> Fixed:
        text = str(body["messages"])
        if "response_format" in body and not self.known:
            return Status(400, {"error": {"message": "unknown field response_format", "param": "response_format"}})
        if len(text) > self.longest:
            return Status(400, {"error": {"message": "maximum context length exceeded"}})
        if "tools" in body:
            call = {"id": "1", "type": "function", "function": {"name": "read_file", "arguments": "{}"}}
            message: dict[str, Any] = {"role": "assistant", "content": None if self.tools else "I cannot."}
            return Status(200, {"choices": [{"message": message | ({"tool_calls": [call]} if self.tools else {})}]})
        word = "plover" if self.sees or "code word" not in text else "heron"
        return Say(json.dumps({"bird": word}) if self.schema and self.known else f"It is the {word}.")


def look(server: Server, **settings: Any) -> dict[str, Check]:
    with ScriptedModel([], then=server) as model:
        settings = {"base_url": model.base_url, "name": "scripted", **settings}
        made = config.Model(**settings)
        return {check.name: check for check in probe(Endpoint(made, KEY, model.base_url, "scripted"), made)}


def test_an_endpoint_that_can_everything() -> None:
    found = look(Server(), usd_per_million_prompt=2.0)
    assert {name for name, check in found.items() if check.state == "ok"} == {
        "model", "schema", "tools", "context", "price", "edits"}
    assert "held to a schema" in found["edits"].text and "8,000 tokens is seen" in found["context"].text


def test_what_an_endpoint_cannot_is_said_with_the_mend() -> None:
    loose = look(Server(schema=False, tools=False, sees=False))
    assert "taken, and not kept to" in loose["schema"].text and "did not call it" in loose["tools"].text
    assert "first line was not seen" in loose["context"].text and "OLLAMA_CONTEXT_LENGTH" in loose["context"].mend
    assert "only the prompt holds" in loose["edits"].text and "not known" in loose["price"].text
    bare = look(Server(known=False, longest=9000))
    assert "neither schemas nor JSON mode" in bare["schema"].text and "the prompt alone" in bare["edits"].text
    assert "refused as too long" in bare["context"].text and bare["model"].state == "ok"


@pytest.mark.parametrize(("item", "said", "mend"), [
    (Status(401, {"error": {"message": f"bad key {KEY}"}}), "key refused (401", "Set a valid key in OPENAI_API_KEY."),
    (Status(404, {"error": {"message": "no such model"}}), "unknown model (404", "Correct model.name"),
    (Status(402, {"error": {"message": "pay"}}), "quota (402", "Top the account up."),
])
def test_one_that_does_not_answer_is_one_line(item: Fixed, said: str, mend: str) -> None:
    with ScriptedModel([], then=item) as model:
        made = config.Model(base_url=model.base_url, name="scripted")
        (check,) = list(probe(Endpoint(made, KEY, model.base_url, "scripted"), made))
    assert check.state == "error" and said in check.text and mend in check.mend and KEY not in check.line()


def test_context_is_read_where_servers_state_it() -> None:
    assert stated_context({"id": "m", "max_model_len": 32768}) == 32768
    assert stated_context({"meta": {"n_ctx_train": 4096}}) == 4096
    assert stated_context({"top_provider": {"context_length": 9}, "context_length": 8}) == 8
    assert stated_context({"context_length": "long"}) == 0


def test_the_command_line_probes_every_model(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "RATCHET_MODEL"):
        monkeypatch.delenv(name, raising=False)
    target = tmp_path / "t"
    tiny.write_tiny_target(target)
    assert cli.edge(["doctor", str(target), "--model"]) == 1
    assert "no model is named" in capfd.readouterr().err
    with ScriptedModel([], then=Server()) as one, ScriptedModel([], then=Status(401)) as two:
        text = (target / "ratchet.toml").read_text()
        (target / "ratchet.toml").write_text(text.replace("[model]", f"""[model]
base_url = "{one.base_url}"
name = "one\"""") + f"""
[[models]]
base_url = "{two.base_url}"
name = "two"
""")
        assert cli.edge(["doctor", str(target), "--model"]) == 1
    out = capfd.readouterr().out
    assert out.count("OK       model") == 1 and "two at http://127.0.0.1" in out and "key refused" in out
