"""What ticket routing takes from the hub: a pretrained encoder, a ready tokenizer; fetched before any rank starts."""

from __future__ import annotations

from collections.abc import Callable

from dist_train.fetch import Fetched, fetch_model
from dist_train.hub import is_hub_name, is_offline
from dist_train.pretrained import fetched_model
from recipes.ticket_routing.config import Config
from recipes.ticket_routing.earlier import earlier_model

Say = Callable[[str], None]


def pins(config: Config, say: Say) -> dict[str, str]:
    """The commits that this config's hub names stand for now, by the key that pins them."""
    model, tokenizer = fetched_model(config, say), _fetched_tokenizer(config, say)
    found = {"model.revision": model, "data.tokenizer_revision": tokenizer}
    return {key: fetched.revision for key, fetched in found.items() if fetched is not None}


def tokenizer_folder(config: Config, say: Say = print) -> str | None:
    """The folder of the ready tokenizer; None where one is trained. Earlier weights go with their own."""
    earlier = earlier_model(config)
    if earlier is not None:
        return str(earlier.folder)
    fetched = _fetched_tokenizer(config, say) if config.data.tokenizer is not None else fetched_model(config, say)
    return str(fetched.folder) if fetched is not None else config.data.tokenizer or config.model.pretrained


def _fetched_tokenizer(config: Config, say: Say) -> Fetched | None:
    name = config.data.tokenizer
    if name is None or not is_hub_name(name):
        return None
    revision, cache = config.data.tokenizer_revision, config.data.cache_dir
    return fetch_model(name, revision, cache, is_offline(config.data), say, key="data.tokenizer", weights=False)
