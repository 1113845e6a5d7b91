"""instructor, as it is, in its default mode, which forces a tool; on an adapter whose template shows tools
and on one whose template shows none.
"""

from __future__ import annotations

import instructor
import openai
from given import KEY, SPOKEN_ORDER, V1, Order, tell

ORDERED = [{"role": "user", "content": SPOKEN_ORDER}]
client = instructor.from_openai(openai.OpenAI(base_url=V1, api_key=KEY))
ASKED = {"response_model": Order, "messages": ORDERED, "temperature": 0, "max_retries": 0}

*_, partial = client.chat.completions.create_partial(model="caller", **ASKED)
tell(
    structured=client.chat.completions.create(model="caller", **ASKED).model_dump(),
    partial=partial.model_dump(),
    unshown=sorted(client.chat.completions.create(model="orders", **ASKED).model_dump()),
)
