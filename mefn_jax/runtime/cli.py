"""TODO."""

import os
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mefn_jax.errors import ConfigError, UserError


def run_command(main, define_flags) -> None:
    """Runs a command: `define_flags()` defines its flags, `main()` does the work. A UserError or a flag that cannot be
    parsed is printed in one line, without a traceback; the exit status is then 1 or 2."""

    def parse(argv):
        try:
            define_flags()
            for flag in flags.FLAGS.get_flags_for_module(__name__):  # so that --help lists those defined here too
                flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
            rest = flags.FLAGS(argv)
            if "config" in flags.FLAGS and flags.FLAGS.config is not None and not config_path().is_file():
                raise ConfigError(f"--config={config_path()}: no such file")
            return rest
        except (flags.Error, UserError, AttributeError, KeyError, FileNotFoundError, ValueError) as e:
            _fail(_flag_message(e), 2)

    def guarded(argv):
        if len(argv) > 1:
            _fail(f"unexpected argument {argv[1]!r}; options start with --", 2)
        try:
            main()
        except UserError as e:
            _fail(str(e), 1)
        except BrokenPipeError:  # what reads the output has enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would say it again at exit
            sys.exit(1)

    logging.set_verbosity(logging.WARNING)
    app.run(guarded, flags_parser=parse)


def define_config_flag(default: str | None) -> None:
    """Defines `--config=FILE.py[:arguments]` and its `--config.key=value` overrides; without a default it may be left
    out, and is then None."""
    config_flags.DEFINE_config_file(
        "config", default, "Configuration file, with arguments after a colon.", lock_config=True
    )


def define_process_flags() -> None:
    """Defines the flags of a command that several processes may run together."""
    flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0, where neither TPUs nor Slurm say it.")
    flags.DEFINE_integer("num_processes", 0, "With --coordinator_address: how many processes there are.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "With --coordinator_address: which of them this is, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1)


def define_compile_flags() -> None:
    """Defines the flags of compiling for a TPU slice instead of running."""
    flags.DEFINE_string("compile_for", "", "Only compile, for a TPU slice such as v5e:16x16, and report.")
    flags.DEFINE_string("compile_report", "", "With --compile_for: a file that gets the report as JSON.")


def config_path() -> Path:
    """The file that `--config` names, without its arguments."""
    flag = flags.FLAGS["config"]
    return Path(getattr(flag, "config_filename", flag.value).partition(":")[0])  # or a plain string


def _flag_message(error: Exception) -> str:
    text = str(error.args[0] if error.args else error)
    if not isinstance(error, AttributeError | KeyError):
        return " ".join(text.split("\n"))
    # ml_collections hands on the repr of a KeyError; its second line holds the nearest name.
    lines = [line.strip("'\" ") for line in text.replace("\\n", "\n").replace("\\'", "'").split("\n")]
    return f"unknown configuration key {lines[0]!r}. {' '.join(lines[1:])}".strip()


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
