"""``ratchet prompt``: exactly what would be sent to a model for the next attempt, without sending it.

Of a run: from its ledger and its own clone. Of a target: as a first run of its newest commit would ask. Nothing is
started, and nothing is left behind. Does not show what a model with tools would look up first: that is its choice.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from agent import config as configuration
from agent import resources, site
from agent.briefing.codemap import tokens
from agent.config import Config
from agent.ledger import State
from agent.llm.endpoint import Endpoint
from agent.llm.messages import Prompts
from agent.llm.proposer import LlmProposer
from agent.read import Briefing, brief
from agent.site import Site


def of_run(folder: Path, state: State) -> tuple[Config, Briefing]:
    """The briefing of the next attempt of the run in ``folder``."""
    facts = state.campaign
    config = Config.model_validate(facts["config"])
    return config, _brief(_site(folder, str(facts["prefix"]), str(facts["start"]), config), state)


def of_target(target: Path | None, preset: str = "", seed: int = 0) -> tuple[Config, Briefing]:
    """The briefing of the first attempt on ``target``; None: the one that comes with ratchet. Raises UserError."""
    place = target or resources.default_target()
    with tempfile.TemporaryDirectory(prefix="ratchet-prompt-") as temporary:
        folder = Path(temporary)
        origin = site.clone(site.locate(place, packaged=target is None), folder, None, "")
        config = site.read_config(folder / "repo.git", origin.start, origin.prefix, preset, len(site.gpus()))
        return config, _brief(_site(folder, origin.prefix, origin.start, config),
                              State(campaign={"seed": seed}, tip=origin.start))


def request(config: Config, briefing: Briefing) -> dict[str, Any]:
    """The body of the request."""
    base, name = configuration.endpoint(config.model)
    endpoint = Endpoint(config.model, configuration.key(config.model), base, name)
    return LlmProposer(endpoint, config.model, resources.prompts()).request(briefing)


def lines(config: Config, briefing: Briefing) -> list[str]:
    """The same for a person: each message under a heading, then what goes beside them."""
    body, prompts = request(config, briefing), Prompts(resources.prompts())
    shown = []
    for message in body["messages"]:
        shown += [f"=== {message['role']}, about {tokens(message['content'])} tokens", message["content"], ""]
    rest = {key: value for key, value in body.items() if key != "messages"}
    shown += [f"=== templates {prompts.identity(briefing)}; beside the messages", json.dumps(rest, indent=1)]
    if config.model.explore and prompts.hides(briefing):
        shown.append(f"=== not everything is shown: a model with tools may look things up first, up to "
                     f"{config.model.explore} times")
    return shown


def _brief(place: Site, state: State) -> Briefing:
    editable, protected = place.texts(state.tip)
    return brief(place.config, state, editable, protected, guidance=place.guidance())


def _site(folder: Path, prefix: str, start: str, config: Config) -> Site:
    return Site(folder, prefix, start, config, None, ("cpu",), 0, 0)
