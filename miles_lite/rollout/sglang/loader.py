"""Weights into a live SGLang model. Runs inside each scheduler process of a server.

SGLang calls `receive` (its `custom_weight_loader`) for one `/update_weights_from_tensor`; the call
lasts for the whole sync. The payload says where this rank's actor listens, and buckets come from
there: what arrives is exactly what the rank hosts, and both sides' checksums are compared.

Whatever goes wrong is told to the actor and never raised: an exception here ends the whole server.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection
from typing import Any

import torch

from miles_lite.rollout.sglang.wire import Address, Message, read_route
from miles_lite.weights.transport import Inbox, WeightSyncError

JSON = dict[str, Any]


def receive(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Take one sync. named_tensors: a single entry, whose name is the Address of the actor."""
    address = Address.parse(named_tensors[0][0])
    with Client(address.path, "AF_UNIX", address.key) as connection, torch.no_grad():
        serve(connection, dict(model.named_parameters()))


def serve(connection: Connection, tensors: Mapping[str, torch.Tensor]) -> None:
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
                inbox = _start(message.body, tensors)
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


def _start(body: JSON, tensors: Mapping[str, torch.Tensor]) -> Inbox:
    """Hold what the sync expects against the live model before anything is written."""
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
    return Inbox(
        body["name"],
        tensors.__getitem__,
        {route.source: route for route in routes},
        getattr(torch, body["dtype"]),
    )
