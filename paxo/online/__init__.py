"""Self-play and online training: sample, judge, pair, train, move the anchor, in rounds."""

from paxo.online.collect import Collected, RoundError, collect
from paxo.online.drawing import Drawer, Drawn
from paxo.online.groups import Group, Prompt, read_groups, write_groups
from paxo.online.judging import Bench
from paxo.online.method import Draw, Method, Schedule
from paxo.online.self_play import PlayResult, RoundSettings, play
from paxo.online.table import METHODS, method

__all__ = [
    "METHODS",
    "Bench",
    "Collected",
    "Draw",
    "Drawer",
    "Drawn",
    "Group",
    "Method",
    "PlayResult",
    "Prompt",
    "RoundError",
    "RoundSettings",
    "Schedule",
    "collect",
    "method",
    "play",
    "read_groups",
    "write_groups",
]
