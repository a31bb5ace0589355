"""`miles-lite COMMAND ...`: thin. A mistake of the user ends in one line, not in a trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime

from miles_lite import log
from miles_lite.checkpoints import CheckpointError
from miles_lite.claim import RunFinished
from miles_lite.protocols import RunError
from miles_lite.rollout.dynamic import NothingToKeep
from miles_lite.rollout.signal import NoSignalError
from miles_lite.stop import ENDED_ITSELF, AlarmError, Stopped

USAGE = """\
miles-lite train experiment=NAME [key=value ...]   train; NAME is a file of configs/experiment;
                                                   with --supervise it goes on after a crash
miles-lite check experiment=NAME [key=value ...]   read and check all it reads, start nothing
miles-lite plan experiment=NAME [key=value ...]    memory, time and traffic of a run, and whether it
                                                   fits: without GPU or weights, see plan --help
miles-lite doctor [experiment=NAME] [key=value ..] hosts, files and one harmless step of the loop:
                                                   ok, or what is wrong and the way out
miles-lite reward-audit experiment=NAME [...]      what the reward says of right, wrong, cut and
                                                   hostile answers in the model's own format
miles-lite launch head|worker IP [...]             a run on many hosts, see launch --help
miles-lite report RUN [RUN2 ...] [--open]          curves, times, waste, samples: one HTML file
miles-lite export RUN[@STEP] --out DIR             a checkpoint of a run as an HF folder
miles-lite drift RUN[@STEP]                        why engine and trainer differ: parts, causes and
                                                   the first layer, on one answer of a checkpoint
miles-lite convert hf-to-dist --hf DIR --out DIR   HF to Megatron torch_dist; also dist-to-hf and
                                                   verify, see convert --help
miles-lite wandb-dashboard --project P --entity E  a W&B workspace for the runs of a project
miles-lite eval --model DIR|RUN[@STEP] experiment=NAME [key=value ...]
                                                   pass@k and mean@k of the sets of data.eval
miles-lite samples RUN                             what a run's model wrote, see samples --help
miles-lite replay RUN[@STEP] --reward FILE:FUNCTION
                                                   saved samples, scored by another reward
miles-lite chaos experiment=NAME --kill KIND,...   kill processes of a run at random, compare it
                                                   with an undisturbed one, see chaos --help
miles-lite serve --model DIR|RUN[@STEP]            an OpenAI-compatible endpoint, see serve --help

Keys and their meaning are in miles_lite/config.py, e.g. algo.eps_clip_high=0.3 parallel.tp=2
"""

# what would end it again, since the same seeds draw the same answers
_LASTING = (NoSignalError, NothingToKeep, AlarmError, CheckpointError)


def main() -> None:
    """Entry point; exits with 0, with 2 for an error of the user, with 1 for one of ours, with
    ENDED_ITSELF, and with 128 + N when signal N stopped it."""
    sys.excepthook = log.say_trace
    sys.exit(run(sys.argv[1:]))


def run(words: Sequence[str]) -> int:
    commands: dict[str, Callable[[Sequence[str]], None]] = {
        "train": _train,
        "check": _check,
        "plan": _plan,
        "doctor": _doctor,
        "reward-audit": _reward_audit,
        "convert": _convert,
        "export": _export,
        "launch": _launch,
        "wandb-dashboard": _wandb_dashboard,
        "report": _report,
        "serve": _serve,
        "eval": _eval,
        "samples": _samples,
        "replay": _replay,
        "drift": _drift,
        "chaos": _chaos,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] not in commands:
        print(f"miles-lite: no command {words[0]!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    log.setup("driver")
    try:
        commands[words[0]](words[1:])
    except (ValueError, RunError, OSError) as error:
        if not str(error):  # then only its trace says something
            raise
        log.say(f"miles-lite {words[0]}: {error}", sys.stderr)
        if words[0] == "train" and isinstance(error, _LASTING):
            return ENDED_ITSELF
        return 2 if isinstance(error, ValueError) else 1
    except RunFinished as finished:
        log.say(str(finished))
    except Stopped as stopped:
        print(f"miles-lite {words[0]}: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print(f"miles-lite {words[0]}: interrupted", file=sys.stderr)
        return 130
    return 0


def _check(overrides: Sequence[str]) -> None:
    from miles_lite import build
    from miles_lite.compose import compose

    cfg = compose(overrides)
    inputs = build.check(cfg)
    print(
        f"{cfg.experiment}: {inputs.model.num_layers} layers {inputs.model.pattern}, "
        f"{sum(map(len, inputs.sources))} training and "
        f"{sum(map(len, inputs.eval_prompts.values()))} evaluation prompts, "
        f"{cfg.parallel.dims.world_size} devices: nothing speaks against it"
    )


def _plan(words: Sequence[str]) -> None:
    from miles_lite.planner import command

    command.run(words)


def _doctor(words: Sequence[str]) -> None:
    from miles_lite.doctor import command

    command.run(words)


def _convert(words: Sequence[str]) -> None:
    from miles_lite.weights import convert_command

    convert_command.run(words)


def _wandb_dashboard(words: Sequence[str]) -> None:
    from miles_lite.dashboard import command

    command(words)


def _report(words: Sequence[str]) -> None:
    from miles_lite.report import command

    command.run(words)


def _export(words: Sequence[str]) -> None:
    from miles_lite.weights import convert_command

    convert_command.export(words)


def _launch(words: Sequence[str]) -> None:
    from miles_lite.launch import command

    if code := command.run(words):
        sys.exit(code)


def _eval(words: Sequence[str]) -> None:
    from miles_lite import evaluate

    evaluate.run(words)


def _samples(words: Sequence[str]) -> None:
    from miles_lite import samples

    samples.run(words)


def _replay(words: Sequence[str]) -> None:
    from miles_lite import replay

    replay.run(words)


def _serve(words: Sequence[str]) -> None:
    from miles_lite.serve import command

    command.run(words)


def _drift(words: Sequence[str]) -> None:
    from miles_lite.drift import command

    command.run(words)


def _reward_audit(overrides: Sequence[str]) -> None:
    from miles_lite import build
    from miles_lite.compose import compose

    cfg = compose(overrides)
    sections = build.audit_reward(cfg, build.read(cfg))
    for section in sections:
        log.say("\n".join(section.lines()))
    for warning in [warning for section in sections for warning in section.warnings]:
        log.say(f"warning: {warning}")
    if failures := [section.failure for section in sections if section.failure]:
        raise ValueError("; ".join(failures))


def _train(words: Sequence[str]) -> None:
    from miles_lite import supervise

    options = supervise.options(words)
    if not options.supervise:
        _train_once(options.overrides)
    elif code := supervise.run(options.overrides, options.restarts):
        sys.exit(code)


def _chaos(words: Sequence[str]) -> None:
    from miles_lite.chaos import command

    if code := command.run(words):
        sys.exit(code)


def _train_once(overrides: Sequence[str]) -> None:
    from miles_lite import build
    from miles_lite.compose import compose
    from miles_lite.console import Console
    from miles_lite.run import Run, read_metrics
    from miles_lite.stop import StopRequest
    from miles_lite.summary import lines, summarize
    from miles_lite.train import train

    cfg = compose(overrides)
    inputs = build.check(cfg)

    def lost(why: str) -> None:
        run.finish({"error": why}, "failed")
        log.say(f"miles-lite train: {why}", sys.stderr)

    with StopRequest() as stop, Run.open(cfg, datetime.now()) as run:
        with (
            stop.told(),
            Console(cfg.experiment, cfg.train.num_steps) as console,
            build.start(cfg, inputs, run.folder / "engines", lost) as parts,
        ):
            train(cfg, run, parts, console, stop)
        summary = summarize(run.folder, read_metrics(run.folder))
        run.finish(summary)
    console.summary(lines(summary))


if __name__ == "__main__":
    main()
