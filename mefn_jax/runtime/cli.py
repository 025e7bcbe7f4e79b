"""Command-line entry: defines and parses flags, and prints an error of the user's in one line."""

import contextlib
import importlib.util
import inspect
import itertools
import os
import re
import signal
import sys
import textwrap
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from mefn_jax.config import get_dotted, set_dotted, suggest
from mefn_jax.errors import ConfigError, UserError, reason
from mefn_jax.runtime.config_files import find_config, is_installed
from mefn_jax.runtime.storage import expand_home

# Options of the configuration that are paths or, for `pretrained`, may be.
PATH_OPTIONS = (
    *("data.dir", "data.cached_text", "data.negatives", "image.pretrained", "text.pretrained"),
    "train.init_from",
)
LARGEST_COUNT = 10**9  # of a flag that counts something
# Commands of a checkout, and what pyproject.toml calls them in an installed package.
SCRIPTS = {
    "python train.py": "mefn-train",
    "python eval.py": "mefn-eval",
    "python -m mefn_jax.data.prepare": "mefn-prepare",
    "python -m mefn_jax.sweep": "mefn-sweep",
    "python -m mefn_jax.export": "mefn-export",
}
OUT_OF_MEMORY = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)  # in an error of XLA
HELP_FLAGS = ("--help", "-help", "-h", "--helpshort")


def run_command(main, define_flags, description: str | None = None) -> None:
    """Runs a command: `define_flags()` defines its flags, `main()` does the work. If `main` has a parameter, it is the
    list of the arguments that are not flags; otherwise such an argument is an error.

    `--help` prints `description`, or the docstring of the module of `main`, and the flags in the order of their
    definition. A UserError or a flag that cannot be parsed is printed in one line, without a traceback; the exit status
    is then 1 or 2. Ctrl-C or a closed terminal ends the command in one line, with the status of the shell for this
    signal, 128 and its number."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, _interrupt)

    def parse(argv):
        try:
            flags_of_absl = set(flags.FLAGS)
            argv = _expand_config(argv)
            sys.argv = argv  # where ml_collections looks for overrides
            define_flags()
            if not set(HELP_FLAGS).isdisjoint(argv[1:]):
                names = [name for name in flags.FLAGS if name not in flags_of_absl]
                print(_format_help(description or sys.modules[main.__module__].__doc__, names), flush=True)
                sys.exit(0)
            try:
                positional = flags.FLAGS(argv)
            except (AttributeError, KeyError) as e:  # an override of an option that the file of `--config` lacks
                if unknown := _describe_unknown(None):
                    raise ConfigError(unknown) from e
                raise
            _check_path_flags()
            expand_path_options()
            return positional
        except BrokenPipeError:
            _exit_without_reader()
        except (flags.Error, UserError, FileNotFoundError) as e:
            fail(_flag_message(e), 2)
        except Exception as e:  # the file of `--config` is Python, which can raise anything
            fail(_describe_config_error(e) or _flag_message(e), 2)

    def run_guarded(argv):
        takes_arguments = bool(inspect.signature(main).parameters)
        if len(argv) > 1 and not takes_arguments:
            fail(f"unexpected argument {argv[1]!r}; options start with --", 2)
        try:
            main(list(map(expand_home, argv[1:]))) if takes_arguments else main()
        except UserError as e:
            fail(str(e), 1)
        except Interruption as e:
            _exit_interrupted(e.number)
        except BrokenPipeError:
            _exit_without_reader()
        except Exception as e:
            if _is_out_of_memory(e):
                fail(
                    f"out of memory ({reason(e)}); take a smaller model, train.batch_size or eval.batch_size, or what "
                    "docs/training.md#memory lists",
                    1,
                )
            if not _comes_from_environment(e):
                raise
            fail(f"JAX cannot use the devices ({reason(e)}); {_describe_environment()}", 1)

    logging.set_verbosity(logging.WARNING)
    try:
        app.run(run_guarded, flags_parser=parse)
    except Interruption as e:  # while the flags were parsed
        _exit_interrupted(e.number)


def _expand_config(argv: list[str]) -> list[str]:
    """Returns the words of a command with the value of `--config` made a path: of a name, and of `~`."""
    words = list(argv)
    for k, word in enumerate(words):
        if word.startswith("--config="):
            words[k] = f"--config={find_config(expand_home(word.removeprefix('--config=')))}"
        elif word == "--config" and k + 1 < len(words):
            words[k + 1] = find_config(expand_home(words[k + 1]))
    return words


def _comes_from_environment(error: Exception) -> bool:
    """Returns whether JAX raised an error while it read its variables or looked for devices."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_code.co_filename.endswith(("jax/_src/xla_bridge.py", "jax/_src/config.py"))


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether an error says that the memory of this machine or of a device does not suffice."""
    is_from_xla = type(error).__name__ == "JaxRuntimeError"  # JAX is not imported for --help
    return isinstance(error, MemoryError) or (is_from_xla and bool(OUT_OF_MEMORY.search(str(error))))


def _describe_environment() -> str:
    """Returns which variables choose the devices, with their values."""
    pattern = "JAX_(PLATFORM|NUM_CPU|ENABLE)|CUDA_VISIBLE|XLA_FLAGS"
    names = sorted(name for name in os.environ if re.match(pattern, name))
    values = ", ".join(f"{name}={os.environ[name]}" for name in names)
    return f"check {values}" if values else "set JAX_PLATFORMS=cpu to use the CPU"


class Interruption(KeyboardInterrupt):
    """SIGINT or SIGHUP, whose `number` it has."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number


def _interrupt(number: int, frame) -> None:
    """Raises Interruption, as the handler of a signal; a second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    while frame is not None:
        # Python swallows an exception that comes while it imports a module, and prints a traceback.
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            _exit_interrupted(number)
        frame = frame.f_back
    raise Interruption(number)


def _exit_interrupted(number: int) -> None:
    """Prints which signal ends the command, and exits without waiting for threads, some of which read ahead."""
    with contextlib.suppress(OSError):  # a closed terminal
        print(f"error: ended by {signal.Signals(number).name}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(128 + number)


def define_config_flag(default: str | None) -> None:
    """Defines `--config=FILE.py[:arguments]` and its `--config.key=value` overrides. `default` is a name or a path;
    without one, the flag is optional and None if left out."""
    description = "Configuration, by name or as a file, with optional arguments after a colon: FILE.py:a=x,b."
    default = default and find_config(default)
    try:
        config_flags.DEFINE_config_file("config", default, description, lock_config=True)
    except (AttributeError, KeyError) as e:  # an override of an option that does not exist
        if unknown := _describe_unknown(default):
            raise ConfigError(unknown) from e
        raise


class _PathParser(flags.ArgumentParser):
    """Parser of a flag that is a path."""

    syntactic_help = "a path"

    def parse(self, argument):
        """Returns the path with `~` expanded."""
        return expand_home(argument)


def define_path_flag(name: str, default: str | None, description: str, required: bool = False) -> None:
    """Defines a flag that is a path, in which `~` stands for the home directory."""
    flags.DEFINE(_PathParser(), name, default, description, serializer=flags.ArgumentSerializer(), required=required)


def _check_path_flags() -> None:
    """Raises ConfigError for a flag with an empty path, as `--workdir=$RUN` gives where RUN is not set: the command
    would write to its default, or to the current directory."""
    for name in flags.FLAGS:
        flag = flags.FLAGS[name]
        if isinstance(flag.parser, _PathParser) and flag.present and not flag.value:
            raise ConfigError(f"--{name}= is empty; give a path, or leave the flag out")


def define_count_flag(name: str, default: int, description: str) -> None:
    """Defines a flag that counts something, from 1 on."""
    flags.DEFINE_integer(name, default, description, lower_bound=1, upper_bound=LARGEST_COUNT)


def expand_path_options() -> None:
    """Expands `~` in the options of the configuration that are paths, if the command has a configuration."""
    config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    if not hasattr(config, "to_dict"):
        return
    for key in PATH_OPTIONS:
        section, _, name = key.partition(".")
        if section in config and name in config[section] and isinstance(path := get_dotted(config, key), str):
            set_dotted(config, key, expand_home(path))


def parse_count(text: str) -> int | None:
    """Returns the number from 0 on that a text writes in ASCII digits, at most LARGEST_COUNT; None for other texts,
    such as `²`, which `str.isdigit` accepts and `int` does not."""
    number = int(text) if re.fullmatch(r"[0-9]{1,10}", text) else None
    return number if number is not None and number <= LARGEST_COUNT else None


def _find_config_argument() -> str:
    """Returns the value of `--config` on the command line, `FILE.py:arguments`, or an empty string."""
    words = sys.argv[1:]
    values = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    values += [value for name, value in itertools.pairwise(words) if name == "--config"]
    return values[-1] if values else ""


def _describe_config_error(error: Exception) -> str:
    """Returns the message of an error that the file of `--config` raises, with its line; empty for any other error."""
    path = os.path.expanduser(_find_config_argument().partition(":")[0])
    if not os.path.isfile(path):
        return ""
    if isinstance(error, SyntaxError):
        return f"--config={path}: not a configuration file in Python ({error.msg}, line {error.lineno})"
    if isinstance(error, AttributeError) and "get_config" in str(error):
        return f"--config={path}: has no function get_config, as configs/shapes.py has; give a configuration file"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.isfile(frame.filename) and os.path.samefile(frame.filename, path)
    ]
    return f"--config={path}: fails in line {lines[-1]} ({reason(error)})" if lines else ""


def _describe_unknown(default: str | None) -> str:
    """Returns a message about the first override on the command line that the configuration lacks, with the names that
    it has there; empty if there is none."""
    path, _, argument = (_find_config_argument() or default or "").partition(":")
    if not path:
        return ""
    spec = importlib.util.spec_from_file_location("configuration", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        whole = module.get_config(argument)
    except Exception:  # the file itself fails: `_describe_config_error` says how
        return ""
    for key in (match[1] for argument in sys.argv if (match := re.match(r"--config\.([\w.]+)", argument))):
        config, parts = whole, key.split(".")
        for k, part in enumerate(parts):
            names = sorted(config.keys()) if hasattr(config, "keys") else []
            if part not in names:
                section = f"config.{'.'.join(parts[:k])}".removesuffix(".")
                known = ", ".join(names) or "no parts"
                return f"unknown option --config.{key}{suggest(part, names)}; {section} has {known}"
            config = config[part]
    return ""


def define_process_flags() -> None:
    """Defines the flags of a command that several processes can run together."""
    flags.DEFINE_string("coordinator_address", "", "HOST:PORT of process 0; needed without TPUs and Slurm.")
    flags.DEFINE_integer("num_processes", 0, "With --coordinator_address: number of processes.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "With --coordinator_address: index of this process, from 0.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for the other processes at the start.", lower_bound=1)


def define_compile_flags() -> None:
    """Defines the flags for compiling for a TPU slice instead of running."""
    flags.DEFINE_string("compile_for", "", "Compile for a TPU slice such as v5e:16x16 and report, without running.")
    define_path_flag("compile_report", "", "With --compile_for: file for the report, as JSON.")


def config_path() -> Path:
    """Returns the path of the file that `--config` names, without its arguments."""
    flag = flags.FLAGS["config"]
    return Path(getattr(flag, "config_filename", flag.value).partition(":")[0])  # `value` if the flag is a plain string


def _format_help(description: str, names: list[str]) -> str:
    """Returns the text of `--help`: the description of the command, and its flags with their defaults."""
    lines = [description.strip(), "", "flags:"]
    for name in names:
        flag = flags.FLAGS[name]
        title = f"  --{'[no]' * flag.boolean}{name}"
        default = f" (default: {flag.default_as_str.strip(chr(39))})" if flag.default else ""
        lines += textwrap.wrap(f"{title:<23} {' '.join(flag.help.split())}{default}", 120, subsequent_indent=" " * 24)
    return _name_scripts("\n".join(lines))


def _flag_message(error: Exception) -> str:
    """Returns the message of an error in the flags, on one line."""
    text = str(error.args[0] if error.args else error)
    if missing := re.search(r"Flag --(\w+) must have a value other than None", text):
        return _describe_missing(missing[1])
    return " ".join(text.split("\n"))


def require_flag(name: str):
    """Returns the value of a flag. Raises ConfigError if it is not given."""
    if flags.FLAGS[name].value is None:
        raise ConfigError(_describe_missing(name))
    return flags.FLAGS[name].value


def _describe_missing(name: str) -> str:
    """Returns the message that a flag is missing, and what it is."""
    description = flags.FLAGS[name].help
    return f"--{name} is missing: {description[0].lower()}{description[1:].rstrip('.')}"


def _exit_without_reader() -> None:
    """Exits after the reader of the output has closed it, as `head` does."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # otherwise Python reports it again at exit
    sys.exit(1)


def fail(message: str, status: int) -> None:
    """Prints an error and exits with `status`."""
    print(f"error: {_name_scripts(message)}", file=sys.stderr)
    sys.exit(status)


def _name_scripts(text: str) -> str:
    """Replaces commands of a checkout in a text (`python train.py`) by those of an installed package (`mefn-train`)."""
    if is_installed():
        for command, script in SCRIPTS.items():
            text = text.replace(command, script)
    return text
