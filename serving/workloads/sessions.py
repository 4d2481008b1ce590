"""Conversations: which requests go on from which, and what they share.

Owns: the model of sessions and the content of their prompts.
Must not know: arrival processes, output lengths.
Source: fitted to the conversation trace of kvcache-ai/Mooncake (FAST25-release/traces, arXiv:2407.00079), see
configs/workload/conversation.yaml.

A session is a stream of tokens, and turn k's prompt its first n_k tokens after the system prompt that all sessions
share. Some turns branch off: they keep only a part of what came before, and the next turn goes on as if they had not
been.
Sessions decide the order of the requests only, arrivals the instants: so many requests pass between two turns as do in
the time between them at the given rate.
"""

from dataclasses import dataclass

import numpy as np

from serving.workloads.quantiles import Floats, Quantiles
from serving.workloads.requests import Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionModel:
    """How conversations go; lengths in tokens."""

    system_prompt_tokens: int
    first_tokens: Quantiles  # prompt of the first turn
    bounds_tokens: tuple[int, ...]  # that part prompts in classes by their length
    first_go_on: tuple[float, ...]  # probability of a second turn, for each class of the first prompt
    go_on: tuple[float, ...]  # of another turn after the second, the third, ...; the last of all further
    large_growth_tokens: int  # a turn that adds so much, a document, is more often the last
    go_on_after_large: float
    gap_s: Quantiles  # between two turns
    growth_tokens: Quantiles  # of the prompt from turn to turn
    branch: tuple[float, ...]  # share of the later turns that branch off, for each class of the prompt before
    branch_kept: Quantiles  # share of the prompt before that such a turn keeps
    branch_length: Quantiles  # its length, in lengths of the prompt before


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPrompts:
    """Prompts in the order of their arrival; shape (N,) each."""

    session: Ints
    num_tokens: Ints
    num_session_tokens: Ints  # what comes from the session, the system prompt included; the rest is its own


def draw_sessions(model: SessionModel, rng: np.random.Generator, count: int, *, rate_per_s: float) -> SessionPrompts:
    """The first `count` requests of sessions that start one after the other, at `rate_per_s` requests a second.

    None has begun before: as in the trace, the share of turns that go on rises in the first minutes.
    """
    session = np.arange(count)  # the first `count` requests are of the first `count` sessions
    after_s = np.zeros(count)  # since the session's start
    tokens = model.first_tokens.draw(rng, count)  # of the session
    turns = [(session, after_s, tokens, tokens)]
    goes_on = rng.random(count) < _by_class(model, model.first_go_on, tokens)
    while goes_on.any():
        session, after_s, tokens = session[goes_on], after_s[goes_on], tokens[goes_on]
        after_s = after_s + model.gap_s.draw(rng, len(session))
        growth = model.growth_tokens.draw(rng, len(session))
        is_branch = rng.random(len(session)) < _by_class(model, model.branch, tokens)
        branch_length = tokens * model.branch_length.draw(rng, len(session))
        branch_kept = np.minimum(tokens * model.branch_kept.draw(rng, len(session)), branch_length)
        grown = tokens + growth
        turns.append(
            (session, after_s, np.where(is_branch, branch_length, grown), np.where(is_branch, branch_kept, grown))
        )
        tokens = np.where(is_branch, tokens, grown)
        probability = model.go_on[min(len(turns) - 2, len(model.go_on) - 1)]
        is_large = ~is_branch & (growth >= model.large_growth_tokens)
        goes_on = rng.random(len(session)) < np.where(is_large, model.go_on_after_large, probability)
    sessions, times_s, num_tokens, num_shared = zip(*turns, strict=True)
    session = np.concatenate(sessions)
    starts_s = np.arange(count) * (len(session) / count / rate_per_s)
    order = np.argsort(starts_s[session] + np.concatenate(times_s), kind="stable")[:count].copy()
    return SessionPrompts(
        session=session[order],
        num_tokens=np.rint(np.concatenate(num_tokens)[order]).astype(np.int64),
        num_session_tokens=np.rint(np.concatenate(num_shared)[order]).astype(np.int64),
    )


def _by_class(model: SessionModel, values: tuple[float, ...], tokens: Floats) -> Floats:
    return np.asarray(values)[np.searchsorted(model.bounds_tokens, tokens, side="right")]
