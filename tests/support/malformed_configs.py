"""Configs that are damaged, hostile or bombs, by name: what is written, and words of the error."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"  # a file that code in a payload would leave where it runs
Make = Callable[[Path], Path]


def text(content: str | bytes) -> Make:
    """Write a file bad.yaml."""

    def make(folder: Path) -> Path:
        path = folder / "bad.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def special(build: Callable[[Path], object]) -> Make:
    """Put something else in the place of bad.yaml."""

    def make(folder: Path) -> Path:
        build(folder / "bad.yaml")
        return folder / "bad.yaml"

    return make


def extending(build: Callable[[Path], object]) -> Make:
    """Write a file that extends something else."""

    def make(folder: Path) -> Path:
        build(folder / "base.yaml")
        return text("extends: base.yaml\n")(folder)

    return make


def sparse(size: int) -> Make:
    """Make a file of that many zeros that takes no room on the disk."""
    return special(lambda path: (path.touch(), os.truncate(path, size)))


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))

# Each ends with exit code 64 and a line that names the file or the setting, and has these words.
REFUSED: dict[str, tuple[Make, str]] = {
    "no config": (lambda folder: folder / "bad.yaml", "no such config file"),
    "a folder": (special(Path.mkdir), "is a folder, no regular file"),
    "a pipe": (special(os.mkfifo), "is a pipe, no regular file"),
    "an endless device": (special(lambda path: path.symlink_to("/dev/zero")), "is a device, no regular file"),
    "a link to itself": (special(lambda path: path.symlink_to(path)), "symbolic links"),
    "noise": (text(b"\x80\x04\x95\xff" * 9), "not plain YAML: unacceptable character #x0080"),
    "a null byte": (text(b"run: a\nseed: \x001\n"), "not plain YAML: unacceptable character #x0000"),
    "an escape sequence": (text(b"run: '\x1b[31m'\n"), "not plain YAML: unacceptable character #x001b"),
    "Latin-1": (text("seed: 1\nrun: caf\xe9\n".encode("latin-1")), "save it as UTF-8"),
    "a list": (text("- 1\n- 2\n"), "holds no settings; a config is a mapping"),
    "a number": (text("3\n"), "holds no settings"),
    "nothing": (text(""), "holds no settings"),
    "a tab": (text("model:\n\tdepth: 2\n"), "line 2, column 1: not plain YAML"),
    "an open bracket": (text("run: [1, 2\nseed: 3\n"), "not plain YAML"),
    "two colons": (text("run: a: b\n"), "line 1, column 7: not plain YAML"),
    "a key twice": (
        text("run: 1\nmodel: {depth: 1, depth: 2}\n"),
        "line 2, column 19: not plain YAML: 'depth' is given",
    ),
    "a key that is a list": (text("? [a]\n: 1\n"), "line 1, column 3: not plain YAML: a key that is no text"),
    "a key that is null": (text("~: 2\n"), "unknown key '~'"),
    "a merge key": (text("<<: {run: a}\n"), "unknown key '<<'"),
    "two documents": (text("run: a\n---\nrun: b\n"), "line 2, column 1: not plain YAML: expected a single document"),
    "no finite number": (text("optimizer: {base_lr: -.inf}\n"), "'optimizer.base_lr' is '-.inf', expected float"),
    "a number beyond measure": (text("optimizer: {base_lr: 1e999}\n"), "it must be a finite number"),
    "an endless number": (text(f"seed: {'9' * 5000}\n"), "'seed' is"),
    "an unknown key": (text("rnu: a\n"), "unknown key 'rnu'; did you mean 'run'?"),
    "a reference": (text("run: ${oc.env:HOME}\n"), "setting 'run' has a reference ${...}"),
    "a reference in a list": (text("model: {patch_nums: ['${oc.env:HOME}']}\n"), "'model.patch_nums' has a reference"),
    "a reference in a section": (text("model: ${oc.env:HOME}\n"), "setting 'model' has a reference"),
    "a list in a list": (
        text("model: {patch_nums: [[1], 2]}\n"),
        "'model.patch_nums' is [['1'], '2']; it holds a list",
    ),
    "an extended file that is gone": (text("extends: gone.yaml\n"), "gone.yaml: no such config file"),
    "an extended device": (text("extends: /dev/zero\n"), "/dev/zero: is a device, no regular file"),
    "an extended pipe": (extending(os.mkfifo), "base.yaml: is a pipe, no regular file"),
    "itself extended": (text("extends: bad.yaml\n"), "extends itself through bad.yaml; break the circle"),
    "two files extended": (text("extends: [a.yaml, b.yaml]\n"), "it must be the name of one file"),
    "a password": (text("tracking: {uri: 'http://anna:Kanarie1@host'}\n"), "setting 'tracking.uri' holds a password"),
    "a token": (text("run: hf_Kanarie1Kanarie1Kanarie1\n"), "setting 'run' holds a Hugging Face token"),
    "a token in a list": (text("model: {patch_nums: [hf_Kanarie1Kanarie1Kanarie1]}\n"), "holds a Hugging Face token"),
}
EXPLOITS: dict[str, tuple[Make, str]] = {
    "a call": (text(f"run: !!python/object/apply:os.mkdir ['{CANARY}']\n"), "a tag (tag:yaml.org,2002:python/object/"),
    "a new object": (text(f"run: !!python/object/new:os.mkdir ['{CANARY}']\n"), "a tag (tag:yaml.org,2002:python"),
    "a module": (text("run: !!python/module:antigravity\n"), "a tag (tag:yaml.org,2002:python/module:antigravity)"),
    "a tag of one's own": (text("run: !exec 'mkdir canary'\n"), "a tag (!exec)"),
    "a tag for a key": (text("!!python/name:os.system run: a\n"), "a tag"),
    "a tag under another handle": (
        text(f"%TAG ! tag:yaml.org,2002:python/\n---\nrun: !object/apply:os.mkdir ['{CANARY}']\n"),
        "a tag (tag:yaml.org,2002:python/object/apply:os.mkdir)",
    ),
    "a resolver that decodes": (text("run: ${oc.decode:'!!python/name:os.system'}\n"), "a reference ${...}"),
}
BOMBS: dict[str, tuple[Make, str]] = {
    "a billion laughs": (text(LAUGHS), "line 1, column 4: not plain YAML: an anchor or alias; write the value itself"),
    "an anchor that holds itself": (text("run: &a [*a]\n"), "an anchor or alias"),
    "a nest of lists": (text("run: " + "[" * 30_000), "nested too deeply"),
    "a nest of mappings": (text("run: " + "{a: " * 8_000), "nested too deeply"),
    "a nest of keys": (text("? " * 16_000), "nested too deeply"),
    "a gigabyte of zeros": (sparse(2**30), "has 1073741824 bytes, at most 32768 are accepted"),
    "a megabyte": (text(f"run: {'x' * 10**6}\n"), "has 1000006 bytes, at most 32768 are accepted"),
    "many small values": (text("run: [" + "0, " * 10_000 + "0]\n"), "'run' is ["),
    "many keys": (text("".join(f"k{n}: 1\n" for n in range(3_000))), "unknown key 'k0'"),
}
# Settings on the command line, and words of the error.
OVERRIDES: dict[str, tuple[str, str]] = {
    "no setting": ("run", "'run' is not a setting; write it as a.b=c"),
    "no name": ("=3", "'=3' is not a setting"),
    "an empty part": ("model..depth=3", "'model..depth=3' is not a setting"),
    "many parts": ("a" + ".a" * 10**5 + "=3", "is not a setting; write it as a.b=c"),
    "an open bracket": ("model.patch_nums=[1,2", "model.patch_nums=: line 1, column 5: not plain YAML"),
    "a tag": ("run=!!python/name:os.system", "run=: line 1, column 1: not plain YAML: a tag"),
    "a reference": ("run=${oc.env:HOME}", "a reference ${...}"),
    "not a number": ("optimizer.base_lr=nan", "setting 'optimizer.base_lr' is nan; it must be a finite number"),
    "a nest": ("run=" + "[" * 10**5, "nested too deeply"),
    "a password": ("tracking.uri=http://anna:Kanarie1@host", "setting 'tracking.uri' holds a password in a URL"),
}
