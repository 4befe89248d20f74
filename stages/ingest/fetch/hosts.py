"""Who may be asked next: each host's slots, rate, pauses and failures, and the slots of the whole node.

A row waits here holding nothing. A request starts only when its host has a free slot, the host's rate allows it and the
node has a free slot, all at once; hosts that could go on take the node's slots in turn. So 10,000 waiting rows of one
slow host hold its own few slots and nothing else, and what may start does start then (the rate holds on the wire).
There is no polling: a host's waiting rows are looked at when a row comes, when a slot is freed, or when its rate or
pause is over.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from datetime import datetime, timedelta, timezone

from stages.ingest.fetch.addresses import FetchError

MAX_HOSTS = 50_000  # remembered a node; beyond, those that were idle longest are forgotten
FAILURES_UNTIL_DOWN = 10  # in a row, with no response between
PROBE_EVERY_S = 60.0  # a host that is down is asked once in this time
DNS_FAILED_FOR_S = 300.0  # a name that does not exist is not looked up again for this long
MAX_PAUSE_S = 60.0  # that rows wait for a host that limits rates, in total; else they fail
FORGIVEN_S = 1.0  # of these, by every response: a host that pauses for minutes to give one image would hold a shard
MAX_REFUSAL_S = 365 * 86_400.0  # what a Retry-After can ask for


class Host:
    """What is known of one host:port, and the rows that wait for it."""

    __slots__ = (
        "allowed_at_s",
        "failures",
        "in_flight",
        "is_ready",
        "key",
        "last_failure",
        "paused_s",
        "paused_until_s",
        "probe_at_s",
        "refusal",
        "refused_until_s",
        "timer",
        "waiting",
    )

    def __init__(self, key: str):
        self.key = key
        self.in_flight = 0
        self.waiting: deque[asyncio.Future] = deque()
        self.is_ready = False  # it is among the hosts that wait for a slot of the node
        self.timer: asyncio.TimerHandle | None = None
        self.allowed_at_s = 0.0  # when the next request would start at a steady rate (GCRA's theoretical arrival time)
        self.paused_until_s = 0.0
        self.paused_s = 0.0  # in total, less what its responses have earned
        self.refused_until_s = 0.0
        self.refusal = ("", "")  # the error and detail of rows that come before then
        self.failures = 0  # in a row
        self.last_failure = ""
        self.probe_at_s = 0.0

    def refused(self, now_s: float) -> FetchError | None:
        """Why the host is not asked now; None when it may be (which, of a host that is down, is its probe)."""
        if now_s < self.refused_until_s:
            return FetchError(*self.refusal)
        if self.failures >= FAILURES_UNTIL_DOWN:
            if now_s < self.probe_at_s:
                return FetchError("host_down", f"{self.key} failed {self.failures} times in a row: {self.last_failure}")
            self.probe_at_s = now_s + PROBE_EVERY_S
        return None


class Hosts:
    """All hosts of one node, and the node's own slots. Built in, and used from, one running loop."""

    def __init__(self, concurrency: int, per_host_concurrency: int, per_host_requests_per_s: float):
        self._loop = asyncio.get_running_loop()
        self._hosts: OrderedDict[str, Host] = OrderedDict()
        self._free = concurrency
        self._per_host_concurrency = per_host_concurrency
        self._interval_s = 1 / per_host_requests_per_s
        # A burst fills the host's slots, but is never more than a second's worth.
        burst = max(1.0, min(per_host_concurrency, per_host_requests_per_s))
        self._burst_s = (burst - 1) * self._interval_s
        self._ready: deque[Host] = deque()  # hosts with a row that waits for nothing but a slot of the node

    def __len__(self) -> int:
        return len(self._hosts)

    def host(self, key: str) -> Host:
        """The state of `key` (host:port), made where it is new."""
        host = self._hosts.get(key)
        if host is None:
            host = self._hosts[key] = Host(key)
            if len(self._hosts) > MAX_HOSTS:
                self._forget_one()
        else:
            self._hosts.move_to_end(key)
        return host

    async def enter(self, host: Host) -> None:
        """Returns once a request to the host may start; `leave` must follow. FetchError where it is not to be asked."""
        now_s = self._loop.time()
        if (refusal := host.refused(now_s)) is not None:
            raise refusal
        if (
            self._free > 0
            and host.in_flight < self._per_host_concurrency
            and not host.waiting
            and not self._ready
            and self._allowed_at_s(host) <= now_s
        ):
            self._start(host, now_s)
            return
        turn = self._loop.create_future()
        host.waiting.append(turn)
        self._look_at(host)
        self._hand_out()
        try:
            refusal = await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result() is None:
                self.leave(host)  # cancelled in the moment between being let in and going on
            raise
        if refusal is not None:
            raise refusal

    def leave(self, host: Host) -> None:
        """Frees the slots that `enter` took."""
        host.in_flight -= 1
        self._free += 1
        if host.waiting:
            self._look_at(host)
        if self._ready:
            self._hand_out()

    def answered(self, host: Host) -> None:
        """The host sent a response that asks for no pause: it is not down, and earns some patience."""
        host.failures = 0
        host.paused_s = max(0.0, host.paused_s - FORGIVEN_S)

    def failed(self, host: Host, reason: str) -> None:
        """The host sent no (whole) response; after so many in a row it is down, and its waiting rows fail."""
        host.failures += 1
        host.last_failure = reason
        if host.failures == FAILURES_UNTIL_DOWN:
            host.probe_at_s = self._loop.time() + PROBE_EVERY_S
            self._turn_away(host)

    def name_failed(self, host: Host, detail: str) -> None:
        """The host's name does not exist: its other rows fail without a look-up for some time."""
        self._refuse(host, DNS_FAILED_FOR_S, "dns_failed", f"{detail} (cached)")

    def limits_rate(self, host: Host, wait_s: float) -> None:
        """The host asked for a pause: all its rows wait, or, where that would be too long, fail as host_down."""
        host.failures = 0  # it does answer
        now_s = self._loop.time()
        until_s = now_s + min(wait_s, MAX_REFUSAL_S)
        # Several responses that ask for the same pause are one pause.
        host.paused_s += max(0.0, until_s - max(now_s, host.paused_until_s))
        if host.paused_s > MAX_PAUSE_S:
            host.paused_s = 0.0
            until = datetime.now(timezone.utc) + timedelta(seconds=until_s - now_s)
            detail = f"{host.key} limits the rate of requests: not asked until {until:%Y-%m-%d %H:%M:%S} UTC"
            self._refuse(host, until_s - now_s, "host_down", detail)
        elif until_s > host.paused_until_s:
            host.paused_until_s = until_s
            host.allowed_at_s = max(host.allowed_at_s, until_s + self._burst_s)  # no burst after a pause

    def close(self) -> None:
        """Ends all timers; rows that still wait must have been cancelled."""
        for host in self._hosts.values():
            if host.timer is not None:
                host.timer.cancel()

    def _allowed_at_s(self, host: Host) -> float:
        """When rate and pause allow the host's next request."""
        return max(host.allowed_at_s - self._burst_s, host.paused_until_s)

    def _start(self, host: Host, now_s: float) -> None:
        host.in_flight += 1
        self._free -= 1
        host.allowed_at_s = max(host.allowed_at_s, now_s) + self._interval_s

    def _look_at(self, host: Host) -> None:
        """Puts a host whose next row may start among the ready ones; sets a timer where rate or pause say later."""
        if host.is_ready or host.timer is not None or host.in_flight >= self._per_host_concurrency:
            return
        while host.waiting and host.waiting[0].done():  # its row was cancelled
            host.waiting.popleft()
        if not host.waiting:
            return
        allowed_at_s = self._allowed_at_s(host)
        if allowed_at_s > self._loop.time():
            host.timer = self._loop.call_at(allowed_at_s, self._on_timer, host)
        else:
            host.is_ready = True
            self._ready.append(host)

    def _on_timer(self, host: Host) -> None:
        host.timer = None
        self._look_at(host)
        self._hand_out()

    def _hand_out(self) -> None:
        """Gives the node's free slots to the ready hosts, in turn, one row each."""
        while self._free > 0 and self._ready:
            host = self._ready.popleft()
            host.is_ready = False
            now_s = self._loop.time()
            if self._allowed_at_s(host) <= now_s:  # a pause may have begun meanwhile
                while host.waiting:
                    turn = host.waiting.popleft()
                    if not turn.done():
                        self._start(host, now_s)
                        turn.set_result(None)
                        break
            self._look_at(host)

    def _refuse(self, host: Host, for_s: float, error: str, detail: str) -> None:
        until_s = self._loop.time() + for_s
        if until_s > host.refused_until_s:
            host.refused_until_s = until_s
            host.refusal = (error, detail)
        self._turn_away(host)

    def _turn_away(self, host: Host) -> None:
        """Ends the wait of all rows of a host that is not to be asked."""
        now_s = self._loop.time()
        while host.waiting:
            turn = host.waiting.popleft()
            if not turn.done():
                turn.set_result(host.refused(now_s))

    def _forget_one(self) -> None:
        """Drops the host that was idle longest; busy ones among the oldest move to the young end."""
        for _ in range(64):
            key, host = next(iter(self._hosts.items()))
            if host.in_flight or host.waiting or host.timer is not None:
                self._hosts.move_to_end(key)
            else:
                del self._hosts[key]
                return
