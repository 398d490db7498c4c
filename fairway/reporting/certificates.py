"""What the certify stage found out about an evaluator, and its word over all seeds."""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fairway.certification.accounting import Verdict
from fairway.runtime.errors import UserError
from fairway.runtime.files import require_file

Standing = Literal["legal", "illegal", "unproven"]


class Condition(BaseModel):
    """One condition of a meaningful score: the verdict, why, and what was measured to reach it."""

    model_config = ConfigDict(strict=True, frozen=True)

    verdict: Verdict
    why: str
    evidence: dict[str, Any]


class Certificate(BaseModel):
    """The certificate of one evaluator on one seed. Keys beyond these are the certify stage's own business."""

    model_config = ConfigDict(strict=True, frozen=True)

    evaluator: str
    legal: bool | Literal["unproven"]
    conditions: dict[str, Condition] = Field(min_length=1)
    certify_s: float

    @property
    def standing(self) -> Standing:
        """The verdict in a word."""
        if isinstance(self.legal, bool):
            return "legal" if self.legal else "illegal"
        return "unproven"


def load_certificate(path: Path, evaluator: str, made_by: str) -> Certificate:
    """Read a certificate.json. Raises UserError if it is missing, is not one, or belongs to another evaluator."""
    try:
        certificate = Certificate.model_validate_json(require_file(path, made_by).read_bytes())
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{path}: not a certificate: {key}: {fault['msg']}; `{made_by}` makes it anew") from None
    if certificate.evaluator != evaluator:
        raise UserError(f"{path}: a certificate of {certificate.evaluator!r}, expected {evaluator!r}")
    return certificate


def standing(certificates: list[Certificate]) -> Standing:
    """An evaluator is legal if it is so on every seed, and illegal if it is so on any."""
    found = {certificate.standing for certificate in certificates}
    if "illegal" in found:
        return "illegal"
    return "legal" if found == {"legal"} else "unproven"


def worst(certificates: list[Certificate], condition: str) -> Condition | None:
    """The seed's finding that decides about a condition: a failure before a doubt before a pass; None if untested."""
    found = [certificate.conditions[condition] for certificate in certificates if condition in certificate.conditions]
    return min(found, key=lambda finding: ("fail", "unproven", "pass").index(finding.verdict), default=None)


def broken(certificates: list[Certificate]) -> list[str]:
    """Names of the conditions that fail on any seed, in the certificate's order."""
    names = dict.fromkeys(name for certificate in certificates for name in certificate.conditions)
    return [name for name in names if (finding := worst(certificates, name)) and finding.verdict == "fail"]
