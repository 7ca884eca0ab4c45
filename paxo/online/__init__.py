"""Self-play and online training: sample, judge, pair, train, move the anchor, in rounds."""

from paxo.online.collect import Collected, Judges, RoundError, collect
from paxo.online.drawing import Drawer, Drawn
from paxo.online.groups import Group, Prompt, read_groups, write_groups
from paxo.online.judging import Bench
from paxo.online.method import Draw, Method, Schedule
from paxo.online.self_play import PlayResult, play
from paxo.online.self_reward import SelfReward
from paxo.online.settings import RoundSettings
from paxo.online.table import METHODS, method

__all__ = [
    "METHODS",
    "Bench",
    "Collected",
    "Draw",
    "Drawer",
    "Drawn",
    "Group",
    "Judges",
    "Method",
    "PlayResult",
    "Prompt",
    "RoundError",
    "RoundSettings",
    "Schedule",
    "SelfReward",
    "collect",
    "method",
    "play",
    "read_groups",
    "write_groups",
]
