"""What a model's tokens cost: the config's own prices, else the maintained table of the package genai-prices (one row
a provider and model, with the provider's page as its source; its release is its date), else unknown, and said so.

An endpoint on this machine or in a private network costs nothing, whatever its model is called. Prices are those of
plain input and output tokens: a discount for cached ones is not counted, so that a cap errs to the safe side; what a
server itself reports as cost goes before all this (agent/llm/answers.py).
"""

from __future__ import annotations

import functools
import ipaddress
from dataclasses import dataclass
from importlib import metadata
from urllib.parse import urlsplit

from agent.config import Model
from agent.errors import UserError

TABLE = "genai-prices"


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million tokens of the question and of the answer. ``known`` False: counted as 0."""

    prompt: float
    completion: float
    source: str
    known: bool = True

    def usd(self, prompt: int, completion: int) -> float:
        """Dollars of these tokens."""
        return (prompt * self.prompt + completion * self.completion) / 1e6


def find(model: Model, name: str, base_url: str) -> Price:
    """The price of the model ``name`` behind ``base_url``."""
    return _find(model.usd_per_million_prompt, model.usd_per_million_completion, name, base_url)


def line(price: Price, name: str) -> str:
    """The price in one line for a person."""
    if not price.known:
        return (f"the price of {name} is not known: its tokens count as $0 (set model.usd_per_million_prompt and "
                "model.usd_per_million_completion)")
    return f"{name} costs ${price.prompt:g} + ${price.completion:g} per million tokens ({price.source})"


def check_cap(price: Price, name: str, usd: float) -> None:
    """Raises UserError where a cap in dollars is set and cannot hold, because the price is not known."""
    if usd and not price.known:
        raise UserError(f"caps.usd is set, but the price of {name} is not known.",
                        "Set model.usd_per_million_prompt and model.usd_per_million_completion, or drop the cap.")


@functools.cache
def _find(prompt: float, completion: float, name: str, base_url: str) -> Price:
    if prompt or completion:
        return Price(prompt, completion, "ratchet.toml")
    if _private(urlsplit(base_url).hostname or ""):
        return Price(0.0, 0.0, "an endpoint of your own")
    from genai_prices import Usage, calc_price  # the table is large: read only when it is needed
    release = f"{TABLE} {metadata.version(TABLE)}"
    for where in (base_url, None):
        try:
            asked = calc_price(Usage(input_tokens=1000), model_ref=name, provider_api_url=where)
            answered = calc_price(Usage(output_tokens=1000), model_ref=name, provider_api_url=where)
        except LookupError:
            continue
        pages = asked.provider.pricing_urls or []
        whose = "" if where else f", taken to be that of {asked.provider.name}"
        # of a thousand tokens, since a long prompt may fall into a dearer class
        return Price(float(asked.total_price) * 1000, float(answered.total_price) * 1000,
                     ", ".join([release, *pages[:1]]) + whose)
    return Price(0.0, 0.0, f"not in {release}", known=False)


def _private(host: str) -> bool:
    """Whether a host is this machine, or an address of a private network."""
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        return True
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return False
