"""What every section of a recipe is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """A group of settings. Unknown keys are refused, so that a misspelt one never passes in silence."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
