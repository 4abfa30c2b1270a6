"""What a provider may cost: the worst case of a call is held back before it is made, and settled after it."""

from __future__ import annotations

import asyncio

from selfroute.errors import CloudError


class LimitError(CloudError):
    """The spend limit is reached."""


class Spending:
    """USD spent and held back, and the limit on both; None: no limit."""

    def __init__(self, limit_usd: float | None) -> None:
        self._limit_usd = limit_usd
        # What was paid, a call that broke off counted at its worst; and the worst of the calls under way.
        self._spent_usd = self._reserved_usd = self._abandoned_usd = 0.0
        self._settled = asyncio.Condition()

    def carry(self, spent_usd: float) -> None:
        """Count what was spent before."""
        self._spent_usd += spent_usd

    def abandoned_usd(self) -> float:
        """What attempts that broke off since this was last asked may have cost."""
        abandoned, self._abandoned_usd = self._abandoned_usd, 0.0
        return abandoned

    async def reserve(self, worst_usd: float) -> None:
        """Hold back the worst case of a call; where others hold back too much, wait for them.

        Raises:
            LimitError: with it the limit might be passed.
        """
        limit = self._limit_usd
        async with self._settled:
            while limit is not None and self._spent_usd + self._reserved_usd + worst_usd > limit:
                if self._spent_usd + worst_usd > limit:
                    raise LimitError(
                        f"the spend limit of {limit:g} USD is reached: {self._spent_usd:.4f} are spent, and a call may "
                        f"cost {worst_usd:.4f} (raise spend_limit_usd, or lower max_tokens)"
                    )
                await self._settled.wait()
            self._reserved_usd += worst_usd

    async def settle(self, worst_usd: float, cost_usd: float, *, abandoned: bool) -> None:
        """Put what a call cost in place of what was held back for it."""
        async with self._settled:
            self._reserved_usd -= worst_usd
            self._spent_usd += cost_usd
            self._abandoned_usd += cost_usd if abandoned else 0.0
            self._settled.notify_all()
