"""Configs that are damaged, hostile, or bombs, by name: what is written, and what the error says of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"  # a file that code in a payload would leave where it runs
Make = Callable[[Path], Path]


def text(content: str | bytes) -> Make:
    """A file bad.yaml."""

    def make(folder: Path) -> Path:
        path = folder / "bad.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def special(build: Callable[[Path], object]) -> Make:
    """Something else in the place of bad.yaml."""

    def make(folder: Path) -> Path:
        build(folder / "bad.yaml")
        return folder / "bad.yaml"

    return make


def extending(build: Callable[[Path], object]) -> Make:
    """A file that extends something else."""

    def make(folder: Path) -> Path:
        build(folder / "base.yaml")
        return text("extends: base.yaml\n")(folder)

    return make


def chain(length: int) -> Make:
    """Files that extend one another."""

    def make(folder: Path) -> Path:
        for number in range(length):
            (folder / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
        (folder / f"{length}.yaml").write_text("run: r\n")
        return folder / "0.yaml"

    return make


def sparse(size: int) -> Make:
    return special(lambda path: (path.touch(), os.truncate(path, size)))


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))

# all: exit code 64, a line that names the file, and this
REFUSED: dict[str, tuple[Make, str]] = {
    "no config": (lambda folder: folder / "bad.yaml", "no such config file"),
    "config a folder": (special(Path.mkdir), "is a folder, no regular file"),
    "config a pipe": (special(os.mkfifo), "is a pipe, no regular file"),
    "config an endless device": (special(lambda path: path.symlink_to("/dev/zero")), "is a device, no regular file"),
    "config a link to itself": (special(lambda path: path.symlink_to(path)), "symbolic links"),
    "config of noise": (text(b"\x80\x04\x95\xff" * 9), "line 1: not valid YAML: no UTF-8 text"),
    "config with a null byte": (text(b"run: a\nseed: \x001\n"), "line 2: not valid YAML: character 0x0; remove it"),
    "config with an escape sequence": (text(b"run: '\x1b[31m'\n"), "not valid YAML: character 0x1b"),
    "config in UTF-16": (text("run: a\n".encode("utf-16")), "is UTF-16; save it as plain UTF-8"),
    "config with a byte order mark": (text(b"\xef\xbb\xbfrun: a\n"), "is UTF-8 with a byte order mark; save it as"),
    "config in Latin-1": (text("seed: 1\nrun: caf\xe9\n".encode("latin-1")), "line 2: not valid YAML: no UTF-8 text"),
    "config a list": (text("- 1\n- 2\n"), "holds a list, a config is a mapping of settings"),
    "config a number": (text("3\n"), "holds a int"),
    "empty config": (text(""), "holds a NoneType"),
    "config with a tab": (text("model:\n\tdepth: 2\n"), "line 2: not valid YAML"),
    "config with an open bracket": (text("run: [1, 2\nseed: 3\n"), "not valid YAML"),
    "config with two colons": (text("run: a: b\n"), "line 1: not valid YAML"),
    "config that is JSON cut short": (text('{"run": "a", '), "not valid YAML"),
    "a key twice": (text("run: 1\nmodel: {depth: 1, depth: 2}\n"), "line 2, column 19: 'depth' is given twice"),
    "a key that is a list": (text("? [a]\n: 1\n"), "line 1, column 3: a key that is no text"),
    "a key that is a number": (text("1: 2\n"), "the key '1' is no name of a setting"),
    "a key that is null": (text("~: 2\n"), "the key '~' is no name of a setting"),
    "a key of two lines": (text('"run\\nrun": 2\n'), "the key 'run\\nrun' is no name of a setting"),
    "a merge key": (text("<<: {run: a}\n"), "the key '<<' is no name of a setting"),
    "two documents": (text("run: a\n---\nrun: b\n"), "line 2, column 1: a second document begins here"),
    "a number that is none": (text("seed: .nan\n"), "line 1, column 7: .nan is no number that a setting can have"),
    "an infinite number": (text("seed: -.inf\n"), "-.inf is no number that a setting can have"),
    "an endless number": (text(f"seed: {'9' * 5000}\n"), "'seed' is"),
    "a number beyond measure": (text("run: r\noptimizer: {base_lr: 1e999}\n"), "it must be a finite number"),
    "a value of a megabyte": (text(f"run: {'x' * 10**6}\n"), "a value of 1000000 characters, at most 10000"),
    "an unknown key": (text("rnu: a\n"), "unknown key 'rnu'; did you mean 'run'?"),
    "a reference to the environment": (text("run: ${oc.env:HOME}\n"), "line 1, column 6: a reference ${...}"),
    "a reference in a list": (text("run: a\nmodel: {patch_nums: ['${oc.env:HOME}']}\n"), "a reference ${...}"),
    "extends nothing that is there": (text("extends: gone.yaml\n"), "gone.yaml: no such config file"),
    "extends itself": (text("extends: bad.yaml\n"), "extends itself through bad.yaml; break the circle"),
    "extends an endless device": (text("extends: /dev/zero\n"), "/dev/zero: is a device, no regular file"),
    "extends a pipe": (extending(os.mkfifo), "base.yaml: is a pipe, no regular file"),
    "extends a folder": (extending(Path.mkdir), "base.yaml: is a folder"),
    "extends a list": (text("extends: [a.yaml, b.yaml]\n"), "it must be the name of one file"),
    "extends a number": (text("extends: 3\n"), "extends is 3; it must be the name of one file"),
    "a chain of extends": (chain(40), "extends more than 16 files"),
    "a password in a setting": (
        text("run: r\ntracking: {uri: 'http://anna:Kanarie1@mlflow.example'}\n"),
        "setting 'tracking.uri' holds a password in a URL",
    ),
    "a token for a name": (text("run: hf_Kanarie1Kanarie1Kanarie1\n"), "setting 'run' holds a Hugging Face token"),
}
EXPLOITS: dict[str, tuple[Make, str]] = {
    "a call": (text(f"run: !!python/object/apply:os.mkdir ['{CANARY}']\n"), "a tag (tag:yaml.org,2002:python/object/"),
    "a new object": (text(f"run: !!python/object/new:os.mkdir ['{CANARY}']\n"), "a tag (tag:yaml.org,2002:python"),
    "a module": (text("run: !!python/module:antigravity\n"), "a tag (tag:yaml.org,2002:python/module:antigravity)"),
    "a name": (text("run: !!python/name:os.system\n"), "a tag (tag:yaml.org,2002:python/name:os.system)"),
    "a tag of one's own": (text("run: !exec 'mkdir canary'\n"), "a tag (!exec)"),
    "a tag for a key": (text("!!python/name:os.system run: a\n"), "a tag"),
    "a tag under another handle": (
        text(f"%TAG ! tag:yaml.org,2002:python/\n---\nrun: !object/apply:os.mkdir ['{CANARY}']\n"),
        "a tag (tag:yaml.org,2002:python/object/apply:os.mkdir)",
    ),
    "a resolver that reads the environment": (text("run: '${oc.env:PATH}'\n"), "a reference ${...}"),
    "a resolver that decodes": (text("run: ${oc.decode:'!!python/name:os.system'}\n"), "a reference ${...}"),
}
BOMBS: dict[str, tuple[Make, str]] = {
    "a billion laughs": (text(LAUGHS), "line 1, column 4: an anchor or alias (&a); write the value itself"),
    "an anchor that holds itself": (text("run: &a [*a]\n"), "an anchor or alias (&a)"),
    "a nest of lists": (text("run: " + "[" * 500_000), "nested deeper than 32 levels"),
    "a nest of mappings": (text("run: " + "{a: " * 200_000), "nested deeper than 32 levels"),
    "a nest of keys": (text("? " * 200_000), "line 1"),
    "a gigabyte of zeros": (sparse(2**30), "has 1073741824 bytes, at most 1048576 are accepted"),
    "a megabyte of small values": (text("run: [" + "0, " * 340_000 + "0]\n"), "more than 5000 names and values"),
    "a megabyte of keys": (text("".join(f"k{n}: 1\n" for n in range(100_000))), "more than 5000 names and values"),
    "a megabyte of colons": (text("run: 1" + ":59" * 340_000 + "\n"), "a value of 1020001 characters"),
    "a megabyte of quotes": (text("run: '" + "''" * 500_000 + "'\n"), "a value of 500000 characters"),
}
# settings on the command line, and what the error says
OVERRIDES: dict[str, tuple[str, str]] = {
    "no setting": ("run", "'run' is not a setting; write it as a.b=c"),
    "no name": ("=3", "'=3' is not a setting"),
    "an empty part": ("model..depth=3", "'model..depth=3' is not a setting"),
    "many parts": ("a" + ".a" * 10**5 + "=3", "is not a setting; write it as a.b=c"),
    "an open bracket": ("model.patch_nums=[1,2", "model.patch_nums=: line 2: not valid YAML"),
    "a tag": ("run=!!python/name:os.system", "run=: line 1, column 1: a tag"),
    "an anchor": ("run=&a x", "an anchor or alias"),
    "a reference": ("run=${oc.env:HOME}", "a reference ${...}"),
    "a second document": ("run=a\n--- b", "a second document"),
    "not a number": ("optimizer.base_lr=nan", "setting 'optimizer.base_lr' is nan; it must be a finite number"),
    "a nest": ("run=" + "[" * 10**5, "nested deeper than 32 levels"),
    "a password": ("tracking.uri=http://anna:Kanarie1@host", "setting 'tracking.uri' holds a password in a URL"),
}
