"""Queries of the registry: the versions of a model, one of them by its URI, and the newest good one."""

import re

from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import ExternalError, InputError
from pipeline.redact import redact
from pipeline.track.registry.version_tags import GOOD
from pipeline.track.tracking_server import Unreachable, reaching

_MOST_NAMED = 20
"""Models that an error names."""


def list_versions(client: MlflowClient, name: str | None = None, **tags: str) -> list[ModelVersion]:
    """Returns the versions of a registered model, or of all, that have these tags, by name and number.

    They come with their aliases. The list is empty for a model that does not exist.
    """
    terms = [f"tags.`{key}` = {quoted(value)}" for key, value in tags.items()]
    if name:
        terms.insert(0, f"name = {quoted(name)}")
    query = " and ".join(terms) or None
    found = []
    aliases = {}
    token: str | None = None
    with reaching(f"models:/{name}" if name else "registered models"):
        while True:
            page = client.search_model_versions(query, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        # A search returns versions without their aliases; the model has them.
        for model in {version.name for version in found}:
            aliases[model] = client.get_registered_model(model).aliases
    for version in found:
        # Aliases may come with numbers or texts, depending on the backend.
        number = str(version.version)
        version.aliases = [alias for alias, target in aliases[version.name].items() if str(target) == number]
    # Numbers may be texts, which would sort 10 before 9.
    return sorted(found, key=lambda version: (version.name, int(version.version)))


def find_version(client: MlflowClient, uri: str) -> ModelVersion:
    """Returns the version of models:/NAME/VERSION or models:/NAME@ALIAS. Raises InputError where there is none."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(.*)|@(.*))?", uri)
    if not match:
        raise InputError(f"{uri}: a registered model is models:/NAME/VERSION or models:/NAME@ALIAS")
    name, number, alias = match.groups()
    if not alias and not (number and number.isdigit()):
        raise InputError(f"{uri}: names no version: give models:/NAME/VERSION or models:/NAME@ALIAS")
    try:
        if alias:
            number = str(client.get_model_version_by_alias(name, alias).version)
        return client.get_model_version(name, number)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            message = " ".join(error.message.split())
            raise Unreachable(f"{uri}: {redact(message)}") from error
        raise InputError(f"{uri}: {error.message}{_describe_existing(client, name)}") from error


def newest_good(client: MlflowClient, name: str) -> str | None:
    """Returns the number of a model's newest good version."""
    query = f"name = {quoted(name)} and tags.{GOOD} = 'true'"
    found = client.search_model_versions(query, max_results=1, order_by=["version_number DESC"])
    return str(found[0].version) if found else None


def quoted(text: str) -> str:
    """Quotes a text for a filter of MLflow's search, which has no escapes."""
    mark = '"' if "'" in text else "'"
    if mark in text:
        raise InputError(f"{text}: a name with both kinds of quotation marks cannot be searched for; choose another")
    return f"{mark}{text}{mark}"


def _describe_existing(client: MlflowClient, name: str) -> str:
    """Returns what exists instead; nothing where the server, rather than the name, is at fault."""
    try:
        models = client.search_registered_models(max_results=_MOST_NAMED)
        existing = "registered models: " + (", ".join(model.name for model in models) or "none")
        found = list_versions(client, name)
    except (MlflowException, ExternalError):
        return ""
    if found:
        names = [str(version.version) for version in found[-10:]]
        for version in found:
            names += [f"@{alias}" for alias in version.aliases]
        existing += f"; of {name}: {', '.join(names)}"
    return f" ({existing})"
