"""Reads a given answer and what the model predicts for each of its tokens."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvlocal.chat.session import ChatSession


def read_answer(session: ChatSession, content: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Reads a given answer to the last user turn, inside `ChatSession.hold`, and returns its tokens, int32 [n], and what the model predicted, float32
    [n, n_vocab].

    Row i holds the logits from which token i would have been drawn. The session keeps the logits of n_ubatch tokens.
    """
    cache, prediction = session.cache, session.prediction
    rows, tokens = [], []
    passages = session.answer_passages(content)
    cache.ledger.begin_segment("assistant")
    for passage in passages:
        ids = passage.tokens
        while len(ids):
            chunk, ids = np.split(ids, [cache.room_in_answer])
            assert prediction is not None
            before = prediction[None]
            cache.append(chunk, "decode", logits="all" if passage.text else "last")
            prediction = cache.context.logits()
            if passage.text:
                tokens.append(chunk)
                rows += [before, cache.context.logits_all()[:-1]]
    return np.concatenate(tokens), np.concatenate(rows)
