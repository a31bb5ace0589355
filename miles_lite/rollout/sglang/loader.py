"""Weights into a live SGLang model. Runs inside each scheduler process of a server.

SGLang calls `receive` (its `custom_weight_loader`) for one `/update_weights_from_tensor`; the call
lasts for the whole sync. The payload says where this rank's actor listens, and buckets come from
there: what arrives is exactly what the rank hosts, and both sides' checksums are compared.

Whatever goes wrong is told to the actor and never raised: an exception here ends the whole server.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from miles_lite.rollout.sglang.wire import Address, Message, read_route
from miles_lite.weights.plan import Copy
from miles_lite.weights.transport import Inbox, WeightSyncError

JSON = dict[str, Any]


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Take one sync. named_tensors: a single entry, whose name is the Address of the actor."""
    address = Address.parse(named_tensors[0][0])
    with Client(address.path, "AF_UNIX", address.key) as connection, torch.no_grad():
        serve(connection, model)


def serve(connection: Connection, model: Any) -> None:
    """Answer the actor's messages until it says goodbye or is gone."""
    inbox: Inbox | None = None
    while True:
        try:
            message = Message.parse(connection.recv_bytes())
        except (EOFError, OSError):  # the actor died; its driver knows
            return
        answer: JSON = {}
        try:
            if message.verb == "start":
                inbox = _start(message.body, model)
            elif message.verb == "load":
                assert inbox is not None, "start comes first"
                inbox.load(message.body["source"], message.body["number"], message.bucket())
            elif message.verb == "finish":
                assert inbox is not None, "start comes first"
                answer = {"checksums": {str(k): v for k, v in inbox.finish().items()}}
            else:
                assert message.verb == "goodbye", message.verb
        except Exception as error:
            told = isinstance(error, WeightSyncError | ValueError)
            answer = {"error": str(error) if told else traceback.format_exc(limit=-3)}
        connection.send_bytes(json.dumps(answer).encode())
        if message.verb == "goodbye":
            return


def _start(body: JSON, model: Any) -> Inbox:
    """Hold what the sync expects against the live model before anything is written."""
    tensors = dict(model.named_parameters())
    expected = {name: tuple(shape) for name, shape in body["shapes"].items()}
    live = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name in expected}
    for name, shape in expected.items():
        if live.get(name) != shape:
            raise WeightSyncError(
                f"{body['name']}: SGLang has {name!r} in shape {live.get(name, 'none at all')}, "
                f"the sync expects {shape}: this version or these options of SGLang keep weights "
                "in a way that miles_lite/rollout/sglang/layout.py does not know"
            )
    unfilled = [name for name in tensors if name not in expected]
    if unfilled:
        raise WeightSyncError(
            f"{body['name']}: SGLang has weights that no sync fills: {', '.join(unfilled[:5])}"
        )
    for name in body["padded"]:  # nobody sends the padding, and what was released is garbage
        tensors[name].zero_()
    routes = [read_route(route) for route in body["routes"]]
    if body["check_names"]:
        _check_names(body["name"], model, [copy for route in routes for copy in route.copies])
    return Inbox(
        body["name"],
        tensors.__getitem__,
        {route.source: route for route in routes},
        getattr(torch, body["dtype"]),
    )


def _check_names(name: str, model: Any, copies: Sequence[Copy]) -> None:
    """Where SGLang's own `load_weights` would put each HF tensor must be where the plan puts it.

    Both sides' checksums agree on a tensor that the plan sends to the wrong place; this does not.
    """
    planned = {copy.tensor: (copy.target.param, copy.target.index) for copy in copies}
    found = _own_places(model, planned)
    for tensor, place in planned.items():
        if found.get(tensor) != place:
            raise WeightSyncError(
                f"{name}: the sync puts {tensor!r} into {_told(place)}, SGLang itself into "
                f"{_told(found.get(tensor))}"
            )


def _told(place: tuple[str, int] | None) -> str:
    if place is None:
        return "nothing"
    param, index = place
    return f"{param!r}" + (f" at {index}" if index >= 0 else "")


def _own_places(model: Any, names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """HF name -> (parameter, position of its expert or -1), by having SGLang load nothing under
    every name while all parameters only note who is loaded into them."""
    places: dict[str, tuple[str, int]] = {}
    params = dict(model.named_parameters())
    owners = {id(param): name for name, param in params.items()}
    current = ""

    def note(param: torch.Tensor, loaded: torch.Tensor, *_: Any, **named: Any) -> None:
        expert = named.get("expert_id")
        local = -1 if expert is None else expert % param.shape[0]  # experts lie in order
        places[current] = (owners[id(param)], local)

    loaders = {name: getattr(param, "weight_loader", None) for name, param in params.items()}
    try:
        for param in params.values():
            _set_loader(param, note)
        for current in names:
            model.load_weights([(current, torch.empty(0))])
    finally:
        for name, param in params.items():
            _set_loader(param, loaders[name])
    return places


def _set_loader(param: Any, loader: Any) -> None:
    """Some of SGLang's parameters have it as a property of their own field, others as a plain
    attribute, or not at all."""
    if hasattr(type(param), "weight_loader"):
        param._weight_loader = loader
    elif loader is None:
        del param.weight_loader
    else:
        param.weight_loader = loader
