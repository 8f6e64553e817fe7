"""The classes of the labelled task, by the icons' names, and which names are val and which test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from orchestrator.packaged.clip_icons.drawings import Icon

# Class: beginnings of Phosphor's names, beginnings of the other designers' captions.
CLASSES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "airplane": (("airplane",), ("airplane", "plane")),
    "battery": (("battery",), ("battery",)),
    "bell": (("bell",), ("bell",)),
    "book": (("book",), ("book",)),
    "bookmark": (("bookmark", "bookmarks"), ("bookmark",)),
    "bug": (("bug",), ("bug",)),
    "calendar": (("calendar",), ("calendar",)),
    "camera": (("camera",), ("camera",)),
    "car": (("car",), ("car",)),
    "chart": (("chart",), ("chart", "bar chart", "pie chart", "line chart")),
    "chat bubble": (("chat", "chats"), ("chat", "message", "comment")),
    "clipboard": (("clipboard",), ("clipboard",)),
    "clock": (("clock",), ("clock",)),
    "cloud": (("cloud",), ("cloud",)),
    "crown": (("crown",), ("crown", "vip crown", "chess queen")),
    "currency": (("currency",), ("currency", "money", "dollar sign", "euro sign")),
    "die": (("dice",), ("dice",)),
    "envelope": (("envelope",), ("email", "mail", "envelope")),
    "eye": (("eye",), ("eye",)),
    "file": (("file",), ("file",)),
    "fire": (("fire",), ("fire",)),
    "fish": (("fish",), ("fish",)),
    "flag": (("flag",), ("flag",)),
    "flower": (("flower",), ("flower", "plant")),
    "folder": (("folder",), ("folder",)),
    "funnel": (("funnel",), ("filter",)),
    "gear": (("gear",), ("cog", "gear", "settings")),
    "globe": (("globe",), ("earth", "globe")),
    "hand": (("hand",), ("hand",)),
    "handbag": (("handbag",), ("bag", "shopping bag", "purse")),
    "heart": (("heart",), ("heart",)),
    "hourglass": (("hourglass",), ("hourglass", "timer sand")),
    "house": (("house",), ("home", "house")),
    "key": (("key",), ("key",)),
    "light bulb": (("lightbulb",), ("lightbulb",)),
    "lightning": (("lightning",), ("lightning", "flash", "bolt")),
    "link": (("link",), ("link",)),
    "magnet": (("magnet",), ("magnet",)),
    "magnifying glass": (("magnifying-glass",), ("magnify", "magnifying glass", "search", "zoom")),
    "map pin": (("map-pin",), ("map marker", "map pin", "location")),
    "megaphone": (("megaphone",), ("bullhorn", "megaphone")),
    "microphone": (("microphone",), ("microphone", "mic")),
    "monitor": (("monitor", "television", "desktop"), ("monitor", "television", "tv", "desktop", "computer")),
    "moon": (("moon",), ("moon", "weather night")),
    "mouse": (("mouse",), ("mouse", "computer mouse")),
    "music note": (("music-note", "music-notes"), ("music",)),
    "newspaper": (("newspaper",), ("newspaper",)),
    "paint brush": (("paint-brush",), ("brush", "paint brush", "paintbrush", "format paint")),
    "paper clip": (("paperclip",), ("paperclip", "attachment")),
    "paper plane": (("paper-plane",), ("send", "paper plane")),
    "padlock": (("lock",), ("lock",)),
    "pencil": (("pencil", "pen"), ("pencil", "pen")),
    "phone": (("phone",), ("phone",)),
    "push pin": (("push-pin",), ("pin", "pushpin", "thumbtack")),
    "rainbow": (("rainbow",), ("rainbow", "looks")),
    "rocket": (("rocket",), ("rocket",)),
    "shield": (("shield",), ("shield",)),
    "shopping cart": (("shopping-cart",), ("cart", "shopping cart")),
    "smiley": (("smiley",), ("emoticon", "face", "emotion")),
    "speaker": (("speaker",), ("volume", "speaker")),
    "star": (("star",), ("star",)),
    "suitcase": (("suitcase", "briefcase"), ("briefcase", "suitcase", "bag suitcase")),
    "sun": (("sun",), ("sun", "weather sunny", "white balance sunny")),
    "tag": (("tag",), ("tag", "price tag")),
    "thermometer": (("thermometer",), ("thermometer", "temp")),
    "thumb": (("thumbs",), ("thumb", "thumbs")),
    "train": (("train",), ("train",)),
    "trash can": (("trash",), ("trash", "delete")),
    "tree": (("tree", "tree-evergreen"), ("tree", "pine tree")),
    "umbrella": (("umbrella",), ("umbrella",)),
    "user": (("user", "users"), ("account", "user")),
    "warning sign": (("warning",), ("alert", "error warning", "warning", "triangle exclamation")),
    "wifi": (("wifi",), ("wifi",)),
}
NOT_OF_CLASS = {"tree-structure"}
MAX_NAMES = 8  # of one class in val and test together


def hash_order(text: str) -> str:
    """A key that sorts texts in an order without meaning, always the same."""
    return hashlib.sha256(text.encode()).hexdigest()


def _begins(text: str, starts: Iterable[str], gap: str) -> bool:
    return any(text == start or text.startswith(start + gap) for start in starts)


def name_splits(names: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """`val` or `test` for each held-out name, and the names of each class: half of each class is val."""
    ordered = sorted(names, key=hash_order)
    splits = {name: ("test", "val")[i % 2] for i, name in enumerate(ordered)}
    classes: dict[str, list[str]] = {}
    for label, (starts, _) in CLASSES.items():
        classes[label] = [n for n in ordered if n not in NOT_OF_CLASS and _begins(n, starts, "-")][:MAX_NAMES]
        splits.update({name: ("test", "val")[i % 2] for i, name in enumerate(classes[label])})
    return splits, classes


def class_of(icon: Icon) -> str | None:
    """The class of a training designer's icon, where its first caption begins with one's words."""
    text = icon.captions[0]
    found = [label for label, (_, starts) in CLASSES.items() if _begins(text, starts, " ")]
    return found[0] if len(found) == 1 else None
