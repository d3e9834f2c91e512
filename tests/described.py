"""Holds an answer of the service against what /openapi.json says of it."""

import functools
import json
import re

import jsonschema_rs

import kirosync

LARGE = 1 << 20  # bytes of a body; each test with one has the same in small


@functools.cache
def operations():
    """The operations as (method, pattern of the path, what is said of it), in the order in which they are found."""
    document = json.loads(kirosync.openapi())
    return [
        (route.method, re.compile(re.escape(path).replace(r"\{id\}", ".+")), document["paths"][path][method])
        for route in kirosync.ROUTES
        for path in kirosync.paths_of(route)
        for method in (route.method.lower(),)
    ]


@functools.cache
def components():
    return json.loads(kirosync.openapi())["components"]


@functools.cache
def validator(schema):
    return jsonschema_rs.validator_for({**json.loads(schema), "components": components()})


def resolved(said):
    return components()["responses"][said["$ref"].rpartition("/")[2]] if "$ref" in said else said


def hold(method, path, status, headers, body):
    """Fail unless *status*, *headers* and *body* are what the description has for *method* and *path*."""
    said = next((said for verb, pattern, said in operations() if verb == method and pattern.fullmatch(path)), None)
    if said is None:  # nothing that is described: a HEAD, or what is refused as unknown
        return
    where = f"{method} {path}: {status}"
    assert str(status) in said["responses"], f"{where} is not described"
    response = resolved(said["responses"][str(status)])
    wanted = {name for name, header in response["headers"].items() if header.get("required", "$ref" in header)}
    assert {name.lower() for name in wanted} <= {name.lower() for name in headers}, f"{where}: {wanted} are to be there"
    if "content" not in response:
        assert not body, f"{where} is to have no body"
        return
    media = headers["Content-Type"].partition(";")[0]
    assert media in response["content"], f"{where}: {media} is not described"
    if media == "application/json" and len(body) < LARGE:
        wrong = next(validator(json.dumps(response["content"][media]["schema"])).iter_errors(json.loads(body)), None)
        assert wrong is None, f"{where}: {wrong}"
