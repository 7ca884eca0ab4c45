"""The console script `paxo`. Nothing heavy is imported before a verb runs, so `--help` is quick."""

import argparse
import dataclasses
import difflib
import errno
import json
import logging
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import paxo

DONE, CRASHED, WRONG_USE, NON_FINITE, NO_ROUND, INTERRUPTED = 0, 1, 2, 3, 5, 130
EPILOG = """\
exit codes:
  0    done
  1    an unexpected error; its traceback is shown
  2    wrong use: a flag, a setting, an input file or a folder; one line says what is wrong
       (--debug shows the traceback too)
  3    the loss became NaN or infinite; the line names the step and the batch
  5    a round of self-play could not be judged or trained on; the line tells why, with counts, and
       the same `paxo run` command goes on from there
  130  interrupted; the same `paxo run` command resumes

Settings are changed by their dotted names: --set train.num_steps=20 optimizer.learning_rate=1e-5
"""
# What a user can put right: the message alone tells how.
USER_ERRORS = (
    ValueError,
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
)
USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code, one of those in `paxo --help`.

    One of several processes that has failed does not return: it ends at once.
    """
    code = _main(arguments)
    if code in (CRASHED, WRONG_USE, NON_FINITE, NO_ROUND) and _is_one_of_several():
        sys.modules["paxo.distributed"].leave(code)
    return code


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        options = parse(arguments)
        set_up_logging(options.verbose)
        VERBS[options.verb](options)
        sys.stdout.flush()
        return DONE
    except SystemExit as stop:  # argparse has said all there is to say
        return stop.code if isinstance(stop.code, int) else WRONG_USE
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:  # the reader of `paxo methods | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if _is("paxo.training.loop", "NonFiniteLossError", error):
            return _fail(_one_line(error), NON_FINITE, debug)
        if _is("paxo.online.collect", "RoundError", error):
            return _fail(_one_line(error), NO_ROUND, debug)
        if isinstance(error, USER_ERRORS) or _is_users_os_error(error):
            return _fail(_one_line(error), WRONG_USE, debug)
        traceback.print_exc()
        return CRASHED


def run(options: argparse.Namespace) -> None:
    """`paxo run FILE`: trains as the experiment file says."""
    file = _existing(options.file)
    workdir = options.workdir or pathlib.Path("runs", file.stem)
    from paxo import distributed, experiment

    distributed.start(
        options.coordinator, options.num_processes, options.process_id, verbose=options.verbose
    )
    experiment.run_file(file, options.overrides, workdir)


def inspect(options: argparse.Namespace) -> None:
    """`paxo inspect FILE`: shows the records as the model will see them."""
    file = _existing(options.file)
    from paxo import experiment

    experiment.inspect_file(file, options.overrides, options.num)


def export(options: argparse.Namespace) -> None:
    """`paxo export WORKDIR`: writes a checkpoint as a Hugging Face folder."""
    workdir = _existing(options.workdir)
    from paxo import experiment

    experiment.export_run(workdir, options.step, options.out)


def sample(options: argparse.Namespace) -> None:
    """`paxo sample WORKDIR_OR_MODEL`: prints completions."""
    from paxo import experiment

    experiment.sample_run(
        options.source,
        prompts=options.prompts,
        num=options.num,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
    )


def plan(options: argparse.Namespace) -> None:
    """`paxo plan FILE --topology KIND:SIZE`: tells what a run needs on chips that are not here."""
    file = _existing(options.file)
    # Nothing is run but this machine's CPU: an accelerator, if there is one, stays free.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from paxo import experiment

    experiment.plan_file(
        file,
        options.overrides,
        topology=options.topology,
        model=options.model,
        compiled=options.compile,
        out=options.out,
    )


def methods(options: argparse.Namespace) -> None:
    """`paxo methods`: lists the objectives, or with `--compare` those of other trainers beside."""
    if options.compare is not None:
        _print_peers(options)
        return
    if options.online:
        _print_rows(options)
        return
    from paxo import objectives

    rows = objectives.method_table()
    if options.json:
        print(json.dumps(rows, indent=2, default=str, ensure_ascii=False))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        values = ", ".join(f"{name}={value}" for name, value in row["hyper_parameters"].items())
        details = [", ".join(row["inputs"]), values or "no hyper-parameters", row["paper"]]
        print(f"{row['name']:{width}}  {row['summary']}")
        print(f"{'':{width}}  {' | '.join(filter(None, details))}")


def _print_rows(options: argparse.Namespace) -> None:
    """The self-play methods with what they need and their settings."""
    from paxo.online import METHODS

    rows = [
        {
            "name": name,
            "objective": row.objective.name,
            "paper": row.paper,
            "needs": row.needs,
            "settings": row.hyper_parameters,
        }
        for name, row in METHODS.items()
    ]
    if options.json:
        print(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        values = ", ".join(f"{name}={value}" for name, value in row["settings"].items())
        needs = f"needs {', '.join(row['needs'])}"
        print(f"{row['name']:{width}}  {row['objective']} | {row['paper']} | {needs}")
        print(f"{'':{width}}  {values}")


def _print_peers(options: argparse.Namespace) -> None:
    from paxo.losses.peers import comparison
    from paxo.overrides import SettingsError

    try:
        rows = comparison(options.compare or None)
    except ValueError as error:
        raise SettingsError(str(error)) from error
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2, ensure_ascii=False))
        return
    header = ("objective", "library", "its name", "")
    cells = [(r.name, r.peer, r.peer_name, "equal" if r.equal else "not equal") for r in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells)]
    for row, note in zip((header, *cells), ("note", *(r.note for r in rows))):
        print("  ".join(f"{cell:{w}}" for cell, w in zip((*row, note), (*widths, 0))).rstrip())


VERBS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "run": run,
    "inspect": inspect,
    "export": export,
    "sample": sample,
    "plan": plan,
    "methods": methods,
}


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; prints what is wrong with it and raises SystemExit(2)."""
    parser, verbs = _parsers()
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is not None and verb not in verbs:
        parser.error(
            f"unknown command {verb!r}{_nearest(verb, verbs)}; there are {', '.join(verbs)}"
        )
    defaults = argparse.Namespace(verbose=False, debug=False)
    options, unknown = parser.parse_known_args(arguments, defaults)
    if unknown:
        known = [flag for action in verbs[options.verb]._actions for flag in action.option_strings]
        near = _nearest(unknown[0].partition("=")[0], known)
        verbs[options.verb].error(f"unknown argument {unknown[0]!r}{near}")
    return options


def set_up_logging(verbose: bool) -> None:
    """Sends the package's log to stderr: coloured on a terminal, plain lines elsewhere.

    Other libraries may warn, no more. On a terminal the log and the progress bar share one console.
    """
    if sys.stderr.isatty():
        import rich
        from rich.logging import RichHandler

        rich.reconfigure(stderr=True)
        console = rich.get_console()
        handler: logging.Handler = RichHandler(console=console, show_path=verbose)
        handler.setFormatter(logging.Formatter("%(message)s", datefmt="%H:%M:%S"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if verbose else logging.WARNING, force=True
    )
    logging.getLogger("paxo").setLevel(logging.DEBUG if verbose else logging.INFO)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, we do not
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is no fault
    for noisy in ("orbax", "jax", "httpx", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs
        )

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USE, f"paxo: error: {message}; see {self.prog} --help\n")


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    # Known before and after the command: without SUPPRESS the command's default would win.
    common = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("-v", "--verbose", action="store_true", help="log more")
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    parser = _Parser(
        prog="paxo",
        description="Preference optimisation of language models.",
        epilog=EPILOG,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"paxo {paxo.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="COMMAND", required=True)
    verbs = {}
    for name, (add_arguments, text) in _ARGUMENTS.items():
        verbs[name] = subparsers.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[common]
        )
        add_arguments(verbs[name])
    return parser, verbs


def _add_file(parser: _Parser) -> None:
    parser.add_argument("file", metavar="FILE", help="experiment file, as experiments/dpo_hh.py")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="A.B=C",
        type=_assignment,
        nargs="+",
        action="extend",
        default=[],
        help="change settings by their dotted names (after FILE; may be given several times)",
    )


def _add_run(parser: _Parser) -> None:
    _add_file(parser)
    parser.add_argument(
        "--workdir", metavar="DIR", help="run folder (default: runs/<name of FILE>); an "
        "interrupted run in it is resumed"
    )  # fmt: skip
    several = parser.add_argument_group(
        "several processes",
        "found by themselves on Cloud TPU, in GKE and under SLURM; elsewhere each is told",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
    several.add_argument("--num-processes", metavar="N", type=_count, help="how many there are")
    several.add_argument("--process-id", metavar="I", type=_count, help="which one this is, from 0")


def _add_inspect(parser: _Parser) -> None:
    _add_file(parser)
    parser.add_argument("--num", type=_count, default=3, help="records to print (default: 3)")


def _add_export(parser: _Parser) -> None:
    parser.add_argument("workdir", metavar="WORKDIR", help="folder of a run")
    parser.add_argument("--step", type=_count, help="checkpoint to export (default: the last)")
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: WORKDIR/export)")


def _add_sample(parser: _Parser) -> None:
    parser.add_argument("source", metavar="WORKDIR_OR_MODEL", help="folder of a run or a model")
    parser.add_argument(
        "--prompt", dest="prompts", metavar="TEXT", nargs="+", action="extend", default=[],
        help="prompts to complete (default: prompts of the run's own)",
    )  # fmt: skip
    parser.add_argument("--num", type=_count, default=1, help="completions of each (default: 1)")
    parser.add_argument("--max-tokens", type=_count, default=128, help="tokens (default: 128)")
    parser.add_argument(
        "--temperature", type=_temperature, default=1.0, help="0 takes the likeliest (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")


def _add_plan(parser: _Parser) -> None:
    _add_file(parser)
    parser.add_argument(
        "--topology", required=True, metavar="KIND:SIZE", help="v5e:16x16, v5p:4x4x4, v6e:16x16, "
        "tpu7x:4x4x4, gpu:h200x8 or cpu; a TPU without a size: its smallest slice that holds the "
        "run is found",
    )  # fmt: skip
    parser.add_argument(
        "--model", metavar="NAME", help="plan for a model of this shape, such as llama3-8b"
    )
    parser.add_argument(
        "--compile", type=_count, default=3, metavar="N", help="compile the run's programs and the "
        "N best layouts of the search (default: 3; 0 compiles nothing)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR",
        help="folder of plan.json and plan.md (default: runs/<name of FILE>/plan-KIND-SIZE)",
    )  # fmt: skip


def _add_methods(parser: _Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--compare",
        nargs="?",
        const="",
        metavar="LIBRARY",
        help="what TRL, EasyDeL, HALOs and authors' code compute, all or one of them, and whether "
        "it is equal",
    )
    parser.add_argument(
        "--online", action="store_true", help="self-play and online methods, with their settings"
    )


_ARGUMENTS: Mapping[str, tuple[Callable[[_Parser], None], str]] = {
    "run": (_add_run, "train as an experiment file says, or resume"),
    "inspect": (_add_inspect, "show records, masks and statistics of an experiment's data"),
    "export": (_add_export, "write a checkpoint as a Hugging Face folder"),
    "sample": (_add_sample, "print completions of a trained model"),
    "plan": (
        _add_plan,
        "tell what a run, self-play too, needs and takes on chips that are not here",
    ),
    "methods": (_add_methods, "list the objectives"),
}


def _assignment(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(
            f"settings are given as name=value after FILE; got {text!r}"
        )
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number is wanted; got {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"a number of at least 0 is wanted; got {text!r}")
    return value


def _existing(path: str) -> pathlib.Path:
    """The path, checked before seconds go into imports."""
    if not os.path.exists(path):
        siblings = [str(p) for p in pathlib.Path(path).parent.glob("*")]
        raise FileNotFoundError(errno.ENOENT, f"no such file{_nearest(path, siblings)}", path)
    return pathlib.Path(path)


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _is(module: str, name: str, error: Exception) -> bool:
    # Only a loaded module can have raised it, and importing it here would import jax.
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _is_one_of_several() -> bool:
    # Importing jax here would cost who made no use of it.
    started = "paxo.distributed" in sys.modules and "jax" in sys.modules
    return started and sys.modules["jax"].distributed.is_initialized()


def _is_users_os_error(error: Exception) -> bool:
    # One without a number is paxo's own, raised with a text that names file and way out.
    return isinstance(error, OSError) and error.errno in (None, *USER_ERRNOS)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"paxo: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
