"""Numbers of nested results, side by side, to be compared within a tolerance."""

from typing import Any


def figures(value: Any, name: str = "") -> dict[str, float]:
    """By path all numbers of a JSON value; -1 for null. Texts are left out."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: number for key, own in items for path, number in figures(own, f"{name}/{key}").items()}
    return {} if isinstance(value, str) else {name: -1 if value is None else value}
