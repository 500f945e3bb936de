"""The answers of the Responses API that are kept: GET and DELETE /v1/responses/ID, GET /v1/responses/ID/input_items."""

from __future__ import annotations

import re
import uuid
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ferrum_jax.server.errors import ApiError
from ferrum_jax.server.replies import Reply
from ferrum_jax.server.service import service_of
from ferrum_jax.server.store import Kept

_MOST = 100  # items on a page


def items_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The input of a request as items, each with an id and with its text as a part."""
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [_item(item) for item in items]


def _item(item: dict[str, Any]) -> dict[str, Any]:
    kind = item.get("type", "message")
    found = {"id": f"{'msg' if kind == 'message' else 'item'}_{uuid.uuid4().hex}", "type": kind} | item
    if isinstance(content := item.get("content"), str):
        part = "output_text" if item.get("role") == "assistant" else "input_text"
        found["content"] = [{"type": part, "text": content}]
    return found


async def response(request: HttpRequest) -> Response:
    """GET or DELETE of one."""
    kept = await _found(request)
    if request.method == "DELETE":
        await service_of(request).store.remove(kept.response["id"])
        return Reply({"id": kept.response["id"], "object": "response", "deleted": True})
    return Reply(kept.response)


async def input_items(request: HttpRequest) -> Response:
    """The input that led to one, the last item first unless `order` is asc; `limit` of them, `after` one."""
    items, query = (await _found(request)).items, request.query_params
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise ApiError(400, f"order: is asc or desc, not {order!r:.40}", param="order")
    if not re.fullmatch("[0-9]{1,3}", limit) or not 1 <= int(limit) <= _MOST:
        raise ApiError(400, f"limit: is a number from 1 to {_MOST}, not {limit!r:.40}", param="limit")
    items = items if order == "asc" else items[::-1]
    if after is not None:
        places = [place for place, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(400, f"after: there is no item {after!r:.80}", param="after")
        items = items[places[0] + 1 :]
    page = items[: int(limit)]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    return Reply({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": len(items) > len(page)})


async def _found(request: HttpRequest) -> Kept:
    id = request.path_params["id"]
    kept = await service_of(request).store.get(id)
    if kept is None:
        raise ApiError(404, f"the response {id!r:.80} is not kept here", param="response_id")
    return kept
