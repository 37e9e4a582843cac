"""What placing a call costs, how evenly calls lie, and what a router hears a second: the real functions, no server.

python -m benchmarks.placement --rounds 5
"""

from __future__ import annotations

import argparse
import heapq
import pickle
import random
import statistics
import time
from dataclasses import dataclass, field

from benchmarks import workload
from deployments import frames
from deployments.calls import Call
from deployments.replica.reporter import Reporter
from deployments.reports import HOST, VRAM, Report, name_digest, pack
from deployments.router.fleet import Fleet
from engine.request import SamplingParams

CAPACITY = 32
KINDS = ("base", "prefix", "cold", "held", "hot")


def call_of(number: int, adapter: str | None, hints: tuple[int, ...] = ()) -> Call:
    """A call with nothing else in it."""
    return Call(
        request_id=f"q{number}",
        prompt_token_ids=(),
        params=SamplingParams(),
        seed=0,
        adapter=adapter,
        prefix_hints=hints,
    )


def fleet_of(num_replicas: int, num_names: int) -> Fleet:
    """A router that knows `num_replicas`, each with `num_names` adapters and some load."""
    rng = random.Random(1)
    fleet, every = Fleet(), [f"adapter-{i}" for i in range(12 * num_names)]
    ids = [f"replica-{i:04}" for i in range(num_replicas)]
    fleet.on_members(ids)
    for replica_id in ids:
        names = tuple((name_digest(name), rng.choice((HOST, VRAM))) for name in rng.sample(every, num_names))
        load = rng.randrange(CAPACITY)
        fleet.on_report(
            replica_id, pack(Report(epoch=1, number=0, load=load, capacity=CAPACITY, is_full=True, names=names))
        )
    return fleet


def decision(num_replicas: int, num_names: int, kind: str, num_calls: int = 2000) -> dict[str, float]:
    """Microseconds of one `Fleet.place`: by the clock, and of this thread's processor time."""
    fleet, walls = fleet_of(num_replicas, num_names), []
    names = {"cold": lambda i: f"cold-{i}", "held": lambda i: f"adapter-{i % 400}", "hot": lambda _: "adapter-0"}
    calls = [
        call_of(i, names[kind](i) if kind in names else None, (i, i + 1, i + 2) if kind == "prefix" else ())
        for i in range(num_calls)
    ]
    start_cpu = time.thread_time()
    for call in calls:
        start = time.perf_counter()
        fleet.place(call)
        walls.append(time.perf_counter() - start)
    cpu = (time.thread_time() - start_cpu) / num_calls
    return {"median_us": statistics.median(walls) * 1e6, "cpu_us": cpu * 1e6}


@dataclass
class Simulated:
    """A replica: what runs there, and what it holds."""

    reporter: Reporter
    ends_s: list[float] = field(default_factory=list)
    names: dict[str, float] = field(default_factory=dict)  # adapter -> when it is there


@dataclass
class World:
    """Replicas and routers by a clock of its own. Loads are told with receipts, and every `stale_s` to every router."""

    num_replicas: int
    num_routers: int = 1
    stale_s: float = 0.25
    load_s: float = 0.2  # of a cold adapter
    seed: int = 7

    def __post_init__(self) -> None:
        self.now_s = 0.0
        self.rng = random.Random(self.seed)
        self.replicas = {f"replica-{i:04}": self._replica() for i in range(self.num_replicas)}
        self.routers = [Fleet(now_s=lambda: self.now_s) for _ in range(self.num_routers)]
        self.running: list[tuple[float, int, str]] = []
        self.number = 0
        self.told_s = 0.0
        self.sent: dict[str, set[str]] = {}  # adapter -> replicas
        for router in self.routers:
            router.on_members(self.replicas)
        self._tell()

    def _replica(self) -> Simulated:
        replica = Simulated(Reporter(capacity=CAPACITY, names=lambda: ((), ()), now_s=lambda: self.now_s))
        replica.reporter = Reporter(
            capacity=CAPACITY,
            names=lambda: ([name for name, at_s in replica.names.items() if at_s <= self.now_s], ()),
            now_s=lambda: self.now_s,
        )
        return replica

    def run(self, adapter: str | None, *, in_flight: float, for_s: float, mean_s: float = 2.0) -> list[float]:
        """Poisson arrivals that keep `in_flight` requests in each replica. Returns max / mean, ten times a second."""
        rate = in_flight * self.num_replicas / mean_s
        until_s, next_s, look_s, ratios = self.now_s + for_s, self.now_s, self.now_s, []
        while self.now_s < until_s:
            next_s += self.rng.expovariate(rate)
            while self.running and self.running[0][0] <= next_s:
                self._end()
            self.now_s = next_s
            if self.now_s - self.told_s >= self.stale_s:
                self._tell()
            self._send(adapter, self.rng.expovariate(1 / mean_s))
            if self.now_s - look_s >= 0.1:
                look_s = self.now_s
                ratios.append(self.imbalance())
        return ratios

    def imbalance(self) -> float:
        """Most in flight on a replica / mean."""
        counts = [len(replica.ends_s) for replica in self.replicas.values()]
        return max(counts) * len(counts) / max(1, sum(counts))

    def _send(self, adapter: str | None, lasts_s: float) -> None:
        self.number += 1
        router = self.rng.randrange(self.num_routers)
        fleet = self.routers[router]
        chosen = fleet.place(call_of(self.number, adapter))[0]
        replica = self.replicas[chosen]
        fleet.sent(chosen)
        replica.ends_s.append(0.0)
        fleet.on_load(chosen, len(replica.ends_s), CAPACITY)
        if adapter is not None:
            self.sent.setdefault(adapter, set()).add(chosen)
            replica.names.setdefault(adapter, self.now_s + self.load_s)
        heapq.heappush(self.running, (self.now_s + lasts_s, router, chosen))

    def _end(self) -> None:
        self.now_s, router, chosen = heapq.heappop(self.running)
        self.replicas[chosen].ends_s.pop()
        self.routers[router].ended(chosen)

    def _tell(self) -> None:
        self.told_s = self.now_s
        for replica_id, replica in self.replicas.items():
            replica.reporter.load(len(replica.ends_s))
            for number, fleet in enumerate(self.routers):
                fleet.on_load(replica_id, len(replica.ends_s), CAPACITY)
                if data := replica.reporter.due(str(number)):
                    fleet.on_report(replica_id, data)


def received(num_replicas: int, *, seconds: int = 10, num_names: int = 400, swaps_s: float = 1.0) -> dict[str, float]:
    """Bytes a second that one router receives beside answers, pickled as they are sent: a frame a second and replica.

    Each replica answers 4 requests a second of 1,000 prompts, and `swaps_s` of its `num_names` adapters change.
    """
    clock, rng = [0.0], random.Random(3)
    total = first = 0
    for _ in range(num_replicas):
        names = [f"adapter-{rng.randrange(10**6)}" for _ in range(num_names)]
        reporter = Reporter(capacity=CAPACITY, names=lambda held=names: (held, ()), now_s=lambda: clock[0])  # type: ignore[misc]
        for second in range(-2, seconds):
            clock[0] = float(second)
            for _ in range(round(swaps_s)):
                names[rng.randrange(num_names)] = f"adapter-{rng.randrange(10**6)}"
            for _ in range(4):
                prompt = int(rng.paretovariate(1.0)) % 1000
                reporter.remember((3 * prompt, 3 * prompt + 1, 3 * prompt + 2))
            size = len(pickle.dumps(frames.write(9, (), reporter.due("router"))))
            total, first = (total + size, first) if second >= 0 else (total, first + size)
    return {"bytes_per_s": total / seconds, "bytes_at_first": float(first)}


def of_serve(num_replicas: int, stats: dict[str, object]) -> int:
    """Bytes of the list of replicas that Serve sends every router when one comes or goes, or one's `stats` change."""
    from ray.serve._private.common import DeploymentID, DeploymentTargetInfo, ReplicaID, RunningReplicaInfo

    deployment = DeploymentID("Replica", "chorus")
    infos = [
        RunningReplicaInfo(
            replica_id=ReplicaID(f"{i:08}", deployment), node_id=f"{i:056}", node_ip="10.0.0.1",
            availability_zone=None, actor_name=f"SERVE_REPLICA::chorus#Replica#{i:08}", max_ongoing_requests=4096,
            routing_stats=stats, port=30000,
        )
        for i in range(num_replicas)
    ]  # fmt: skip
    return len(pickle.dumps(DeploymentTargetInfo(is_available=True, running_replicas=infos)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", default="16,64,256,1000")
    parser.add_argument("--names", type=int, default=400, help="adapters that each replica holds")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sizes = [int(size) for size in args.replicas.split(",")]
    for size in sizes:
        for kind in KINDS:
            rounds = [decision(size, args.names, kind) for _ in range(args.rounds)]
            workload.print_figures({"case": f"decision, {size} replicas, {kind}", **workload.spread(rounds)}, args)
    for num_routers in (1, 4):
        for in_flight in (4.0, 8.0, 16.0, 24.0):
            world = World(64, num_routers)
            for adapter in (None, "one"):
                ratios = world.run(adapter, in_flight=in_flight, for_s=15.0)[50:]
                figures = {"mean": round(statistics.fmean(ratios), 3), "max": round(max(ratios), 3)}
                title = (
                    f"max / mean in flight, 64 replicas with {in_flight:g}, {num_routers} routers, {adapter or 'base'}"
                )
                workload.print_figures({"case": title, **figures}, args)
    for size in sizes:
        figures = {**received(size, num_names=args.names), "serve_bytes_a_change_of_replicas": of_serve(size, {})}
        workload.print_figures({"case": f"heard by a router, {size} replicas", **figures}, args)


if __name__ == "__main__":
    main()
