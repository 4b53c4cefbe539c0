"""ratchet.toml: every key's errors, presets, and rules that span keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from agent import config
from agent.config import Config, parse
from agent.errors import UserError

LEAST = '[train]\ncommand = "python train.py"\n[evaluate]\npattern = "loss: (.*)"\n'
TARGET = Path(__file__).resolve().parents[1] / "target_repo" / "ratchet.toml"


def refused(text: str, preset: str = "") -> str:
    with pytest.raises(UserError) as caught:
        parse(text, "ratchet.toml", preset)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def tables() -> list[str]:
    return [name for name, field in Config.model_fields.items()
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)]


def keys() -> list[tuple[str, str]]:
    return [(table, key) for table in tables()
            for key in Config.model_fields[table].annotation.model_fields]  # type: ignore[union-attr]


def test_everything_but_the_command_has_a_default() -> None:
    found = parse(LEAST, "x")
    assert found.train.command == "python train.py" and found.budget.amount == 0 and found.judge.looks == [4, 6, 8]
    assert refused("").endswith('Add:  [train]  command = "python train.py"')


@pytest.mark.parametrize(("table", "key"), keys())
def test_a_wrong_value_of_any_key_names_the_key(table: str, key: str) -> None:
    text = LEAST + (f"[{table}]\n" if f"[{table}]" not in LEAST else "")
    text = re.sub(rf"^{key} = .*\n", "", text, flags=re.MULTILINE) if key in ("command", "pattern") else text
    if key == "command" and table != "train":
        text = LEAST
    wrong = "{ wrong = [] }" if key != "environment" else "3"
    told = refused(text.replace(f"[{table}]\n", f"[{table}]\n{key} = {wrong}\n", 1))
    assert f"{table}.{key}" in told and "got " in told


@pytest.mark.parametrize("table", tables())
def test_an_unknown_key_lists_the_known_ones(table: str) -> None:
    text = LEAST + (f"[{table}]\n" if f"[{table}]" not in LEAST else "")
    told = refused(text.replace(f"[{table}]\n", f"[{table}]\nnonsense = 1\n"))
    assert f"unknown key {table}.nonsense." in told
    for known in Config.model_fields[table].annotation.model_fields:  # type: ignore[union-attr]
        assert known in told.split("Known keys here: ")[1]
    assert "Did you mean 'command'?" in refused('[train]\ncommand = "x"\ncomand = "x"\n')
    assert "unknown key tran. Did you mean 'train'?" in refused(LEAST + "[tran]\n")


@pytest.mark.parametrize(("text", "told"), [
    ('[train]\ncommand = ""\n', "train.command is empty"),
    ('[train]\ncommand = "x"\n', "evaluate.pattern is missing"),
    ('[train]\ncommand = "x"\n[evaluate]\ntier = "sealed"\n', "needs train.served, data.prepare and evaluate.command"),
    ('[train]\ncommand = "x"\n[evaluate]\ntier = "protected"\n', "needs evaluate.command"),
    (LEAST + '[budget]\nunit = "charged_steps"\n', "needs a target that the harness serves"),
    (LEAST + '[budget]\nunit = "steps"\namount = 5\n', "Put {steps} into the command"),
    (LEAST + '[budget]\nunit = "seconds"\namount = 5\n', "Put {seconds} into the command"),
    (LEAST.replace("[evaluate]", "served = true\n[evaluate]"), "a served target is budgeted in steps"),
    (LEAST.replace("train.py", "train.py {out}").replace("[evaluate]", "served = true\n[evaluate]")
     + "[budget]\namount = 5\n", "a served target hands its weights to the harness"),
    (LEAST + "[judge\n", "is not valid TOML"),
    (LEAST + '[train.limits]\n', "unknown key train.limits"),
])
def test_rules_that_span_keys(text: str, told: str) -> None:
    assert told in refused(text)


def test_warm_needs_a_served_script_and_names_of_modules() -> None:
    served = ('[train]\ncommand = "{}"\nserved = true\nwarm = ["torch", "numpy.linalg"]\n[budget]\namount = 5\n'
              "[evaluate]\npattern = '(x)'\n")
    assert parse(served.format("python train.py --fast"), "x").train.warm == ["torch", "numpy.linalg"]
    for command in ("python -m train", "sh train.sh", "python /elsewhere/train.py", "train.py"):
        assert "train.warm needs a target that the harness serves and a command" in refused(served.format(command))
    assert "train.warm needs" in refused(served.format("python train.py").replace("served = true\n", ""))
    assert "'a b', which is no module's name" in refused(served.format("python train.py").replace("torch", "a b"))


def test_a_preset_is_laid_over_the_rest() -> None:
    text = LEAST + '[judge]\nfloor = 0.5\nlooks = [2]\n[presets.fast]\njudge = { looks = [3] }\n'
    assert parse(text, "x").judge.looks == [2]
    chosen = parse(text, "x", "fast")
    assert (chosen.judge.looks, chosen.judge.floor, chosen.preset) == ([3], 0.5, "fast")
    assert "has no preset 'slow'. Choose one of: fast." in refused(text, "slow")
    assert "Choose one of: none." in refused(LEAST, "slow")
    assert "unknown key judge.look" in refused(text.replace("looks = [3]", "look = [3]"))  # also when not chosen


def test_every_preset_of_the_default_target_is_valid() -> None:
    text = TARGET.read_text()
    for preset in parse(text, "x").presets:
        found = parse(text, "x", preset)
        assert found.preset == preset and found.evaluate.tier == "sealed"


def test_a_missing_or_unreadable_file_says_how_to_write_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No ratchet.toml in .* Write one there"):
        config.load(tmp_path)
    (tmp_path / "ratchet.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"Cannot read .* It must be a readable UTF-8 file"):
        config.load(tmp_path)


def test_the_environment_fills_in_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1/")
    monkeypatch.setenv("RATCHET_MODEL", "named")
    monkeypatch.setenv("MY_KEY", " secret ")
    model = config.Model(key_variable="MY_KEY")
    assert config.endpoint(model) == ("http://127.0.0.1:1/v1", "named") and config.key(model) == "secret"
    assert config.endpoint(config.Model(base_url="https://x/v1", name="own")) == ("https://x/v1", "own")


LEAST_MODELS = """[train]
command = "python t.py"
[evaluate]
pattern = 'loss: (.*)'
[model]
name = "one"
base_url = "https://one.example/v1"
key_variable = "ONE_KEY"
timeout_seconds = 7
usd_per_million_prompt = 3
"""


def test_further_models_take_what_they_leave_out_but_no_key_to_another_address() -> None:
    found = config.other_models(config.parse(LEAST_MODELS + """
[[models]]
name = "two"
role = "peer"
[[models]]
name = "three"
base_url = "http://localhost:1/v1"
[[models]]
name = "four"
base_url = "http://localhost:2/v1"
key_variable = "FOUR_KEY"
""", "x"))
    assert [(m.name, m.role, m.key_variable, m.timeout_seconds, m.usd_per_million_prompt) for m in found] == [
        ("two", "peer", "ONE_KEY", 7, 0), ("three", "fallback", "", 7, 0), ("four", "fallback", "FOUR_KEY", 7, 0)]
    assert [config.endpoint(m)[0] for m in found] == [
        "https://one.example/v1", "http://localhost:1/v1", "http://localhost:2/v1"]


@pytest.mark.parametrize(("table", "said"), [
    ('role = "peer"', "has no name"), ('name = "x"\nroll = "peer"', r"\[\[models\]\] roll"),
    ('name = "x"\nrole = "boss"', r"\[\[models\]\] role"), ('name = "x"\nattempts = 0', r"\[\[models\]\] attempts"),
])
def test_a_wrong_further_model_is_one_line(table: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        config.parse(f"{LEAST_MODELS}\n[[models]]\n{table}\n", "x")
    assert "\n" not in str(caught.value)
