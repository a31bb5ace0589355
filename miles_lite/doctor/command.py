"""`miles-lite doctor [experiment=NAME] [key=value ...]`: what would go wrong, before it does."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from miles_lite.cluster.everywhere import on_every_host
from miles_lite.compose import compose
from miles_lite.config import Config
from miles_lite.doctor import files, live, node
from miles_lite.doctor.finding import Finding, as_json, merged, ok
from miles_lite.doctor.host import measure
from miles_lite.doctor.needs import Needs
from miles_lite.planner.plan import read_model
from miles_lite.run import RunError

HOST_DEADLINE_S = 120.0


def run(words: Sequence[str]) -> None:
    """Prints a line a check. Raises RunError if one failed, ConfigError for no experiment."""
    options = _parser().parse_intermixed_args(words)
    cfg = compose(options.overrides) if options.overrides else None
    stream = sys.stderr if str(options.json) == "-" else sys.stdout
    found: list[Finding] = []
    for finding in examine(cfg, options):
        print(finding.line(), file=stream, flush=True)
        found.append(finding)
    if options.json:
        text = json.dumps(as_json(cfg.experiment if cfg else "", found), indent=1) + "\n"
        print(text, end="") if str(options.json) == "-" else options.json.write_text(text)
    if failed := [finding.name for finding in found if finding.status == "failed"]:
        raise RunError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="miles-lite doctor", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write it there too; - for stdout"
    )
    parser.add_argument("--node", action="store_true", help="this host and files only, without Ray")
    parser.add_argument("--no-live", action="store_true", help="start no trainer and no engine")
    parser.add_argument("--address", metavar="auto|IP:PORT", help="of a Ray: check all its hosts")
    parser.add_argument(
        "--ports", type=_block, metavar="FIRST-LAST", help="a block that will be listened on"
    )
    parser.add_argument(
        "--max-drift", type=float, metavar="NATS", help=f"a token; {live.MAX_DRIFT} by model.dtype"
    )
    return parser


def _block(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    return int(first), int(last or first)


def examine(cfg: Config | None, options: argparse.Namespace) -> Iterator[Finding]:
    """All findings in their order, as they are made."""
    needs, model, healthy = Needs(), None, True
    if cfg is not None:
        try:
            model, notes = read_model(cfg)
            needs = Needs.of(cfg, model)
        except ValueError as error:
            fix = "mend the key it names; model.path=FOLDER with an HF checkpoint"
            yield Finding("experiment", "failed", str(error), fix)
        else:
            told = f"{cfg.experiment}: {model.num_layers} layers, {needs.summary}"
            yield ok("experiment", "; ".join([told, *notes]))
    for finding in _hosts(cfg, needs, options):
        healthy &= finding.status != "failed"
        yield finding
    if cfg is None or model is None:
        return
    found, inputs = files.check(cfg, model)
    yield from found
    reasons = {
        "--no-live": options.no_live,
        "--node": options.node,
        "a check of the hosts failed": not healthy,
        "a check of the files failed": any(f.status == "failed" for f in found),
    }
    if inputs is None or any(reasons.values()):
        yield from live.skip_all(next(why for why, so in reasons.items() if so))
        return
    address = options.address or cfg.cluster.address
    cfg = replace(cfg, cluster=replace(cfg.cluster, address=address))
    bound = live.MAX_DRIFT[cfg.model.dtype] if options.max_drift is None else options.max_drift
    yield from live.check(cfg, inputs, bound)


def _hosts(cfg: Config | None, needs: Needs, options: argparse.Namespace) -> Iterable[Finding]:
    """Of this host, or of all that a Ray has."""
    address = options.address or (cfg.cluster.address if cfg else "local")
    if options.node or address == "local":
        needs = replace(needs, ports=options.ports)
        return node.check_here(needs)
    wanted = (tuple(needs.rooms), needs.shared, None)  # Ray has its ports already
    try:
        answers = on_every_host(address, measure, *wanted, deadline_s=HOST_DEADLINE_S)
    except OSError as error:  # ConnectionError, or one of sockets
        fix = "start Ray first (scripts/run-ultra.sh), or --node for this host alone"
        return [Finding("cluster", "failed", f"no Ray at {address}: {error}", fix)]
    hosts = answers.values
    fix = "look whether it is up, and has this code and its packages"
    found = [Finding("cluster", "failed", why, fix) for why in answers.failures.values()]
    told = f"{len(hosts)} hosts answer, {needs.num_hosts} wanted"
    if len(hosts) < needs.num_hosts:
        found.append(Finding("cluster", "failed", told, "start Ray on the others"))
    elif not found:
        found.append(ok("cluster", told))
    found += merged(
        (h, finding) for h, host in hosts.items() for finding in node.check(host, needs)
    )
    if len(hosts) > 1:
        found += [*node.differences(hosts, needs), node.clocks(answers.offsets)]
    return found
