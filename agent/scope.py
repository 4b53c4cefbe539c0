"""The goal-keeper: turns away a patch that changes the question instead of answering it. Pure rules, before any run.

The policy (policy.py) keeps patches to the editable files, and the harness owns budget, seeds and scores where it can.
What is left is code in editable files that sets them itself: small models that were told to keep the number of steps
raised it in four of five of their "improvements". Read from the syntax trees, old against new:

    budget      a number of steps, epochs or seconds is set anew (not where the budget is in seconds)
    seed        a seed is set anew, or a call that seeds comes, goes or changes
    evaluation  how much is evaluated is set anew, or a call that prints the metric changes (not in the sealed tier)
    data        a file of held-out data is named that was not named before

Only plain numbers count (``STEPS = 400``, ``steps *= 2``, ``default=400`` of ``--steps``), not what is computed from
other names, so a new schedule passes. Does not cover: the same in other words. A model's good will is no defence, and
this is none: what a patch gains by it is for the tiers and audits to refuse.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from agent.config import Config
from agent.policy import Changed, check
from agent.records import Candidate, Proposal
from agent.site import Site

BUDGET = frozenset({
    "steps", "max_steps", "num_steps", "n_steps", "total_steps", "train_steps", "training_steps", "max_iters",
    "num_iters", "n_iters", "iterations", "num_iterations", "max_iterations", "epochs", "num_epochs", "max_epochs",
    "n_epochs", "time_budget", "max_seconds", "train_seconds"})
SEED = frozenset({"seed", "random_seed", "rng_seed", "torch_seed", "manual_seed", "base_seed"})
EVALUATION = frozenset({
    "eval_steps", "eval_batches", "eval_iters", "eval_tokens", "eval_rows", "val_steps", "val_batches", "val_iters",
    "val_tokens", "val_rows", "num_eval_batches"})
_SEEDING = frozenset({"seed", "manual_seed", "manual_seed_all", "set_seed", "seed_everything", "default_rng"})
_HELD_OUT = re.compile(r"(?:^|[/_.-])(?:val|valid|validation|test|heldout|held_out|holdout|confirm)[\w.-]*"
                       r"\.(?:bin|npy|npz|txt|json|jsonl|parquet|csv|pt)$", re.IGNORECASE)


def outside(site: Site, proposal: Proposal, candidate: Candidate) -> str:
    """Why ``candidate`` is outside the objective's scope; empty where it is not, or where a person proposed it."""
    if not site.config.source.goal_keeper or proposal.author not in ("llm", "search"):
        return ""
    return drift(check(site.repo, candidate.base, candidate.tree, site.prefix, site.config.source), site.config)


def drift(changed: Sequence[Changed], config: Config) -> str:
    """The first rule that the changed files break, in words; empty where they break none."""
    for file in changed:
        if not file.path.endswith(".py") or file.new is None:
            continue
        old, new = _tree(file.old), _tree(file.new)
        for names, what in ((BUDGET, "how long it trains"), (SEED, "the seed"), (EVALUATION, "what is evaluated")):
            if names is BUDGET and config.budget.unit == "seconds":
                continue
            fresh = Counter(_settings(new, names)) - Counter(_settings(old, names))
            if fresh:
                return f"outside the objective: {file.path} changes {what} ({next(iter(fresh))})"
        if Counter(_calls(old, _SEEDING)) != Counter(_calls(new, _SEEDING)):
            return f"outside the objective: {file.path} changes how random numbers are seeded"
        if config.evaluate.tier != "sealed" and Counter(_prints(old, config)) != Counter(_prints(new, config)):
            return f"outside the objective: {file.path} changes what it prints as {config.metric.name}"
        named = set(_strings(new)) - set(_strings(old))
        held = sorted(text for text in named if _HELD_OUT.search(text))
        if held:
            return f"outside the objective: {file.path} names held-out data ({held[0][:60]})"
    return ""


def _tree(text: str | None) -> ast.AST:
    try:
        return ast.parse(text or "")
    except (SyntaxError, ValueError, RecursionError):  # the base may hold files for another Python
        return ast.Module([], [])


def _settings(tree: ast.AST, names: frozenset[str]) -> Iterator[str]:
    """``NAME = number`` for each place that sets one of ``names`` to a plain number, in one form."""
    for node in ast.walk(tree):
        for target, value in _bindings(node):
            name = _last(target) if isinstance(target, ast.AST) else target
            if name.lower() in names and value is not None and _plain(value, name):
                yield f"{name} {'*=' if isinstance(node, ast.AugAssign) else '='} {ast.unparse(value)}"


def _bindings(node: ast.AST) -> Iterator[tuple[ast.AST | str, ast.expr | None]]:
    """(what is set, to what) by ``node``: assignments, keyword arguments, dict entries, defaults of parameters and of
    command line options."""
    if isinstance(node, ast.Assign):
        yield from ((target, node.value) for target in node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.NamedExpr)):
        yield node.target, node.value
    elif isinstance(node, ast.Dict):
        yield from ((str(key.value), value) for key, value in zip(node.keys, node.values, strict=True)
                    if isinstance(key, ast.Constant))
    elif isinstance(node, ast.arguments):
        given = [*node.posonlyargs, *node.args]
        yield from ((one.arg, value) for one, value in zip(given[len(given) - len(node.defaults):], node.defaults,
                                                           strict=True))
        yield from ((one.arg, value) for one, value in zip(node.kwonlyargs, node.kw_defaults, strict=True))
    elif isinstance(node, ast.Call):
        yield from ((keyword.arg, keyword.value) for keyword in node.keywords if keyword.arg)
        first = node.args[0] if node.args else None
        if _last(node.func) == "add_argument" and isinstance(first, ast.Constant):
            yield from ((str(first.value).lstrip("-").replace("-", "_"), keyword.value) for keyword in node.keywords
                        if keyword.arg == "default")


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _plain(value: ast.expr, own: str) -> bool:
    """Whether an expression is of numbers alone, and of the name itself that it sets."""
    parts = [part for part in ast.walk(value) if not isinstance(part, (ast.operator, ast.unaryop, ast.expr_context))]
    numbers = [part for part in parts if isinstance(part, ast.Constant) and type(part.value) in (int, float)]
    return bool(numbers) and all(isinstance(part, (ast.BinOp, ast.UnaryOp)) or part in numbers or _last(part) == own
                                 for part in parts)


def _calls(tree: ast.AST, names: frozenset[str]) -> Iterator[str]:
    return (ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Call) and _last(node.func) in names)


def _prints(tree: ast.AST, config: Config) -> Iterator[str]:
    """Calls that print or write the metric, by its name or by the words of the pattern that finds it."""
    words = {config.metric.name, *re.findall(r"[A-Za-z]\w{2,}", re.sub(r"\\\w|\[[^]]*\]|\([^)]*\)", " ",
                                                                     config.evaluate.pattern))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last(node.func) in ("print", "write", "info") and any(
                word in text for text in _strings(node) for word in words):
            yield ast.dump(node)


def _strings(tree: ast.AST) -> Iterator[str]:
    return (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
