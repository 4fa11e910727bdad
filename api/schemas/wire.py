"""What every body and query has in common: bodies are strict, queries are text, answers are closed."""

from typing import Annotated, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from shared import limits

Item = TypeVar("Item")


class In(BaseModel):
    """A JSON body, or a part of one: no unknown keys, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Query(BaseModel):
    """Query parameters: text in, typed values out, no unknown names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Out(BaseModel):
    """An answer. Every key is always there; what does not apply is null."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_mode_override="serialization")


class ErrorDetail(Out):
    """`message` is for people, `code` is stable for programs, `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Out):
    """What every failure answers, whatever its status."""

    error: ErrorDetail


class Listed(Out, Generic[Item]):
    """One page of a list. The next page is the same request with `after` set to `last_id`."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None = None
    last_id: str | None = None
    has_more: bool = False

    @classmethod
    def of(cls, items: list[Item], *, has_more: bool = False) -> Self:
        """One page; what is listed has an `id`."""
        named = [str(getattr(item, "id", "")) for item in (items[:1] + items[-1:])]
        return cls(data=items, first_id=named[0], last_id=named[-1], has_more=has_more) if named else cls(data=[])


class Deleted(Out):
    """What a DELETE answers."""

    id: str
    object: str
    deleted: Literal[True] = True


def stored_text(text: str) -> str:
    """Refuse U+0000, which PostgreSQL cannot store."""
    if "\0" in text:
        raise PydanticCustomError("nul_character", "must not hold the character U+0000")
    return text


def whole_number(text: object) -> object:
    """Turn decimal digits into an int, and nothing else: no sign, no blanks, no '1_000', no '1.0'."""
    if isinstance(text, str):
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise PydanticCustomError("whole_number", "must be a whole number")
        return int(text)
    return text


def true_or_false(text: object) -> object:
    """Turn 'true' and 'false' into a bool, and nothing else."""
    if isinstance(text, str):
        if text not in ("true", "false"):
            raise PydanticCustomError("true_or_false", "must be true or false")
        return text == "true"
    return text


Flag = Annotated[bool, BeforeValidator(true_or_false)]
PageSize = Annotated[int, Field(ge=1, le=limits.MAX_PAGE), BeforeValidator(whole_number)]
ModelName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(stored_text)]
MetadataKey = Annotated[str, Field(min_length=1, max_length=limits.MAX_METADATA_KEY), AfterValidator(stored_text)]
MetadataValue = Annotated[str, Field(max_length=limits.MAX_METADATA_VALUE), AfterValidator(stored_text)]
Metadata = Annotated[dict[MetadataKey, MetadataValue], Field(max_length=limits.MAX_METADATA_PAIRS)]


class PageQuery(Query):
    """`limit` items after the item with id `after`."""

    limit: PageSize = 20
    after: str | None = None
