"""What the output and error files of a batch say of each request."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from nuner_jax.annotate.journal.journal import Finish
from nuner_jax.annotate.money import Prices
from nuner_jax.annotate.prompts import Prompt
from nuner_jax.annotate.request.answers import (
    EndpointFault,
    EndpointStop,
    MalformedAnswer,
    error_within,
    fault_outcomes,
    judge,
    message_of,
    read_answer,
    status_error,
)
from nuner_jax.annotate.request.endpoints import api_key, without_key
from nuner_jax.annotate.request.retry import PATIENCE, rejects_everything
from nuner_jax.annotate.request.work import body_for
from nuner_jax.annotate.units import Outcome, Pending, Usage
from nuner_jax.errors import NunerError


@dataclass
class Results:
    """The results of one batch, judged, with what was strange about them.

    waiting: units of the requests without a result yet, by the request's name, which is its `custom_id`.
    proven: whether a unit was ever answered. rejected: requests that the endpoint found wrong before one was.
    repeated: lines of a request that had one before. foreign: lines of requests that are not open in this batch.
    broken: lines that cannot be read. without: requests that no line is about.
    """

    config: ConfigDict
    prompt: Prompt
    prices: Prices
    waiting: dict[str, list[Pending]]
    proven: bool
    rejected: int = 0
    repeated: int = 0
    foreign: int = 0
    broken: int = 0
    without: int = 0
    _stop: EndpointStop | None = None
    _rejection: str = ""
    _seen: set[str] = field(default_factory=set)

    def of_lines(self, paths: Iterable[Path]) -> Iterator[Finish]:
        """The end of each request that a line is about; its first line counts."""
        for line in _lines(paths, api_key(self.config.endpoint)):
            if line is None:
                self.broken += 1
            elif line["custom_id"] in self._seen:
                self.repeated += 1
            elif (units := self.waiting.pop(line["custom_id"], None)) is None:
                self.foreign += 1
            else:
                self._seen.add(line["custom_id"])
                yield self._end(line, units)

    def of_the_rest(self, status: str) -> Iterator[Finish]:
        """The end of each request that no line was about; it is asked for again.

        What a batch did not come to before it expired or was cancelled is not billed. Anything else may have been.
        """
        certain = status in ("expired", "cancelled") and not self.broken
        fault = EndpointFault("no_result", f"batch {status}", retry=True, billed="no" if certain else "unknown")
        self.without = len(self.waiting)
        while self.waiting:
            yield self._fault(*self.waiting.popitem(), fault)

    def oddities(self) -> str:
        """What was strange, for a person; "" if nothing was."""
        counts = {
            "without a result": self.without,
            "repeated lines": self.repeated,
            "lines of no open request": self.foreign,
            "unreadable lines": self.broken,
        }
        return "".join(f", {count:,} {name}" for name, count in counts.items() if count)

    def reason_to_stop(self) -> NunerError | None:
        """The error that ends the run, if every further batch would meet the same."""
        if self._stop or self.proven or not self.rejected:
            return self._stop
        endpoint = self.config.endpoint
        return rejects_everything(f"{endpoint.model} at {endpoint.base_url}", self.rejected, self._rejection)

    def _end(self, line: Mapping[str, Any], units: Sequence[Pending]) -> Finish:
        response = line.get("response") or {}
        if error := self._error(line, response):
            return self._fault(line["custom_id"], units, error)
        try:
            answer = read_answer(response.get("body"))
        except MalformedAnswer as error:
            fault = EndpointFault("malformed_answer", str(error), retry=True, billed="unknown")
            return self._fault(line["custom_id"], units, fault)
        self.proven = True
        outcomes = judge(answer, self.prompt, units, self.config.request.max_attempts)
        if answer.usage == Usage():  # the endpoint does not count
            return Finish(line["custom_id"], outcomes, answer.id, None, unsure=self._worst(units))
        return Finish(line["custom_id"], outcomes, answer.id, answer.usage, self.prices.of(answer.usage))

    def _error(self, line: Mapping[str, Any], response: Mapping[str, Any]) -> EndpointFault | EndpointStop | None:
        """The error of a line: an HTTP status, or the batch's own reason why it was not executed; None: an answer."""
        status, body = response.get("status_code"), response.get("body")
        if isinstance(status, int) and status != 200:
            return status_error(status, body, {}, self.config.endpoint)
        if status == 200 or body:
            return error_within(body, self.config.endpoint)
        error = line.get("error") or {}
        reason = error.get("code") if isinstance(error, dict) else None
        return EndpointFault(str(reason or "no_result"), message_of(error), retry=True)

    def _fault(self, name: str, units: Sequence[Pending], error: EndpointFault | EndpointStop) -> Finish:
        if isinstance(error, EndpointStop):
            self._stop = error
            return Finish(name, [Outcome(unit.id, "retry", error=error.reason) for unit in units])
        if error.reason == "bad_request" and not self.proven:
            # Perhaps the config is wrong, and no unit: they are not given up before one was answered.
            self.rejected += 1
            self._rejection = error.detail
            error = EndpointFault(error.reason, error.detail, retry=True)
        most = self.config.request.max_attempts
        if error.retry and error.billed == "no":  # of the endpoint's own making: it had no answer for the unit
            most *= PATIENCE
        return Finish(
            name, fault_outcomes(units, error, most), unsure=self._worst(units) if error.billed == "unknown" else 0
        )

    def _worst(self, units: Sequence[Pending]) -> int:
        return self.prices.worst(body_for(self.config, self.prompt, units), self.config.endpoint.max_tokens)


def _lines(paths: Iterable[Path], key: str) -> Iterator[dict[str, Any] | None]:
    """The JSON objects of files of results, with the key blotted out; None for a line without `custom_id`."""
    for path in paths:
        with path.open("rb") as lines:
            for raw in filter(None, map(bytes.strip, lines)):
                try:
                    line = json.loads(without_key(raw.decode(), key))
                except (ValueError, RecursionError):
                    line = None
                match line:
                    case {"custom_id": str(), **rest} if isinstance(rest.get("response") or {}, dict):
                        yield line
                    case _:
                        yield None
