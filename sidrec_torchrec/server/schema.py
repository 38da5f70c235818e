"""What a request looks like in JSON: one user, what came before, and the candidates."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sidrec_torchrec.server.limits import Refused

LAST_TIME = 1 << 53  # what every JSON reader can hold; and no difference of two times overflows
Word = Annotated[int, Field(ge=-1, lt=1 << 63)]
Label = Annotated[int, Field(ge=0, le=1)]
Time = Annotated[int, Field(ge=0, le=LAST_TIME)]
Model = TypeVar("Model", bound=BaseModel)
_TOLD = {
    "extra_forbidden": "there is no such field",
    "missing": "is missing",
}  # where pydantic's own words would not help


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Items(_Part):
    """N items, by their SIDs or by their ids.

    Args:
        words: of each item its words, those of all SIDs side by side, as ``sids.parquet`` has them; -1 in all of them for an
            event whose item has no SID.
        items: instead of words, ids as ``items.parquet`` has them; for servers with ``--sids``. An event's may be null.
        features: by name a value for each item; see ``/metadata``.
    """

    words: list[list[Word]] | None = None
    items: list[Any] | None = None
    features: dict[str, list[Any]] = {}


class History(Items):
    """What the user did before, oldest first.

    Args:
        labels: by task a label for each event: 1, 0, or null where it is not known yet.
        time: of each event, as ``events.parquet`` has it.
    """

    labels: dict[str, list[Label | None]] = {}
    time: list[Time] = []


class ScoreRequest(_Part):
    """Which of these items will this user like now?

    Args:
        time: now.
        candidates: what is asked about.
        history: what came before; none if it is left out.
        num_events: that the user had so far, those not sent included; as many as are sent, if it is left out.
        user: features of the user, by name.
        fingerprints: of the codecs whose SIDs these are, by the names in ``/metadata``; another one is answered 409.
    """

    time: Time
    candidates: Items
    history: History | None = None
    num_events: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    user: dict[str, Any] = {}
    fingerprints: dict[str, str] = {}


def parse(body: bytes) -> ScoreRequest:
    """A request of its JSON.

    Raises:
        Refused: 422 on what is no JSON, or has another shape; names the first field that is wrong.
    """
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        said = _TOLD.get(first["type"]) or first["msg"][:1].lower() + first["msg"][1:]
        raise Refused(422, f"{place(*first['loc'])}: {said}") from None


def place(*parts: str | int) -> str:
    """How errors name a field: ``history.time[3]``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".") or "the body"
