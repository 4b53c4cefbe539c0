"""ratchet.toml: how to train a target, what may be edited, and what the number is. Environment is read here alone.

A config comes from ``ratchet.toml`` in the target's folder. Everything has a default except ``train.command``.
``[presets.NAME]`` holds tables of the same shape that are laid over the rest when that preset is chosen.
"""

from __future__ import annotations

import difflib
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from agent.errors import UserError
from sandbox.job import Tier

FILE = "ratchet.toml"
LEAST = """[train]  command = "python train.py"  [evaluate]  pattern = 'loss: ([-+.\\w]+)'"""
"""The smallest config that can run."""
News = Literal["merge", "trouble", "approval", "end"]
EngineKind = Literal["local", "ray", "slurm"]
PLACEHOLDERS = ("seed", "steps", "seconds", "preset", "device", "gpus", "out")
"""What ``train.command`` may hold in braces."""


class Section(BaseModel):
    """A table of the file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Train(Section):
    """How to start one training run."""

    command: str = Field(description='command line, e.g. "python train.py --seed {seed} --steps {steps} --out {out}"; '
                         "{seed}, {steps}, {seconds}, {preset}, {device}, {gpus} and {out} are filled in")
    served: bool = Field(False, description="the harness serves the batches and takes the weights over HARNESS_FD")
    rows: int = Field(8, ge=1, description="rows of one served batch")
    sequence: int = Field(128, ge=8, description="tokens of one served row")
    threads: int = Field(1, ge=1, description="CPU threads of one run")
    gpus_per_run: int = Field(1, ge=1, le=64, description="GPUs of one run, for a command that uses several, e.g. "
                              "torchrun --nproc-per-node {gpus}; local engine only")
    jobs_per_gpu: int = Field(1, ge=1, le=64, description="runs side by side on one GPU, for small ones that leave it "
                              "idle and fit in its memory together")
    environment: dict[str, str] = Field(default_factory=dict, description="environment of the run; never a secret")
    data: list[str] = Field(default_factory=list, description="folders that the run may read besides its source")
    warm: list[str] = Field(default_factory=list, description="modules that boxes import before their job is known, so "
                            "that it starts sooner; installed ones, never a file of the target; empty: no warm start")

    @field_validator("warm")
    @classmethod
    def _modules(cls, value: list[str]) -> list[str]:
        for name in value:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ValueError(f"has {name!r}, which is no module's name")
        return value

    @field_validator("command")
    @classmethod
    def _parses(cls, value: str) -> str:
        if not shlex.split(value):
            raise ValueError("is empty")
        return value


class Data(Section):
    """How the training and held-out tokens are made, once per machine, outside the box, from the base commit."""

    prepare: str = Field("", description="command with {out} and {preset}; writes train.bin, val.bin, ... to {out}")


class Evaluate(Section):
    """Where the number comes from."""

    tier: Tier = Field("reported", description="sealed, protected or reported")
    command: str = Field("", description="sealed: starts the model server; protected: prints the metric of what the "
                         "training run left in {out}")
    pattern: str = Field("", description="regular expression with one group that finds the metric in the output")
    rows: int = Field(256, ge=1, description="rows of each split that are scored")
    audit: int = Field(128, ge=0, description="rows of each split that an audit asks a prefix of, against non-causal "
                       "models; 0: no audits")
    seconds: float = Field(300.0, gt=0, description="wall limit of one evaluation")


class Source(Section):
    """Which files a patch may touch. Patterns are globs relative to the target; protected wins over editable."""

    editable: list[str] = Field(default_factory=lambda: ["**/*.py"], description="globs a patch may change")
    protected: list[str] = Field(default_factory=list, description="globs a patch may not change")
    max_patch_lines: int = Field(800, ge=1, description="added plus removed lines")
    max_patch_kb: int = Field(64, ge=1, description="size of the diff in KiB")
    goal_keeper: bool = Field(True, description="turn away proposals that change budget, seeds, evaluation or data "
                              "(agent/scope.py)")


class Metric(Section):
    """The number to improve."""

    name: str = Field("val_bpb", description="its name in reports")
    direction: Literal["min", "max"] = Field("min", description="min or max")


class Budget(Section):
    """What one training run may spend."""

    unit: Literal["charged_steps", "steps", "seconds"] = Field(
        "steps", description="charged_steps, steps or seconds")
    amount: float = Field(0, ge=0, description="steps or seconds; 0: the command decides")
    dead_band: float = Field(0.1, ge=0, description="relative change of step time that is not charged")
    probe_steps: int = Field(12, ge=0, description="steps of the tiny run before a full one; 0: none")


class Seeds(Section):
    """Seeds are the harness's, never the patch's."""

    first: int = Field(1, ge=0, description="first seed of the paired runs")


class Judge(Section):
    """When a candidate is merged."""

    alpha: float = Field(0.10, gt=0, lt=1, description="false discovery rate of a campaign's merges")
    policy: Literal["auto", "single", "bundles"] = Field(
        "auto", description="certify each candidate alone, or in bundles; auto: bundles where proposals do not end and "
        "there is room for 100 runs")
    gear: Literal["auto", "paired", "weighing"] = Field(
        "auto", description="of bundles: screen on the incumbent's seeds, or weigh in designs; auto: by what the first "
        "candidates show")
    looks: list[int] = Field(default_factory=lambda: [4, 6, 8],
                             description="numbers of fresh pairs at which to decide")
    floor: float = Field(0.002, ge=0, description="smallest believable sd of one paired effect")
    min_effect: float = Field(0.0, ge=0, description="improvement that the interval's end must exceed")
    early_stop: float = Field(0.0, ge=0, lt=1, description="share of a screening run after which it is stopped when "
                              "its training loss is not ahead of the incumbent's; 0: never")
    final_pairs: int = Field(3, ge=2, description="fresh seeds for the final number")
    approve: bool = Field(False, description="merges wait for a person: ratchet approve ID, or ratchet veto ID")
    audit_margin: float | None = Field(None, ge=0, description="what the closing audit may lose by a removal, and at "
                                       "most half of what the merge was certified to gain; left out: the floor")


Finite = Annotated[float, Field(allow_inf_nan=False)]


class Caps(Section):
    """What a whole campaign may spend; 0: no cap. Each holds back what the final number needs (agent/spending.py)."""

    hours: Finite = Field(0, ge=0, description="wall hours that it works; see also --until")
    gpu_hours: Finite = Field(0, ge=0, description="hours that jobs hold a slot: GPU-hours on GPUs, CPU-slot-hours "
                             "elsewhere")
    usd: Finite = Field(0, ge=0, description="dollars, for the model and at usd_per_gpu_hour for slots")
    tokens: int = Field(0, ge=0, description="tokens of the model, both ways")
    experiments: int = Field(0, ge=0, description="training runs of full length; --budget-runs wins")
    disk_gb: Finite = Field(0, ge=0, description="gigabytes (1e9) of the run's folder")
    usd_per_gpu_hour: Finite = Field(0, ge=0, description="price of an hour that a job holds a slot")
    audit_pairs: int = Field(0, ge=0, description="pairs a merge of a closing audit afterwards, for which as much is "
                             "left of the caps; 0: nothing")


class Guards(Section):
    """What a merge may cost beside the loss, as a multiple of the campaign's start (agent/guards.py); 0: no cap."""

    parameters: float = Field(0, ge=0, description="most parameters, e.g. 1.05; 0: no cap")
    weights: float = Field(0, ge=0, description="most bytes of weights; 0: no cap")
    memory: float = Field(0, ge=0, description="most peak memory of a training run; 0: no cap")
    inference: float = Field(0, ge=0, description="most charged seconds of the model's answers; 0: no cap")
    evaluation: float = Field(0, ge=0, description="most charged seconds of the whole evaluation; 0: no cap")

    @field_validator("*")
    @classmethod
    def _leaves_the_start(cls, value: float) -> float:
        if 0 < value < 1:
            raise ValueError("is below 1, the start itself: every patch would have to shrink first")
        return value


class Hooks(Section):
    """What is told elsewhere while a campaign runs; see docs/service.md."""

    run: str = Field("", description="command line of yours, run outside any box; one JSON object on its standard "
                         "input")
    url: str = Field("", description="the same object is posted here")
    url_variable: str = Field("", description="environment variable that holds the URL, where it is a secret")
    on: list[News] = Field(default_factory=lambda: list(get_args(News)), description="what is told")
    seconds: float = Field(10, gt=0, description="deadline of one hook")


class LimitsTable(Section):
    """Hard limits on one run; see sandbox.job.Limits."""

    wall_seconds: float = Field(600, gt=0)
    memory_mb: int = Field(8192, gt=0)
    processes: int = Field(512, gt=0)
    log_mb: int = Field(4, gt=0)
    scratch_mb: int = Field(2048, gt=0)
    weights_mb: int = Field(2048, gt=0)


class Engine(Section):
    """Which machines run the jobs; see docs/engines.md."""

    kind: EngineKind = Field("local", description="local, ray or slurm, when --engine is not given")
    slots: int = Field(0, ge=0, description="jobs side by side on ray or slurm when --slots is not given; 0: ray takes "
                       "what is free, slurm 4")
    address: str = Field("", description="ray: address of the cluster; empty: RAY_ADDRESS, else a running one of this "
                         "machine, else a new one")
    scratch: str = Field("", description="ray: folder on the nodes for jobs and data; empty: their temporary folder")
    partition: str = Field("", description="slurm: --partition")
    account: str = Field("", description="slurm: --account")
    time: str = Field("", description="slurm: --time; empty: the job's own limits and some minutes")
    gres: str = Field("", description='slurm: --gres of a GPU job, e.g. "gpu:h100:1"; empty: jobs use CPUs')
    extra: list[str] = Field(default_factory=list, description="slurm: more arguments of sbatch")
    python: str = Field("", description="slurm: interpreter on the nodes; empty: the path of this one")


class Model(Section):
    """The model that proposes. The key itself is never in this file."""

    base_url: str = Field("", description="OpenAI-compatible endpoint; empty: OPENAI_BASE_URL, else api.openai.com")
    name: str = Field("", description="model name; empty: RATCHET_MODEL")
    key_variable: str = Field("OPENAI_API_KEY", description="environment variable that holds the key")
    temperature: float | None = Field(None, ge=0, le=2)
    max_tokens: int = Field(8192, ge=256)
    timeout_seconds: float = Field(180, gt=0, description="one call")
    deadline_seconds: float = Field(900, gt=0, description="one proposal, its tries, waits and repair rounds included")
    stream: bool = Field(False, description="ask for the reply as a stream of pieces")
    attempts: int = Field(4, ge=1, description="calls per proposal before it is given up")
    repairs: int = Field(2, ge=0, description="repair rounds that show the model its error")
    search: bool = Field(True, description="an optimiser of numeric constants takes turns with the model, where "
                         "--proposer does not say otherwise")
    parallel: int = Field(4, ge=1, le=64, description="questions to the model at a time, at most")
    briefing_tokens: int = Field(60_000, ge=4000, description="tokens of a briefing at most, at three bytes each")
    explore: int = Field(6, ge=0, le=40, description="look-ups in source and past attempts before a proposal, where "
                         "the briefing cannot show all and the endpoint has tools; 0: none")
    guidance: str = Field("ratchet.md", description="file of the target with your words to the model, read from the "
                          "commit that the run starts from; empty: none")
    usd_per_million_prompt: float = Field(0, ge=0)
    usd_per_million_completion: float = Field(0, ge=0)
    outage_hours: float = Field(8, ge=0, description="how long a night waits for a model when nothing else has a "
                                "proposal left")


class OtherModel(Model):
    """A further model; what it leaves out is taken from [model] (see ``other_models``)."""

    role: Literal["fallback", "peer", "review"] = Field(
        "fallback", description="asked while the others cannot be, asked in turn with [model], or asked to review")


class Config(Section):
    """The whole file."""

    train: Train
    name: str = Field("", description="name of the target in reports; empty: its folder's name")
    preset: str = Field("", description="preset when none is asked for; empty: cpu or h100 by what the machine has")
    data: Data = Data()
    evaluate: Evaluate = Evaluate()
    source: Source = Source()
    metric: Metric = Metric()
    budget: Budget = Budget()
    seeds: Seeds = Seeds()
    judge: Judge = Judge()
    guards: Guards = Guards()
    caps: Caps = Caps()
    hooks: Hooks = Hooks()
    limits: LimitsTable = LimitsTable()
    engine: Engine = Engine()
    model: Model = Model()
    models: list[dict[str, Any]] = Field(default_factory=list, description="further models: tables with the keys of "
                                         "[model], and role")
    presets: dict[str, dict[str, Any]] = Field(default_factory=dict)


def parse(text: str, where: str, preset: str = "") -> Config:
    """Config from the text of a ratchet.toml, with ``preset`` laid over it. Raises UserError with the mend."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{where} is not valid TOML: {error}.", "Correct that line.") from error
    presets = raw.get("presets", {})
    preset = preset or str(raw.get("preset", ""))
    if preset:
        if not isinstance(presets, dict) or preset not in presets:
            known = ", ".join(sorted(presets)) if isinstance(presets, dict) and presets else "none"
            raise UserError(f"{where} has no preset {preset!r}.", f"Choose one of: {known}.")
        raw = _overlay(raw, presets[preset]) | {"preset": preset}
    train = raw.get("train", {})
    if isinstance(train, dict) and "command" not in train and set(train) <= set(Train.model_fields):
        # a misspelt key is named as such below
        raise UserError(f"{where} does not say how to train.", 'Add:  [train]  command = "python train.py"')
    try:
        config = Config.model_validate(raw)
        _check_models(config, where)
        for name, table in config.presets.items():
            if name != preset:
                Config.model_validate(_overlay(raw, table))
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from error
    _check(config, where)
    return config


def load(folder: Path, preset: str = "") -> Config:
    """Config of the target in ``folder``. Raises UserError when the file is missing or wrong."""
    path = folder / FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"No {FILE} in {folder}.", f"Write one there; the least is:  {LEAST}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.", "It must be a readable UTF-8 file.") from error
    return parse(text, str(path), preset)


def key(model: Model) -> str:
    """The API key from the environment, or an empty string."""
    return os.environ.get(model.key_variable, "").strip()


def hook_url(hooks: Hooks) -> str:
    """Where hooks post to, or an empty string."""
    return os.environ.get(hooks.url_variable, "").strip() if hooks.url_variable else hooks.url


def endpoint(model: Model) -> tuple[str, str]:
    """(base URL, model name) with the environment's defaults filled in."""
    base = model.base_url or os.environ.get("OPENAI_BASE_URL", "") or "https://api.openai.com/v1"
    return base.rstrip("/"), model.name or os.environ.get("RATCHET_MODEL", "")


def other_models(config: Config) -> tuple[OtherModel, ...]:
    """The models of ``[[models]]``. What one leaves out is that of [model]; but one with an address of its own takes
    neither key nor prices from there, so that no key is sent to another's endpoint. Raises ValidationError."""
    own = {"role": "fallback", "name": "", "usd_per_million_prompt": 0, "usd_per_million_completion": 0}
    shared = config.model.model_dump()
    apart = {"key_variable": "", **own}
    return tuple(OtherModel.model_validate(shared | (apart if "base_url" in entry else own) | entry)
                 for entry in config.models)


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the tables of ``top`` laid over it, key by key."""
    merged = dict(base)
    for name, value in top.items():
        old = merged.get(name)
        merged[name] = _overlay(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _check_models(config: Config, where: str) -> None:
    """Raises UserError for an entry of [[models]] that is no model."""
    try:
        for other in other_models(config):
            if not other.name:
                raise UserError(f"{where}: an entry of [[models]] has no name.", 'Add  name = "..."')
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: [[models]] {key}: {first['msg']}.",
                        f"Known keys: {', '.join(sorted(OtherModel.model_fields))}.") from error


def _check(config: Config, where: str) -> None:
    """Rules that span two keys."""
    evaluate = config.evaluate
    if evaluate.tier == "sealed" and not (config.train.served and config.data.prepare and evaluate.command):
        raise UserError(f"{where}: evaluate.tier = \"sealed\" needs train.served, data.prepare and evaluate.command.",
                        'Add them, or use tier = "protected" or "reported".')
    if evaluate.tier == "protected" and not evaluate.command:
        raise UserError(f"{where}: evaluate.tier = \"protected\" needs evaluate.command.",
                        "Give the command that prints the metric.")
    if evaluate.tier != "sealed" and not evaluate.pattern:
        raise UserError(f"{where}: evaluate.pattern is missing: nothing says where the metric is printed.",
                        "Add e.g.  [evaluate]  pattern = 'val_loss: ([-+.\\w]+)'")
    try:
        groups = re.compile(evaluate.pattern).groups
    except re.error as error:
        raise UserError(f"{where}: evaluate.pattern is no regular expression: {error}.", "Correct it.") from error
    if evaluate.pattern and groups != 1:
        raise UserError(f"{where}: evaluate.pattern has {groups} groups; it needs one, around the number.",
                        "Write e.g.  pattern = 'val_loss: ([-+.\\w]+)'")
    unknown = [name for name in re.findall(r"\{(\w+)\}", config.train.command) if name not in PLACEHOLDERS]
    if unknown:
        raise UserError(f"{where}: train.command has an unknown placeholder {{{unknown[0]}}}.",
                        f"Known: {', '.join('{' + name + '}' for name in PLACEHOLDERS)}.")
    if config.budget.unit == "charged_steps" and not config.train.served:
        raise UserError(f"{where}: budget.unit = \"charged_steps\" needs a target that the harness serves.",
                        'Set train.served = true (see target_repo/README.md), or use unit = "steps" or "seconds".')
    if config.train.served and (config.budget.unit == "seconds" or config.budget.amount < 1):
        raise UserError(f"{where}: a served target is budgeted in steps.",
                        'Set  [budget]  unit = "charged_steps"  amount = 200')
    if config.train.gpus_per_run > 1 and config.train.jobs_per_gpu > 1:
        raise UserError(f"{where}: train.gpus_per_run and train.jobs_per_gpu exclude each other.",
                        "Leave one of them at 1.")
    if config.train.warm and not (config.train.served and re.match(r"python3? [^-/]\S*\.py\b", config.train.command)):
        raise UserError(f"{where}: train.warm needs a target that the harness serves and a command  python SCRIPT.py.",
                        "Set warm = [].")
    if config.train.served and "{out}" in config.train.command:
        raise UserError(f"{where}: train.command takes {{out}}, but a served target hands its weights to the harness.",
                        "Drop {out}, or set train.served = false.")
    placeholder = {"steps": "{steps}", "seconds": "{seconds}"}.get(config.budget.unit, "")
    if not config.train.served and config.budget.amount and placeholder not in config.train.command:
        raise UserError(f"{where}: budget.amount is set, but train.command does not take it.",
                        f"Put {placeholder} into the command, or set amount = 0 if the command decides.")


def _explain(error: ValidationError) -> str:
    """The first problem in one line: which key, what is wrong, which keys exist."""
    first = next((found for found in error.errors() if found["type"] == "extra_forbidden"), error.errors()[0])
    path = [str(part) for part in first["loc"]]
    name = ".".join(path)
    if first["type"] == "extra_forbidden":
        keys = _keys(path[:-1])
        near = difflib.get_close_matches(path[-1], keys, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"unknown key {name}.{hint} Known keys here: {', '.join(keys)}."
    field = _field(path)
    wanted = f" It should be: {field}." if field else ""
    return f"{name} {first['msg'].removeprefix('Value error, ')} (got {first['input']!r}).{wanted}"


def _section(path: list[str]) -> type[BaseModel]:
    kind: type[BaseModel] = Config
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            break
        kind = annotation
    return kind


def _keys(path: list[str]) -> list[str]:
    return sorted(_section(path).model_fields)


def _field(path: list[str]) -> str:
    kind = _section(path[:-1])
    return (kind.model_fields[path[-1]].description or "") if path[-1] in kind.model_fields else ""
