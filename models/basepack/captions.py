"""What each recording is called in words: sentences of its data set, titles of its authors, or made from its label.

Sentences made from a label come in two sets that share no sentence: one to train on, one to ask with. They are other
sentences about the same thing, so finding by them shows more than that a label was looked up; but a word that no
training sentence holds stays unknown, and no claim is made about free language.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from models.basepack.tables import Recording, Sound
from models.errors import DataError

TRAIN: Mapping[str, tuple[str, ...]] = {
    "fight": (
        "people are fighting",
        "a fight between several persons",
        "men hitting each other in a brawl",
        "a violent fight in front of the camera",
        "somebody is attacked and beaten",
    ),
    "normal": (
        "people behave normally",
        "an ordinary scene without violence",
        "persons standing and walking around peacefully",
        "nothing special happens",
        "everyday life in front of a surveillance camera",
    ),
    "handshake": (
        "two persons shake hands",
        "a handshake",
        "somebody shaking hands with another person",
        "two men greet each other with a handshake",
    ),
    "hug": ("two persons hug", "a hug", "somebody hugging another person", "two people embrace each other in a hug"),
    "kick": ("one person kicks another", "a kick", "somebody kicking another person", "a man kicks with his leg"),
    "point": ("a person points at something", "pointing with a finger", "somebody is pointing", "a man points ahead"),
    "punch": (
        "one person punches another",
        "a punch",
        "somebody punching another person",
        "a man punches with his fist",
    ),
    "push": ("one person pushes another", "a push", "somebody pushing another person", "a man pushes someone away"),
    "bend": ("a person bends down", "bending over", "somebody bends to the ground", "a man bending to pick up a thing"),
    "jump": ("a person jumps forward", "jumping ahead on two legs", "somebody jumps along", "a man jumping forward"),
    "jump_in_place": (
        "a person jumps in place",
        "jumping up and down on the spot",
        "somebody jumps up in place",
        "a man jumping on the spot",
    ),
    "jumping_jack": (
        "a person does jumping jacks",
        "a jumping jack",
        "somebody exercising jumping jacks",
        "jumping with arms and legs spread like a jack",
    ),
    "gallop_sideways": (
        "a person gallops sideways",
        "galloping to the side",
        "somebody galloping sideways",
        "a man moves sideways in a gallop",
    ),
    "run": ("a person runs", "running", "somebody is running past", "a man runs through the picture"),
    "walk": ("a person walks", "walking", "somebody is walking past", "a man walks through the picture"),
    "wave_one_hand": (
        "a person waves with one hand",
        "waving one hand",
        "somebody waves one arm",
        "a man waving with a single hand",
    ),
    "wave_two_hands": (
        "a person waves with two hands",
        "waving both hands",
        "somebody waves two arms",
        "a man waving with both hands",
    ),
}
"""Sentences to train on, by the labels of fights, UT-Interaction and Weizmann."""

TEST: Mapping[str, tuple[str, ...]] = {
    "fight": ("a brawl between men", "several people fighting violently", "someone is beaten by others"),
    "normal": ("a peaceful everyday scene", "ordinary people walking around", "no violence, just normal life"),
    "handshake": ("a man shakes the hand of another", "they are shaking hands", "greeting by handshake"),
    "hug": ("a man hugs another", "they are hugging", "an embrace of two persons"),
    "kick": ("a man kicks somebody", "they are kicking", "kicking someone with the leg"),
    "point": ("a man is pointing ahead", "somebody points with his finger", "pointing at a thing"),
    "punch": ("a man punches somebody", "punching someone with the fist", "they throw a punch"),
    "push": ("a man pushes somebody", "they are pushing", "pushing someone away"),
    "bend": ("someone bending down to the ground", "a man bends over", "bends to pick up something"),
    "jump": ("someone jumping forward on both legs", "a man jumps ahead", "jumps along"),
    "jump_in_place": ("someone jumping on the spot", "a man jumps up and down in place", "jumps in place"),
    "jumping_jack": (
        "someone doing jumping jacks",
        "a man exercises a jumping jack",
        "a jack with spread arms and legs",
    ),
    "gallop_sideways": ("someone galloping to the side", "a man gallops sideways", "a sideways gallop"),
    "run": ("someone runs past", "a man is running", "running through the picture"),
    "walk": ("someone walks past", "a man is walking", "walking through the picture"),
    "wave_one_hand": ("someone waving one hand", "a man waves one arm", "a wave with a single hand"),
    "wave_two_hands": ("someone waving both arms", "a man waves two hands", "a wave with both hands"),
}
"""Sentences to ask with, none of which is trained on."""

SOUND_SENTENCES: Mapping[str, tuple[str, ...]] = {
    "dog_bark": ("a dog barks", "the sound of a barking dog"),
    "rain": ("rain is falling", "the sound of rain"),
    "sea_waves": ("waves of the sea", "the sound of ocean waves on the beach"),
    "baby_cry": ("a baby cries", "the sound of a crying baby"),
    "clock_tick": ("a clock ticks", "the sound of a ticking clock"),
    "sneeze": ("somebody sneezes", "the sound of a sneeze"),
    "helicopter": ("a helicopter flies", "the sound of a helicopter"),
    "chainsaw": ("a chainsaw is running", "the sound of a chainsaw cutting a tree"),
    "rooster": ("a rooster crows", "the sound of a cock crowing"),
    "fire_crackling": ("a fire crackles", "the sound of a crackling fire"),
}
"""Beside the authors' titles, to train on."""

_CREDIT = re.compile(r"- \[(\d-\d+-[A-Z])\.ogg\]:\s+clip derived from (.*?) \(https?://")
_SUFFIX = re.compile(r"\.(wav|aiff?|flac|mp3|ogg|m4a)$", re.IGNORECASE)


def sound_titles(folder: Path) -> dict[str, str]:
    """The authors' titles by ``fold-freesound-take``, cleaned; a title of no letters is left out.

    ``folder`` is ESC-10's. Raises ``DataError`` when its credits cannot be read.
    """
    path = folder / "README.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); get the data again") from error
    titles = {name: clean_title(title) for name, title in _CREDIT.findall(text)}
    if not titles:
        raise DataError(f"{path} credits no clip as `- [1-100-A.ogg]: clip derived from …`; get the data again")
    return {name: title for name, title in titles.items() if title}


def clean_title(title: str) -> str:
    """Without the file's ending, numbers and joints between words; lower case."""
    words = _SUFFIX.sub("", title.replace("\\u200b", "").strip())
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)
    words = re.sub(r"[^A-Za-zÀ-ÿ']+", " ", words)
    return " ".join(word for word in words.lower().split() if len(word) > 1 or word == "a")


def title_of(sound: Sound, titles: Mapping[str, str]) -> str | None:
    """A sound's title, if it has one."""
    return titles.get(sound.path.stem.partition("_")[2])


def source_of(sound: Sound) -> str:
    """The recording on freesound.org that it was cut from."""
    return sound.path.stem.split("-")[1]


def gmdcsa_sentences(folder: Path) -> dict[str, str]:
    """GMDCSA24's sentences by file name. Raises ``DataError`` for a row without one."""
    found = {}
    for table in sorted(folder.glob("Subject_*.csv")):
        stem = table.stem
        for line, row in enumerate(table.read_text(encoding="utf-8-sig").splitlines()[1:], start=2):
            cells = row.split(",")
            if len(cells) < 6 or not cells[4].strip():
                raise DataError(f"{table}:{line}: no sentence in the fifth column; get the data again")
            found[f"{stem}_{cells[0].partition('.')[0].strip()}.mp4"] = " ".join(cells[4].lower().split())
    return found


def is_template(recording: Recording) -> bool:
    """Whether a recording's sentences are made from its label."""
    return recording.spans[0].label in TRAIN and recording.dataset in ("fights", "ut-interaction", "weizmann")
