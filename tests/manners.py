"""How schemathesis is to behave (its hooks): from addresses of its own, and without waiting."""

import contextlib
import itertools

import schemathesis

import kirosync

HELD_S = 0.02  # that an answer may be held
FEW = 18  # characters that fit into the name of a file, whatever they are: see NAME_BYTES
addresses = itertools.count(1)


@schemathesis.hook
def before_call(context, case, kwargs):
    """What one address may ask without a token is limited, which other tests look into; here everyone has their own."""
    number = next(addresses)
    case.headers["X-Forwarded-For"] = f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"
    with contextlib.suppress(KeyError, TypeError, ValueError):
        case.query["wait"] = min(float(case.query["wait"]), HELD_S)


@schemathesis.hook
def filter_path_parameters(context, path_parameters):
    return is_short((path_parameters or {}).get("id"))


@schemathesis.hook
def filter_query(context, query):
    return is_short((query or {}).get("agent"))


@schemathesis.hook
def filter_body(context, body):
    records = [body.get(kind) for kind in kirosync.KINDS] if isinstance(body, dict) else []
    return all(is_short(identity) for each in records if isinstance(each, dict) for identity in each)


@schemathesis.hook
def map_body(context, body):
    """Write numbers as JavaScript does: 5.0 is 5. To a schema both are integers, to the service only this is."""
    if isinstance(body, dict):
        return {name: map_body(context, value) for name, value in body.items()}
    if isinstance(body, list):
        return [map_body(context, value) for value in body]
    return int(body) if isinstance(body, float) and body.is_integer() and abs(body) < 2**53 else body


def is_short(identity):
    """Whether *identity* is one that the schema describes: how long the name of its file is, no schema can say."""
    return not isinstance(identity, str) or len(identity) <= FEW or bool(kirosync.PLAIN.fullmatch(identity))
