"""A scheduler: two phases take turns that grow."""

from hybrid_jax import Count, Metrics, ScheduleState, settings


@settings
class Growing:
    """Gives ``first`` one step, ``second`` one, ``first`` two, ``second`` two, and so on, up to ``longest``."""

    first: str  # phase that begins
    second: str  # phase that follows
    longest: Count = 8  # steps of a turn at most

    @property
    def phases(self) -> tuple[str, ...]:
        """The two phases."""
        return self.first, self.second

    def choose(self, state: ScheduleState) -> str:
        """The phase whose turn the next step is in."""
        step, turn = sum(state.steps.values()), 1
        while step >= 2 * turn:
            step -= 2 * turn
            turn = min(turn + 1, self.longest)
        return self.first if step < turn else self.second

    def update(self, state: ScheduleState, phase: str, metrics: Metrics) -> ScheduleState:
        """Counts the step; the metrics do not matter, so the steps of each phase can be planned."""
        return state.after(phase)
