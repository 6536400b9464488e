"""The class of an image sample, from its cls or its json member."""

from __future__ import annotations

from data_pipeline.files.strict_json import parse_json
from data_pipeline.shards.members import Sample

MAX_LABEL = 10**9
MAX_JSON_BYTES = 2**20
JSON_KEY = "label"


def label_of(sample: Sample, json_key: str = JSON_KEY) -> int:
    """The class of a sample: the number in its cls member, or without one, what its json member has under `json_key`.

    Raises ValueError if that is not a number from 0 to a billion.
    """
    if "cls" in sample.members:
        text = sample.members["cls"]
        if not text.strip().isdigit() or len(text) > 20 or int(text) > MAX_LABEL:
            raise ValueError(f"member cls is {text[:20]!r}, expected a class number")
        return int(text)
    if "json" not in sample.members:
        raise ValueError(f"no label among the members {sorted(sample.members)}, expected cls or json")
    return _json_label(sample.members["json"], json_key)


def _json_label(content: bytes, key: str) -> int:
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"member json has {len(content)} bytes, at most {MAX_JSON_BYTES} are accepted")
    try:
        fields = parse_json(content)
    except ValueError as error:
        raise ValueError(f"member json is not valid JSON ({error})") from None
    value = fields.get(key) if isinstance(fields, dict) else None
    if type(value) is not int or not 0 <= value <= MAX_LABEL:
        raise ValueError(f"member json has {str(value)[:40]!r} as {key}, expected a class number; see json_label")
    return value
