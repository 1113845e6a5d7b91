"""POST /tokenize and /detokenize, in vLLM's shapes. API process; must not know another dialect's wire
shapes, but the messages that it takes as OpenAI's have them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from ..errors import document_errors
from ..generation.admission import Admission, Admitted, decode_ids, tokenize_text
from ..generation.conversation import Conversation, render_conversation
from ..generation.names import enter_named
from ..generation.openai_conversation import end_turns, offer_functions, read_turns
from ..generation.rendering import defer_elements, render_answer
from ..generation.token_ids import id_list
from ..schemas.tokens import DetokenizeRequest, TokenizeRequest
from ..scopes import KEY_SCOPE

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter(tags=["tokens"], dependencies=[KEY_SCOPE])

RESPONSES = document_errors(404, 409, 422, 429, 503)


@router.post("/tokenize", responses=RESPONSES)
async def tokenize_prompt(body: TokenizeRequest, request: Request, admission: Admitted) -> Response:
    """The ids that a text, or a conversation by the adapter's template, has in a request's prompt."""
    tokenizer = await enter_named(body.model, admission)
    ids = await _prompt_ids(body, request, admission, tokenizer)
    answer = {
        "count": len(ids),
        "max_model_len": admission.base.context,
        "tokens": id_list(ids),
        "token_strs": None,
        "adapter": admission.adapter,
    }
    if body.return_token_strs:
        answer["token_strs"] = defer_elements(len(ids), (tokenizer.token_name(id) for id in ids))
    return await render_answer(answer, admission.adapter_headers())


@router.post("/detokenize", responses=RESPONSES)
async def detokenize_ids(body: DetokenizeRequest, admission: Admitted) -> Response:
    """The text of these ids, special tokens by their names."""
    tokenizer = await enter_named(body.model, admission)
    admission.check_ids(body.tokens, "tokens")
    text = await decode_ids(tokenizer, body.tokens, special=True)
    return await render_answer({"prompt": text, "adapter": admission.adapter}, admission.adapter_headers())


async def _prompt_ids(
    body: TokenizeRequest, request: Request, admission: Admission, tokenizer: AdapterTokenizer
) -> tuple[int, ...]:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return await tokenize_text(request, tokenizer, body.prompt, special)
    conversation = Conversation(
        read_turns(body.messages or ()),
        offer_functions([tool.function for tool in body.tools or ()]),
        template=end_turns(
            body.chat_template_kwargs or {}, body.add_generation_prompt, body.continue_final_message
        ),
    )
    return await render_conversation(
        admission, tokenizer, conversation, special=bool(body.add_special_tokens)
    )
