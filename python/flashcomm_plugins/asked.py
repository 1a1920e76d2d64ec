"""Whether the plugins are asked for, and what they say."""

import os
import re
import sys

VARIABLE = "FLASHCOMM_PLUGIN"
UNSET = "Unset " + VARIABLE


def is_asked():
    value = os.environ.get(VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        os.environ[VARIABLE] = "0"
        say("WARN", "%s=%r is not allowed; it takes 0 or 1. 0 holds." % (VARIABLE, value))
    return value == "1"


def stay_out(engine, why, cure):
    """Says why the plugin does nothing, once, in one line with the cure.

    The variable is taken back. The shim compares it with that of the other ranks, which must route
    alike, and the processes that this one starts need not say the same again.
    """
    if os.environ.get(VARIABLE) == "0":
        return
    os.environ[VARIABLE] = "0"
    say("WARN", "the plugin for %s stays out: %s. %s" % (engine, why, cure))


def when_asked(engine, install, cure):
    """Installs a plugin where it is asked for. Whatever goes wrong, the engine starts without it."""
    if not is_asked():
        return
    try:
        install()
    except Exception as error:
        stay_out(engine, "this %s is unknown to it: %r" % (engine, error), cure)


def is_known(version, oldest, newest):
    """Whether `version`, a text, is from `oldest` to `newest`; as many numbers as theirs count."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    if not numbers:
        return False
    return oldest <= tuple(map(int, numbers[0].split(".")))[: len(oldest)] <= newest


def say(level, text):
    """Looks as the shim's own log does. What only informs is said where FLASHCOMM_LOG asks."""
    asked = os.environ.get("FLASHCOMM_LOG", "").strip() or "warn"
    levels = {"off": [], "error": [], "warn": ["WARN"]}
    if level in levels.get(asked, ["WARN", "INFO"]):
        print("flashcomm [%d] %s: %s" % (os.getpid(), level, text), file=sys.stderr, flush=True)
