"""Who is known, by the config."""

from __future__ import annotations

from plinth.pipelines.config.settings import Config
from plinth.pipelines.identity.callers import Identity, Keys, OneKey
from plinth.pipelines.identity.key_file import FileKeys


def identity_of(config: Config) -> Identity:
    """Who has a key; false where none is asked for.

    Raises:
        ConfigError: the variable of a key is not set, or the file of keys is wrong.
    """
    keys: list[Keys] = []
    if (key := config.api_key()) is not None:
        keys.append(OneKey(key))
    if config.serve.keys is not None:
        keys.append(FileKeys(config.beside(config.serve.keys)))
    if config.serve.oidc.issuer is None:
        return Identity(keys)
    from plinth.pipelines.identity.tokens import IssuerTokens

    tokens = IssuerTokens(config.serve.oidc)
    tokens.look()
    return Identity(keys, tokens)
