"""Modules that bring users' states up to date, and score candidates given them: plain tensors in and out, to be exported."""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sidrec_torchrec.codec.codec import fingerprint_of
from sidrec_torchrec.data.batches import with_features
from sidrec_torchrec.errors import DataError, SidrecError
from sidrec_torchrec.ranker.model import Context, count_labels, last_time
from sidrec_torchrec.ranker.readers import CodeReader, Requests
from sidrec_torchrec.ranker.serving import FEATURE_INPUTS, INPUTS, ServingRanker, export_any_size, ranges_of
from sidrec_torchrec.ranker.user_state import DTYPES, STATE_INPUTS, StateLayout, UserStates
from sidrec_torchrec.side.code_attention import Masses

_EVENTS = {name: INPUTS[name] for name in ("history_NW", "action_N", "time_N", "offsets_B1")}
UPDATE_INPUTS: dict[str, tuple[str, ...]] = STATE_INPUTS | _EVENTS
"""What ``UserStateUpdater`` takes, in this order, and the sizes of each; it gives the first, the states, again. With features of
events, their codes come last; so in the next."""
STATEFUL_INPUTS: dict[str, tuple[str, ...]] = STATE_INPUTS | {
    name: shape for name, shape in INPUTS.items() if name != "num_events_B"
}
"""What ``StatefulServingRanker`` takes, in this order, and the sizes of each."""


class UserStateUpdater(nn.Module):
    """Adds new events to what is kept of users, at a cost that does not depend on how many came before.

    To 1e-5 the states are those of the whole history, however it is cut. An event is added for good: its labels cannot be
    learned later, nor can it be taken out again; for that, make the state again from the events.

    Args:
        model: of a trained ranker that attends to codes, with learned queries, and neither blocks nor several
            histories; shares its parameters.

    Raises:
        SidrecError: on another ranker.

    Example::

        updater = UserStateUpdater(model)
        states = updater.append(updater.new(1), history_NW=words_NW, action_N=..., time_N=..., offsets_B1=...)
        (row,) = states.to_rows()                       # to be stored
        states = UserStates.from_rows([row], updater.layout)
    """

    def __init__(self, model: ServingRanker) -> None:
        super().__init__()
        self.reader = _reader_of(model)
        self.num_tasks = model.num_tasks
        self.features = model.features
        self.eval()

    @cached_property
    def layout(self) -> StateLayout:
        """Of its states; of the weights as they are when first asked for."""
        return _layout_of(self.reader, self.num_tasks)

    def new(self, B: int) -> UserStates:
        """Those of B users without events."""
        return UserStates.new(self.layout, B, self.reader.attention.output.weight.device)

    @torch.no_grad()
    def append(
        self,
        states: UserStates,
        *,
        history_NW: Tensor,
        action_N: Tensor,
        time_N: Tensor,
        offsets_B1: Tensor,
        feature_NF: Tensor | None = None,
    ) -> UserStates:
        """The states with each user's new events: those of user b, oldest first, stand from offsets b to b + 1.

        Args:
            states: of B users.
            history_NW: packed SIDs of all users' new events, one user after another; int64.
            action_N, time_N: of each event; int64.
            offsets_B1: rising from 0 to N; int64.
            feature_NF: codes of each event's features; int64. None where the ranker reads none.

        Raises:
            CodecMismatchError: on states of another ranker.
            DataError: on offsets that do not rise from 0 to N, another number of times or actions, a word that is no SID,
                or an action out of range.
        """
        _check_layout(states, self.layout)
        N = history_NW.shape[0]
        if action_N.shape != (N,) or time_N.shape != (N,):
            raise DataError(
                f"action_N and time_N have shapes {tuple(action_N.shape)} and {tuple(time_N.shape)}, expected ({N},)"
            )
        shape = None if feature_NF is None else tuple(feature_NF.shape)
        if shape != ((N, len(self.features)) if len(self.features) else None):
            names = ", ".join(self.features.sizes) or "nothing"
            raise DataError(f"feature_NF is of shape {shape}; this ranker reads of each of {N} events {names}")
        rising = offsets_B1.shape == (len(states) + 1,) and not (offsets_B1.diff() < 0).any()
        if not rising or offsets_B1[0] != 0 or offsets_B1[-1] != N:
            raise DataError(
                f"offsets_B1 must be {len(states) + 1} numbers that rise from 0 to {N}; got {offsets_B1.tolist()}"
            )
        try:
            self.reader.spec.check_words(history_NW)
        except ValueError as error:
            raise DataError(f"history_NW: {error}") from None
        return UserStates(self.layout, *self(*states.tensors, history_NW, action_N, time_N, offsets_B1, feature_NF))

    def forward(
        self,
        mass_BVKH: Tensor,
        lse_BKH: Tensor,
        count_B: Tensor,
        labels_B2T: Tensor,
        last_time_B: Tensor,
        history_NW: Tensor,
        action_N: Tensor,
        time_N: Tensor,
        offsets_B1: Tensor,
        feature_NF: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """As ``append``, of tensors as ``UserStates`` has them, unchecked; gives the first five anew."""
        begin_B, end_B = ranges_of(offsets_B1, count_B.shape[0])
        new = self.reader.learned_masses(history_NW, with_features(action_N, feature_NF), begin_B, end_B)
        masses = Masses(mass_BVKH, lse_BKH, count_B).merge(new)
        labels_B2T = labels_B2T + count_labels(action_N, begin_B, end_B, self.num_tasks)
        last_time_B = torch.where(end_B > begin_B, last_time(time_N, end_B), last_time_B)
        return masses.mass_MVPH.float(), masses.lse_MPH, masses.count_M, labels_B2T, last_time_B


class StatefulServingRanker(nn.Module):
    """``ServingRanker`` for users whose states are kept: learned queries and context come from the state.

    The candidates' own attention looks at time and candidate, so it still reads events: all of them, and predictions are
    ``ServingRanker``'s to 1e-5; or the newest alone, which costs less, while what is kept stays that of all.

    Args:
        model: as ``UserStateUpdater``'s; becomes a submodule.

    Raises:
        SidrecError: as ``UserStateUpdater``.
    """

    def __init__(self, model: ServingRanker) -> None:
        super().__init__()
        _reader_of(model)
        self.model = model
        self.eval()

    @cached_property
    def layout(self) -> StateLayout:
        """Of the states; of the weights as they are when first asked for."""
        return _layout_of(_reader_of(self.model), self.model.num_tasks)

    @torch.no_grad()
    def score(self, states: UserStates, **inputs: Tensor) -> Tensor:
        """As ``forward``, given the states of B users, the other inputs by name.

        Raises:
            CodecMismatchError: on states of another ranker.
        """
        _check_layout(states, self.layout)
        return self(*states.tensors, **inputs)

    def forward(
        self,
        mass_BVKH: Tensor,
        lse_BKH: Tensor,
        count_B: Tensor,
        labels_B2T: Tensor,
        last_time_B: Tensor,
        history_NW: Tensor,
        action_N: Tensor,
        time_N: Tensor,
        offsets_B1: Tensor,
        candidate_MW: Tensor,
        request_M: Tensor,
        request_time_B: Tensor,
        user_BF: Tensor,
        feature_NF: Tensor | None = None,
        known_MF: Tensor | None = None,
        user_values_V: Tensor | None = None,
        user_lengths_BL: Tensor | None = None,
    ) -> Tensor:
        """Predictions for each candidate and task, as ``ServingRanker``'s.

        Args:
            mass_BVKH, lse_BKH, count_B, labels_B2T, last_time_B: as ``UserStates`` has them, of all events of each request's
                user.
            history_NW, action_N, time_N, offsets_B1: as ``ServingRanker.forward``'s; of the events that candidates read.
            candidate_MW, request_M, request_time_B, user_BF, feature_NF, known_MF, user_values_V, user_lengths_BL: as
                ``ServingRanker.forward``'s.

        Returns:
            float [M]; with several tasks [M, K].
        """
        begin_B, end_B = ranges_of(offsets_B1, count_B.shape[0])
        requests = Requests(
            items=history_NW,
            has_item_N=history_NW[:, 0] >= 0,
            side_NC=with_features(action_N, feature_NF),
            time_N=time_N,
            begin_B=begin_B,
            end_B=end_B,
            candidates=candidate_MW,
            request_M=request_M,
            request_time_B=request_time_B,
            learned=Masses(mass_BVKH, lse_BKH, count_B),
        )
        context = Context.of_counts(
            order_S=count_B[request_M],
            time_S=request_time_B[request_M],
            last_S=last_time_B[request_M],
            reads_S=count_B[request_M] > 0,
            labels_S2K=labels_B2T[request_M],
        )
        users_BD = self.model.users(user_BF, user_values_V, user_lengths_BL)
        return self.model.score(requests, context, users_BD, known_MF)


def _reader_of(model: ServingRanker) -> CodeReader:
    """Refuses rankers of which nothing can be kept."""
    reader = model.reader
    if not isinstance(reader, CodeReader):
        raise SidrecError(
            "states are kept for rankers with --model.attention codes, and without --model.blocks and --model.histories-by"
        )
    if reader.queries.seeds_KD is None:
        raise SidrecError("this ranker has no learned queries to keep; train one with --model.learned-queries")
    return reader


def _layout_of(reader: CodeReader, num_tasks: int) -> StateLayout:
    attention = reader.attention
    return StateLayout(
        codec=reader.spec.fingerprint,
        weights=fingerprint_of(reader.state_dict(), "reader of codes"),
        values=attention.events.rows_VE.shape[0] + attention.bucket_value_AD.shape[0],
        queries=reader.queries.num_learned,
        heads=attention.num_heads,
        tasks=num_tasks,
    )


def export_updater(updater: UserStateUpdater) -> ExportedProgram:
    """As a program for any number of users and events, none included; see ``UPDATE_INPUTS``."""
    sizes = updater.layout.sizes | {"words": updater.reader.spec.num_words, "features": len(updater.features)}
    feature = {"feature_NF": FEATURE_INPUTS["feature_NF"]} if len(updater.features) else {}
    return export_any_size(updater, UPDATE_INPUTS | feature, sizes, DTYPES)


def export_stateful(model: StatefulServingRanker) -> ExportedProgram:
    """As a program for any number of requests, events and candidates, none included; see ``STATEFUL_INPUTS``."""
    inputs = STATEFUL_INPUTS | model.model.more_inputs
    return export_any_size(model, inputs, model.layout.sizes | model.model.fixed_sizes, DTYPES)


def _check_layout(states: UserStates, layout: StateLayout) -> None:
    layout.check(states.layout.header, "these states")
