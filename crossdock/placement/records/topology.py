"""The topology: nodes, devices and links that a plan is made for, with their speeds; its YAML file and the bundled presets."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from crossdock import atomic, strict_yaml
from crossdock.cores import available_cores
from crossdock.errors import BadData, MissingInput
from crossdock.strict_yaml import Document, StrictModel

LINK_CLASSES = ("same_device", "same_node", "other_node")
SAME_DEVICE, SAME_NODE, OTHER_NODE = range(3)
MAX_DEVICES = 4096
LEAST_SPEED = float(np.finfo(np.float64).tiny)  # of a link or a device: the time for a byte or an operation is a finite number

# Of one CPU core, for `Topology.local` before anything is measured.
PLACEHOLDER_FLOP_PER_S = 2.0e10
PLACEHOLDER_BYTES_PER_S = 2.0e9
PLACEHOLDER_LATENCY_S = 1.0e-4


@dataclass(frozen=True, eq=False)
class Topology:
    """Devices of one expert-parallel group, the nodes they sit in, and the links between them.

    node_of_R         node of each device, numbered 0 .. N-1 without gaps
    flop_per_s_R      float64 [R], sustained flop/s of each device in the expert GEMMs
    memory_bytes_R    float64 [R]
    bytes_per_s_RR    float64 [R, R], from row to column, one direction; what the sending device sustains when it talks to that peer alone.
                      The diagonal is the device with itself: inf where that costs nothing
    latency_s_RR      float64 [R, R], of one transfer; 0 on the diagonal
    node_bytes_per_s  what all devices of one node together send to (and, separately, receive from) other nodes; None where every
                      device has its own network card
    measured          whether the speeds were probed on the machine that the file describes
    source            where the figures come from, in words
    """

    name: str
    node_of_R: tuple[int, ...]
    flop_per_s_R: NDArray[np.float64]
    memory_bytes_R: NDArray[np.float64]
    bytes_per_s_RR: NDArray[np.float64]
    latency_s_RR: NDArray[np.float64]
    node_bytes_per_s: float | None = None
    measured: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "node_of_R", tuple(int(node) for node in self.node_of_R))
        R = len(self.node_of_R)
        if not 1 <= R <= MAX_DEVICES:
            raise BadData(f"the topology has {R} devices; give 1 to {MAX_DEVICES}")
        nodes = sorted(set(self.node_of_R))
        if nodes != list(range(len(nodes))):
            raise BadData(f"nodes are numbered {nodes[:8]}; number them 0..{len(nodes) - 1} without gaps")
        for name, shape in (("flop_per_s_R", (R,)), ("memory_bytes_R", (R,)), ("bytes_per_s_RR", (R, R)), ("latency_s_RR", (R, R))):
            values = np.array(getattr(self, name), dtype=np.float64)
            if values.shape != shape:
                raise BadData(f"{name} has shape {values.shape}; with {R} devices it is {shape}")
            values.setflags(write=False)
            object.__setattr__(self, name, values)
        _check_range("flop_per_s", self.flop_per_s_R, positive=True)
        _check_range("memory_bytes", self.memory_bytes_R, positive=True)
        _check_range("bytes_per_s", self.bytes_per_s_RR, positive=True, may_be_inf=np.eye(R, dtype=bool))
        _check_range("latency_s", self.latency_s_RR, positive=False)
        if self.node_bytes_per_s is not None:
            _check_range("node_bytes_per_s", np.array([self.node_bytes_per_s]), positive=True)

    @classmethod
    def uniform(
        cls,
        nodes: int,
        devices_per_node: int,
        *,
        flop_per_s: float = 5.0e14,
        memory_bytes: float = 8.0e10,
        same_node_bytes_per_s: float = 3.6e11,
        same_node_latency_s: float = 1.0e-5,
        other_node_bytes_per_s: float = 4.0e10,
        other_node_latency_s: float = 2.0e-5,
        shared_by_node: bool = False,
        name: str = "",
        measured: bool = False,
        source: str = "",
    ) -> "Topology":
        """Equal devices in equal nodes. Where `shared_by_node`, `other_node_bytes_per_s` is what the whole node has. The defaults are a
        rounded H100 with NVLink inside a node and one 400 Gbit/s card each."""
        if nodes < 1 or devices_per_node < 1:
            raise BadData(f"{nodes} nodes x {devices_per_node} devices; give at least 1 of each")
        if nodes * devices_per_node > MAX_DEVICES:
            raise BadData(f"{nodes} nodes x {devices_per_node} devices; a topology has at most {MAX_DEVICES} devices")
        node_R = np.repeat(np.arange(nodes), devices_per_node)
        class_RR = _link_class(node_R)
        num_devices = nodes * devices_per_node
        return cls(
            name=name or f"{nodes}x{devices_per_node}",
            node_of_R=tuple(node_R.tolist()),
            flop_per_s_R=np.full(num_devices, flop_per_s),
            memory_bytes_R=np.full(num_devices, memory_bytes),
            bytes_per_s_RR=np.array([np.inf, same_node_bytes_per_s, other_node_bytes_per_s])[class_RR],
            latency_s_RR=np.array([0.0, same_node_latency_s, other_node_latency_s])[class_RR],
            node_bytes_per_s=other_node_bytes_per_s if shared_by_node and nodes > 1 else None,
            measured=measured,
            source=source,
        )

    @classmethod
    def local(cls, num_devices: int = 1, nodes: int = 1) -> "Topology":
        """This machine as `num_devices` CPU devices, in `nodes` pretended nodes. Memory and cores are read and shared out evenly; speeds
        are placeholders until `crossdock probe` measures them (`measured` is False)."""
        if nodes < 1 or num_devices % nodes:
            raise BadData(f"{num_devices} devices do not divide over {nodes} nodes; choose a number of nodes that divides it")
        cores = available_cores()
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return cls.uniform(
            nodes,
            num_devices // nodes,
            flop_per_s=PLACEHOLDER_FLOP_PER_S * cores / num_devices,
            memory_bytes=memory_bytes / num_devices,
            same_node_bytes_per_s=PLACEHOLDER_BYTES_PER_S,
            same_node_latency_s=PLACEHOLDER_LATENCY_S,
            other_node_bytes_per_s=PLACEHOLDER_BYTES_PER_S,
            other_node_latency_s=PLACEHOLDER_LATENCY_S,
            name=f"{nodes}x{num_devices // nodes}-local",
            source=f"{cores} cores and their memory as read here; speeds are placeholders, run `crossdock probe` to measure them",
        )

    @property
    def num_devices(self) -> int:
        return len(self.node_of_R)

    @property
    def num_nodes(self) -> int:
        return max(self.node_of_R) + 1

    @cached_property
    def link_class_RR(self) -> NDArray[np.int8]:
        """int8 [R, R]: index into `LINK_CLASSES` of the link from row to column."""
        return _link_class(np.array(self.node_of_R))

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether every link is as fast as the one back."""
        return bool(np.array_equal(self.bytes_per_s_RR, self.bytes_per_s_RR.T))

    @cached_property
    def digest(self) -> str:
        """sha256 of everything that a plan depends on; the name and the source do not count."""
        header = json.dumps([list(self.node_of_R), self.node_bytes_per_s])
        arrays = (self.flop_per_s_R, self.memory_bytes_R, self.bytes_per_s_RR, self.latency_s_RR)
        found = hashlib.sha256(header.encode())
        for array in arrays:
            found.update(np.ascontiguousarray(array, dtype="<f8").data)
        return found.hexdigest()

    @classmethod
    def load(cls, path: Path | str) -> "Topology":
        """Read a YAML file, or a bundled preset by its bare name such as `2x8-nvlink-ib`.

        Raises `MissingInput` where there is neither, naming the presets, and `BadData` where the file is malformed.
        """
        path = Path(path)
        preset = preset_directory() / f"{path.name.removesuffix('.yaml')}.yaml"
        if not _holds(path.is_file) and path.parent == Path() and _holds(preset.is_file):
            path = preset
        elif not _holds(path.exists):
            raise MissingInput(f"{path}: no such topology; give a YAML file, or a preset: {', '.join(preset_names())}")
        document = strict_yaml.load(path, error=BadData)
        file = _parsed(document)
        try:
            return _from_long(file, path.stem) if isinstance(file, _LongForm) else _from_short(file, path.stem)
        except BadData as error:
            raise BadData(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write YAML atomically: the short form where devices and links are uniform, else the long one. `load` gives the same digest."""
        atomic.write_text(Path(path), self.as_yaml())

    def as_yaml(self) -> str:
        """The text of the file that `save` writes."""
        body = self._short_form() or self._long_form()
        head = {"name": self.name, "measured": self.measured, "source": self.source}
        return strict_yaml.dump(head | body)

    def _short_form(self) -> dict[str, Any] | None:
        """The mapping of the short form, or None where `uniform` cannot say what this topology is."""
        links = [self._uniform_link(link_class) for link_class in (SAME_NODE, OTHER_NODE)]
        per_node, rest = divmod(self.num_devices, self.num_nodes)
        if rest or None in links:
            return None
        (same_node_bytes_per_s, same_node_latency_s), (other_node_bytes_per_s, other_node_latency_s) = [link for link in links if link]
        shared_by_node = self.node_bytes_per_s is not None
        again = Topology.uniform(
            self.num_nodes,
            per_node,
            flop_per_s=float(self.flop_per_s_R[0]),
            memory_bytes=float(self.memory_bytes_R[0]),
            same_node_bytes_per_s=same_node_bytes_per_s,
            same_node_latency_s=same_node_latency_s,
            other_node_bytes_per_s=other_node_bytes_per_s,
            other_node_latency_s=other_node_latency_s,
            shared_by_node=shared_by_node,
        )
        if again.digest != self.digest:
            return None
        links_by_name: dict[str, Any] = {}
        if per_node > 1:
            links_by_name["same_node"] = {"bytes_per_s": same_node_bytes_per_s, "latency_s": same_node_latency_s}
        if self.num_nodes > 1:
            other_node = {"bytes_per_s": other_node_bytes_per_s, "latency_s": other_node_latency_s, "shared_by_node": shared_by_node}
            links_by_name["other_node"] = other_node
        device = {"flop_per_s": float(self.flop_per_s_R[0]), "memory_bytes": float(self.memory_bytes_R[0])}
        return {"nodes": self.num_nodes, "devices_per_node": per_node, "device": device, "links": links_by_name}

    def _uniform_link(self, link_class: int) -> tuple[float, float] | None:
        """(bytes/s, s) of a link class whose links are all equal; (1, 0) where the class is empty; None where they differ."""
        of_class_RR = self.link_class_RR == link_class
        bytes_per_s, latency_s = np.unique(self.bytes_per_s_RR[of_class_RR]), np.unique(self.latency_s_RR[of_class_RR])
        if not bytes_per_s.size:
            return 1.0, 0.0
        return (float(bytes_per_s[0]), float(latency_s[0])) if bytes_per_s.size == latency_s.size == 1 else None

    def _long_form(self) -> dict[str, Any]:
        devices = [
            {"node": node, "flop_per_s": float(flop_per_s), "memory_bytes": float(memory_bytes)}
            for node, flop_per_s, memory_bytes in zip(self.node_of_R, self.flop_per_s_R, self.memory_bytes_R, strict=True)
        ]
        bytes_per_s = [[None if np.isinf(value) else value for value in row] for row in self.bytes_per_s_RR.tolist()]
        body = {"devices": devices, "bytes_per_s": bytes_per_s, "latency_s": self.latency_s_RR.tolist()}
        return body if self.node_bytes_per_s is None else body | {"node_bytes_per_s": float(self.node_bytes_per_s)}


def _holds(question: Callable[[], bool]) -> bool:
    """The answer to a question about a path, no for a name that no file can have."""
    try:
        return question()
    except OSError:
        return False


def preset_directory() -> Path:
    """Where the bundled presets lie: inside an installed package, else in the `configs/topologies` of a source checkout."""
    installed = Path(__file__).parents[1] / "topologies"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "configs" / "topologies"


def preset_names() -> tuple[str, ...]:
    """Names that `Topology.load` takes without a file."""
    return tuple(sorted(path.stem for path in preset_directory().glob("*.yaml")))


class _Device(StrictModel):
    flop_per_s: float = Field(gt=0)
    memory_bytes: float = Field(gt=0)


class _PlacedDevice(_Device):
    node: int = Field(ge=0)


class _Link(StrictModel):
    bytes_per_s: float = Field(gt=0)
    latency_s: float = Field(ge=0)


class _OtherNodeLink(_Link):
    shared_by_node: bool = False


class _Links(StrictModel):
    same_node: _Link | None = None
    other_node: _OtherNodeLink | None = None


class _ShortForm(StrictModel):
    name: str = ""
    measured: bool = False
    source: str = ""
    nodes: int = Field(ge=1)
    devices_per_node: int = Field(ge=1)
    device: _Device
    links: _Links = _Links()


class _LongForm(StrictModel):
    name: str = ""
    measured: bool = False
    source: str = ""
    devices: list[_PlacedDevice]
    bytes_per_s: list[list[float | None]]
    latency_s: list[list[float]]
    node_bytes_per_s: float | None = Field(default=None, gt=0)


def _parsed(document: Document) -> _ShortForm | _LongForm:
    if isinstance(document.value, dict) and "devices" in document.value:
        return strict_yaml.validated(_LongForm, document, error=BadData)
    return strict_yaml.validated(_ShortForm, document, error=BadData)


def _from_short(file: _ShortForm, stem: str) -> Topology:
    if file.devices_per_node > 1 and file.links.same_node is None:
        raise BadData(f"a node has {file.devices_per_node} devices and links.same_node is absent; give its bytes_per_s and latency_s")
    if file.nodes > 1 and file.links.other_node is None:
        raise BadData(f"there are {file.nodes} nodes and links.other_node is absent; give its bytes_per_s and latency_s")
    same_node = file.links.same_node or _Link(bytes_per_s=1.0, latency_s=0.0)
    other_node = file.links.other_node or _OtherNodeLink(bytes_per_s=1.0, latency_s=0.0)
    return Topology.uniform(
        file.nodes,
        file.devices_per_node,
        flop_per_s=file.device.flop_per_s,
        memory_bytes=file.device.memory_bytes,
        same_node_bytes_per_s=same_node.bytes_per_s,
        same_node_latency_s=same_node.latency_s,
        other_node_bytes_per_s=other_node.bytes_per_s,
        other_node_latency_s=other_node.latency_s,
        shared_by_node=other_node.shared_by_node,
        name=file.name or stem,
        measured=file.measured,
        source=file.source,
    )


def _from_long(file: _LongForm, stem: str) -> Topology:
    num_devices = len(file.devices)
    return Topology(
        name=file.name or stem,
        node_of_R=tuple(device.node for device in file.devices),
        flop_per_s_R=np.array([device.flop_per_s for device in file.devices]),
        memory_bytes_R=np.array([device.memory_bytes for device in file.devices]),
        bytes_per_s_RR=_square(
            "bytes_per_s", [[np.inf if cell is None else cell for cell in row] for row in file.bytes_per_s], num_devices
        ),
        latency_s_RR=_square("latency_s", file.latency_s, num_devices),
        node_bytes_per_s=file.node_bytes_per_s,
        measured=file.measured,
        source=file.source,
    )


def _square(name: str, rows: Sequence[Sequence[float]], num_devices: int) -> NDArray[np.float64]:
    lengths = sorted({len(row) for row in rows})
    if len(rows) != num_devices or lengths != [num_devices]:
        raise BadData(f"{name} has {len(rows)} rows of lengths {lengths}; with {num_devices} devices it is {num_devices} x {num_devices}")
    return np.array(rows, dtype=np.float64)


def _link_class(node_R: NDArray[np.int64]) -> NDArray[np.int8]:
    class_RR = np.where(node_R[:, None] == node_R[None, :], SAME_NODE, OTHER_NODE).astype(np.int8)
    np.fill_diagonal(class_RR, SAME_DEVICE)
    class_RR.setflags(write=False)
    return class_RR


def _check_range(name: str, values: NDArray[np.float64], *, positive: bool, may_be_inf: ArrayLike = False) -> None:
    least = LEAST_SPEED if positive else 0.0
    fits = (np.isfinite(values) | (np.asarray(may_be_inf) & (values == np.inf))) & (values >= least)
    if not fits.all():
        place = tuple(np.argwhere(~fits)[0].tolist())
        wanted = "0 or more" if not positive else f"at least {LEAST_SPEED:g}" if 0 < values[place] < LEAST_SPEED else "positive"
        raise BadData(f"{name}{list(place)} is {values[place]}; give a finite number, {wanted}")
