"""Which hardware each teacher's actors get: whole GPUs where there are enough, else equal shares of one.

Pure reckoning over what a cluster offers; only :func:`read_cluster` talks to Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field, PositiveInt

from common.config import StrictModel
from common.errors import ClusterError

_ROUNDING = 1e-6


class TeacherPlacement(StrictModel):
    """What the actors of one teacher ask for. A request that no machine can meet stops the run before it starts."""

    actors: PositiveInt = Field(1, description="Copies of the teacher; raise it where this teacher is the bottleneck.")
    gpus: float | None = Field(
        None, ge=0, description="GPUs per actor: 0, a fraction of one, or whole ones; None: the run decides."
    )
    micro_batch: PositiveInt | None = Field(
        None, description="Rows per forward pass, where this teacher needs another number than the run's."
    )
    accelerator_type: str | None = Field(
        None, description="Only GPUs of this kind, by Ray's name for it, such as A100 or H100."
    )
    labels: dict[str, str] = Field(
        default_factory=dict, description="Only machines with these Ray node labels: value, !value, in(a,b), !in(a,b)."
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="Custom Ray resources that each actor takes up."
    )


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    gpus: float = 0
    cpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    accelerator_types: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom resources."""


@dataclass(frozen=True)
class ClusterResources:
    """What there is in all, whether it is in use or not."""

    nodes: tuple[Node, ...]

    @property
    def gpus(self) -> float:
        """GPUs of all machines."""
        return sum(node.gpus for node in self.nodes)

    @property
    def cpus(self) -> float:
        """Logical CPU cores of all machines."""
        return sum(node.cpus for node in self.nodes)

    @property
    def accelerator_types(self) -> dict[str | None, float]:
        """GPUs by kind; None is the kind of those of which Ray does not know it."""
        found: dict[str | None, float] = {}
        for node in self.nodes:
            if node.gpus:
                kind = node.accelerator_types[0] if node.accelerator_types else None
                found[kind] = found.get(kind, 0) + node.gpus
        return dict(sorted(found.items(), key=lambda item: item[0] or "~"))  # Ray lists machines in any order

    def gpus_for(self, request: TeacherPlacement) -> int:
        """GPUs of the machines that a request allows."""
        return int(sum(node.gpus for node in self.nodes if _may_run(request, node)))


def read_cluster() -> ClusterResources:
    """The machines that are up in the Ray cluster this process has joined."""
    import ray

    return ClusterResources(tuple(_read_node(node) for node in ray.nodes() if node["Alive"]))


def _read_node(node: dict[str, Any]) -> Node:
    kinds, custom = [], {}
    for name, amount in node["Resources"].items():
        if name.startswith("accelerator_type:"):
            kinds.append(name.partition(":")[2])
        elif name not in ("GPU", "CPU", "memory", "object_store_memory") and not name.startswith("node:"):
            custom[name] = float(amount)
    total = node["Resources"]
    return Node(total.get("GPU", 0), total.get("CPU", 0), dict(node.get("Labels", {})), tuple(sorted(kinds)), custom)


def place(
    teachers: Sequence[str],
    cluster: ClusterResources,
    overrides: Mapping[str, TeacherPlacement] | None = None,
    default_actors: int = 1,
    default_gpus: float | None = None,
) -> dict[str, TeacherPlacement]:
    """Decide how many GPUs each actor holds.

    What is asked for explicitly is granted or refused. The actors for which nobody decided get one whole GPU each if
    that fits beside the others, else equal shares of one, as large as fit; 0 where the cluster has no GPU at all.

    Args:
        teachers: Names of those that will run.
        cluster: What there is.
        overrides: Requests of single teachers; fields they do not state follow the defaults.
        default_actors: Actors of a teacher whose request does not say.
        default_gpus: GPUs per actor where the request does not say; None: as described above.

    Returns:
        Teacher -> request with ``gpus`` filled in, in the order in which to start them: first those that the fewest
        machines can serve, then the largest, so that none finds its place taken by one that had a choice. Equals keep
        the order of ``teachers``.

    Raises:
        ClusterError: More is asked for than there is.
    """
    wanted: dict[str, TeacherPlacement] = {}
    for name in teachers:
        request = (overrides or {}).get(name, TeacherPlacement())
        actors = request.actors if "actors" in request.model_fields_set else default_actors
        gpus = default_gpus if request.gpus is None else request.gpus
        wanted[name] = request.model_copy(update={"actors": actors, "gpus": gpus})
        _check_possible(name, wanted[name], cluster)
    undecided = [name for name, request in wanted.items() if request.gpus is None]
    decided = {name: request for name, request in wanted.items() if request.gpus is not None}
    if (lost := _first_unplaced(decided, cluster)) is not None:
        raise ClusterError(_does_not_fit(lost, decided, cluster))
    # Shares of one size never leave a rest that no one can use, whichever GPU Ray puts them on.
    most = sum(wanted[name].actors for name in undecided) if cluster.gpus else 0
    for per_gpu in range(1, most + 1):
        tried = {
            name: request.model_copy(update={"gpus": 1 / per_gpu}) if name in undecided else request
            for name, request in wanted.items()
        }
        if (lost := _first_unplaced(tried, cluster)) is None:
            return _in_order(tried, cluster)
    if undecided and cluster.gpus:
        raise ClusterError(_does_not_fit(lost or undecided[0], wanted, cluster))
    settled = {name: request.model_copy(update={"gpus": request.gpus or 0.0}) for name, request in wanted.items()}
    return _in_order(settled, cluster)


def ray_options(placement: TeacherPlacement) -> dict[str, Any]:
    """Options of Ray for one actor of a teacher; ``gpus`` must be decided (see :func:`place`)."""
    assert placement.gpus is not None, "an actor is started before its GPUs are decided"
    # Teachers wait for their GPU most of the time; CPUs are counted for those that decode.
    options: dict[str, Any] = {"num_gpus": placement.gpus, "num_cpus": 0}
    if placement.accelerator_type is not None:
        options["accelerator_type"] = placement.accelerator_type
    if placement.labels:
        options["label_selector"] = dict(placement.labels)
    if placement.resources:
        options["resources"] = dict(placement.resources)
    return options


def _check_possible(name: str, request: TeacherPlacement, cluster: ClusterResources) -> None:
    """Insist that a request makes sense and that at least one machine is of the kind it names."""
    if request.gpus is not None and request.gpus > 1 and request.gpus != int(request.gpus):
        raise ClusterError(
            f"Teacher {name!r} asks for {request.gpus:g} GPUs per actor. Above 1, an actor can hold only whole GPUs; "
            f"ask for {int(request.gpus)} or {int(request.gpus) + 1}, or for a fraction of one."
        )
    if any(_may_run(request, node) for node in cluster.nodes):
        return
    kinds = sorted({kind for node in cluster.nodes for kind in node.accelerator_types})
    # Ray's own labels (node id and the like) are not what anybody chose a machine by.
    labels = sorted(
        {f"{key}={value}" for node in cluster.nodes for key, value in node.labels.items() if "node-id" not in key}
    )
    resources = sorted({key for node in cluster.nodes for key in node.resources})
    raise ClusterError(
        f"No machine of the cluster can run teacher {name!r}, which asks for {_request_text(request)}. There are "
        f"{len(cluster.nodes)} machines with accelerator types {', '.join(kinds) or 'none'}, labels "
        f"{', '.join(labels) or 'none'} and custom resources {', '.join(resources) or 'none'}. Change the teacher's "
        "placement, or start a machine of that kind first."
    )


def _may_run(request: TeacherPlacement, node: Node) -> bool:
    return (
        (request.accelerator_type is None or request.accelerator_type in node.accelerator_types)
        and all(_label_fits(wanted, node.labels.get(key)) for key, wanted in request.labels.items())
        and all(node.resources.get(key, 0) >= amount for key, amount in request.resources.items())
    )


def _label_fits(wanted: str, found: str | None) -> bool:
    """Ray's label selectors: ``value``, ``!value``, ``in(a,b)``, ``!in(a,b)``."""
    negated, plain = wanted.startswith("!"), wanted.removeprefix("!")
    if plain.startswith("in(") and plain.endswith(")"):
        values = [part.strip() for part in plain[3:-1].split(",")]
    else:
        values = [plain]
    return (found in values) != negated


def _in_order(requests: Mapping[str, TeacherPlacement], cluster: ClusterResources) -> dict[str, TeacherPlacement]:
    def rank(name: str) -> tuple[int, float]:
        request = requests[name]
        return sum(_may_run(request, node) for node in cluster.nodes), -(request.gpus or 0)

    return {name: requests[name] for name in sorted(requests, key=rank)}


def _first_unplaced(requests: Mapping[str, TeacherPlacement], cluster: ClusterResources) -> str | None:
    """Go through the actors in starting order and give each the place that suits the fewest others.

    Returns:
        The first teacher with an actor that finds no place, or None if all do.
    """
    requests = _in_order(requests, cluster)
    free = [[1.0] * int(node.gpus) for node in cluster.nodes]
    left = [dict(node.resources) for node in cluster.nodes]
    suits = [sum(_may_run(request, node) for request in requests.values()) for node in cluster.nodes]
    for name, request in requests.items():
        eligible = [index for index, node in enumerate(cluster.nodes) if _may_run(request, node)]
        eligible.sort(key=lambda index: (suits[index], cluster.nodes[index].gpus))
        for _ in range(request.actors):
            if not any(_take(request, free[index], left[index]) for index in eligible):
                return name
    return None


def _take(request: TeacherPlacement, free: list[float], left: dict[str, float]) -> bool:
    """Take up one actor's share of a machine, if it has room.

    Args:
        request: What the actor needs.
        free: What is free of each of the machine's GPUs.
        left: What is left of its custom resources.
    """
    if any(left.get(key, 0) + _ROUNDING < amount for key, amount in request.resources.items()):
        return False
    gpus = request.gpus or 0.0
    # Like Ray: of the GPUs with room for a fraction the fullest, and never two of them for one fraction.
    chosen = sorted((room, index) for index, room in enumerate(free) if room + _ROUNDING >= min(gpus, 1.0))
    count = max(1, int(gpus)) if gpus else 0
    if len(chosen) < count:
        return False
    for _, index in chosen[:count]:
        free[index] -= min(gpus, 1.0)
    for key, amount in request.resources.items():
        left[key] -= amount
    return True


def _request_text(request: TeacherPlacement) -> str:
    parts = [] if request.accelerator_type is None else [f"accelerator type {request.accelerator_type}"]
    parts += [f"label {key}={value}" for key, value in request.labels.items()]
    parts += [f"{amount:g} of resource {key}" for key, amount in request.resources.items()]
    return ", ".join(parts) or "any machine"


def _does_not_fit(lost: str, requests: Mapping[str, TeacherPlacement], cluster: ClusterResources) -> str:
    total = sum(request.actors * (request.gpus or 0) for request in requests.values())
    kinds = ", ".join(f"{count:g} x {kind or 'kind not known'}" for kind, count in cluster.accelerator_types.items())
    request = requests[lost]
    share = "a share of a GPU" if request.gpus is None else f"{request.gpus:g} GPUs"
    where = "" if _request_text(request) == "any machine" else f" on {_request_text(request)}"
    return (
        f"There is no room for teacher {lost!r} ({request.actors} actors with {share} each{where}): the placements "
        f"asked for need {total:g} GPUs in all and the cluster has {cluster.gpus:g} ({kinds or 'no GPU'}). An actor's "
        "GPUs are on one machine, and a fraction is of one GPU. Lower the GPUs or actors per teacher, name fewer "
        "teachers, leave the GPUs unset to share them out, or set a teacher's to 0 to run it on CPUs."
    )
