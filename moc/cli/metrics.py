"""What the agents know, in Prometheus' text format (with the library prometheus_client, the extra `metrics`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["render_metrics"]

Statuses = Sequence[tuple[Path, dict[str, Any]]]

OF_RUN = (
    ("moc_incarnation", "number of the job's present life", "incarnation"),
    ("moc_global_step", "newest step that every rank has sealed in memory", "global_step"),
    ("moc_committed_step", "newest step that is a checkpoint in storage", "last_committed_step"),
    ("moc_persisting", "whether a save is under way", "persisting"),
    ("moc_arena_bytes", "memory that holds the snapshots", "arena_bytes"),
)
OF_RANK = (
    ("moc_rank_alive", "whether the trainer lives", "alive"),
    ("moc_rank_sealed_step", "newest step that the rank has sealed", "sealed_step"),
    ("moc_rank_step", "step at the rank's last boundary", "beat_step"),
    ("moc_rank_beat_age_seconds", "time since the rank's last boundary", "beat_age_s"),
)
OF_ROUTING = (
    ("moc_plt", "proportion of tokens whose updates recoveries have lost", "plt"),
    ("moc_plt_limit", "proportion of lost tokens above which there is an alarm", "plt_limit"),
)
OF_LAYER = (
    ("moc_routes", "tokens routed to the experts of a MoE layer in the run so far", "routed"),
    ("moc_routes_lost", "those of them whose updates recoveries have lost", "lost"),
)
OF_SAVES = (
    ("moc_saves", "saves that have ended since the agent began", "saves"),
    ("moc_saves_failed", "saves that have failed since the agent began", "failed"),
)

OF_REPLICAS = (
    ("moc_replicated_step", "newest step of this node's snapshots that all its hosts hold", "replicated_step"),
    ("moc_replica_sent_bytes", "bytes sent to other nodes since the agent began", "sent_bytes"),
    ("moc_replica_failures", "snapshots that a host has not taken since the agent began", "failures"),
    ("moc_guest_bytes", "memory that holds other nodes' replicas", "guest_bytes"),
)


def render_metrics(statuses: Statuses) -> str:
    """Return the exposition; what an agent does not know yet has no sample. Raises: UsageError without the library."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise UsageError("--prometheus needs prometheus_client allowed=pip install 'moc[metrics]'") from error

    class Agents(Collector):
        def collect(self) -> Iterable[Metric]:
            return _families(statuses)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Agents())
    return generate_latest(registry).decode()


def _families(statuses: Statuses) -> Iterable[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

    yield GaugeMetricFamily("moc_agents", "agents that answer on this machine", value=len(statuses))
    info = InfoMetricFamily("moc_agent", "which agent serves a run", labels=["run"])
    for _, status in statuses:
        facts = {name: str(status.get(name) or "") for name in ("version", "storage")}
        info.add_metric([status["run"]], {**facts, "pid": str(status["pid"])})
    yield info
    for name, text, field in OF_RUN:
        gauge = GaugeMetricFamily(name, text, labels=["run"])
        for _, status in statuses:
            if status.get(field) is not None:
                gauge.add_metric([status["run"]], float(status[field]))
        yield gauge
    yield from _lost_tokens(statuses)
    for name, text, field in OF_SAVES:
        counter = CounterMetricFamily(name, text, labels=["run"])
        for _, status in statuses:
            counter.add_metric([status["run"]], float(status["counters"][field]))
        yield counter
    failed = GaugeMetricFamily("moc_last_save_failed", "whether the newest save failed", labels=["run"])
    for _, status in statuses:
        failed.add_metric([status["run"]], float(bool(status.get("last_error"))))
    yield failed
    yield from _replicas(statuses)
    for name, text, field in OF_RANK:
        gauge = GaugeMetricFamily(name, text, labels=["run", "rank"])
        for _, status in statuses:
            for row in status["ranks"]:
                if row.get(field) is not None:
                    gauge.add_metric([status["run"], str(row["rank"])], float(row[field]))
        yield gauge


def _lost_tokens(statuses: Statuses) -> Iterable[Metric]:
    from prometheus_client.core import GaugeMetricFamily

    counted = [(status["run"], status["routing"]) for _, status in statuses if status.get("routing")]
    for name, text, field in OF_ROUTING:
        gauge = GaugeMetricFamily(name, text, labels=["run"])
        for run, routing in counted:
            gauge.add_metric([run], float(routing[field]))
        yield gauge
    for name, text, field in OF_LAYER:
        gauge = GaugeMetricFamily(name, text, labels=["run", "layer"])
        for run, routing in counted:
            for layer, routes in enumerate(routing[field]):
                gauge.add_metric([run, str(layer)], float(routes))
        yield gauge


def _replicas(statuses: Statuses) -> Iterable[Metric]:
    """Yield what is known of replicas; nothing where there are none."""
    from prometheus_client.core import GaugeMetricFamily

    rows = [(status["run"], status.get("company", {}).get("replication")) for _, status in statuses]
    found = [(run, row) for run, row in rows if row is not None]
    for name, text, field in OF_REPLICAS if found else ():
        gauge = GaugeMetricFamily(name, text, labels=["run"])
        for run, row in found:
            if row.get(field) is not None:
                gauge.add_metric([run], float(row[field]))
        yield gauge
    if found:
        away = GaugeMetricFamily("moc_hosts_away", "nodes that do not take this node's replicas", labels=["run"])
        for run, row in found:
            away.add_metric([run], float(len(row["away"])))
        yield away
