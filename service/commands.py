"""The command line: serve, inspect, forecast, plan, bench; an error is one line on stderr.

Starts the API process, or runs a command by itself; must not know HTTP or a tensor.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .child_process import QUIET
from .errors import AdapterdError, DirectoryHeld, SettingsError
from .exit_codes import ExitCode
from .settings import Settings, read_settings
from .telemetry import logs
from .telemetry.traces import make_tracer

REPOSITORY = Path(__file__).parent.parent


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    chosen = _make_parser().parse_args(arguments)
    try:
        code: int = chosen.run(chosen)
        return code
    except DirectoryHeld as error:
        logs.tell_failure(str(error))
        return ExitCode.HELD
    except (SettingsError, AdapterdError, OSError, ValueError) as error:
        logs.tell_failure(str(error))
        return ExitCode.REFUSED
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="adapterd",
        description="One quantized base model, hundreds of LoRA adapters, mixed freely in every batch.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _serve_command(commands.add_parser("serve", help="answer HTTP requests", allow_abbrev=False))
    inspect_help = "say what an adapter's files hold, without a base"
    _inspect_command(commands.add_parser("inspect", help=inspect_help))
    forecast_help = "say what an adapter of some shape would weigh on a base, from its config.json alone"
    _forecast_command(commands.add_parser("forecast", help=forecast_help))
    plan_help = "say what fits on a GPU beside a base, from its config alone"
    _plan_command(commands.add_parser("plan", help=plan_help))
    # the options behind it are the load generator's own, so this parser takes none
    bench = commands.add_parser("bench", help="measure a running service", add_help=False, prefix_chars="\0")
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_run_bench)
    return parser


def _serve_command(parser: argparse.ArgumentParser) -> None:
    for name in Settings.model_fields:
        flag, variable = f"--{name.replace('_', '-')}", f"ADAPTERD_{name.upper()}"
        parser.add_argument(flag, dest=f"set_{name}", metavar="VALUE", help=f"over {variable}")
    parser.add_argument("--workers", default="1", help=argparse.SUPPRESS)
    parser.set_defaults(run=_run_serve)


def _run_serve(chosen: argparse.Namespace) -> int:
    if chosen.workers != "1":
        raise SettingsError(
            "--workers: more than one server process is not supported: one API process, one worker per device"
        )
    given = {name: text for name, text in vars(chosen).items() if text is not None}
    flags = {name.removeprefix("set_"): text for name, text in given.items() if name.startswith("set_")}
    if flags.get("log_format", os.environ.get("ADAPTERD_LOG_FORMAT")) == "json":
        logs.set_up_logging("json", "info")  # a wrong setting, too, is a line of such a log
    settings, tracer = read_settings(os.environ, flags), make_tracer(os.environ)
    os.environ |= QUIET
    _without_torch()
    from .server import run_server

    return run_server(settings, tracer)


def _without_torch() -> None:
    """Hides torch from transformers, which then keeps to tokenizers: 200 MB and two seconds less.

    The API process computes nothing.
    """
    modules: dict[str, Any] = sys.modules
    modules.setdefault("torch", None)


def _inspect_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="the adapter's folder")
    _format_flag(parser)
    parser.set_defaults(run=_run_inspect)


def _run_inspect(chosen: argparse.Namespace) -> int:
    from . import cli
    from .catalog import summary_text

    summary = cli.inspect_folder(chosen.path)
    _print_result(summary, summary_text.format_summary(summary), chosen.format)
    return ExitCode.FAILED if summary["problems"] else ExitCode.OK


def _forecast_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, help="the base's config.json, or its folder")
    parser.add_argument("--r", type=int, required=True, help="the rank")
    parser.add_argument("--target-modules", required=True, help="comma-separated names")
    parser.add_argument("--dtype", default="float32", help="of the adapter's file")
    _format_flag(parser)
    parser.set_defaults(run=_run_forecast)


def _run_forecast(chosen: argparse.Namespace) -> int:
    if not chosen.config.exists():
        raise SettingsError(f"--config: there is no {chosen.config}")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs a greeting at import
    from .catalog import facts, summary_text
    from .catalog.validator.skeleton import Skeleton

    base = Skeleton(chosen.config)
    modules = [name.strip() for name in chosen.target_modules.split(",") if name.strip()]
    forecast = facts.forecast_size(base.list_linears(), base.parameters, chosen.r, modules, chosen.dtype)
    _print_result(forecast, summary_text.format_forecast(forecast), chosen.format)
    return ExitCode.OK


def _plan_command(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="the base's config.json, or its folder, or demo")
    parser.add_argument("--memory", required=True, help="of the device, such as 24GB")
    parser.add_argument("--quantization", choices=("nf4", "int8", "none"), default="nf4")
    parser.add_argument("--pool-rank", type=_positive, default=Settings().pool_rank)
    parser.add_argument("--max-rows", type=_positive, help="sequences at once")
    parser.add_argument("--context", type=_positive, help="tokens of a sequence, instead of the base's own")
    _format_flag(parser)
    parser.set_defaults(run=_run_plan)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def _run_plan(chosen: argparse.Namespace) -> int:
    from . import memory_plan

    memory = memory_plan.parse_bytes(chosen.memory)
    shape = memory_plan.read_shape(chosen.base, chosen.quantization)
    plan = memory_plan.plan_memory(shape, memory, chosen.pool_rank, chosen.max_rows, chosen.context)
    _print_result(plan, memory_plan.format_plan(plan), chosen.format)
    return 0 if plan["kv_tokens"] else 1


def _format_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("text", "json"), default="text")


def _print_result(result: dict[str, Any], table: str, format: str) -> None:
    print(json.dumps(result, indent=2) if format == "json" else table.rstrip("\n"))


def _run_bench(chosen: argparse.Namespace) -> int:
    if not (REPOSITORY / "deploy" / "bench").is_dir():
        raise SettingsError(
            "bench: the load generator is part of the repository, not of the installed package"
        )
    command = [sys.executable, "-m", "deploy.bench.bench", *chosen.rest]
    return subprocess.run(command, cwd=REPOSITORY, check=False).returncode
